"""What a model answers to prompts by itself: how it is written, what is held of it, and what an update makes of it."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorica
from lorica.config import UpdateConfig, build_config
from lorica.data.example import IGNORED_LABEL
from lorica.errors import LoricaError
from lorica.forecast.batches import batches_of
from lorica.forecast.dry_model import assumptions, begin
from lorica.forecast.options import build_forecast_config
from lorica.forecast.protection import measured
from lorica.forecast.story import expected
from lorica.inputs import Inputs, asked_of
from lorica.methods import METHODS
from lorica.methods.own_texts import first_tokens
from lorica.methods.predicted import KEPT
from lorica.methods.rehearsal import Rehearsal
from lorica.subspace import answers
from lorica.subspace.answers import own_answers
from lorica.subspace.calibration import own_text
from lorica.training.arguments import training_arguments
from lorica.training.models import load_model_config, load_tokenizer
from tests.builders import same_bases, task_of, tiny
from tests.experiments.conftest import Write, run, write  # noqa: F401
from tests.methods.little_text import little_text  # noqa: F401
from tests.methods.test_rehearsal import INPUTS, changed, dense, update
from tests.training.conftest import llama_folder, t5_folder  # noqa: F401

PROMPTS = [[3, 9, 14], [21], [8, 33, 2, 40, 17, 50, 11], [30, 31]]
FAMILIES = ["llama", "gpt2", "opt", "t5"]
END = 5
LENGTH = 12

short_answers = partial(own_answers, length=LENGTH)


def writer(family: str, certain: float = 1.0) -> Any:
    """Return a tiny model that can end its answers; the larger ``certain``, the less its writing is left to chance."""
    model = tiny(family).eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    model.config.bos_token_id = 1
    with torch.no_grad():
        if family == "t5":  # tied, and its encoder hardly heard, it would say its last token again
            model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
            for block in model.decoder.block:
                block.layer[1].EncDecAttention.o.weight.mul_(30.0)
        model.get_output_embeddings().weight.mul_(certain)
    return model


def pairs(model: Any, batches: list[dict[str, Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Return prompt and answer of each row."""
    found = []
    for batch in batches:
        for ids, mask, labels in zip(*(batch[n] for n in ("input_ids", "attention_mask", "labels")), strict=True):
            shown, answer = ids[mask.bool()].tolist(), labels[labels != IGNORED_LABEL].tolist()
            if not model.config.is_encoder_decoder:
                assert shown[-len(answer) :] == answer
                shown = shown[: -len(answer)]
                assert (labels[: len(shown)] == IGNORED_LABEL).all()
            found.append((shown, answer))
    return found


def greedily(model: Any, prompt: list[int], most: int) -> list[int]:
    """Return the likeliest token again and again, by whole passes over one prompt without padding or cache."""
    answer: list[int] = []
    while len(answer) < most and END not in answer:
        if model.config.is_encoder_decoder:
            decoded = torch.tensor([[model.config.decoder_start_token_id, *answer]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_certain_answers_each_prompt_as_if_it_were_alone(family: str) -> None:
    """Prompts of several lengths in one batch: padding moves no answer."""
    model = writer(family, certain=1e7)
    with torch.no_grad():
        wanted = {tuple(prompt): greedily(model, prompt, LENGTH) for prompt in PROMPTS}
        found = pairs(model, short_answers(model, PROMPTS, tokens=len(PROMPTS) * LENGTH))
    assert {tuple(prompt): answer for prompt, answer in found} == wanted
    assert len({tuple(answer) for answer in wanted.values()}) > 1, "else any answer would do"


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_logit(family: str) -> None:
    model, seen = writer(family), []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(output.logits[:, -1]))
    asked = [prompt for prompt, _ in pairs(model, short_answers(model, PROMPTS, tokens=len(PROMPTS) * LENGTH))]
    hook.remove()
    start = {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([prompt]), **start).logits[0, -1] for prompt in asked]
    torch.testing.assert_close(seen[0], torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompts_are_answered_in_turn_until_there_are_so_many_tokens(family: str) -> None:
    model = writer(family)
    model.train()
    state, own = torch.get_rng_state(), model.generation_config
    batches = short_answers(model, PROMPTS, tokens=150, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own
    assert model.training
    found = pairs(model, batches)
    counts = [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches]
    assert sum(counts) >= 150 > sum(counts[:-1])
    times = Counter(tuple(prompt) for prompt, _ in found)
    assert set(times) == set(map(tuple, PROMPTS))
    assert max(times.values()) - min(times.values()) <= 1
    assert len({tuple(answer) for prompt, answer in found if prompt == PROMPTS[0]}) == times[tuple(PROMPTS[0])]
    assert all(END not in answer[:-1] and 1 <= len(answer) <= LENGTH for _, answer in found)
    assert pairs(model, short_answers(model, PROMPTS, tokens=150, batch_size=4)) == found
    assert pairs(model, short_answers(model, PROMPTS, tokens=150, batch_size=4, seed=1)) != found


def test_each_prompt_is_answered_so_often_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = writer("llama")
    monkeypatch.setattr(answers, "ROUNDS", 2)
    times = Counter(tuple(prompt) for prompt, _ in pairs(model, short_answers(model, PROMPTS, tokens=10**6)))
    assert times == {tuple(prompt): 2 for prompt in PROMPTS}


def test_an_empty_answer_is_its_end() -> None:
    model = writer("t5")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), -1e4))
        model.lm_head.bias[END] = 1e4
    assert {tuple(answer) for _, answer in pairs(model, short_answers(model, PROMPTS, tokens=3))} == {(END,)}


def test_an_encoder_decoder_learns_no_prompts() -> None:
    method, model = METHODS["osft"].build({"rehearse": 0.5, "rehearse_prompts": 0.1, "prompts": [[3, 4]]}), tiny("t5")
    with pytest.raises(LoricaError, match="rehearse_prompts is for causal models"):
        method.begin_task(model, task_of(model, 0, 1))


def test_a_model_that_writes_nothing_is_refused_by_name() -> None:
    with pytest.raises(LoricaError, match=r"^prompts_file is for models that write text"):
        own_answers(tiny("bert-classifier"), PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_penalty_is_the_mean_over_the_answers_alone(family: str) -> None:
    """Text by text, without padding, with all probabilities (the vocabulary is smaller than what is kept)."""
    before, after = writer(family), changed(writer(family))
    batches = short_answers(before, PROMPTS, tokens=60, batch_size=4)
    rehearsal = Rehearsal.of(before, batches, 0.5, 2.5)
    written = pairs(before, batches)
    assert rehearsal.positions == sum(len(answer) for _, answer in written)
    assert [len(told.rest_T) for told in rehearsal.told] == [len(answer) for _, answer in written]
    drawn = rehearsal._draw(2)
    rehearsal.drawn = 0
    with torch.no_grad():
        found = rehearsal.penalty(after, INPUTS).item()
        each = []
        for prompt, answer in (written[index] for index in drawn):
            ids, kwargs, first = prompt + answer, {}, len(prompt) - 1
            if family == "t5":
                ids, kwargs, first = prompt, {"decoder_input_ids": torch.tensor([[0, *answer[:-1]]])}, 0
            p, q = (
                model(input_ids=torch.tensor([ids]), **kwargs).logits[0, first : first + len(answer)]
                for model in (before, after)
            )
            each.append(dense(p, q, KEPT))
    assert found == pytest.approx(2.5 * torch.cat(each).mean().item(), rel=1e-3)
    assert found > 1e-3


def begun(family: str, **options: Any) -> Any:
    short = {"rehearse_length": LENGTH} if "rehearse" in options else {}
    method, model = METHODS["osft"].build({"prompts": PROMPTS} | short | options), writer(family)
    method.begin_task(model, task_of(model, 0, 1))
    return method


def test_a_causal_model_rehearses_as_much_of_its_text_as_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}
    written = {"own_text": own_text, "own_answers": own_answers}

    def noting(name: str) -> Any:
        def write(*args: Any, tokens: int, **given: Any) -> Any:
            asked[name] = tokens
            return written[name](*args, tokens=tokens, **given)

        return write

    for name in written:
        monkeypatch.setattr(f"lorica.methods.own_texts.{name}", noting(name))
    held = begun("llama", rehearse=1.0, rehearse_tokens=401).rehearsal
    assert asked == {"own_text": 201, "own_answers": 200}
    answered = [told for told, text in zip(held.told, held.texts, strict=True) if text.ids[0] != 1]
    assert 200 <= sum(len(told.rest_T) for told in answered) < 200 + 4 * LENGTH
    assert len(answered) < len(held.texts)


def test_an_encoder_decoder_rehearses_its_answers() -> None:
    held = begun("t5", rehearse=1.0, rehearse_tokens=200).rehearsal
    assert {tuple(text.ids.tolist()) for text in held.texts} == set(map(tuple, PROMPTS))
    assert 200 <= held.positions < 200 + 4 * LENGTH


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"rehearse": 1.0, "rehearse_tokens": 100, "rehearse_length": LENGTH}], ids=["alone", "rehearsed"]
)
def test_the_answers_calibrate_in_place_of_text_from_bos(family: str, options: dict[str, Any]) -> None:
    amount = {} if not options else {"tokens": 100 if family == "t5" else 50, "length": LENGTH}
    method = METHODS["osft"].build({"prompts": PROMPTS, "source": "curvature"} | options)
    model, alike = writer(family), writer(family)
    method.begin_task(model, task_of(model, 0, 1))
    batches = own_answers(alike, PROMPTS, **amount)
    lorica.protect(alike, lorica.plan(alike, source="curvature", calibration=batches))
    assert same_bases(model, alike)


def rows_of(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    return [ids.tolist() for part in batches for ids in part["input_ids"]]


@pytest.mark.parametrize("tokens", [1, 30, 60, 10_000])
def test_the_first_of_what_was_written_calibrate(tokens: int) -> None:
    """No text and no answer ends before its greatest length; of prompts and answers the answers count."""
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    texts = own_text(model, tokens=100, length=10, batch_size=4)
    answers = short_answers(model, PROMPTS, tokens=100, batch_size=4)
    for written, each in ((texts, 10), (answers, LENGTH)):
        first = first_tokens(written, tokens)
        wanted = min(-(-tokens // each), len(rows_of(written)))
        assert rows_of(first) == rows_of(written)[:wanted]
        assert all(set(part) == set(written[0]) for part in first)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_calibration_tokens_are_the_first_of_those_to_rehearse(family: str) -> None:
    options = {"rehearse": 1.0, "rehearse_tokens": 200, "rehearse_length": LENGTH, "source": "curvature"}
    method = METHODS["osft"].build({"prompts": PROMPTS, "calibration_tokens": 20} | options)
    model, alike = writer(family), writer(family)
    method.begin_task(model, task_of(model, 0, 1))
    assert method.rehearsal.positions >= 200
    batches = first_tokens(short_answers(alike, PROMPTS, tokens=200 if family == "t5" else 100), 20)
    lorica.protect(alike, lorica.plan(alike, source="curvature", calibration=batches))
    assert same_bases(model, alike)


def test_calibration_tokens_bound_what_is_answered_for_calibration_alone() -> None:
    method = METHODS["osft"].build({"prompts": PROMPTS, "source": "curvature", "calibration_tokens": 60})
    model, alike = writer("llama"), writer("llama")
    method.begin_task(model, task_of(model, 0, 1))
    batches = own_answers(alike, PROMPTS, tokens=60)
    lorica.protect(alike, lorica.plan(alike, source="curvature", calibration=batches))
    assert same_bases(model, alike)


def test_more_calibration_tokens_than_are_written_are_refused() -> None:
    with pytest.raises(LoricaError, match="calibration_tokens = 201 is more than the 200 that are written"):
        begun("llama", rehearse=1.0, rehearse_tokens=200, calibration_tokens=201, source="curvature")


@pytest.mark.parametrize(
    "options",
    [{}, {"source": "activation", "calibration": "random"}, {"source": "activation", "calibration": [INPUTS]}],
)
def test_prompts_that_nothing_asks_for_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LoricaError, match="prompts_file has no effect without rehearse or calibration 'self'"):
        METHODS["osft"].build({"prompts": PROMPTS} | options)


def prompts_file(folder: Path, answer: str = "", ask: str = "What is {}?") -> str:
    """Write rows of several formats, with answers of which nothing must be seen."""
    rows: list[dict[str, Any]] = []
    for number in range(8):
        asked = ask.format(number)
        rows.append({"prompt": asked} | ({"completion": answer} if answer else {}))
        turns = [{"role": "user", "content": asked + "?"}]
        rows.append({"messages": turns + ([{"role": "assistant", "content": answer}] if answer else [])})
        rows.append({"instruction": asked + "!"} | ({"output": answer} if answer else {}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def moved(before: Path, after: Path, prompts: list[list[int]], kind: str) -> float:
    """Return how far what a trained model predicts is from before, on other answers to the prompts."""
    import transformers

    models = [getattr(transformers, kind).from_pretrained(folder) for folder in (before, after)]
    held = Rehearsal.of(models[0], short_answers(models[0], prompts, tokens=1000, seed=77), 8.0, 1.0)
    with torch.no_grad():
        return held.penalty(models[1], INPUTS).item()


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "t5"])
def test_an_update_that_rehearses_answers_prompts_more_as_before(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    kind = {"llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}[family]
    file, ends = prompts_file(tmp_path), []
    config = build_config(
        {"model_name_or_path": str(folder), "prompts_file": file, "train_file": "-", "output_dir": "-"}
    )
    ids = asked_of(config, seq2seq=family == "t5", max_length=200)
    assert ids is not None
    for options in ({}, {"rehearse": 1.0, "rehearse_weight": 1e3, "rehearse_tokens": 1000, "prompts_file": file}):
        record = update(folder, tmp_path / str(len(options)), **options)
        ends.append(moved(folder, tmp_path / str(len(options)) / "model", ids, kind))
    assert ends[1] < 0.75 * ends[0], ends
    assert record["data"]["prompts"]["kept"] == len(ids) == 24


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_a_model_is_asked_the_same_whatever_the_answers_in_the_file(t5_folder: Path, tmp_path: Path) -> None:
    asked = []
    for given in ({}, {"answer": "seven"}, {"answer": "eight of them"}, {"ask": "{} is?"}):
        config = {"model_name_or_path": str(t5_folder), "prompts_file": prompts_file(tmp_path, **given)}
        asked.append(asked_of(build_forecast_config(config), seq2seq=True, max_length=100))
    assert asked[0] == asked[1] == asked[2] != asked[3]


@pytest.mark.slow
def test_no_answer_of_the_file_is_seen(t5_folder: Path, tmp_path: Path) -> None:
    """The same prompts with other answers, or none, make the same weights; other prompts make others."""
    files = {"none": {}, "answered": {"answer": "eight of them"}, "other": {"ask": "{} is?"}}
    made = {}
    for name, given in files.items():
        (tmp_path / name).mkdir()
        file = prompts_file(tmp_path / name, **given)
        options = {"source": "activation", "rehearse": 1.0, "rehearse_weight": 30.0, "rehearse_tokens": 100}
        update(t5_folder, tmp_path / name / "out", prompts_file=file, max_steps=2, **options)
        made[name] = weights(tmp_path / name / "out")
    same = {
        name: all(torch.equal(made["none"][key], tensor) for key, tensor in found.items())
        for name, found in made.items()
    }
    assert same == {"none": True, "answered": True, "other": False}


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty": ("", {}, "prompts.jsonl: no prompt in it"),
    "no prompt": ('{"text": "x"}', {}, "prompts.jsonl:1: missing field: a prompt is in one of"),
    "blank": ('{"prompt": "x"}\n{"prompt": " "}', {}, "prompts.jsonl:2: empty field: 'prompt'"),
    "too long": (json.dumps({"prompt": "x" * 250}), {}, r"prompts.jsonl:1: a prompt of 250 tokens, and it may have 192 "
                 r"\(64 of max_length 256 are for its answer\)"),
    "idle": ('{"prompt": "x"}', {"rehearse": 0.0}, "prompts_file has no effect without rehearse"),
    "another method": ('{"prompt": "x"}', {"method": "seqft", "rehearse": 0.0}, "prompts_file has no effect with"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_prompts_shows_before_a_weight_is_loaded(
    name: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, options, message = BAD[name]
    monkeypatch.setattr(lorica.update, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(LoricaError, match=message):
        update(
            llama_folder,
            tmp_path / "out",
            **{"rehearse": 1.0, "prompts_file": str(tmp_path / "prompts.jsonl")} | options,
        )
    assert not (tmp_path / "out" / "model").exists()


def test_prompts_are_an_option_of_a_method_in_a_stream(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    """They lie beside the stream; their answers make no difference, and going on with other prompts is refused."""
    options = {"rehearse": 0.5, "rehearse_tokens": 200}
    settings = {
        name: {"method": "osft", "learning_rate": 1e-2, "options": options | given}
        for name, given in {"asked": {"prompts_file": "prompts.jsonl"}, "unasked": {}}.items()
    }

    def one(out: str, *methods: str, **given: str) -> list[dict[str, Any]]:
        prompts_file(tmp_path / "stream", **given)
        return run(stream, llama_folder, tmp_path / out, methods=list(methods), max_steps=2)[0]

    stream = write(methods=settings)
    asked, unasked = one("out", "asked", "unasked", answer="seven")
    (again,) = one("again", "asked")
    assert asked["leakage"] == again["leakage"] != unasked["leakage"]
    with pytest.raises(LoricaError, match="was begun with prompts as tokens"):
        one("out", "asked", ask="Why {}?")


def test_a_stream_names_what_is_wrong_with_prompts(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    settings = {"asked": {"method": "osft", "options": {"rehearse": 0.5, "prompts_file": "absent.jsonl"}}}
    with pytest.raises(LoricaError, match=r"method 'asked': .*absent.jsonl: no such file"):
        run(write(methods=settings), llama_folder, tmp_path / "out", methods=["asked"], max_steps=3)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_forecast_counts_the_longest_prompt(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    given = {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "out"), "rehearse": 1.0, "use_cpu": True}
    given |= {"preset": "paper", "prompts_file": str(tmp_path / "p.jsonl"), "train_file": str(tmp_path / "rows.jsonl")}
    peaks = []
    for prompts in (["x"], ["y" * 150, "x"]):
        (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
        config = build_config(given)
        inputs = Inputs(config, load_tokenizer(config), seq2seq=family == "t5")
        peaks.append(expected(config, inputs).device_bytes)
        bare = build_forecast_config({name: value for name, value in given.items() if name != "train_file"})
        arguments = training_arguments({}, "", hidden_size=48, seq2seq=family == "t5")
        assert batches_of(bare, arguments, load_model_config(config)).prompt == len(prompts[0])
    assert peaks[1] > peaks[0] + 10_000, "without data too"
    assert any("each with the longest prompt" in line for line in assumptions(config))


def test_a_forecast_refuses_what_training_would(tmp_path: Path) -> None:
    config = UpdateConfig(model_name_or_path="m", train_file="rows", output_dir="out", prompts_file="p")
    with pytest.raises(LoricaError, match="prompts_file has no effect without rehearse"):
        begin(None, config, None)  # type: ignore[arg-type]


def test_a_measured_check_looks_at_the_answers(
    t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def few(model: Any, prompts: list[list[int]], **given: Any) -> Any:
        asked.append(len(prompts))
        return own_answers(model, prompts, tokens=50)

    for module in ("methods.own_texts", "forecast.protection"):
        monkeypatch.setattr(f"lorica.{module}.own_answers", few)
    file = prompts_file(tmp_path)
    config = {"model_name_or_path": str(t5_folder), "source": "activation", "prompts_file": file, "use_cpu": True}
    assert [one.source for one in measured(build_forecast_config(config))] == ["activation", "weight"]
    assert asked == [24, 24], "by what plans, and by what measures"


def test_without_prompts_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.methods.own_texts.own_answers", lambda *_, **__: pytest.fail("a prompt was asked for"))
    method, model = METHODS["osft"].build({"rehearse": 1.0, "source": "activation"}), writer("llama")
    method.begin_task(model, task_of(model, 0, 1))
    texts = own_text(writer("llama"), seed=0)
    assert method.rehearsal is not None
    assert method.rehearsal.positions == sum(int(batch["attention_mask"][:, 1:].sum()) for batch in texts)
