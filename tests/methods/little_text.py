"""Less text of a model's own than a real update needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lorica.methods import own_texts
from lorica.subspace.calibration import own_text

LITTLE = 1000


@pytest.fixture(autouse=True, scope="module")
def little_text() -> Iterator[None]:
    """Let models write at most 1,000 tokens, in rehearsing and where a test does not say how many."""

    def little(model: Any, *, tokens: int = LITTLE, **given: Any) -> list[dict[str, Any]]:
        return own_text(model, tokens=min(tokens, LITTLE), **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(own_text.__wrapped__.__kwdefaults__, "tokens", LITTLE)  # type: ignore[attr-defined]
        patch.setattr(own_texts, "own_text", little)
        yield
