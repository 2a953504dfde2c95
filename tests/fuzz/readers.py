"""The readers that are fuzzed: what each is fed with, and what it may do with it.

``check`` writes the bytes to a file, has them read, and fails where the reader raises anything but the error that it
promises, or tells more than a few lines.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from lorica.constrain.checkpoint import open_weights
from lorica.data import encode, validate, write_rejected
from lorica.data.stream import read_stream
from lorica.errors import LoricaError
from lorica.report.page import html_report, markdown_report, report_parts
from lorica.report.reading import read_records
from lorica.subspace.plan import Plan
from lorica.training.manifest import MANIFEST, damage, write_manifest
from lorica.training.states import load_tree, random_state, save_tree
from tests.fuzz.mutations import as_json, mutated, odd_values
from tests.report.conftest import run_record, train_record
from tests.training.conftest import byte_tokenizer

File = tuple[str, bytes]
"""The name of a file and what is in it."""

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
MAX_MESSAGE = 4000
VOCABULARY = 250


@dataclass(frozen=True)
class Reader:
    """A reader, valid files, files to feed it with, and the check of what it does with one."""

    seeds: Callable[[], list[File]]
    files: Callable[[], st.SearchStrategy[File]]
    check: Callable[[Path, File], None]


def _refused(error: Exception, path: Path, lines: int = 1) -> None:
    """Check that a message names the file and is so many lines at most, all of which can be printed."""
    message = str(error)
    assert str(path) in message, message
    assert len(message) < MAX_MESSAGE, message
    assert message.count("\n") < lines, message
    assert all(line.isprintable() for line in message.split("\n")), message


# --- rows -----------------------------------------------------------------------------------------------------------

_CHAT = [{"role": "user", "content": "hi</s>"}, {"role": "assistant", "content": "there"}]
_ROWS: list[dict[str, Any]] = [
    {"prompt": "q", "completion": "a"},
    {"messages": _CHAT},
    {"prompt": _CHAT[:1], "completion": _CHAT[1:]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "é"}], "system": "s"},
    {"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]], "system": "s"},
    {"text": "words \U0001f600\\"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 0]},
]

_LISTS = [[row] * 3 for row in _ROWS] + [[_ROWS[0], _ROWS[5], _ROWS[0]]]


def _row_seeds() -> list[File]:
    lines = [
        "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\r\n" for i, row in enumerate(rows)) for rows in _LISTS
    ]
    return [
        *(("rows.jsonl", text.encode()) for text in lines),
        *(("rows.json", json.dumps(rows, indent=1).encode()) for rows in _LISTS),
        *(("rows.csv", _csv([row] * 3)) for row in (_ROWS[0], _ROWS[5])),
        *(("rows.parquet", _parquet(_LISTS[number])) for number in (0, 5, 6)),
    ]


def _row_files() -> st.SearchStrategy[File]:
    names = dict.fromkeys(name for name, _ in _row_seeds())
    valid = {name: [data for other, data in _row_seeds() if other == name] for name in names}
    named = {name: mutated(files) for name, files in valid.items()}
    named["rows.jsonl"] |= odd_values(_LISTS).map(_lines)
    named["rows.json"] |= odd_values(_LISTS).map(as_json)
    anything = st.tuples(st.sampled_from(list(names)), st.binary(max_size=300))
    return st.one_of(*(st.tuples(st.just(name), files) for name, files in named.items()), anything)


def _lines(rows: Any) -> bytes:
    return b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows]))


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@cache
def _tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _check_rows(folder: Path, file: File) -> None:
    path = folder / file[0]
    path.write_bytes(file[1])
    try:
        report = validate(path, skip_invalid_rows=True, vocab_size=VOCABULARY)
    except LoricaError as error:
        _refused(error, path)
        return
    if report.rejected:
        with pytest.raises(LoricaError) as refusal:
            validate(path, vocab_size=VOCABULARY)
        _refused(refusal.value, path, lines=13)  # what is wrong, ten rows, how many more, what to do
    write_rejected(report, folder / "rejected.jsonl")
    entries = [json.loads(line) for line in (folder / "rejected.jsonl").read_bytes().splitlines()]
    assert len(entries) == report.rejected
    assert all(entry["file"] == str(path) and entry["reason"].isprintable() for entry in entries)
    places = [entry["line"] for entry in entries] + [int(row.where.rpartition(":")[2]) for row in report.examples]
    assert len(places) == report.rows_read
    if not path.name.endswith("json"):  # elements of an array may share a line
        assert len(set(places)) == len(places)
    try:
        kept, summary = encode(report.examples, _tokenizer(), max_length=64)
    except LoricaError:
        return
    assert len(kept) == summary.kept
    assert summary.kept + summary.dropped + summary.prompt_fills_context + summary.nothing_to_train == summary.rows


# --- streams --------------------------------------------------------------------------------------------------------

_STREAM: dict[str, Any] = {
    "name": "s", "version": 1, "description": "d", "seeds": [0, 1], "max_length": 64,
    "tasks": [
        {"name": "one", "train_file": "a.jsonl", "test_file": "b.jsonl", "prompt": "{q}? {options}",
         "answer": " {label}", "choices": ["x", "y"], "shorten": "q", "scoring": "choose", "num_train_epochs": 2.5,
         "learning_rate_scale": 1.0},
        {"name": "two", "train_file": "a.jsonl", "test_file": "b.jsonl", "reader": "rows", "stop": ["\n"], "floor": 10,
         "hub": {"path": "o/n", "labels": {"label": ["no", "yes"]}, "fields": {"q": "{a} {b}"}, "test_rows": 5}},
    ],
    "orders": {"1": ["one", "two"], "2": ["two", "one"]},
    "held_out": [{"name": "three", "test_file": "c.json", "reader": "boolq", "metric": "f1"}],
    "training": {"num_train_epochs": 1},
    "methods": {"osft": {"method": "osft", "learning_rate": 1e-3, "options": {"k": [1]}}},
}  # fmt: skip
_YAML = b"""\
name: s
version: 1
description: &text >
  two
  lines
tasks:
  - &task {name: one, train_file: a, test_file: b, prompt: '{q}', description: *text}
  - <<: *task
    name: two
seeds: [0, 0x1]
max_length: 64
training: {learning_rate: 1e-3, logging_dir: null, day: 2001-01-01, bytes: !!binary aGk=}
"""


def _stream_seeds() -> list[File]:
    return [("stream.yaml", _YAML), ("stream.yaml", json.dumps(_STREAM, indent=1).encode())]


def _stream_files() -> st.SearchStrategy[File]:
    content = (
        mutated([data for _, data in _stream_seeds()]) | odd_values([_STREAM]).map(as_json) | st.binary(max_size=200)
    )
    return content.map(lambda data: ("stream.yaml", data))


def _check_stream(folder: Path, file: File) -> None:
    path = folder / file[0]
    path.write_bytes(file[1])
    try:
        stream = read_stream(path)
    except LoricaError as error:
        _refused(error, path)
        return
    assert stream.tasks or stream.held_out
    assert {task.name for task in stream.in_order(None)} <= {task.name for task in stream.tasks}


# --- plans ----------------------------------------------------------------------------------------------------------

_PLAN = {
    "schema_version": 1, "family": "llama", "train_also": ["norm"],
    "entries": [
        {"name": "a", "shape": [6, 4], "k": 2, "source": "weight", "constraint": "two-sided", "learned": [1, 1]},
        {"name": "b", "shape": [6, 4], "k": 3, "source": "activation", "constraint": "input", "why": "w"},
        {"name": "c", "shape": [10**6, 10**6], "k": 10**6, "constraint": "block"},
    ],
}  # fmt: skip


def _plan_seeds() -> list[File]:
    return [("plan.json", json.dumps(_PLAN, indent=1).encode()), ("plan.json", as_json(_PLAN))]


def _plan_files() -> st.SearchStrategy[File]:
    content = mutated([data for _, data in _plan_seeds()]) | odd_values([_PLAN]).map(as_json) | st.binary(max_size=200)
    return content.map(lambda data: ("plan.json", data))


def _check_plan(folder: Path, file: File) -> None:
    path = folder / file[0]
    path.write_bytes(file[1])
    try:
        plan = Plan.load(path)
    except LoricaError as error:
        _refused(error, path)
        return
    assert str(plan).count("\n") >= len(plan) + 1
    assert plan.free >= 0
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.from_records(plan.records(), plan.family).entries == plan.entries


# --- records --------------------------------------------------------------------------------------------------------


def _records() -> list[Any]:
    share = {"percent": 50.0, "low": 40.0, "high": 60.0}
    judge = {"schema": 1, "kind": "judge", "before": "a", "after": "b", "win": share, "tie": share, "lose": share,
             "prompts": 10, "ties": {"same": 2}, "judge": {"kind": "endpoint"}, "keyword_refusal_rate": {"before": 0.0},
             "files": {"p": "q"}, "limit": 5}  # fmt: skip
    layer = {"name": "w", "shape": [6, 4], "k": 2, "free": 8, "share": 0.5, "source": "weight",
             "constraint": "two-sided", "spectrum": {"index": [0, 3], "sigma": [3.0, 1.0]}, "effective_rank": 2.5,
             "squared_share": 0.9, "energy": {"protected": 0.5, "random": 0.4, "best": 0.9}}  # fmt: skip
    look = {"schema": 1, "kind": "inspect", "method": "osft", "family": "llama", "layers": [layer],
            "before": {"loss": 1.0}, "interventions": [{"which": "top", "fraction": 0.1, "directions": 2, "loss": 2.0}],
            "curvature": {"rows": 8, "spearman": {"w": 0.5}}}  # fmt: skip
    runs = [run_record(order="1", seed=1), run_record("seqft", row_scores={"colours": "0 100 50"}, beside={})]
    update = train_record(
        parent={"model": "m", "weights_sha256": "x", "updates": 1}, weights_sha256="y", rejected={"e": 2.0}
    )
    return [*runs, update, runs, [update, update | {"weights_sha256": "z"}], judge, look]


def _record_seeds() -> list[File]:
    return [("run.json", json.dumps(record, indent=1).encode()) for record in _records()]


def _record_files() -> st.SearchStrategy[File]:
    content = (
        odd_values(_records()).map(as_json) | mutated([data for _, data in _record_seeds()]) | st.binary(max_size=200)
    )
    return content.map(lambda data: ("run.json", data))


def _check_record(folder: Path, file: File) -> None:
    path = folder / file[0]
    path.write_bytes(file[1])
    try:
        records = read_records([path])
    except LoricaError as error:
        _refused(error, path)
        return
    try:
        parts = report_parts(records)
        pages = html_report(parts) + markdown_report(parts)
    except LoricaError:
        return
    pages.encode("utf-8")


# --- checkpoints ----------------------------------------------------------------------------------------------------


@cache
def _checkpoint() -> dict[str, bytes]:
    """Return the files of a small checkpoint by name, all that its manifest lists."""
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}],
    }
    tree = {
        "optimizer": state,
        "scheduler": {"last": 3, "best": float("inf")},
        "scaler": None,
        "random": random_state(),
    }
    tree["dtype"] = torch.bfloat16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.safetensors").write_bytes(
            save({"a.weight": torch.ones(3, 2), "b": torch.zeros(2, dtype=torch.int64)})
        )
        save_tree(tree, folder, "state")
        write_manifest(folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _checkpoint_files() -> st.SearchStrategy[File]:
    files = _checkpoint()
    found = [st.tuples(st.just(name), mutated([data])) for name, data in files.items()]
    for name in (MANIFEST, "state.json"):
        found.append(st.tuples(st.just(name), odd_values([json.loads(files[name])]).map(as_json)))
    for name in ("state.safetensors", "model.safetensors"):
        header, body = _apart(files[name])
        found.append(st.tuples(st.just(name), odd_values([header]).map(lambda value, body=body: _packed(value, body))))
    return st.one_of(*found)


def _apart(data: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _packed(header: Any, body: bytes) -> bytes:
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + body


def _check_checkpoint(folder: Path, file: File) -> None:
    name, data = file
    for each, content in (_checkpoint() | {name: data}).items():
        (folder / each).write_bytes(content)
    wrong = damage(folder)
    assert wrong is None or (wrong.isprintable() and len(wrong) < MAX_MESSAGE), wrong
    if name != MANIFEST and data != _checkpoint()[name]:
        assert wrong is not None, "a changed file passed for the one that was written"
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        load_tree(folder, "state")
    try:
        weights = open_weights(folder / "model.safetensors")
        for key in weights.keys():
            weights.tensor(key)
    except LoricaError as error:
        _refused(error, folder / "model.safetensors")


READERS = {
    "rows": Reader(_row_seeds, _row_files, _check_rows),
    "stream": Reader(_stream_seeds, _stream_files, _check_stream),
    "plan": Reader(_plan_seeds, _plan_files, _check_plan),
    "record": Reader(_record_seeds, _record_files, _check_record),
    "checkpoint": Reader(lambda: list(_checkpoint().items()), _checkpoint_files, _check_checkpoint),
}
