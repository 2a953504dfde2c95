"""Records prove themselves: a changed ``lorica.json``, ``run.json`` or ``scored.json`` is found, wherever it counts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import lorica
import lorica.experiments.cell
from lorica.artefacts.file import HEADER
from lorica.cli import app
from lorica.data.stream import read_stream
from lorica.errors import LoricaError
from lorica.evaluation.judge import Verdict
from lorica.json_file import SEAL, load_record, seal_broken, sealed
from lorica.judging import judge_models
from lorica.lineage import read_lineage
from lorica.record import write_record
from lorica.report import read_record
from lorica.verification import verify
from tests.artefacts.conftest import before_and_after
from tests.artefacts.test_apply import apply, export
from tests.reliability.small_runs import rows_file, run, stream_of, update
from tests.reliability.test_fallback import flip
from tests.training.conftest import llama_folder  # noqa: F401

CHANGED = r"was changed: its record_sha256 is not that of its content"
CHANGED_ON_READING = r"it was changed since it was written: its record_sha256 is that of other content"

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(st.text(max_size=5), values, max_size=4)


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record as a text editor would: the hash stays what it was."""
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record, indent=1))


def without_hash(file: Path) -> None:
    """Make a record what it would be of a version that wrote no hashes."""
    rewrite(file, lambda record: record.pop(SEAL))


def told(folder: Path) -> list[str]:
    return [str(one) for one in verify(folder)]


def problems(folder: Path) -> list[str]:
    return [str(one) for one in verify(folder) if one.problem]


# --- the hash ---------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_other_fields_by_name() -> None:
    by_hand = '{"a":[1.5,null,true],"b":{"1":"\\u00e9"}}'
    record = sealed({"b": {1: "é"}, "a": (1.5, None, True)})
    assert record[SEAL] == hashlib.sha256(by_hand.encode()).hexdigest()
    assert sealed(record) == record, "the hash of before is no part of it"


@given(record=records, indent=st.sampled_from([None, 1, 4]), order=st.booleans())
def test_a_record_comes_back_in_any_layout(
    record: dict[str, Any], indent: int | None, order: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("record") / "lorica.json"
    write_record(file, record)
    found = load_record(file)
    assert SEAL not in found
    assert found.keys() == record.keys() - {SEAL}
    file.write_text(json.dumps(json.loads(file.read_text()), indent=indent, sort_keys=order))
    assert load_record(file) == found


@given(record=records, name=st.text(max_size=5), value=values)
def test_no_value_changes_unseen(record: dict[str, Any], name: str, value: Any) -> None:
    kept = sealed(record)
    other = kept | {name: value}
    assert seal_broken(other) == (json.dumps(other, sort_keys=True) != json.dumps(kept, sort_keys=True))
    assert not seal_broken(record), "a record without a hash is not a damaged one"


@pytest.mark.reliability("R4")
def test_no_bit_changes_unseen(tmp_path: Path) -> None:
    """Every bit in turn: the file is refused, says the same (1e-05 is 1E-05), or has no field of that name any more."""
    file = tmp_path / "run.json"
    write_record(file, {"scores": [1.5, None, 1e-05], "a\té": True})
    whole, record = file.read_bytes(), json.loads(file.read_text())
    refused = 0
    for place in range(8 * len(whole)):
        harmed = bytearray(whole)
        harmed[place // 8] ^= 1 << place % 8
        file.write_bytes(harmed)
        try:
            assert load_record(file) == {name: value for name, value in record.items() if name != SEAL}
        except ValueError:
            refused += 1
        except AssertionError:
            assert SEAL not in json.loads(harmed), "which lorica verify tells; see below"
    assert refused > 0.9 * 8 * len(whole)


# --- lorica verify ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an update, the cell of a run and a judgement, all finished."""
    folder = tmp_path_factory.mktemp("finished")
    update(llama_folder, folder / "updated", rows_file(folder))
    run(stream_of(folder / "stream"), llama_folder, folder / "runs", save_models=True)
    judge_models(
        str(llama_folder), str(folder / "updated"), rows_file(folder, "asked", 2),
        judge=lambda *_: Verdict("first"), output_dir=folder / "judged", max_new_tokens=1, say=lambda _: None,
    )  # fmt: skip
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


HARMS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a score": ("runs/seqft/run.json", lambda r: r["scores"][0].__setitem__(0, 99.5)),
    "the seed": ("runs/seqft/run.json", lambda r: r.update(seed=7)),
    "the listed files": ("updated/lorica.json", lambda r: r["files"].popitem()),
    "the plan": ("updated/lorica.json", lambda r: r["plan"][0].update(k=1)),
    "a field more": ("updated/lorica.json", lambda r: r.update(approved=True)),
    "the hash": ("updated/lorica.json", lambda r: r.update({SEAL: "0" * 64})),
    "no hash in its place": ("updated/lorica.json", lambda r: r.update({SEAL: None})),
    "the judgement": ("judged/judge.json", lambda r: r["win"].update(percent=100.0)),
}


@pytest.mark.reliability("R4")
@pytest.mark.parametrize("harm", HARMS)
def test_verify_names_the_record_that_was_changed(harm: str, copied: Path) -> None:
    name, change = HARMS[harm]
    assert problems(copied) == []
    rewrite(copied / name, change)
    (problem,) = problems(copied)
    what = {"run.json": "result", "lorica.json": "model", "judge.json": "judgement"}[Path(name).name]
    assert problem == f"{Path(name).parent}: {what}: {Path(name).name} {CHANGED}"


@pytest.mark.reliability("R4")
def test_the_judgements_beside_their_record_count(copied: Path) -> None:
    assert told(copied / "judged") == ["judgement: complete and unchanged"]
    (copied / "judged" / "judgements.jsonl").write_text("{}")
    assert problems(copied / "judged") == [
        "judgement: judgements.jsonl was changed: its SHA-256 is not the one it was written with"
    ]
    (copied / "judged" / "judgements.jsonl").unlink()
    assert problems(copied / "judged") == ["judgement: judgements.jsonl is missing"]


@pytest.mark.reliability("R4")
def test_records_of_artefacts_prove_themselves(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")
    written = apply(before, tmp_path / "update", tmp_path / "on")
    assert load_record(tmp_path / "on" / "lorica.json") == json.loads(json.dumps(written))
    rewrite(tmp_path / "on" / "lorica.json", lambda record: record.update(scale=2.0))
    rewrite(tmp_path / "update" / HEADER, lambda header: header["made"].clear())
    assert problems(tmp_path / "on") == [f"model: lorica.json {CHANGED}"]
    assert problems(tmp_path / "update") == [f"update: lorica-update.json {CHANGED}"]
    with pytest.raises(LoricaError, match=rf"lorica-update\.json: damaged: {CHANGED_ON_READING}"):
        apply(before, tmp_path / "update", tmp_path / "again")


@pytest.mark.parametrize("name", ["updated/lorica.json", "runs/seqft/run.json", "judged/judge.json"])
def test_a_record_of_before_there_were_hashes_is_no_damage(name: str, copied: Path) -> None:
    without_hash(copied / name)
    (line,) = [line for line in told(copied) if "no hash" in line]
    assert line.endswith(f"complete and unchanged, if {Path(name).name} is, which carries no hash of itself")
    done = CliRunner().invoke(app, ["verify", str(copied)])
    assert done.exit_code == 0
    assert line in done.output.splitlines()


def test_reports_read_records_with_and_without_a_hash(copied: Path) -> None:
    for name in ("updated/lorica.json", "runs/seqft/run.json", "judged/judge.json"):
        with_hash = read_record(copied / name)
        without_hash(copied / name)
        assert read_record(copied / name) == with_hash


def test_verify_says_of_a_file_which_folder_to_give(copied: Path) -> None:
    file = copied / "updated" / "model.safetensors"
    with pytest.raises(LoricaError, match=f"{file} is a file; give the folder that it is part of: .* {file.parent}$"):
        verify(file)


# --- where a record decides -------------------------------------------------------------------------------------------


@pytest.mark.reliability("R4")
def test_a_changed_record_of_the_parent_is_not_believed(copied: Path, llama_folder: Path) -> None:
    out = copied / "updated"
    assert read_lineage(str(out)).updates == 1
    rewrite(out / "lorica.json", lambda record: record["parent"].update(updates=5))
    with pytest.raises(LoricaError, match=rf"lorica\.json: .*update before: {CHANGED_ON_READING}; restore it, or rem"):
        update(out, copied / "next", rows_file(copied))
    with pytest.raises(LoricaError, match=rf"lorica\.json: cannot read the plan: {CHANGED_ON_READING}; restore it"):
        lorica.audit(llama_folder, out)
    (out / "lorica.json").unlink()
    assert read_lineage(str(out)).updates == 0


@pytest.mark.reliability("R4")
def test_a_changed_result_is_not_reported_and_its_removal_writes_it_anew(
    finished: Path, copied: Path, llama_folder: Path
) -> None:
    stream, cell = read_stream(finished / "stream" / "stream.yaml"), copied / "runs" / "seqft"
    before = json.loads((cell / "run.json").read_text())
    weights = load_file(cell / "model" / "model.safetensors")
    rewrite(cell / "run.json", lambda record: record["scores"][2].__setitem__(0, 99.5))
    with pytest.raises(LoricaError, match=rf"run\.json: cannot read it: {CHANGED_ON_READING}; remove it to"):
        run(stream, llama_folder, copied / "runs", save_models=True)
    (cell / "run.json").unlink()
    (record,) = run(stream, llama_folder, copied / "runs", save_models=True)
    assert record["scores"] == before["scores"]
    assert record["files"] == before["files"], "its model is still the trained one"
    again = load_file(cell / "model" / "model.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert problems(copied / "runs") == []


# --- the scores of a stage --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nobody handles it."""


@pytest.fixture
def half_way(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the output folder of a run that was killed when its second task was to be learned."""
    learn = lorica.experiments.cell.CellRun._learn

    def one_only(cell: Any, index: int, progress: Any) -> None:
        if index:
            raise Killed
        learn(cell, index, progress)

    with monkeypatch.context() as patch:
        patch.setattr(lorica.experiments.cell.CellRun, "_learn", one_only)
        with pytest.raises(Killed):
            run(stream_of(tmp_path / "stream"), llama_folder, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.reliability("R4")
def test_changed_scores_of_a_stage_are_found(half_way: Path, llama_folder: Path, tmp_path: Path) -> None:
    stage = half_way / "seqft" / "cell" / "stage-1"
    assert told(half_way) == ["seqft/cell/stage-1: complete and unchanged"]
    scored = (stage / "scored.json").read_text()
    (stage / "scored.json").write_text(scored.replace('"steps": 2', '"steps": 3'))
    reason = "scored.json was changed: its SHA-256 is not the one it was written with"
    assert problems(half_way) == [f"seqft/cell/stage-1: {reason}"]
    stream = stream_of(tmp_path / "stream")
    with pytest.raises(LoricaError, match=rf"stage-1: {reason}; remove .*stage-1 to go on from what was before it"):
        run(stream, llama_folder, half_way)
    flip(stage / "scored.json")
    with pytest.raises(LoricaError, match=reason):
        run(stream, llama_folder, half_way)
    (stage / "scored.json").write_text(scored)
    run(stream, llama_folder, half_way)
    assert problems(half_way) == []


@pytest.mark.reliability("R1")
def test_scores_that_no_manifest_lists_are_measured_anew(half_way: Path, llama_folder: Path, tmp_path: Path) -> None:
    """After a kill between the two files, or where an earlier version did not list them."""
    stage, stream = half_way / "seqft" / "cell" / "stage-1", stream_of(tmp_path / "stream")
    (whole,) = run(stream, llama_folder, tmp_path / "whole")
    (stage / "scored.json").write_text((stage / "scored.json").read_text().replace('"steps": 2', '"steps": 3'))
    rewrite(stage / "manifest.json", lambda manifest: manifest["files"].pop("scored.json"))
    (record,) = run(stream, llama_folder, half_way)
    assert record["scores"] == whole["scores"]
    assert record["cost"]["steps"] == whole["cost"]["steps"] == 4
    assert problems(half_way) == []
