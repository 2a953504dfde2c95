"""What can and cannot be exported, and what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.artefacts import file
from lorica.artefacts.apply import apply_updates
from lorica.artefacts.export import export_update
from lorica.errors import LoricaError
from lorica.json_file import load_record
from tests.artefacts.conftest import before_and_after, same_files, saved, stored
from tests.builders import tiny


def edited(folder: Path, edit: dict[str, Tensor | None]) -> Path:
    """Replace tensors of a saved model; None removes one."""
    state = load_file(folder / "model.safetensors") | edit
    save_file({key: value for key, value in state.items() if value is not None}, folder / "model.safetensors")
    return folder


def refused(before: Path, after: Path, output: Path, message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        export_update(str(before), str(after), str(output))
    assert not output.exists()
    assert not list(output.parent.glob(".*"))


def test_what_is_told(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    lines: list[str] = []
    passed: list[tuple[str, int, int]] = []
    result = export_update(
        str(before), str(after), str(tmp_path / "u"), say=lines.append, progress=lambda *at: passed.append(at)
    )
    total = len(stored(before))
    assert (result["changed"], result["tensors"]) == (14, total)  # 7 weights in each of 2 blocks
    assert result["model_bytes"] == (before / "model.safetensors").stat().st_size
    assert lines[0].startswith(f"update: 14 of {total} tensors, {result['bytes']:,} bytes, ")
    assert lines[1] == "no plan is recorded with the model after: what was protected is not known"
    assert result["before"][:12] in lines[2]
    assert result["after"][:12] in lines[2]
    assert passed[-1][1:] == (total, total)
    passed.clear()
    record = apply_updates(
        str(before),
        [str(tmp_path / "u")],
        str(tmp_path / "on"),
        say=lines.append,
        progress=lambda *at: passed.append(at),
    )
    assert [at[1:] for at in passed] == [(done, 2 * total) for done in range(1, 2 * total + 1)]
    assert lines[-3:] == [
        f"apply: {tmp_path / 'u'}",
        f"from model {result['before'][:12]} to {result['after'][:12]}, bit for bit the recorded model",
        f"model: {tmp_path / 'on'}",
    ]
    assert load_record(tmp_path / "on" / "lorica.json") == json.loads(json.dumps(record))


def test_how_the_files_are_cut_is_no_part_of_a_model(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    in_shards = saved(tiny("llama"), tmp_path / "shards", "20KB")
    assert len(list(in_shards.glob("*.safetensors"))) > 2
    whole = export_update(str(before), str(after), str(tmp_path / "u"))
    cut = export_update(str(in_shards), str(after / "model.safetensors"), str(tmp_path / "v"))
    assert (whole["before"], whole["after"]) == (cut["before"], cut["after"])
    apply_updates(str(in_shards), [str(tmp_path / "u")], str(tmp_path / "on"))
    new, expected = stored(tmp_path / "on"), stored(after)
    assert new.keys() == expected.keys()
    assert all(torch.equal(new[key], expected[key]) for key in expected)
    apply_updates(str(tmp_path / "on"), [str(tmp_path / "v")], str(tmp_path / "off"), remove=True)
    assert same_files(tmp_path / "off", in_shards)


def test_a_large_update_is_cut_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = before_and_after(tmp_path)
    monkeypatch.setattr(file, "_FULL", 5000)
    export_update(str(before), str(after), str(tmp_path / "u"))
    assert len(list((tmp_path / "u").glob("update-*.safetensors"))) > 3
    apply_updates(str(before), [str(tmp_path / "u")], str(tmp_path / "on"))
    assert same_files(tmp_path / "on", after)


def test_models_that_differ_in_more_than_numbers_are_refused(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    update = tmp_path / "u"
    norm = load_file(after / "model.safetensors")["model.norm.weight"]
    edited(after, {"model.norm.weight": norm.double()})
    refused(before, after, update, r"model\.norm\.weight is torch\.float32 before and torch\.float64 after")
    edited(after, {"model.norm.weight": torch.ones(31)})
    refused(before, after, update, r"model\.norm\.weight has shape \(32,\) in .*before and \(31,\) in .*after")
    edited(after, {"model.norm.weight": None})
    refused(before, after, update, r"before has model\.norm\.weight and .*after has not \(1 such\)")
    edited(after, {"model.norm.weight": norm, "model.norms.weight": norm.clone()})
    refused(before, after, update, r"after has model\.norms\.weight .* Did you mean 'model\.norm\.weight'\?")


def test_two_equal_models_are_no_update(tmp_path: Path) -> None:
    before = saved(tiny("llama"), tmp_path / "before")
    refused(before, saved(tiny("llama"), tmp_path / "same"), tmp_path / "u", "there is no update to save")


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    path = after / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(before, after, tmp_path / "u", "not a readable safetensors file")
    refused(before, tmp_path / "nowhere", tmp_path / "u", "no such file or folder")


def test_an_output_with_something_in_it_is_refused(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    for output, message in [
        (after, "output .*after is not empty"),
        (after / "config.json", "is a file; name a folder"),
    ]:
        with pytest.raises(LoricaError, match=message):
            export_update(str(before), str(after), str(output))
