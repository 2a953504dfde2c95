"""Scales of figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.report.svg import Scale

numbers = st.floats(-1e200, 1e200)


@given(st.lists(numbers, min_size=1, max_size=5), st.sampled_from([0.1, 1.0, 10.0]))
def test_a_scale_holds_its_values_and_ends_on_ticks(values: list[float], least: float) -> None:
    scale = Scale.nice(values, 0, 100, least=least)
    slack = 1e-6 * (scale.high - scale.low)
    assert scale.low - slack <= min(values) <= max(values) <= scale.high + slack
    assert (scale.ticks[0], scale.ticks[-1]) == (scale.low, scale.high)
    assert 2 <= len(scale.ticks) <= 12
    assert sorted(set(scale.ticks)) == list(scale.ticks)


@pytest.mark.parametrize("value", [1e100, -1e100, 1e16])
def test_a_number_that_one_more_does_not_change(value: float) -> None:
    scale = Scale.nice([value], 0, 100)
    assert scale.low < scale.high
