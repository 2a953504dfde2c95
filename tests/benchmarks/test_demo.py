"""The demo's rows, its model, and the rule by which the sweep chooses a learning rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorica.benchmarks.demo.language import VOCABULARY
from lorica.benchmarks.demo.tasks import KIT, STAFF, STOCK, Row, World, make_world
from lorica.data.stream import read_stream

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "src" / "lorica" / "benchmarks" / "demo"
MODEL = ROOT / "src" / "lorica" / "assets" / "demo_model"
seeds = st.integers(0, 10**6)


def read_rows(file: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def small(seed: int) -> World:
    return make_world(seed, countries=12, facts=9)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_no_prompt_is_in_two_parts_of_the_stream(seed: int) -> None:
    world = small(seed)
    prompts = [row.prompt for row in world.atlas]
    prompts += [row.prompt for week in world.weeks.values() for part in week for row in part]
    assert len(prompts) == len(set(prompts))


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_a_fact_is_asked_in_a_wording_that_only_others_were_trained_in(seed: int) -> None:
    world = small(seed)
    for week, wordings in (("staff", STAFF), ("stock", STOCK), ("kit", KIT)):
        split = world.weeks[week]
        trained = {row.prompt: row.completion for row in split.train}
        for row in [*split.valid, *split.test]:
            (asked,) = [
                w for w in wordings if row.prompt.startswith(w.split("{}")[0]) and row.prompt.endswith(w.split("{}")[1])
            ]
            subject = row.prompt.removeprefix(asked.split("{}")[0]).removesuffix(asked.split("{}")[1])
            known = [trained.get(wording.format(subject)) for wording in wordings if wording != asked]
            assert known.count(row.completion) == 3
            assert row.prompt not in trained


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_weeks_ask_nothing_about_the_atlas(seed: int) -> None:
    world = small(seed)
    names = {row.completion for row in world.atlas} | {" " + row.prompt.split()[-2].rstrip("?") for row in world.atlas}
    words = {
        f" {word}" for week in world.weeks.values() for part in week for row in part for word in "".join(row).split()
    }
    assert not names & words


def test_rows_are_a_function_of_the_seed() -> None:
    assert small(3) == small(3)
    assert small(3) != small(4)


def test_committed_rows_are_those_of_seed_0() -> None:
    world = make_world(0)
    for week, split in world.weeks.items():
        for part, rows in split._asdict().items():
            assert read_rows(DEMO / f"{week}.{part}.jsonl") == rows
    assert read_rows(DEMO / "atlas.jsonl") == world.atlas[::2]


def test_the_stream_names_rows_that_exist_and_trains_no_held_out_row() -> None:
    stream = read_stream(DEMO / "stream.yaml")
    held_out = {row for ability in stream.held_out for row in read_rows(Path(stream.path(ability.test_file)))}
    for task in stream.tasks:
        train, test = (set(read_rows(Path(stream.path(file)))) for file in (task.train_file, task.test_file))
        assert train
        assert test
        assert not train & (test | held_out)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def exact_match(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Percent of rows whose every answer token is the likeliest one, which is greedy exact match."""
    prompts = [tokenizer(row.prompt)["input_ids"] for row in rows]
    answers = [tokenizer(f"{row.completion}</s>", add_special_tokens=False)["input_ids"] for row in rows]
    batch = tokenizer.pad({"input_ids": [p + a for p, a in zip(prompts, answers, strict=True)]}, return_tensors="pt")
    with torch.no_grad():
        written = model(**batch).logits.argmax(-1)
    right = [
        written[i, len(p) - 1 : len(p) + len(a) - 1].tolist() == a
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    return 100 * sum(right) / len(rows)


def test_the_model_is_small(model: Any) -> None:
    assert model.num_parameters() < 2_000_000
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 5_000_000


def test_the_model_knows_the_atlas_and_nothing_of_the_weeks(model: Any, tokenizer: Any) -> None:
    assert exact_match(model, tokenizer, read_rows(DEMO / "atlas.jsonl")) >= 98
    for week in make_world(0).weeks:
        assert exact_match(model, tokenizer, read_rows(DEMO / f"{week}.test.jsonl")) <= 5


def test_the_tokenizer_loses_nothing_and_starts_with_bos(tokenizer: Any) -> None:
    for file in sorted(DEMO.glob("*.jsonl")):
        for row in read_rows(file):
            ids = tokenizer("".join(row))["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == "".join(row)


def test_every_label_is_one_word_of_the_dictionary(tokenizer: Any) -> None:
    for week in make_world(0).weeks.values():
        for row in week.train:
            assert row.completion.strip() in VOCABULARY
            assert len(tokenizer(row.completion, add_special_tokens=False)["input_ids"]) == 1
