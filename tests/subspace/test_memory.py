"""What is remembered of finished tasks: at constant size, and back from a file to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.errors import LoricaError
from lorica.memory import load_memory, save_memory, size_of
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.memory import FactorMemory, memory_rank
from tests.builders import matrix

HALF = torch.finfo(torch.float16).eps


def moment(dim: int, seed: int, rank: int | None = None, scale: float = 1.0) -> Tensor:
    """Return a random second moment."""
    x = scale * matrix(rank or 2 * dim, dim, seed, torch.float64)
    return x.T @ x


def found(seed: int, scale: float = 1.0, rank: int | None = None) -> dict[str, Factors]:
    """Return what a task might leave: two layers with one input, and one by itself without outputs."""
    common = Factor.of(moment(8, seed, rank, scale))
    return {
        "q": Factors(common, Factor.of(moment(6, seed + 1, rank, scale))),
        "k": Factors(common, Factor.of(moment(4, seed + 2, rank, scale))),
        "down": Factors(Factor.of(moment(12, seed + 3, rank, scale))),
    }


def sides(factors: dict[str, Factors]) -> dict[str, Factor]:
    pairs = {f"{name}.{side}": getattr(one, side) for name, one in factors.items() for side in ("inputs", "outputs")}
    return {name: factor for name, factor in pairs.items() if factor is not None}


def test_the_memory_is_the_sum_of_tasks_that_count_the_same() -> None:
    """However large their inputs and gradients were."""
    memory, dense = FactorMemory(), {}
    assert not memory
    for task in range(4):
        tasks = found(10 * task, scale=10.0 ** (3 * task - 4))
        memory.fold(tasks, rank=12)
        for name, factor in sides(tasks).items():
            part = factor.matrix() / factor.matrix().trace()
            dense[name] = dense.get(name, torch.zeros_like(part)) + part
    assert memory
    kept = sides(memory.factors)
    assert kept.keys() == dense.keys()
    for name, factor in kept.items():
        assert factor.trace == pytest.approx(4, rel=1e-12)
        assert factor.vectors_DR.dtype == torch.float16
        torch.testing.assert_close(factor.matrix(), dense[name], rtol=0, atol=4 * HALF * float(dense[name].norm()))


def test_the_memory_does_not_grow(tmp_path: Path) -> None:
    memory, sizes = FactorMemory(), []
    for task in range(50):
        memory.fold(found(10 * task, rank=3), rank=4)
        save_memory(memory.state_dict(), tmp_path / "memory.safetensors")
        sizes.append((tmp_path / "memory.safetensors").stat().st_size)
        for factor in sides(memory.factors).values():
            assert factor.trace == pytest.approx(task + 1, rel=1e-12)
            assert factor.vectors_DR.shape[1] <= 4
    assert len(set(sizes[2:])) == 1, "full after two tasks of rank 3"


def test_what_counts_most_is_kept() -> None:
    """Forty tasks along one direction and one along another: at rank 1 the first stays, the other is in the floor."""
    memory = FactorMemory()
    for task in range(41):
        direction = torch.zeros(5, 5)
        direction[1, 1], direction[3, 3] = (0.0, 1.0) if task == 7 else (1.0, 0.0)
        memory.fold({"w": Factors(inputs=Factor.of(direction))}, rank=1)
    kept = memory.factors["w"].inputs
    assert kept is not None
    assert kept.vectors_DR.abs().argmax() == 1
    assert kept.trace == pytest.approx(41)
    assert kept.floor == pytest.approx(1 / 4, abs=1e-9)


def test_a_file_gives_it_back_to_the_last_bit(tmp_path: Path) -> None:
    memory, again = FactorMemory(), FactorMemory()
    for task in range(3):
        memory.fold(found(10 * task), rank=5)
    save_memory(memory.state_dict(), tmp_path / "memory.safetensors")
    again.load_state_dict(load_memory(tmp_path / "memory.safetensors"))
    one, two = sides(memory.factors), sides(again.factors)
    assert one.keys() == two.keys()
    assert all(factor.same_as(two[name]) for name, factor in one.items())
    assert again.factors["q"].inputs is again.factors["k"].inputs
    memory.fold(found(77), rank=5)
    again.fold(found(77), rank=5)
    assert all(factor.same_as(sides(again.factors)[name]) for name, factor in sides(memory.factors).items())


def test_an_empty_memory_and_one_without_directions_survive_a_file(tmp_path: Path) -> None:
    memory, again = FactorMemory(), FactorMemory()
    again.load_state_dict(memory.state_dict())
    assert not again
    memory.fold({"w": Factors(inputs=Factor.of(torch.eye(3), 0))}, rank=2)
    save_memory(memory.state_dict(), tmp_path / "memory.safetensors")
    again.load_state_dict(load_memory(tmp_path / "memory.safetensors"))
    kept = again.factors["w"].inputs
    assert kept is not None
    torch.testing.assert_close(kept.matrix(), torch.eye(3, dtype=torch.float64) / 3)


def test_what_layers_have_in_common_is_kept_once() -> None:
    memory = FactorMemory()
    for task in range(2):
        memory.fold(found(10 * task), rank=5)
        assert memory.factors["q"].inputs is memory.factors["k"].inputs
        assert len([key for key in memory.state_dict() if key.endswith(".vectors")]) == 4


def test_a_task_that_says_nothing_of_a_layer_leaves_it() -> None:
    memory = FactorMemory()
    memory.fold(found(0), rank=5)
    before = memory.factors
    memory.fold({"new": Factors(inputs=Factor.of(moment(3, 1)))}, rank=5)
    assert list(memory.factors) == ["q", "k", "down", "new"]
    assert all(memory.factors[name].inputs is factors.inputs for name, factors in before.items())


def test_a_task_without_inputs_adds_nothing() -> None:
    memory = FactorMemory()
    for a in (moment(4, 1), torch.zeros(4, 4)):
        memory.fold({"w": Factors(inputs=Factor.of(a))}, rank=4)
    kept = memory.factors["w"].inputs
    assert kept is not None
    assert kept.trace == pytest.approx(1)


def test_what_belongs_to_another_model_is_refused() -> None:
    memory = FactorMemory()
    memory.fold({"w": Factors(inputs=Factor.of(torch.eye(4)))}, rank=4)
    with pytest.raises(LoricaError, match=r"^w has a side of 5, .* has 4: it belongs to another model"):
        memory.fold({"w": Factors(inputs=Factor.of(torch.eye(5)))}, rank=4)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(1, 2e4))
def test_the_rank_is_the_largest_that_fits(dims: list[int], nbytes: float) -> None:
    rank = memory_rank(dims, nbytes)
    assert 1 <= rank <= max(dims)
    assert rank == 1 or bytes_of(dims, rank) <= nbytes
    assert rank == max(dims) or bytes_of(dims, rank + 1) > nbytes


def bytes_of(dims: list[int], rank: int) -> int:
    """Return the bytes of a memory of so many directions of sides that have nothing in common."""
    memory = FactorMemory()
    memory.fold({str(i): Factors(inputs=Factor.of(moment(dim, i), rank)) for i, dim in enumerate(dims)}, rank)
    return size_of({name: tensor for name, tensor in memory.state_dict().items() if not name.endswith(".sides")})
