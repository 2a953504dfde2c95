"""Less text of a model's own than a real update needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorica.subspace.calibration import own_text


@pytest.fixture(autouse=True, scope="module")
def little_text() -> Iterator[None]:
    """Let models write 1,000 tokens where a test does not say how many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(own_text.__wrapped__.__kwdefaults__, "tokens", 1000)  # type: ignore[attr-defined]
        yield
