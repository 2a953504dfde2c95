"""Constrained choices against one forward pass per token, without padding, sorting or sharing."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from lorica.errors import LoricaError
from lorica.evaluation.choices import choice_scores, choose
from tests.builders import VOCABULARY, tiny

BOS, EOS, PAD = 1, 2, 0


def letters(*, bos: bool = False, marks_start: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters; on request with BOS in front, or marking the start of a string."""
    signs = [*string.ascii_lowercase, " ", "?", "!", "\u2581", ".", "\n"]
    vocabulary = {sign: index for index, sign in enumerate(["<pad>", "<s>", "</s>", *signs])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    split = pre_tokenizers.Split(Regex("."), "isolated")
    meta = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([meta, split]) if marks_start else split
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TOKENIZER = letters()
PROMPTS = ["is it?", "what a long question this is?", "x", "and this one!", "short?", "which of these is it?"]
CHOICES = [["a", "b", "c"], ["yes", "no"], ["same", "sane", "lame"], ["q"], ["no way", "nor", "x"], ["a", "ab", "c"]]


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def decided(name: str) -> Any:
    """Return a small model whose choices are no near ties."""
    model = tiny(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return decided("llama")


@pytest.fixture(scope="module", params=["llama", "t5", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return decided(request.param)


@torch.no_grad()
def literal(model: Any, prompt: list[int], ending: list[int]) -> float:
    total = 0.0
    for place, token in enumerate(ending):
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *ending[:place]]])}
        else:
            given = {"input_ids": torch.tensor([[*prompt, *ending[:place]]])}
        total += model(**given).logits[0, -1].log_softmax(-1)[token].item()
    return total


def expected(model: Any) -> list[list[float]]:
    rows = []
    for prompt, texts in zip(PROMPTS, CHOICES, strict=True):
        end = [EOS] if "ab" in texts else []
        rows.append([literal(model, ids_of(prompt), ids_of(text) + end) for text in texts])
    return rows


def close(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=2e-4)


def test_scores_equal_one_token_at_a_time(model: Any) -> None:
    prompts = [ids_of(prompt) for prompt in PROMPTS]
    wanted = expected(model)
    for batch_size in (1, 2, 5, 64):
        close(choice_scores(model, TOKENIZER, prompts, CHOICES, batch_size=batch_size), wanted)
    best = [max(range(len(row)), key=row.__getitem__) for row in wanted]
    assert choose(model, TOKENIZER, prompts, CHOICES) == best
    assert len(set(best)) > 1


def test_normalisation_divides_by_the_length_of_each_choice(llama: Any) -> None:
    prompts, texts = [ids_of("is it?")], [[" b", "no way ", "c"]]
    (plain,) = choice_scores(llama, TOKENIZER, prompts, texts)
    (tokens,) = choice_scores(llama, TOKENIZER, prompts, texts, normalise="tokens")
    (characters,) = choice_scores(llama, TOKENIZER, prompts, texts, normalise="characters")
    assert tokens == pytest.approx([plain[0] / 2, plain[1] / 7, plain[2]])
    assert characters == pytest.approx([plain[0], plain[1] / 6, plain[2]])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_rows_do_not_see_each_other(data: st.DataObject) -> None:
    model = decided("llama")
    texts = st.text(alphabet="abc ?", min_size=1, max_size=6)
    answers = st.lists(texts.filter(str.strip), min_size=1, max_size=4)
    rows = data.draw(st.lists(st.tuples(texts, answers), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(rows))))
    prompts, choices = [ids_of(prompt) for prompt, _ in rows], [answers for _, answers in rows]
    together = choice_scores(model, TOKENIZER, prompts, choices, batch_size=data.draw(st.integers(1, 9)))
    shuffled = choice_scores(model, TOKENIZER, [prompts[i] for i in order], [choices[i] for i in order])
    close([together[i] for i in order], shuffled)
    single = [choice_scores(model, TOKENIZER, [p], [c])[0] for p, c in zip(prompts, choices, strict=True)]
    close(together, single)


def teach(model: Any, pairs: list[tuple[str, str]]) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        for prompt, answer in pairs:
            ids = torch.tensor([[*ids_of(prompt), *ids_of(answer), EOS]])
            labels = ids.clone()
            labels[:, : len(ids_of(prompt))] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_a_choice_that_another_begins_with_wins_only_where_it_is_the_answer() -> None:
    model = teach(tiny("llama").train(), [("is it?", "ab"), ("say more!", "abc")])
    prompts = [ids_of("is it?"), ids_of("say more!")]
    assert choose(model, TOKENIZER, prompts, [["ab", "abc"]] * 2) == [0, 1]
    assert choose(model, TOKENIZER, prompts, [["abc", "ab"]] * 2) == [1, 0]


def test_choices_that_differ_in_their_last_token_are_read_once(llama: Any) -> None:
    seen: list[tuple[int, int]] = []
    hook = llama.register_forward_hook(lambda module, args, output: seen.append(tuple(output.logits.shape[:2])))
    try:
        prompts = [ids_of("is it?"), ids_of("or so?")]
        choose(llama, TOKENIZER, prompts, [["a", "b", "c", "d"]] * 2)
        choose(llama, TOKENIZER, prompts, [["xa", "xb", "cx"]] * 2)
    finally:
        hook.remove()
    # Sequences read, and positions of each whose logits exist: the prompt's last one and what follows it.
    assert seen == [(2, 1), (4, 2)]


def test_a_prompt_too_long_for_the_model_loses_tokens_behind_its_start() -> None:
    gpt2, tokenizer = decided("gpt2"), letters(bos=True)
    assert gpt2.config.n_positions == 32
    long = [BOS, *ids_of("abcdefghij" * 4)]
    texts = ["yes", "no", "x"]
    # 32 positions, of which "yes" needs two: 30 for the prompt, the same 30 for every choice.
    kept = [BOS, *long[-29:]]
    wanted = [literal(gpt2, kept, ids_of(text)) for text in texts]
    close(choice_scores(gpt2, tokenizer, [long, ids_of("is it?")], [texts, ["a"]])[:1], [wanted])
    headless = long[1:]
    wanted = [literal(gpt2, headless[-30:], ids_of(text)) for text in texts]
    close(choice_scores(gpt2, tokenizer, [headless], [texts]), [wanted])
    fills = "ab" * 16
    close(choice_scores(gpt2, tokenizer, [long], [[fills]]), [[literal(gpt2, long[-1:], ids_of(fills))]])
    with pytest.raises(LoricaError, match="a choice of prompt 1 has 33 tokens, the model 32 positions"):
        choose(gpt2, tokenizer, [long, long], [["a"], ["b" * 33]])


def test_an_empty_prompt_is_the_first_token(model: Any) -> None:
    wanted = [literal(model, [BOS], ids_of(text)) for text in ("yes", "no")]
    close(choice_scores(model, TOKENIZER, [[]], [["yes", "no"]]), [wanted])


def test_a_choice_has_the_tokens_it_has_in_training(llama: Any) -> None:
    """A tokenizer that marks the start of a string does so for a string of its own, not for a continuation."""
    tokenizer = letters(bos=True, marks_start=True)
    mark = tokenizer.convert_tokens_to_ids("\u2581")
    prompt = [BOS, mark, *ids_of("is")]
    close(choice_scores(llama, tokenizer, [prompt], [["ab"]]), [[literal(llama, prompt, ids_of("ab"))]])
    for empty in ([], [BOS]):
        close(choice_scores(llama, tokenizer, [empty], [["ab"]]), [[literal(llama, [BOS], [mark, *ids_of("ab")])]])
    t5 = decided("t5")
    close(choice_scores(t5, tokenizer, [prompt], [["ab"]]), [[literal(t5, prompt, [mark, *ids_of("ab")])]])


def test_a_model_without_the_option_to_keep_few_logits(llama: Any) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = llama, llama.config

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    prompts = [ids_of(prompt) for prompt in PROMPTS]
    close(choice_scores(Whole(), TOKENIZER, prompts, CHOICES), choice_scores(llama, TOKENIZER, prompts, CHOICES))


@pytest.mark.parametrize("training", [True, False])
def test_choosing_leaves_no_trace(training: bool, llama: Any) -> None:
    llama.train(training)
    state = torch.get_rng_state()
    told: list[tuple[str, int, int]] = []
    prompts = [ids_of(prompt) for prompt in PROMPTS[:3]]
    choose(llama, TOKENIZER, prompts, CHOICES[:3], batch_size=2, progress=lambda *given: told.append(given))
    assert llama.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in llama.parameters())
    # 1 + 2 + 3 sequences: "same", "sane" and "lame" part before their last letter.
    assert told == [("choices", done, 3) for done in (1, 2, 3)]
    llama.eval()


def test_the_mode_is_put_back_after_an_error(llama: Any) -> None:
    llama.train()
    with pytest.raises(IndexError):
        choose(llama, TOKENIZER, [[10_000]], [["a"]])
    assert llama.training
    llama.eval()


@pytest.mark.parametrize(
    ("prompts", "choices", "options", "message"),
    [
        ([[5]], [["a"], ["b"]], {}, "1 prompts and choices for 2"),
        ([[5], [6]], [["a"], []], {}, "prompt 1 needs at least one choice"),
        ([[5]], [["a", " "]], {}, "prompt 0 needs at least one choice and none that is blank"),
        ([[5]], [["a"]], {"normalise": "token"}, "Did you mean 'tokens'"),
    ],
)
def test_mistakes_are_named(prompts: Any, choices: Any, options: Any, message: str, llama: Any) -> None:
    with pytest.raises(LoricaError, match=message):
        choose(llama, TOKENIZER, prompts, choices, **options)


def test_no_rows_need_no_model(llama: Any) -> None:
    assert choose(llama, TOKENIZER, [], []) == []
