"""``lorica inspect`` from a folder to its record and pages, on every layout of weights, and what it refuses."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import lorica
from lorica.analysis import inspect as inspect_module
from lorica.analysis.inspect import inspect_model
from lorica.analysis.options import InspectOptions
from lorica.constrain.targets import find_targets
from lorica.data.dataset import load
from lorica.errors import LoricaError
from lorica.evaluation.evaluator import mean_loss
from lorica.report.inspection import inspection_part, inspection_text
from lorica.report.inspection_record import InspectionRecord
from lorica.report.inspection_words import meaning
from lorica.report.page import html_report, markdown_report
from lorica.subspace.calibration import random_tokens
from tests.training.conftest import byte_tokenizer

Folders = Callable[[str], str]
Rows = Callable[..., str]


def inspected(folder: str, out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    lines: list[str] = []
    given = {"calibration": "random"} | options
    record = inspect_model(InspectOptions(model_name_or_path=folder, output_dir=out, **given), say=lines.append)
    return record, "\n".join(lines)


def without_directions(folder: str, seq2seq: bool, which: str, share: float) -> Any:
    """Return the model with an end of every spectrum set to zero, by a full SVD."""
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    for module in find_targets(model).values():
        u, s, vh = torch.linalg.svd(module.weight.data.double(), full_matrices=False)
        count = max(1, int(share * len(s) + 1e-9))
        s[slice(0, count) if which == "top" else slice(len(s) - count, None)] = 0
        module.weight.data.copy_((u * s) @ vh)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_scores_are_those_of_a_model_without_the_directions(
    family: str, folders: Folders, rows: Rows, tmp_path: Path
) -> None:
    folder, task, seq2seq = folders(family), rows("task", 6), family == "t5"
    record, _ = inspected(folder, tmp_path / "out", task_file=task, fractions=[0.3], curvature_rows=2)
    data = load(task, byte_tokenizer(), seq2seq=seq2seq)
    found = [("top", 0.3), ("bottom", 0.3)]
    assert [(one["which"], one["fraction"]) for one in record["interventions"]] == found
    for one in record["interventions"]:
        model = without_directions(folder, seq2seq, one["which"], one["fraction"])
        assert one["loss"] == pytest.approx(mean_loss(model, data, byte_tokenizer(), batch_size=4), rel=1e-4)
        assert one["loss"] != pytest.approx(record["before"]["loss"], rel=1e-6)
    assert [layer["name"] for layer in record["layers"]] == list(record["curvature"]["spearman"])
    assert record["curvature"]["rows"] == 2
    assert all(0 < layer["energy"]["protected"] <= layer["energy"]["best"] <= 1 for layer in record["layers"])


def test_the_files_agree_and_the_model_is_untouched(folders: Folders, rows: Rows, tmp_path: Path) -> None:
    folder, out = folders("llama"), tmp_path / "out"
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}
    record, told = inspected(folder, out, task_file=rows("task", 4), per_layer=True, fractions=[0.5], which=["bottom"])
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}
    assert sorted(path.name for path in out.iterdir()) == ["inspect.html", "inspect.json", "inspect.md"]
    assert json.loads((out / "inspect.json").read_text())["layers"] == record["layers"]
    assert len(record["interventions"]) == 1 + len(record["layers"])
    assert "scored 16 times" in told
    page = (out / "inspect.html").read_text()
    assert page.count('<svg viewBox="0 0') == 6  # energy, spectra, exact match, loss, per layer, curvature
    assert "http" not in page.replace("http-equiv", "")
    text = (out / "inspect.md").read_text()
    for layer in record["layers"]:
        short = layer["name"].removeprefix("model.")
        assert short in told
        assert short.replace("_", "\\_") in text


def test_a_model_alone_is_enough(folders: Folders, tmp_path: Path) -> None:
    record, told = inspected(folders("llama"), tmp_path / "out", calibration=None, unfreeze_rank_ratio=0.5)
    assert record["calibration"] == "self"
    assert {"interventions", "curvature", "before"}.isdisjoint(record)
    assert {layer["share"] for layer in record["layers"]} == {0.5}
    assert "(50 % of each weight's, mean over 14 layers)" in told
    assert "What removing" not in (tmp_path / "out" / "inspect.md").read_text()


@pytest.mark.parametrize("options", [{"ranks": "effective-rank"}, {"source": "hybrid"}, {"ranks": "energy"}])
def test_any_plan_can_be_looked_at(options: dict[str, str], folders: Folders, tmp_path: Path) -> None:
    folder = folders("llama")
    record, _ = inspected(folder, tmp_path / "out", **options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    batches = random_tokens(model.config.vocab_size)
    calibration = None if options.get("ranks") else batches
    plan = lorica.plan(model, calibration=calibration, **options)
    assert [layer["k"] for layer in record["layers"]] == [entry.k for entry in plan.entries]


def test_principal_inputs_hold_the_best_share(folders: Folders, rows: Rows, tmp_path: Path) -> None:
    record, _ = inspected(
        folders("t5"), tmp_path / "out", calibration=None, calibration_file=rows("shown", 5), source="activation"
    )
    for layer in record["layers"]:
        assert layer["energy"]["protected"] == pytest.approx(layer["energy"]["best"])
    assert record["calibration"].endswith("shown.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": [0.1]}, r"--fractions needs rows to score: give --task_file"),
        ({"which": ["top"]}, r"--which needs rows"),
        ({"per_layer": True}, r"--per_layer needs rows"),
        ({"curvature_rows": 8}, r"--curvature_rows needs rows"),
        ({"task_file": "x", "fractions": [0.1, 1.0]}, r"--fractions 1 is out of range: a share between 0 and 1"),
        ({"task_file": "x", "fractions": [0.0]}, r"--fractions 0 is out of range"),
        ({"task_file": "x", "fractions": [float("nan")]}, r"--fractions nan is out of range"),
        ({"task_file": "x", "fractions": []}, r"--fractions : give one or more different values"),
        ({"task_file": "x", "fractions": [0.1, 0.1]}, r"--fractions 0\.1, 0\.1: give one or more different values"),
        ({"task_file": "x", "which": ["botom"]}, r"--which 'botom' is unknown; .*Did you mean 'bottom'"),
        ({"task_file": "x", "curvature_rows": -1}, r"--curvature_rows -1 is out of range: 0 or more"),
        ({"batch_size": 0}, r"--batch_size 0 is out of range: 1 or more"),
        ({"calibration": "selv"}, r"--calibration 'selv' is unknown; .*Did you mean 'self'"),
        ({"calibration": "self", "calibration_file": "x"}, r"--calibration and --calibration_file say the same"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        InspectOptions(model_name_or_path="m", output_dir="out", **options)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("t5", {"calibration": "self"}, r"--calibration self: .* is an encoder-decoder"),
        ("llama", {"task_file": "missing.jsonl"}, r"missing\.jsonl: no such file"),
        ("llama", {"target_modules": ["q_prj"]}, r"'q_prj' matches no module of the model\. Did you mean 'q_proj'"),
        ("llama", {"unfreeze_rank_ratio": 1.5}, r"unfreeze_rank_ratio = 1\.5 is out of range"),
    ],
)
def test_what_does_not_fit_the_model(
    family: str, options: dict[str, Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(LoricaError, match=message):
        inspected(folders(family), tmp_path / "out", **options)


def test_a_large_model_has_no_curvature(
    folders: Folders, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_module, "LARGEST_MODEL", 1000)
    given = {"task_file": rows("task", 3), "fractions": [0.5], "which": ["top"]}
    record, told = inspected(folders("llama"), tmp_path / "out", **given)
    assert re.search(r"no curvature of [\d.]+ k parameters is measured, 1\.0 k at most", told)
    assert "curvature" not in record
    with pytest.raises(LoricaError, match=r"--curvature_rows 4: no curvature of .* at most; give 0"):
        inspected(folders("llama"), tmp_path / "out", curvature_rows=4, **given)


def test_curvature_takes_rows_from_all_of_the_file(
    folders: Folders, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def curvatures(model: Any, layers: Any, batches: Any, progress: Any) -> dict[str, Any]:
        seen.extend(byte_tokenizer().decode(batch["input_ids"][0]) for batch in batches)
        return {}

    monkeypatch.setattr(inspect_module, "curvatures", curvatures)
    given = {"task_file": rows("task", 9), "fractions": [0.5], "which": ["top"], "curvature_rows": 3}
    inspected(folders("llama"), tmp_path / "out", **given)
    assert [text.partition("?")[0].removeprefix("<s>") for text in seen] == ["task 0", "task 3", "task 6"]


def figures(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield where a record holds floats that may be missing; of a list only the first item."""
    if isinstance(value, float):
        yield at
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from figures(item, (*at, key))
    elif isinstance(value, list) and value:
        yield from figures(value[0], (*at, 0))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("example")
    task = folder / "task.jsonl"
    task.write_text('{"prompt": "one", "completion": " two"}\n{"prompt": "a", "completion": " b"}\n')
    given = {"task_file": task, "per_layer": True, "fractions": [0.1], "target_modules": ["q_proj"]}
    return inspected(str(llama_folder), folder / "out", **given)[0]


def test_any_figure_that_may_be_missing_may_be_null(example: dict[str, Any]) -> None:
    always = {"share", "fraction", "effective_rank", "protected", "random", "best", "sigma"}
    places = [at for at in figures(json.loads(json.dumps(example))) if always.isdisjoint(at)]
    assert len(places) >= 8
    for at in [*places, ("layers", 0, "energy"), ("curvature",)]:
        changed = copy.deepcopy(example)
        inner: Any = changed
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = None
        record = InspectionRecord.model_validate(changed)
        text = inspection_text(record) + markdown_report([inspection_part(record)])
        assert "nan" not in text.lower().replace("finan", ""), at


def test_names_of_a_record_are_escaped(example: dict[str, Any]) -> None:
    evil = copy.deepcopy(example) | {"model": "<script>alert(1)</script>"}
    evil["layers"][0]["name"] = "<img src=x>"
    page = html_report([inspection_part(InspectionRecord.model_validate(evil))])
    assert "<script>" not in page
    assert "<img" not in page


def test_what_a_correlation_means() -> None:
    words = [meaning(value) for value in (0.95, 0.5, 0.0, -0.8)]
    assert len(set(words)) == 4
    assert "flatter" in words[0]
    assert "not free" in words[2]
    assert "steeper" in words[3]
