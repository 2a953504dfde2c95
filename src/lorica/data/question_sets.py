"""The question sets of the customary general evaluations, as they lie in the files of their authors: a layout each."""

from __future__ import annotations

import re
from pathlib import Path

from lorica.data.csv_rows import csv_records
from lorica.data.jsonl import json_records
from lorica.data.layouts import Layout, Row, converted
from lorica.data.reader import Records
from lorica.data.record import Record, Rejected, RowError
from lorica.errors import LoricaError
from lorica.json_file import read_json
from lorica.registry import Registry

LAYOUTS: Registry[Layout] = Registry("reader")

LETTERS = ("A", "B", "C", "D")
MMLU_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
GSM8K_SHOTS = 8
_CALCULATION = re.compile(r"<<.*?>>")


def _needed(path: Path, what: str) -> Path:
    if not path.is_file():
        raise LoricaError(f"{path}: no such file; {what}.")
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoricaError(f"{path}: cannot read it: {error}.") from error


def _text(row: Row, name: str) -> str:
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise RowError("missing field", f"{name!r} is missing, blank or no text")
    return str(row[name])


# --- MMLU: CSV of questions with four choices; five solved ones stand in the dev file of the subject ----------------


def _mmlu(path: Path) -> Records:
    """Five solved questions of the subject, then the one asked. Source: Hendrycks et al. 2021, arXiv 2009.03300."""
    dev = _mmlu_dev(path)
    subject = path.stem.removesuffix("_test").replace("_", " ")
    solved = [_solved(record) for record in csv_records(dev)]
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    shots = "".join(f"{question} {LETTERS[number]}\n\n" for question, number in solved)

    def convert(row: Row) -> Row:
        question, number = _mmlu_question(row)
        choices = [f" {letter}" for letter in LETTERS]
        return {"prompt": head + shots + question, "answer": choices[number], "choices": choices}

    return converted(csv_records(path), convert)


def _mmlu_dev(path: Path) -> Path:
    subject = path.stem.removesuffix("_test")
    return _needed(path.parent.parent / "dev" / f"{subject}_dev.csv", "the five solved questions come from it")


def _solved(record: Record | Rejected) -> tuple[str, int]:
    if isinstance(record, Rejected):
        raise LoricaError(str(record))
    try:
        return _mmlu_question(record.value)
    except RowError as error:
        raise LoricaError(f"{record.where}: {error}") from None


def _mmlu_question(row: Row) -> tuple[str, int]:
    if missing := [name for name in MMLU_COLUMNS if name not in row]:
        raise RowError("missing field", f"{missing[0]!r}; the header has to be {','.join(MMLU_COLUMNS)}")
    answers = [*map(str, range(4)), *LETTERS]
    if row["answer"] not in answers:
        raise RowError("unknown label", f"answer {row['answer']!r} is neither 0 to 3 nor A to D")
    lines = [f"{letter}. {row[f'choice{number}']}" for number, letter in enumerate(LETTERS)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"]), answers.index(row["answer"]) % 4


LAYOUTS.register("mmlu")(Layout(_mmlu, lambda path: [path, _mmlu_dev(path)], "*_test.csv"))


# --- GSM8K: the answer is a worked solution that ends with "#### number" --------------------------------------------


def _gsm8k_question(row: Row) -> str:
    return f"Question: {_text(row, 'question').strip()}\nAnswer:"


def _gsm8k(path: Path) -> Records:
    """The question alone. Source: Cobbe et al. 2021, arXiv 2110.14168."""
    return converted(
        json_records(path), lambda row: {"prompt": _gsm8k_question(row), "answer": f" {_text(row, 'answer')}"}
    )


def _gsm8k_shots(path: Path) -> Records:
    """The first eight questions of ``train.jsonl`` with their solutions, then the one asked."""
    solved = []
    for record in json_records(_gsm8k_train(path)):
        if isinstance(record, Rejected):
            raise LoricaError(str(record))
        try:
            solution = _CALCULATION.sub("", _text(record.value, "answer"))
            solved.append(f"{_gsm8k_question(record.value)} {solution}\n\n")
        except RowError as error:
            raise LoricaError(f"{record.where}: {error}") from None
        if len(solved) == GSM8K_SHOTS:
            break
    shots = "".join(solved)
    return converted(
        json_records(path), lambda row: {"prompt": shots + _gsm8k_question(row), "answer": f" {_text(row, 'answer')}"}
    )


def _gsm8k_train(path: Path) -> Path:
    return _needed(path.with_name("train.jsonl"), "the solved questions come from it; reader 'gsm8k' needs none")


LAYOUTS.register("gsm8k")(Layout(_gsm8k, pattern="test.jsonl"))
LAYOUTS.register("gsm8k_8_shot")(Layout(_gsm8k_shots, lambda path: [path, _gsm8k_train(path)], "test.jsonl"))


# --- BIG-Bench Hard: JSON of inputs with targets; three solved ones stand in a prompt file --------------------------


def _bbh(path: Path) -> Records:
    """Instruction and three solved questions with their reasoning, then the one asked.

    Source: Suzgun et al. 2022, arXiv 2210.09261.
    """
    # The prompt file starts with a canary for crawlers, parted from the prompt by a line of dashes.
    _, _, shots = _read_text(_bbh_prompt(path)).partition("-----\n")
    if not shots.strip():
        raise LoricaError(f"{_bbh_prompt(path)}: no prompt behind a line of five dashes.")

    def convert(row: Row) -> Row:
        asked = f"Q: {_text(row, 'input')}\nA: Let's think step by step."
        return {"prompt": f"{shots.strip()}\n\n{asked}", "answer": f" {_text(row, 'target')}"}

    return converted(_numbered(path, _json(path, "examples")), convert)


def _bbh_prompt(path: Path) -> Path:
    return _needed(path.parent / "cot-prompts" / f"{path.stem}.txt", "the solved questions come from it")


def _json(path: Path, field: str) -> list[Row]:
    data = read_json(path, "JSON file")
    rows = data.get(field) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LoricaError(f"{path}: not a JSON object with a list {field!r} of objects.")
    return rows


def _numbered(path: Path, rows: list[Row]) -> Records:
    yield from (Record(str(path), number, row) for number, row in enumerate(rows, 1))


LAYOUTS.register("bbh")(Layout(_bbh, lambda path: [path, _bbh_prompt(path)], "*.json"))


# --- PIQA: the labels stand in a file of their own ------------------------------------------------------------------


def _piqa(path: Path) -> Records:
    """A goal and its two solutions. Source: Bisk et al. 2020, arXiv 1911.11641."""
    labels = _read_text(_piqa_labels(path)).split()
    records = list(json_records(path))
    if len(labels) != len(records) or set(labels) - {"0", "1"}:
        raise LoricaError(f"{_piqa_labels(path)}: one 0 or 1 for each of the {len(records)} rows of {path} is needed.")
    for record, label in zip(records, labels, strict=True):
        yield from converted(iter([record]), lambda row, label=label: _piqa_row(row, int(label)))  # type: ignore[misc]


def _piqa_row(row: Row, label: int) -> Row:
    choices = [f" {_text(row, name)}" for name in ("sol1", "sol2")]
    return {"prompt": f"Question: {_text(row, 'goal')}\nAnswer:", "answer": choices[label], "choices": choices}


def _piqa_labels(path: Path) -> Path:
    return _needed(path.with_name(f"{path.stem}-labels.lst"), "the right solutions stand in it")


LAYOUTS.register("piqa")(Layout(_piqa, lambda path: [path, _piqa_labels(path)], "valid.jsonl"))


# --- BoolQ ----------------------------------------------------------------------------------------------------------


def _boolq(path: Path) -> Records:
    """A passage and a question with a boolean answer. Source: Clark et al. 2019, arXiv 1905.10044."""
    return converted(json_records(path), _boolq_row)


def _boolq_row(row: Row) -> Row:
    if not isinstance(row.get("answer"), bool):
        raise RowError("wrong type", "field 'answer': expected true or false")
    choices = [" no", " yes"]
    prompt = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}?\nAnswer:"
    return {"prompt": prompt, "answer": choices[row["answer"]], "choices": choices}


LAYOUTS.register("boolq")(Layout(_boolq, pattern="dev.jsonl"))


# --- TyDi QA, gold passage: the JSON of SQuAD -----------------------------------------------------------------------


def _tydiqa(path: Path) -> Records:
    """A passage and a question whose answer stands in it; of several answers the first.

    Source: Clark et al. 2020, arXiv 2003.05002.
    """
    try:
        rows = [
            {"context": paragraph["context"], "question": asked["question"], "answer": asked["answers"][0]["text"]}
            for article in _json(path, "data")
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, IndexError, TypeError) as error:
        raise LoricaError(f"{path}: not the layout of SQuAD: {error!r}.") from None

    def convert(row: Row) -> Row:
        prompt = f"{_text(row, 'context')}\nQuestion: {_text(row, 'question')}\nAnswer:"
        return {"prompt": prompt, "answer": f" {_text(row, 'answer')}"}

    return converted(_numbered(path, rows), convert)


LAYOUTS.register("tydiqa")(Layout(_tydiqa, pattern="tydiqa-goldp-v1.1-dev.json"))
