"""Scores against slow references: one row at a time, no padding, no sorting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lorica.data.dataset import EncodedDataset, load
from lorica.evaluation.evaluator import evaluate, exact_match
from lorica.evaluation.generate import batches_by_length, greedy_answers
from tests.training.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPTS = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35, 36], [], [80, 81]]


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=len(TOKENIZER), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # decided answers: no ties between float roundings
    return model.eval()


@pytest.fixture(scope="module")
def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(TOKENIZER),
        pad_token_id=2, eos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def data(tmp_path: Path, seq2seq: bool = False) -> EncodedDataset:
    rows = [{"prompt": "ab" * i + "?", "completion": " " + "xyz"[: 1 + i % 3]} for i in range(1, 8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load(path, TOKENIZER, seq2seq=seq2seq)


def test_batched_generation_equals_one_prompt_at_a_time(llama: Any) -> None:
    batched = greedy_answers(llama, TOKENIZER, PROMPTS, max_new_tokens=6, batch_size=3)
    for prompt, answer in zip(PROMPTS, batched, strict=True):
        ids = torch.tensor([prompt or [0]])
        for _ in range(6):
            following = llama(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if following.item() == 1:
                break
        assert answer == TOKENIZER.decode(ids[0, len(prompt or [0]) :], skip_special_tokens=True)


def test_batched_generation_of_an_encoder_decoder(t5: Any) -> None:
    batched = greedy_answers(t5, TOKENIZER, PROMPTS, max_new_tokens=5, batch_size=2)
    single = [greedy_answers(t5, TOKENIZER, [prompt], max_new_tokens=5)[0] for prompt in PROMPTS]
    assert batched == single


def test_loss_weights_every_trained_token_equally(llama: Any, tmp_path: Path) -> None:
    dataset = data(tmp_path)
    total, count = 0.0, 0
    for row in dataset.examples:
        logits = llama(torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert evaluate(llama, dataset, TOKENIZER, batch_size=3)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_exact_match_counts_what_the_model_writes(llama: Any, tmp_path: Path) -> None:
    dataset = data(tmp_path)
    written = greedy_answers(llama, TOKENIZER, [row.prompt_ids or [] for row in dataset.examples], max_new_tokens=4)
    known = [0, 3, 4]
    for index, row in enumerate(dataset.examples):
        answer = f"  {written[index].strip()} " if index in known else "never written"
        object.__setattr__(row, "answer", answer)
    match, answers = exact_match(llama, dataset, TOKENIZER, batch_size=2)
    # An answer that the model goes on writing after is no match, so the known ones count only where it ends.
    ends = greedy_answers(llama, TOKENIZER, [row.prompt_ids or [] for row in dataset.examples], max_new_tokens=14)
    right = sum(ends[index].strip() == written[index].strip() for index in known)
    assert answers == len(dataset)
    assert match == pytest.approx(100 * right / len(dataset))


def test_rows_without_answers_have_no_exact_match(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "only text"}\n')
    score = evaluate(llama, load(path, TOKENIZER), TOKENIZER)
    assert score["exact_match"] is None
    assert score["answers"] == 0


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(training: bool, llama: Any, tmp_path: Path) -> None:
    dataset = data(tmp_path)
    llama.train(training)
    state = torch.get_rng_state()
    evaluate(llama, dataset, TOKENIZER)
    assert llama.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in llama.parameters())
    llama.eval()


def test_batches_hold_every_row_once_longest_first() -> None:
    batches = list(batches_by_length([3, 9, 1, 7, 7], 2))
    assert batches[0][0] == 1
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
