"""Scores against slow references: one row at a time, no padding, no sorting."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lorica.data.dataset import EncodedDataset, load
from lorica.evaluation.evaluator import evaluate, exact_match, mean_loss
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
        ended = False
        for _ in range(6):
            following = llama(ids).logits[:, -1].argmax(-1, keepdim=True)
            ended = following.item() == 1
            if ended:
                break
            ids = torch.cat([ids, following], dim=1)
        assert answer == (TOKENIZER.decode(ids[0, len(prompt or [0]) :], skip_special_tokens=True), ended)


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


def scripted(model: Any, script: dict[int, int]) -> Any:
    """Return a copy of a model that writes, after each token, the token that the script names."""
    writer, read = copy.deepcopy(model), {}
    likely = torch.full((len(TOKENIZER), len(TOKENIZER)), 10.0)
    likely[list(script), list(script.values())] = 50.0

    def remember(module: Any, args: Any, given: Any) -> None:
        read["ids"] = given["input_ids"]

    def follow(module: Any, args: Any, output: Any) -> Any:
        output.logits = likely[read["ids"]][:, -output.logits.shape[1] :]
        return output

    writer.register_forward_pre_hook(remember, with_kwargs=True)
    writer.register_forward_hook(follow)
    return writer


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def chain(text: str, end: int | None) -> dict[int, int]:
    """Return the script that writes a text, whose characters differ, and then the end token or spaces for ever."""
    ids = ids_of(text)
    space = ids_of(" ")[0]
    return {space: space, **dict(pairwise(ids)), ids[-1]: space if end is None else end}


def answered(tmp_path: Path, *pairs: tuple[str, str]) -> EncodedDataset:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs))
    return load(path, TOKENIZER)


def test_exact_match_counts_what_the_model_writes(llama: Any, tmp_path: Path) -> None:
    rows = answered(tmp_path, ("?", "abc"), ("..?", "abd"), ("!?", " abc"), (".?", "ab"))
    writer = scripted(llama, chain("?abc", end=1))
    for batch_size in (1, 2, 4):
        assert exact_match(writer, rows, TOKENIZER, batch_size=batch_size) == (50.0, 4)


def test_an_answer_that_does_not_end_is_no_match(llama: Any, tmp_path: Path) -> None:
    rows = answered(tmp_path, ("?", "abc"))
    assert exact_match(scripted(llama, chain("?abc", end=None)), rows, TOKENIZER, batch_size=2) == (0.0, 1)


def test_what_a_chat_template_puts_behind_an_answer_has_room(llama: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    )
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "abc"}]
    path.write_text(json.dumps({"messages": turns}))
    writer = scripted(llama, chain("?abc ", end=1))
    assert exact_match(writer, load(path, tokenizer), tokenizer, batch_size=1) == (100.0, 1)


def test_a_batch_is_written_for_its_own_longest_answer(llama: Any, monkeypatch: Any, tmp_path: Path) -> None:
    rows = answered(tmp_path, ("?", "abcdefgh"), ("..?", "a"), (".?", "ab"))
    asked: list[int] = []
    generate = type(llama).generate
    monkeypatch.setattr(
        type(llama),
        "generate",
        lambda self, **given: asked.append(given["generation_config"].max_new_tokens) or generate(self, **given),
    )
    exact_match(llama, rows, TOKENIZER, batch_size=2)
    assert asked == [3, 9]


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 6},
        {"suppress_tokens": ids_of("b")},
        {"begin_suppress_tokens": ids_of("a")},
        {"bad_words_ids": [ids_of("c")]},
        {"do_sample": True, "temperature": 90.0, "top_k": 0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"stop_strings": ["b"]},
        {"return_dict_in_generate": True},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_generation_settings_of_a_model_change_nothing(own: dict[str, Any], llama: Any) -> None:
    writer, prompt = scripted(llama, chain("?abc", end=1)), ids_of("b?")
    writer.generation_config.update(**own)
    kept = writer.generation_config.to_dict()
    try:
        by_itself = writer.generate(torch.tensor([prompt]), max_new_tokens=8)
    except ValueError:
        by_itself = None
    assert not torch.is_tensor(by_itself) or by_itself.tolist() != [prompt + ids_of("abc") + [1]], "it has an effect"
    assert greedy_answers(writer, TOKENIZER, [prompt], max_new_tokens=8) == [("abc", True)]
    assert writer.generation_config.to_dict() == kept


@pytest.mark.parametrize("end", [1, 7])
@pytest.mark.parametrize("own", [7, [7], [8, 7]])
def test_the_tokenizer_s_and_the_model_s_end_tokens_end_an_answer(own: Any, end: int, llama: Any) -> None:
    writer = scripted(llama, chain("?abc", end=end))
    writer.generation_config.eos_token_id = own
    answers = greedy_answers(writer, TOKENIZER, [ids_of("?"), ids_of("b?")], max_new_tokens=9)
    assert answers == [("abc", True)] * 2


@pytest.fixture(scope="module")
def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=len(TOKENIZER),
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_generation_stays_within_learned_positions(gpt2: Any) -> None:
    """The last position is used, and a crowded prompt takes no room from the others of its batch."""
    prompts = [[5] * length for length in (63, 40, 64, 63, 3)]
    written = greedy_answers(gpt2, TOKENIZER, prompts, max_new_tokens=20, batch_size=5)
    room = [2, 20, 1, 2, 20]
    for prompt, answer, most in zip(prompts, written, room, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(most):
            following = gpt2(ids).logits[:, -1].argmax(-1, keepdim=True)
            if following.item() == 1:
                break
            ids = torch.cat([ids, following], dim=1)
        assert answer.text == TOKENIZER.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_prompts_cut_to_the_positions_are_scored(gpt2: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "p" * length, "completion": "an answer of twenty-nine bytes"} for length in (10, 60, 100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load(path, TOKENIZER, max_length=64)
    assert max(len(row.prompt_ids or []) for row in dataset.examples) == 63
    score = evaluate(gpt2, dataset, TOKENIZER, batch_size=2)
    assert score["answers"] == 3


def test_a_decoder_of_its_own_has_all_positions_for_the_answer() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, vocab_size=len(TOKENIZER),
        bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.final_logits_bias[0, 9] = 100.0
    written = greedy_answers(model, TOKENIZER, [[5] * 16, [6]], max_new_tokens=30)
    assert [(ids_of(one.text), one.ended) for one in written] == [([9] * 16, False)] * 2


def test_progress_counts_the_batches_of_loss_and_generation_together(llama: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    dataset = data(tmp_path)
    evaluate(llama, dataset, TOKENIZER, batch_size=3, progress=lambda *given: told.append(given))
    assert told == [*(("loss", done, 6) for done in (1, 2, 3)), *(("answers", done, 6) for done in (4, 5, 6))]
    told.clear()
    mean_loss(llama, dataset, TOKENIZER, batch_size=7, progress=lambda *given: told.append(given))
    exact_match(llama, dataset, TOKENIZER, batch_size=4, progress=lambda *given: told.append(given))
    assert told == [("loss", 1, 1), ("answers", 1, 2), ("answers", 2, 2)]


def test_progress_without_answers_ends_with_the_loss(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "only text"}\n')
    told: list[tuple[str, int, int]] = []
    evaluate(llama, load(path, TOKENIZER), TOKENIZER, progress=lambda *given: told.append(given))
    assert told == [("loss", 1, 1)]


def test_rows_without_answers_have_no_exact_match(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "only text"}\n')
    score = evaluate(llama, load(path, TOKENIZER), TOKENIZER)
    assert score["exact_match"] is None
    assert score["answers"] == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.reliability("R34")
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
