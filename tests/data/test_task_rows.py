"""The rows of a task: from a file, from a data set like the hub's, or refused; for each kind of model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset
from lorica.data.scored import Ability, HubSource, Task
from lorica.data.stream import TaskStream
from lorica.data.task_rows import load_rows
from lorica.errors import LoricaError

PROMPT = "Drink.\nOption: {options} \n{sentence}\nAnswer:"
TEA = [{"label": "Tea", "sentence": f"leaf {n}"} for n in range(12)]
COFFEE = [{"label": "Coffee", "sentence": f"bean {n}"} for n in range(8)]


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Words of single letters between [CLS] and [SEP], without EOS, as BERT has it."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    backend = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def stream(tmp_path: Path) -> Callable[..., TaskStream]:
    """Make a stream of one task, `tea`, with rows for its two files."""

    def make(rows: list[Any] | None = None, **task: Any) -> TaskStream:
        for part in ("train", "test"):
            if rows is not None:
                (tmp_path / f"{part}.json").write_text("[" + ",\n".join(map(json.dumps, rows)) + "]", encoding="utf-8")
        fields = {"prompt": PROMPT, "choices": ["Tea", "Coffee"]} | task
        given = Task(name="tea", train_file="train.json", test_file="test.json", **fields)
        return TaskStream(name="drinks", version=1, description="d", tasks=[given]).within(str(tmp_path))

    return make


def load(stream: TaskStream, tokenizer: Any, part: str = "test", **options: Any) -> EncodedDataset:
    options = {"kind": "causal", "max_length": 200} | options
    return load_rows(stream, stream.tasks[0], part, tokenizer, **options)


class TestKinds:
    def test_a_decoder_reads_the_prompt_and_learns_the_label(self, stream: Any, tokenizer: Any) -> None:
        rows = load(stream(TEA + COFFEE), tokenizer)
        row = rows.examples[-1]
        assert tokenizer.decode(row.prompt_ids[1:]) == "Drink.\nOption: Tea, Coffee \nbean 7\nAnswer:"
        assert tokenizer.decode([label for label in row.labels if label != -100]) == "Coffee</s>"
        assert (row.answer, row.choices) == ("Coffee", ("Tea", "Coffee"))
        assert rows.kind == "causal"

    def test_an_encoder_decoder_has_source_and_target(self, stream: Any, make_tokenizer: Any) -> None:
        t5 = make_tokenizer(bos=False, eos_suffix=True)
        row = load(stream(TEA), t5, kind="seq2seq").examples[0]
        assert t5.decode(row.input_ids) == "Drink.\nOption: Tea, Coffee \nleaf 0\nAnswer:</s>"
        assert t5.decode(row.labels) == "Tea</s>"
        assert row.prompt_ids == row.input_ids

    def test_a_classifier_has_the_tokenizer_s_own_encoding_and_a_class(self, stream: Any) -> None:
        bert = bert_tokenizer()
        rows = load(stream(TEA + COFFEE), bert, kind="classifier", labels=["Milk", "Coffee", "Tea"])
        text = "Drink.\nOption: Tea, Coffee \nleaf 0\nAnswer:"
        first, last = rows.examples[0], rows.examples[-1]
        assert first.input_ids == bert(text)["input_ids"]
        assert (first.input_ids[0], first.input_ids[-1]) == (2, 3)
        assert (first.labels, first.answer, last.labels, last.answer) == ([2], "Tea", [1], "Coffee")
        batch = Collator(bert, classifier=True)([rows[0], rows[19]])
        assert torch.equal(batch["labels"], torch.tensor([2, 1]))
        assert batch["labels"].dtype == torch.int64
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert rows.summary["trained_tokens"] == 20
        assert rows.rendered.endswith("-> «Tea»")

    def test_a_classifier_s_classes_are_the_task_s_by_default_and_blanks_do_not_count(self, stream: Any) -> None:
        row = load(stream(COFFEE, answer=" {label}"), bert_tokenizer(), kind="classifier").examples[0]
        assert (row.labels, row.answer, row.choices) == ([1], "Coffee", ("Tea", "Coffee"))

    @pytest.mark.parametrize("cut", [{"max_length": 40}, {"max_prompt_length": 40}])
    def test_a_classifier_s_long_text_is_cut_at_its_end(self, stream: Any, cut: dict[str, int]) -> None:
        bert = bert_tokenizer()
        shortest = len(bert("Drink.\nOption: Tea, Coffee \n\nAnswer:")["input_ids"])
        assert shortest < 40
        long = [{"label": "Tea", "sentence": "leaf " * 50}]
        task = {"shorten": "sentence"} | {key: n for key, n in cut.items() if key == "max_prompt_length"}
        length = {key: n for key, n in cut.items() if key == "max_length"}
        rows = load(stream(long, **task), bert, kind="classifier", **length)
        ids = rows.examples[0].input_ids
        assert len(ids) == 40
        head, cue = bert("Drink.\nOption: Tea, Coffee \nleaf")["input_ids"][:-1], bert("Answer:")["input_ids"][1:]
        assert ids[: len(head)] == head
        assert ids[-len(cue) :] == cue
        assert rows.summary["shortened"] == 1

    def test_a_classifier_needs_choices_and_known_classes(self, stream: Any, tokenizer: Any) -> None:
        bare = stream(TEA, prompt="{sentence}", choices=[])
        with pytest.raises(LoricaError, match=r"stream 'drinks', task 'tea': give choices: a classifier needs to know"):
            load(bare, tokenizer, kind="classifier")
        with pytest.raises(
            LoricaError, match=r"task 'tea': .*test\.json:\d+: 'Tea' is no class of the model: Milk, Coffee"
        ):
            load(stream(TEA), tokenizer, kind="classifier", labels=["Milk", "Coffee"])


class TestRoom:
    @pytest.mark.parametrize(
        ("task", "kind", "longest"),
        [
            ({}, "causal", 99),
            ({"max_new_tokens": 30}, "causal", 70),
            ({"max_new_tokens": 80}, "causal", 50),
            ({"max_new_tokens": 30, "max_prompt_length": 20}, "causal", 20),
            ({"max_new_tokens": 30, "max_prompt_length": 90}, "causal", 70),
            ({"max_new_tokens": 30}, "seq2seq", 100),
            ({"max_new_tokens": 30, "choices": ["Tea"]}, "causal", 99),
        ],
    )
    def test_a_decoder_has_room_for_the_answer_it_writes(
        self, stream: Any, tokenizer: Any, task: dict[str, Any], kind: str, longest: int
    ) -> None:
        made = stream([{"label": "Tea", "sentence": "leaf " * 200}], **{"prompt": "{sentence}", "choices": []} | task)
        rows = load(made, tokenizer, kind=kind, max_length=100)
        assert len(rows.examples[0].prompt_ids or []) == longest


class TestFiles:
    def test_train_and_test_are_two_files(self, stream: Any, tokenizer: Any, tmp_path: Path) -> None:
        made = stream(TEA)
        (tmp_path / "train.json").write_text(json.dumps(COFFEE))
        assert (len(load(made, tokenizer, "train")), len(load(made, tokenizer, "test"))) == (8, 12)

    def test_the_summary_tells_what_was_read(self, stream: Any, tokenizer: Any, tmp_path: Path) -> None:
        rows = load(stream([*TEA, TEA[0], {"label": "-", "sentence": "?"}], drop_labels=["-"]), tokenizer)
        digest = hashlib.sha256((tmp_path / "test.json").read_bytes()).hexdigest()
        summary = rows.summary
        assert (summary["sha256"], summary["rows_read"], summary["kept"]) == (digest, 14, 13)
        assert (summary["duplicates"], summary["left_out"]) == (1, 1)
        assert "1 of 14 rows have no answer and were left out" in summary["notices"]

    def test_a_row_that_does_not_fit_names_stream_task_file_line_and_field(self, stream: Any, tokenizer: Any) -> None:
        with pytest.raises(
            LoricaError, match=r"stream 'drinks', task 'tea': .*\n  .*test\.json:1: missing field: 'sentence'"
        ):
            load(stream([{"label": "Tea", "text": "x"}, *TEA]), tokenizer)

    def test_rows_with_a_format_of_their_own_need_no_prompt(self, stream: Any, tokenizer: Any) -> None:
        own = [{"prompt": "p", "completion": " Tea"}]
        row = load(stream(own, prompt=None, choices=[" Tea", " Coffee"]), tokenizer).examples[0]
        assert (row.answer, row.choices) == (" Tea", (" Tea", " Coffee"))

    def test_a_limit_is_drawn_by_the_seed_and_told(self, stream: Any, tokenizer: Any) -> None:
        made = stream(TEA + COFFEE)
        some, same, other = (load(made, tokenizer, limit=5, seed=seed) for seed in (1, 1, 2))
        places = [[row.where for row in rows.examples] for rows in (some, same, other)]
        assert places[0] == places[1] != places[2]
        assert len(set(places[0])) == 5
        assert set(places[0]) <= {row.where for row in load(made, tokenizer).examples}
        assert "5 of 20 rows drawn without replacement, seed 1" in some.summary["notices"]
        whole = load(made, tokenizer, limit=99)
        assert len(whole) == 20
        assert not any("drawn" in notice for notice in whole.summary["notices"])

    def test_an_ability_is_read_by_its_layout(self, tokenizer: Any, tmp_path: Path) -> None:
        (tmp_path / "q.jsonl").write_text('{"question": "q", "passage": "p", "answer": true}\n')
        held = Ability(name="reading", test_file="q.jsonl", reader="boolq", scoring="choose")
        made = TaskStream(name="s", version=1, description="d", tasks=[], held_out=[held]).within(str(tmp_path))
        (row,) = load_rows(made, held, "test", tokenizer, kind="causal", max_length=100).examples
        assert (row.answer, row.choices) == (" yes", (" no", " yes"))
        with pytest.raises(LoricaError, match=r"stream 's', ability 'reading': unknown reader 'bolq'"):
            load_rows(made, held.model_copy(update={"reader": "bolq"}), "test", tokenizer, kind="causal", max_length=9)
        with pytest.raises(ValueError, match="never trained"):
            load_rows(made, held, "train", tokenizer, kind="causal", max_length=100)


class TestSubset:
    @pytest.mark.parametrize("kind", ["causal", "seq2seq"])
    def test_counts_are_those_of_the_rows_taken(self, stream: Any, tokenizer: Any, kind: str) -> None:
        whole = load(stream(TEA + COFFEE), tokenizer, kind=kind)
        parts = [whole.subset(range(0, 20, 2)), whole.subset([3, 1])]
        assert [row.where for row in parts[1].examples] == [whole.examples[3].where, whole.examples[1].where]
        assert whole.subset(range(20)).summary["tokens"] == whole.summary["tokens"]
        rest = whole.subset(range(1, 20, 2))
        for count in ("kept", "tokens", "trained_tokens"):
            assert parts[0].summary[count] + rest.summary[count] == whole.summary[count]
        assert parts[1].summary["notices"][-1] == "2 of 20 rows taken"
        assert len(whole) == whole.summary["kept"] == 20
        assert parts[1].sha256 == whole.sha256
        assert "2 of 20 rows" in parts[1].describe()

    def test_a_classifier_trains_one_label_a_row(self, stream: Any) -> None:
        rows = load(stream(TEA), bert_tokenizer(), kind="classifier").subset([0, 5])
        assert (rows.summary["kept"], rows.summary["trained_tokens"]) == (2, 2)


class TestHub:
    """A folder with the layout of a data set on the hub stands in for one."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "dataset"
        folder.mkdir()
        for split, count in (("train", 30), ("validation", 10)):
            rows = [{"text": f"{{{split}}} {n}", "kind": n % 2} for n in range(count)]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    def source(self, hub: Path, **fields: Any) -> HubSource:
        given = {"test_split": "validation", "labels": {"kind": ["Tea", "Coffee"]}}
        given |= {"fields": {"sentence": "Text: {text}\n", "label": "{kind}"}}
        return HubSource(path=str(hub), **given | fields)

    def test_numbers_become_words_and_columns_fields(self, stream: Any, tokenizer: Any, hub: Path) -> None:
        rows = load(stream(hub=self.source(hub)), tokenizer)
        assert len(rows) == 10
        row = rows.examples[1]
        assert tokenizer.decode(row.prompt_ids[1:]).endswith("Option: Tea, Coffee \nText: {validation} 1\n\nAnswer:")
        assert row.answer == "Coffee"
        assert rows.summary["path"] == f"{hub}[validation]"
        assert rows.summary["from_hub"] is True
        assert rows.summary["notices"][0].endswith(f"test.json: rows of the hub's data set {hub}")

    def test_a_draw_is_the_same_in_every_run(self, stream: Any, tokenizer: Any, hub: Path) -> None:
        made = stream(hub=self.source(hub, train_rows=7))
        first, second = (load(made, tokenizer, "train", seed=seed) for seed in (0, 1))
        assert len(first) == 7
        assert [row.input_ids for row in first.examples] == [row.input_ids for row in second.examples]
        assert first.sha256 == second.sha256

    def test_a_file_comes_first(self, stream: Any, tokenizer: Any, hub: Path) -> None:
        rows = load(stream(TEA, hub=self.source(hub)), tokenizer)
        assert (len(rows), rows.summary["from_hub"]) == (12, False)

    def test_a_missing_file_names_the_way_to_get_it(self, stream: Any, tokenizer: Any) -> None:
        message = (
            r"stream 'drinks', task 'tea': no file .*test\.json; give the folder that holds test\.json as --data_dir"
        )
        with pytest.raises(LoricaError, match=message):
            load(stream(), tokenizer)

    def test_without_file_and_data_set_both_ways_are_named(self, stream: Any, tokenizer: Any, hub: Path) -> None:
        made = stream(hub=self.source(hub, test_split="tset"))
        with pytest.raises(LoricaError, match=r"no file .*test\.json, and split 'tset' of .*--data_dir, or connect"):
            load(made, tokenizer)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"labels": {"kindd": ["Tea"]}},
                r":1: missing field: 'kindd'; the data set has text, kind\. Did you mean 'kind'",
            ),
            ({"labels": {"kind": ["Tea"]}}, r":2: unknown label: 'kind' is 1, expected 0 to 0"),
            ({"fields": {"sentence": "{txt}", "label": "{kind}"}}, r":1: missing field: 'txt'"),
        ],
    )
    def test_columns_that_are_not_there_are_named(
        self, stream: Any, tokenizer: Any, hub: Path, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(LoricaError, match=message):
            load(stream(hub=self.source(hub, **fields)), tokenizer)
