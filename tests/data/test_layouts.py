"""Question sets in layouts of their own: what each row asks, and what is refused.

The rendered prompt of each layout is compared with its golden file in tests/benchmarks/test_catalogue.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.data.layouts import FORMAT, LayoutSource
from lorica.data.question_sets import LAYOUTS
from lorica.data.validate import Report, validate
from lorica.errors import LoricaError

HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    """Write files by their relative path and return the folder."""

    def write(**contents: str) -> Path:
        for name, text in contents.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".").replace("_DASH_", "-")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


def read(path: Path, layout: str) -> Report:
    return validate(LayoutSource(str(path), LAYOUTS[layout]), FORMAT)


def mmlu(files: Callable[..., Path], test: str, dev: str = "q?,1,2,3,4,2\n") -> Path:
    return files(
        test__old_boats_test_DOT_csv=HEADER + test,
        dev__old_boats_dev_DOT_csv=HEADER + dev,
        test__a_test_DOT_csv=HEADER + "a?,1,2,3,4,D\n",
        dev__a_dev_DOT_csv=HEADER + "b?,1,2,3,4,A\n",
    )


class TestMmlu:
    def test_each_subject_of_a_folder_has_its_own_shots(self, files: Callable[..., Path]) -> None:
        folder = mmlu(files, '"x, or y?",None,NA,,4,0\n')
        first, second = read(folder / "test", "mmlu").examples
        assert "about a.\n\nb?\n" in first.prompt
        assert first.completion == " D"
        assert "about old boats.\n\nq?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\nx, or y?\n" in second.prompt
        # Cells are text: "None" and "NA" are answers, not missing values.
        assert second.prompt.endswith("x, or y?\nA. None\nB. NA\nC. \nD. 4\nAnswer:")
        assert (second.completion, second.choices) == (" A", (" A", " B", " C", " D"))
        assert second.where == f"{folder / 'test' / 'old_boats_test.csv'}:2"

    @pytest.mark.parametrize("answer", ["4", "E", "", "-1"])
    def test_an_answer_that_is_none_names_its_line(self, files: Callable[..., Path], answer: str) -> None:
        folder = mmlu(files, f"x?,1,2,3,4,{answer}\n")
        with pytest.raises(
            LoricaError, match=r"old_boats_test\.csv:2: unknown label: answer .* neither 0 to 3 nor A to D"
        ):
            read(folder / "test" / "old_boats_test.csv", "mmlu")

    def test_the_original_release_without_a_header_is_named(self, files: Callable[..., Path]) -> None:
        folder = mmlu(files, "")
        (folder / "test" / "a_test.csv").write_text("q?,1,2,3,4,A\nr?,1,2,3,4,B\n")
        with pytest.raises(
            LoricaError, match=r"a_test\.csv:2: missing field: 'question'; the header has to be question,"
        ):
            read(folder / "test" / "a_test.csv", "mmlu")

    def test_the_shots_have_to_be_there(self, files: Callable[..., Path]) -> None:
        folder = mmlu(files, "")
        (folder / "dev" / "a_dev.csv").unlink()
        with pytest.raises(LoricaError, match=r"dev/a_dev\.csv: no such file; the five solved questions come from it"):
            read(folder / "test", "mmlu")

    def test_the_hash_covers_the_shots(self, files: Callable[..., Path]) -> None:
        folder = mmlu(files, "x?,1,2,3,4,0\n")
        before = read(folder / "test", "mmlu").sha256
        assert read(folder / "test", "mmlu").sha256 == before
        (folder / "dev" / "a_dev.csv").write_text(HEADER + "b?,1,2,3,4,B\n")
        assert read(folder / "test", "mmlu").sha256 != before


def solved(number: int) -> str:
    return json.dumps({"question": f"{number}?", "answer": f"It is <<{number}+0={number}>>{number}\n#### {number}"})


class TestGsm8k:
    def test_eight_solved_questions_come_before_the_one_asked(self, files: Callable[..., Path]) -> None:
        train = "\n".join(map(solved, range(20)))
        folder = files(test_DOT_jsonl=solved(99), train_DOT_jsonl=train)
        (example,) = read(folder, "gsm8k_8_shot").examples
        shots = "".join(f"Question: {n}?\nAnswer: It is {n}\n#### {n}\n\n" for n in range(8))
        assert example.prompt == shots + "Question: 99?\nAnswer:"
        assert example.completion == " It is <<99+0=99>>99\n#### 99"
        (bare,) = read(folder / "test.jsonl", "gsm8k").examples
        assert bare.prompt == "Question: 99?\nAnswer:"

    def test_the_shots_have_to_be_there(self, files: Callable[..., Path]) -> None:
        folder = files(test_DOT_jsonl=solved(1))
        with pytest.raises(LoricaError, match=r"train\.jsonl: no such file; .* reader 'gsm8k' needs none"):
            read(folder, "gsm8k_8_shot")

    def test_a_shot_without_its_answer_is_named(self, files: Callable[..., Path]) -> None:
        folder = files(test_DOT_jsonl=solved(1), train_DOT_jsonl='{"question": "q"}\n')
        with pytest.raises(LoricaError, match=r"train\.jsonl:1: missing field: 'answer'"):
            read(folder, "gsm8k_8_shot")


def bbh(files: Callable[..., Path], content: Any, prompt: str = "canary\n-----\nDo it.\n\nQ: a\nA: b\n") -> Path:
    return files(walk_DOT_json=json.dumps(content), cot_DASH_prompts__walk_DOT_txt=prompt)


class TestBbh:
    def test_the_canary_never_reaches_a_prompt(self, files: Callable[..., Path]) -> None:
        folder = bbh(files, {"canary": "canary", "examples": [{"input": "i", "target": "t"}] * 2})
        report = read(folder, "bbh")
        assert [example.prompt for example in report.examples] == [
            "Do it.\n\nQ: a\nA: b\n\nQ: i\nA: Let's think step by step."
        ] * 2
        assert report.duplicates == 1
        assert report.examples[1].where.endswith("walk.json:2")

    @pytest.mark.parametrize("content", [[], {}, {"examples": 3}, {"examples": ["x"]}, None])
    def test_another_json_is_refused(self, files: Callable[..., Path], content: Any) -> None:
        with pytest.raises(LoricaError, match=r"walk\.json: "):
            read(bbh(files, content), "bbh")

    def test_a_prompt_file_without_its_line_is_refused(self, files: Callable[..., Path]) -> None:
        folder = bbh(files, {"examples": [{"input": "i", "target": "t"}]}, "canary\nDo it.")
        with pytest.raises(LoricaError, match=r"walk\.txt: no prompt behind a line of five dashes"):
            read(folder, "bbh")

    def test_a_row_without_its_fields_is_named(self, files: Callable[..., Path]) -> None:
        with pytest.raises(LoricaError, match=r"walk\.json:1: missing field: 'target'"):
            read(bbh(files, {"examples": [{"input": "i"}]}), "bbh")


PIQA = json.dumps({"goal": "g", "sol1": "one", "sol2": "two"}) + "\n"


class TestPiqa:
    def test_labels_choose_the_solution(self, files: Callable[..., Path]) -> None:
        folder = files(valid_DOT_jsonl=PIQA * 2, valid_DASH_labels_DOT_lst="1\n0\n")
        assert [example.completion for example in read(folder, "piqa").examples] == [" two", " one"]

    @pytest.mark.parametrize("labels", ["0\n", "0\n1\n1\n", "0\n2\n"])
    def test_labels_that_do_not_fit_are_refused(self, files: Callable[..., Path], labels: str) -> None:
        folder = files(valid_DOT_jsonl=PIQA * 2, valid_DASH_labels_DOT_lst=labels)
        with pytest.raises(LoricaError, match=r"valid-labels\.lst: one 0 or 1 for each of the 2 rows"):
            read(folder, "piqa")

    def test_labels_that_are_no_text_are_refused(self, files: Callable[..., Path]) -> None:
        folder = files(valid_DOT_jsonl=PIQA, valid_DASH_labels_DOT_lst="")
        (folder / "valid-labels.lst").write_bytes(b"\xff")
        with pytest.raises(LoricaError, match=r"valid-labels\.lst: cannot read it: 'utf-8' codec"):
            read(folder, "piqa")

    def test_a_broken_row_keeps_the_labels_in_step(self, files: Callable[..., Path]) -> None:
        folder = files(valid_DOT_jsonl=PIQA + '{"goal": "g"}\n' + PIQA, valid_DASH_labels_DOT_lst="0 1 1")
        source = LayoutSource(str(folder), LAYOUTS["piqa"])
        report = validate(source, FORMAT, skip_invalid_rows=True)
        assert [example.completion for example in report.examples] == [" one", " two"]
        assert report.shown == [f"{folder / 'valid.jsonl'}:2: missing field: 'sol1' is missing, blank or no text"]


def test_boolq_takes_booleans_alone(files: Callable[..., Path]) -> None:
    rows = [{"question": "q", "passage": "p", "answer": answer} for answer in (True, False)]
    folder = files(dev_DOT_jsonl="\n".join(map(json.dumps, rows)))
    assert [example.completion for example in read(folder, "boolq").examples] == [" yes", " no"]
    files(dev_DOT_jsonl=json.dumps(rows[0] | {"answer": "yes"}))
    with pytest.raises(LoricaError, match=r"dev\.jsonl:1: wrong type: field 'answer': expected true or false"):
        read(folder, "boolq")


def test_tydiqa_takes_the_first_answer(files: Callable[..., Path]) -> None:
    asked = {"question": "when?", "answers": [{"text": "1931"}, {"text": "in 1931"}]}
    content = {"data": [{"paragraphs": [{"context": "It was 1931.", "qas": [asked, asked]}]}]}
    folder = files(tydi_DOT_json=json.dumps(content))
    examples = read(folder / "tydi.json", "tydiqa").examples
    assert [(example.prompt, example.completion) for example in examples] == [
        ("It was 1931.\nQuestion: when?\nAnswer:", " 1931")
    ] * 2
    files(tydi_DOT_json=json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}))
    with pytest.raises(LoricaError, match=r"tydi\.json: not the layout of SQuAD: KeyError\('answers'\)"):
        read(folder / "tydi.json", "tydiqa")


def test_a_folder_without_question_files_and_an_unknown_reader_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"the folder holds no file \*_test\.csv"):
        read(tmp_path, "mmlu")
    with pytest.raises(LoricaError, match=r"unknown reader 'mlu'; known: .*Did you mean 'mmlu'"):
        read(tmp_path, "mlu")
