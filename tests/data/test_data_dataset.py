"""Batches and the front door: what a user's file turns into, and what is told about it."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.data import Collator, load, validate
from lorica.errors import LoricaError

PAIRS = [{"prompt": "hello ", "completion": "there"}, {"prompt": "what", "completion": " Paris"}]


class TestCollator:
    @given(
        rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=5),
        multiple=st.sampled_from([None, 1, 4]),
    )
    def test_padding_on_the_right_is_neither_attended_nor_trained(self, rows, multiple):
        batch = Collator(pad_token_id=9, pad_to_multiple_of=multiple)(
            [{"input_ids": row, "labels": row, "answer": None} for row in rows]
        )
        width = batch["input_ids"].shape[1]
        assert width % (multiple or 1) == 0
        assert width < max(map(len, rows)) + (multiple or 1)
        for i, row in enumerate(rows):
            rest = width - len(row)
            assert batch["input_ids"][i].tolist() == row + [9] * rest
            assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * rest
            assert batch["labels"][i].tolist() == row + [-100] * rest

    def test_pad_id_falls_back_to_eos_then_zero(self, make_tokenizer):
        tokenizer = make_tokenizer()
        assert Collator(tokenizer).pad_token_id == tokenizer.pad_token_id == 2
        tokenizer.pad_token = None
        assert Collator(tokenizer).pad_token_id == tokenizer.eos_token_id == 1
        assert Collator().pad_token_id == 0
        assert Collator(tokenizer, pad_token_id=0).pad_token_id == 0

    def test_encoder_decoder_labels_have_their_own_width(self):
        rows = [{"input_ids": [1, 2, 3], "labels": [4]}, {"input_ids": [1], "labels": [5, 6]}]
        batch = Collator(seq2seq=True)(rows)
        assert batch["labels"].tolist() == [[4, -100], [5, 6]]
        assert batch["input_ids"].shape == (2, 3)
        with pytest.raises(ValueError, match="differ in length"):
            Collator()(rows)

    def test_pad_to_multiple_of_must_be_positive(self):
        with pytest.raises(LoricaError, match="pad_to_multiple_of is 0"):
            Collator(pad_to_multiple_of=0)


class TestLoad:
    def test_rows_labels_and_record(self, write, tokenizer):
        path = write(PAIRS)
        data = load(path, tokenizer)
        assert isinstance(data, torch.utils.data.Dataset)
        assert len(data) == 2
        assert data[1] == {"input_ids": data.examples[1].input_ids, "labels": data.examples[1].labels}
        assert [example.answer for example in data.examples] == ["there", " Paris"]
        assert data.format == "prompt_completion"
        assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert data.rendered == "<s>hello «there</s>»"
        assert json.loads(json.dumps(data.summary)) == data.summary
        assert data.summary["loss"] == "completion only"

    def test_description_names_rows_format_loss_and_an_example(self, write, tokenizer):
        text = load(write(PAIRS + PAIRS[:1]), tokenizer).describe()
        for part in ("3 of 3 rows, format prompt_completion", "loss on: completion only", "1 of 3 rows repeat",
                     "<s>hello «there</s>»"):  # fmt: skip
            assert part in text

    def test_skipped_rows_are_counted_and_written(self, write, tokenizer, tmp_path):
        path = write([*PAIRS, {"prompt": "q"}])
        with pytest.raises(LoricaError, match=":3: missing field: 'completion'"):
            load(path, tokenizer)
        data = load(path, tokenizer, skip_invalid_rows=True, rejected_file=tmp_path / "rejected.jsonl")
        assert (data.summary["rows_read"], data.summary["kept"], data.summary["rejected"]) == (3, 2, 1)
        assert json.loads((tmp_path / "rejected.jsonl").read_text())["line"] == 3

    def test_ids_outside_the_vocabulary_are_rejected_rows(self, write, tokenizer):
        path = write([{"input_ids": [5, 1]}, {"input_ids": [5, len(tokenizer)]}])
        with pytest.raises(LoricaError, match=":2: id outside the vocabulary"):
            load(path, tokenizer)

    def test_earlier_validation_is_used_only_while_the_file_is_the_same(self, write, tokenizer):
        path = write(PAIRS)
        report = validate(path)
        assert load(path, tokenizer, validated=report).examples == load(path, tokenizer).examples
        write(PAIRS * 2)
        with pytest.raises(LoricaError, match="changed after it was checked"):
            load(path, tokenizer, validated=report)

    def test_loader_batches(self, write, tokenizer):
        data = load(write(PAIRS), tokenizer)
        loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=Collator(tokenizer))
        batch = next(iter(loader))
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        trained = (batch["labels"][:, 1:] != -100).sum().item()
        assert trained == data.summary["trained_tokens"]

    @pytest.mark.parametrize("template", [None, "chat"])
    def test_rendering_without_marks_is_the_row(self, write, make_tokenizer, template):
        source = random.Random(0)
        words = ["hello", "the cat", "Paris?", "\n", "é"]
        pairs = [{"prompt": source.choice(words), "completion": source.choice(words[:3])} for _ in range(8)]
        tokenizer = make_tokenizer(bos=template is None)
        for row in pairs:
            shown = load(write([row]), tokenizer).rendered
            assert shown.replace("«", "").replace("»", "").removeprefix("<s>") == (
                row["prompt"] + row["completion"] + "</s>"
            )
            assert shown.split("«")[1] == row["completion"] + "</s>»"
