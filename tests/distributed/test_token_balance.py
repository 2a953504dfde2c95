"""The rows of each step are shared out by their tokens, and stay the rows of that step."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler

import lorica
from lorica.data.dealing import TokenBalanced, even_groups
from lorica.training.micro_batches import MicroBatches
from tests.distributed.ranks import on_ranks
from tests.training.conftest import llama_folder  # noqa: F401

Batches = list[list[list[int]]]
"""Rows by process and micro-batch."""

SHARING = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def undealt(lengths: Sequence[int], size: int, ranks: int, drop_last: bool) -> Batches:
    """Return what Accelerate gives each process of rows in their order."""
    order = SequentialSampler(range(len(lengths)))  # type: ignore[arg-type]
    return shards(order, size, ranks, drop_last)


def dealt(lengths: Sequence[int], size: int, ranks: int, rounds: int, drop_last: bool, padded: bool) -> Batches:
    order = SequentialSampler(range(len(lengths)))  # type: ignore[arg-type]
    balanced = TokenBalanced(
        order, lengths.__getitem__, size=size, ranks=ranks, rounds=rounds, padded=padded, drop_last=drop_last
    )
    batches = shards(balanced, size, ranks, drop_last)
    assert sum(len(batch) for mine in batches for batch in mine) == len(balanced)
    return batches


def shards(order: Any, size: int, ranks: int, drop_last: bool) -> Batches:
    whole = BatchSampler(order, size, drop_last)
    return [list(BatchSamplerShard(whole, ranks, rank, even_batches=True)) for rank in range(ranks)]


def steps(batches: Batches, rounds: int) -> Iterator[Batches]:
    for start in range(0, len(batches[0]), rounds):
        yield [mine[start : start + rounds] for mine in batches]


def tokens(lengths: Sequence[int], batch: Sequence[int]) -> int:
    return sum(lengths[row] for row in batch)


def padded_tokens(lengths: Sequence[int], batch: Sequence[int]) -> int:
    return len(batch) * max(lengths[row] for row in batch)


def slowest(cost: Any, lengths: Sequence[int], step: Batches) -> int:
    """Return how much a step costs where the processes wait for each other after each micro-batch."""
    return sum(max(cost(lengths, batch) for batch in one_each) for one_each in zip(*step, strict=True))


# --- the dealing -----------------------------------------------------------------------------------------------------


@given(LENGTHS, SHARING)
def test_a_step_keeps_its_rows_and_each_process_its_number_of_them(
    lengths: list[int], sharing: tuple[int, int, int, bool, bool]
) -> None:
    size, ranks, rounds, drop_last, padded = sharing
    mine = steps(dealt(lengths, size, ranks, rounds, drop_last, padded), rounds)
    theirs = steps(undealt(lengths, size, ranks, drop_last), rounds)
    for step, same in zip(mine, theirs, strict=True):
        assert sorted(row for part in step for batch in part for row in batch) == sorted(
            row for part in same for batch in part for row in batch
        )
        assert {len(batch) for part in step for batch in part} == {size}


@given(LENGTHS, SHARING)
def test_padding_never_costs_more_than_it_did(lengths: list[int], sharing: tuple[int, int, int, bool, bool]) -> None:
    size, ranks, rounds, drop_last, _ = sharing
    mine = steps(dealt(lengths, size, ranks, rounds, drop_last, padded=True), rounds)
    for step, before in zip(mine, steps(undealt(lengths, size, ranks, drop_last), rounds), strict=True):
        assert slowest(padded_tokens, lengths, step) <= slowest(padded_tokens, lengths, before)


def test_a_deal_by_hand() -> None:
    lengths = [9, 1, 8, 2, 3, 7, 5, 6]
    flat, padded = (dealt(lengths, 2, 2, 2, False, padded=padded) for padded in (False, True))
    in_tokens = [[[[lengths[row] for row in batch] for batch in part] for part in way] for way in (flat, padded)]
    assert in_tokens[0] == [[[6, 5], [7, 3]], [[9, 1], [8, 2]]]
    assert in_tokens[1] == [[[9, 6], [5, 1]], [[8, 7], [3, 2]]]


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8).filter(lambda weights: len(weights) % 2 == 0))
def test_two_groups_are_nearly_as_even_as_they_can_be(weights: list[int]) -> None:
    weights = sorted(weights, reverse=True)
    half = len(weights) // 2
    heavy, light = ([weights[item] for item in group] for group in even_groups(range(len(weights)), weights, half))
    assert sorted(heavy + light, reverse=True) == weights
    assert sum(heavy) >= sum(light)
    best = min(max(sum(part), sum(weights) - sum(part)) for part in combinations(weights, half))
    assert sum(heavy) <= 4 / 3 * best


@pytest.mark.parametrize(("ranks", "rounds", "size"), [(2, 1, 8), (8, 1, 8), (8, 4, 4)])
def test_processes_get_about_as_many_tokens(ranks: int, rounds: int, size: int) -> None:
    draw = random.Random(0)
    lengths = [min(1024, max(8, int(draw.lognormvariate(5, 0.9)))) for _ in range(20 * ranks * rounds * size)]

    def worst(batches: Batches) -> float:
        shares = []
        for step in steps(batches, rounds):
            totals = [sum(tokens(lengths, batch) for batch in part) for part in step]
            shares.append(max(totals) * ranks / sum(totals))
        return sum(shares) / len(shares)

    assert worst(undealt(lengths, size, ranks, False)) > 1.15
    for padded in (True, False):
        assert worst(dealt(lengths, size, ranks, rounds, False, padded)) < 1.05


def test_end_to_end_no_micro_batch_of_a_step_is_much_larger_than_another() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(10, 500) for _ in range(128)]
    sums = [tokens(lengths, batch) for part in dealt(lengths, 8, 4, 4, False, padded=False) for batch in part]
    assert max(sums) < 1.02 * min(sums)


def test_another_epoch_has_another_order() -> None:
    class Drawn(SequentialSampler):
        epoch = 0

        def __iter__(self) -> Iterator[int]:
            order = random.Random(self.epoch)
            return iter(order.sample(range(8), 8))

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    balanced = TokenBalanced(
        Drawn(range(8)),
        lambda row: 1,
        size=2,
        ranks=2,
        rounds=1,
        padded=True,
        drop_last=False,  # type: ignore[arg-type]
    )
    first = list(balanced)
    balanced.set_epoch(1)
    assert sorted(first) == sorted(balanced) == list(range(8))
    assert first != list(balanced)


# --- lorica train ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    told = [{"prompt": f"{'very ' * ((5 * i) % 13)}long {i}:", "completion": f" {i % 3}"} for i in range(32)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, told)))
    return tmp_path / "rows.jsonl"


def update(model: Path, rows: Path, out: Path, size: int, **given: Any) -> list[list[int]]:
    """Train, and return the tokens of each micro-batch of each step of this process, padding not counted."""
    seen: list[list[int]] = []
    begin = MicroBatches.begin_step

    def noting(self: MicroBatches, step: int, batches: Sequence[dict[str, Any]]) -> None:
        begin(self, step, batches)
        seen.append([sum(len(self.rows[row]["input_ids"]) for row in batch) for batch in self.numbers])

    options = {"max_steps": 3, "per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
    options |= {"model_name_or_path": str(model), "train_file": str(rows), "output_dir": str(out)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatches, "begin_step", noting)
        lorica.train(
            {"disable_tqdm": True, "use_cpu": True, "preset": "paper"} | options | given, say=lambda line: None
        )
    return seen


@pytest.mark.reliability("R30")
@pytest.mark.parametrize(
    "given",
    [
        {"padding_free": True},
        pytest.param({"padding_free": False}, marks=pytest.mark.slow),
        pytest.param({"padding_free": True, "fsdp": "full_shard"}, marks=pytest.mark.slow),
    ],
    ids=["end to end", "padded", "sharded, end to end"],
)
def test_two_processes_get_as_many_tokens_and_train_as_one_does(
    given: dict[str, Any], model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    one = update(model_folder, rows, tmp_path / "one", 8, padding_free=given["padding_free"])
    first, second = on_ranks(2, lambda rank: update(model_folder, rows, tmp_path / "two", 4, **given))
    for whole, mine, theirs in zip(one, first, second, strict=True):
        assert sum(mine) + sum(theirs) == sum(whole)
        assert max(sum(mine), sum(theirs)) <= 1.1 * min(sum(mine), sum(theirs))
    weights, same = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert max(float((weights[name] - same[name]).abs().max()) for name in same) <= 1e-6


@pytest.mark.slow
def test_resumed_padding_free_it_goes_on_to_the_same_bits(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def both(rank: int) -> None:
        given = {"padding_free": True, "save_steps": 1, "save_total_limit": 9}
        update(model_folder, rows, whole, 4, **given)
        update(model_folder, rows, parts, 4, **given)
        if rank == 0:
            (parts / "model.safetensors").unlink()
        update(model_folder, rows, parts, 4, resume_from_checkpoint=str(parts / "checkpoint-2"), **given)

    on_ranks(2, both)
    mine, theirs = (load_file(out / "model.safetensors") for out in (parts, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
