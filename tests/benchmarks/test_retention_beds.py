"""The retention beds: facts that never contradict, skills that follow their rules, files that follow from the seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from benchmarks.retention import base_model, knowledge, many
from benchmarks.retention import recall as recall_script
from benchmarks.retention.bed import FACTS, SKILL_ROWS, read_rows
from benchmarks.retention.facts import CHOICES, RELATIONS, Row, make_world
from benchmarks.retention.skills import SKILLS, skill_rows
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorica.benchmarks import find_stream
from lorica.data.stream import read_stream
from lorica.experiments.chosen import chosen_settings
from lorica.experiments.config import build_run_config
from lorica.experiments.story import run
from lorica.methods import METHODS
from lorica.training.arguments import check_arguments
from lorica.values import read_config

RECIPES = Path(__file__).resolve().parents[2] / "benchmarks" / "retention"
WORLD = make_world(0)


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["script", *map(str, words)])
    script.main()


def small_knowledge(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Path:
    call(knowledge, monkeypatch, "--output_dir", folder, "--seed", seed, "--facts", 480, "--sets", 2, "--test_rows", 40)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- facts ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(1, 96), st.integers(1, 96))
def test_sets_agree_on_the_people_they_share_and_share_no_others(a: int, b: int, many_a: int, many_b: int) -> None:
    one, other = dict(WORLD.facts(a, many_a)), dict(WORLD.facts(b, many_b))
    assert len(one) == many_a * len(RELATIONS), "no fact is there twice"
    assert len(one.keys() & other.keys()) == len(RELATIONS) * len(set(range(a, a + many_a)) & set(range(b, b + many_b)))
    assert all(one[prompt] == other[prompt] for prompt in one.keys() & other.keys())


def test_the_five_sets_of_1800_facts_share_no_prompt_and_each_answer_is_right_equally_often() -> None:
    sets = [WORLD.facts(300 * number, 300) for number in range(5)]
    assert [len(rows) for rows in sets] == [1800] * 5
    assert len({row.prompt for rows in sets for row in rows}) == 9000
    for rows in sets:
        counts = Counter((row.prompt.split()[-1], row.completion) for row in rows)
        assert set(counts.values()) == {300 // CHOICES}
        assert len(counts) == len(RELATIONS) * CHOICES
        assert max(Counter(row.prompt.split()[0] for row in rows).values()) <= 5 * len(RELATIONS), (
            "names are shared out"
        )


def test_a_world_follows_from_its_seed() -> None:
    assert make_world(0).facts(60, 40) == WORLD.facts(60, 40)
    assert make_world(1).facts(60, 40) != WORLD.facts(60, 40)


# --- skills ---------------------------------------------------------------------------------------------------------


def solve(row: Row) -> str:
    """Answer a row by other means than it was made with."""
    skill, *words, _ = row.prompt.split()
    if skill == "sort":
        return " ".join(letter for letter in map(chr, range(ord("a"), ord("z") + 1)) if letter in words)
    if skill == "add":
        return str(len(range(int(words[0]))) + int(words[1]))
    if skill == "rate":
        harsh = {"poor", "weak", "slow", "ugly", "noisy", "fragile", "rude", "dull", "stale", "dirty", "cold", "harsh"}
        return "bad" if len(harsh & set(words)) >= 2 else "good"
    text = "".join(words)
    while any(pair in text for pair in ("()", "[]", "{}")):
        text = text.replace("()", "").replace("[]", "").replace("{}", "")
    return " ".join({"(": ")", "[": "]", "{": "}"}[mark] for mark in text[::-1])


@pytest.mark.parametrize("name", SKILLS)
def test_rows_of_a_skill_follow_its_rule_and_none_is_learned_and_scored(name: str) -> None:
    train, test = skill_rows(name, 0, 2000, 100)
    assert (len(train), len(test)) == (2000, 100)
    assert not set(train) & set(test)
    for row in {*train[:300], *test}:
        assert row.completion == " " + solve(row)
    assert Counter(row.completion for row in test).most_common(1)[0][1] <= 65, "no one answer will do"
    assert (train, test) == skill_rows(name, 0, 2000, 100)
    assert test != skill_rows(name, 1, 2000, 100)[1]


# --- the folders ----------------------------------------------------------------------------------------------------


def test_a_bed_follows_from_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 0), (again, 0), (other, 1)):
        small_knowledge(folder, monkeypatch, seed)
    assert contents(first) == contents(again)
    differ = {name for name, data in contents(first).items() if contents(other)[name] != data}
    assert differ == set(contents(first)) - {"stream.yaml"}


def test_the_base_has_read_every_word_of_both_beds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bed, short = small_knowledge(tmp_path / "bed", monkeypatch), tmp_path / "short"
    call(many, monkeypatch, "--output_dir", short, "--tasks", 12, "--base_facts", 480)
    words = {word for name in (FACTS, SKILL_ROWS) for row in read_rows(bed / name) for word in "".join(row).split()}
    for folder in (bed, short):
        for file in folder.glob("*.jsonl"):
            assert {word for row in read_rows(file) for word in "".join(row).split()} <= words, file
    assert (bed / "facts-0.test.jsonl").read_bytes() == (short / "facts-0.test.jsonl").read_bytes()


def test_a_mixed_stream_replays_a_share_of_every_earlier_set_and_scores_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--output_dir", tmp_path, "--facts", 480, "--sets", 2, "--mixed", 0.1]
    call(knowledge, monkeypatch, *words)
    plain, mixed = (read_stream(tmp_path / name) for name in ("stream.yaml", "mixed-10.yaml"))
    assert [task.test_file for task in mixed.tasks] == [task.test_file for task in plain.tasks]
    base, skills, first = (set(read_rows(tmp_path / name)) for name in (FACTS, SKILL_ROWS, plain.tasks[0].train_file))
    one, two = (Counter(read_rows(tmp_path / task.train_file)) for task in mixed.tasks)
    for rows, own in zip((one, two), plain.tasks, strict=True):
        assert not Counter(read_rows(tmp_path / own.train_file)) - rows, "the set's own rows are all there"
        assert sum(count for row, count in rows.items() if row in base) == 48
        assert sum(count for row, count in rows.items() if row in skills) == 1600
    assert sum(count for row, count in two.items() if row in first) == 48
    assert {row for row in one if row in base} != {row for row in two if row in base}, "drawn anew for every set"


def test_a_stream_scores_facts_it_learns_and_holds_out_what_the_base_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = read_stream(small_knowledge(tmp_path, monkeypatch) / "stream.yaml")
    assert [task.name for task in stream.tasks] == ["facts-1", "facts-2"]
    assert [ability.name for ability in stream.held_out] == ["facts-0", *SKILLS]
    learned = {row for task in stream.tasks for row in read_rows(tmp_path / task.train_file)}
    assert not learned & set(read_rows(tmp_path / FACTS))
    for task in stream.tasks:
        scored = read_rows(tmp_path / task.test_file)
        assert len(set(scored)) == 40
        assert set(scored) <= set(read_rows(tmp_path / task.train_file))


@pytest.mark.parametrize("name", ["knowledge", "many"])
def test_a_recipe_asks_for_what_exists(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parents[1])
    call({"knowledge": knowledge, "many": many}[name], monkeypatch, "--output_dir", tmp_path)
    given_beside = {"stream": str(tmp_path / "stream.yaml"), "model_name_or_path": "MODEL", "output_dir": "OUT"}
    config = build_run_config(read_config(RECIPES / f"{name}.yaml") | given_beside)
    check_arguments(config.training)
    stream = find_stream(config.stream)
    assert len(stream.tasks) == {"knowledge": 4, "many": 50}[name]
    for one in chosen_settings(config, stream).values():
        METHODS[one.method].build(one.options)
        assert one.learning_rate, "the sweep of a run cannot choose one"


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        (knowledge, ["--facts", 100], "--facts 100: give a multiple of 120"),
        (knowledge, ["--facts", 360], "360 facts, too few"),
        (knowledge, ["--sets", 40], "4,096"),
        (knowledge, ["--sets", 0], "0 sets"),
        (knowledge, ["--mixed", 5], "--mixed 5: give shares"),
        (many, ["--test_rows", 0], "0 scored facts"),
        (many, ["--base_facts", 7], "--base_facts 7"),
        (base_model, ["--data_dir", "nowhere"], "facts-0.train.jsonl"),
    ],
)
def test_a_mistake_ends_a_script_with_one_line(
    script: ModuleType, words: list[object], told: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        call(script, monkeypatch, "--output_dir", tmp_path / "out", *words)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error


# --- the base and a run ---------------------------------------------------------------------------------------------


def test_a_base_learns_is_plain_and_runs_through_its_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bed = small_knowledge(tmp_path / "bed", monkeypatch)
    for name in ("one", "two"):
        call(
            base_model, monkeypatch, "--data_dir", bed, "--output_dir", tmp_path / name, "--size", "tiny", "--steps", 40
        )
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    row = read_rows(bed / FACTS)[0]
    assert len(tokenizer(row.prompt + row.completion)["input_ids"]) == 5, "<s>, two names, relation, answer"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    untrained = base_model.make_model(base_model.SIZES["tiny"], len(tokenizer), 0)
    batch = next(base_model.batches(read_rows(bed / FACTS), 64, tokenizer, 5))
    assert model(**batch).loss < untrained(**batch).loss - 1

    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 400}
    (record,) = run(
        {"stream": str(bed / "stream.yaml"), "model_name_or_path": str(tmp_path / "one"), "methods": ["seqft"],
         "output_dir": str(tmp_path / "run"), "learning_rates": [1e-3], **settings},
        lambda line: None,
    )  # fmt: skip
    sets = [*record["scores"][-1], record["retention"]["facts-0"][-1]]
    assert recall_script.recall(record, "run.json")["all"] == pytest.approx(sum(sets) / 3)
    capsys.readouterr()
    call(recall_script, monkeypatch, tmp_path / "run")
    assert capsys.readouterr().out.splitlines()[1].split()[1] == "0.001"


def record(**changes: Any) -> dict[str, Any]:
    kept = {"facts-0": [100, 40], "sort": [100, 90], "add": [100, 70], "close": [100, 50], "rate": [100, 30]}
    return {"tasks": ["a", "b"], "scores": [[5, 5], [90, 5], [20, 80]], "retention": kept} | changes


def test_recall_is_the_mean_over_all_sets_by_hand() -> None:
    found = recall_script.recall(record(), "run.json")
    assert found == pytest.approx({"all": (20 + 80 + 40) / 3, "learned": 85, "base": 40, "skills": 60})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"retention": {"facts-0": [1]}}, "sort"),
        ({"scores": [[5, 5], [90, 5], [None, 80]]}, "not scored to its end"),
    ],
)
def test_recall_refuses_other_runs(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(recall_script.LoricaError, match=told):
        recall_script.recall(record(**changes), "run.json")


def test_recall_names_a_folder_without_a_run_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(recall_script.LoricaError, match=r"no run\.json below"):
        recall_script.table([tmp_path])
    (tmp_path / "run.json").write_text(json.dumps({"tasks": 1})[:-1])
    with pytest.raises(recall_script.LoricaError, match="cannot read it"):
        recall_script.table([tmp_path])


def test_no_two_batches_of_a_pass_share_a_row() -> None:
    rows = [Row(f"p{number}", f" c{number}") for number in range(10)]
    tokenizer = base_model.make_tokenizer(rows)
    parts = base_model.batches(rows, 4, tokenizer, Random(0).randint(0, 9))
    seen = [tuple(ids) for _ in range(3) for ids in next(parts)["input_ids"].tolist()]
    assert len(seen) == len(set(seen)) == 10
