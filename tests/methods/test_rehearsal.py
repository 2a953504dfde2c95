"""Rehearsal of a model's own text: the divergence against a dense reference, the drawing, and what OSFT makes of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lorica
from lorica.config import build_config
from lorica.data.collate import Collator, FlatCollator
from lorica.data.example import IGNORED_LABEL
from lorica.errors import LoricaError
from lorica.methods import METHODS, rehearsal
from lorica.methods.predicted import KEPT, Prediction
from lorica.methods.rehearsal import Rehearsal, Text, prompt_loss, row_count
from lorica.subspace import observe
from lorica.subspace.calibration import own_text
from lorica.update import train
from tests.builders import same_bases, task_of, tiny
from tests.experiments.conftest import Write, run, write  # noqa: F401
from tests.methods.little_text import little_text  # noqa: F401
from tests.training.conftest import llama_folder, t5_folder  # noqa: F401

TEXTS = {"tokens": 150, "length": 9, "batch_size": 8}


def logits_of(tokens: int, vocabulary: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def dense(p_TV: Tensor, q_TV: Tensor, kept: int) -> Tensor:
    """Return the divergence of distributions whose unlikely tokens are one, from probabilities in float64."""
    p_TV, q_TV = p_TV.double().softmax(-1), q_TV.double().softmax(-1)
    order = p_TV.argsort(-1, descending=True)
    p_TV, q_TV = p_TV.gather(-1, order), q_TV.gather(-1, order)
    p_TK, q_TK = (torch.cat([x[:, :kept], x[:, kept:].sum(-1, keepdim=True)], dim=-1) for x in (p_TV, q_TV))
    return torch.where(p_TK > 0, p_TK * (p_TK / q_TK).log(), 0.0).sum(-1)


@given(st.sampled_from([1, 2, KEPT - 1, KEPT, KEPT + 1, 300]), st.integers(0, 2**30), st.sampled_from([0.1, 3.0, 12.0]))
def test_the_divergence_is_the_dense_one(vocabulary: int, seed: int, scale: float) -> None:
    p, q = logits_of(5, vocabulary, seed, scale), logits_of(5, vocabulary, seed + 1, scale)
    found = Prediction.of(p).divergence(q)
    torch.testing.assert_close(found.double(), dense(p, q, KEPT), rtol=1e-4, atol=1e-5)
    whole = F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert bool((found <= whole + 1e-4 * (1 + whole)).all())
    if vocabulary <= KEPT:
        torch.testing.assert_close(found.double(), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [20, 200])
def test_the_gradient_is_that_of_the_dense_one(vocabulary: int) -> None:
    p, q = logits_of(4, vocabulary, 0), logits_of(4, vocabulary, 1).requires_grad_()
    (mine,) = torch.autograd.grad(Prediction.of(p).divergence(q).sum(), q)
    (theirs,) = torch.autograd.grad(dense(p, q, KEPT).sum(), q)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert float(mine.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["certain", "impossible rest", "impossible kept", "all but one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_impossible_has_a_finite_gradient(kind: str, dtype: torch.dtype) -> None:
    """The rest's probability is 0 in float32, or was 0 already in the logits."""
    p = logits_of(3, 100, 0)
    if kind == "certain":
        p[:, 7] = 6e4
    elif kind == "impossible rest":
        p[:, KEPT:] = -torch.inf
    else:
        p[:, 1 if kind == "all but one" else KEPT // 2 :] = -torch.inf
    q = (p + torch.where(p.isfinite(), logits_of(3, 100, 1), 0.0)).to(dtype).requires_grad_()
    divergence = Prediction.of(p.to(dtype)).divergence(q)
    (gradient,) = torch.autograd.grad(divergence.sum(), q)
    assert bool(divergence.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(divergence.double(), dense(p.to(dtype), q.detach(), KEPT), rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_no_number_shows() -> None:
    assert Prediction.of(logits_of(1, 100, 0)).divergence(torch.full((1, 100), torch.nan)).isnan().all()


def made(model: Any, ratio: float = 0.5, seed: int = 3) -> Rehearsal:
    return Rehearsal.of(model, own_text(model, **TEXTS, seed=seed), ratio, 1.0)


def changed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(logits_of(1, parameter.numel(), 5, 0.05).view_as(parameter))
    return model


INPUTS = {"labels": torch.zeros(4, 7, dtype=torch.int64)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_penalty_is_the_mean_over_the_positions_of_the_texts(family: str) -> None:
    """Text by text, without padding, with all probabilities (the vocabulary is smaller than what is kept)."""
    before, after = tiny(family).eval(), changed(tiny(family)).eval()
    before.config.bos_token_id = 1
    rehearsal = made(before)
    rehearsal.weight = 2.5
    drawn = rehearsal._draw(2)
    rehearsal.drawn = 0
    with torch.no_grad():
        found = rehearsal.penalty(after, INPUTS)
        each = [dense(*(m(rehearsal.texts[i].ids[None]).logits[0, :-1] for m in (before, after)), KEPT) for i in drawn]
    assert found.item() == pytest.approx(2.5 * torch.cat(each).mean().item(), rel=1e-3)
    assert found > 1e-3


def test_nothing_is_held_after_the_end_of_a_text() -> None:
    model = tiny("llama").eval()
    model.generation_config.eos_token_id = [5, 6]
    with torch.no_grad():
        model.lm_head.weight[5:7] = 0.0  # an end is likely enough to be met
    rehearsal = made(model)
    ends = [text.ids[1:].tolist() for text in rehearsal.texts]
    assert all(not {5, 6} & set(end[:-1]) for end in ends)
    assert {5, 6} & {end[-1] for end in ends}, "the end itself is rehearsed"
    assert [len(told.rest_T) for told in rehearsal.told] == [len(text.ids) - 1 for text in rehearsal.texts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_has_not_changed_pays_nothing_and_is_not_pulled(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype).train()
    rehearsal, tolerance = made(model), 1e-6 if dtype == torch.float32 else 1e-2
    penalty = rehearsal.penalty(model, INPUTS)
    penalty.backward()
    assert abs(penalty.item()) < tolerance
    pulls = max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None)
    changed(model).zero_grad()
    rehearsal.penalty(model, INPUTS).backward()
    assert pulls < tolerance * max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) * 10


def test_the_model_is_asked_in_parts_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", dropout=0.3).train()
    model.lm_head.eval()  # a mode of the user's own
    whole = made(model)
    state, own = torch.get_rng_state(), model.generation_config
    monkeypatch.setattr(rehearsal, "LOGITS", 1)
    parts = made(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training
    for one, two in zip(whole.told, parts.told, strict=True):
        torch.testing.assert_close(one.logp_TK, two.logp_TK)


@given(st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 3))
def test_every_text_is_drawn_before_one_is_drawn_again(total: int, sizes: list[int], processes: int) -> None:
    """By all processes together, however many are drawn at a time, and from where a checkpoint says."""

    def draws(rank: int, drawn: int = 0, sizes: list[int] = sizes) -> list[int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rehearsal.processes, "size", lambda: processes)
            patch.setattr(rehearsal.processes, "rank", lambda: rank)
            one = Rehearsal([torch.zeros(2)] * total, [], 0.5, drawn=drawn)  # type: ignore[list-item]
            return [index for size in sizes for index in one._draw(size)]

    together = [index for turn in zip(*(draws(rank) for rank in range(processes)), strict=True) for index in turn]
    counts = Counter(dict.fromkeys(range(total), 0) | Counter(together))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert draws(0, drawn=sizes[0], sizes=sizes[1:]) == draws(0)[sizes[0] :]
    if total > 8 and len(together) >= 2 * total:
        assert together[:total] != together[total : 2 * total], "each pass has an order of its own"


def test_every_text_is_drawn_about_as_often() -> None:
    one = Rehearsal([Text(torch.zeros(2), torch.zeros(2))] * 4, [], 1.0)
    counts = torch.bincount(torch.tensor([i for _ in range(500) for i in one._draw(4)]), minlength=4)
    assert float((counts - 500).abs().max()) < 100  # five standard deviations


@pytest.mark.parametrize(("ratio", "rows"), [(0.01, 1), (0.25, 1), (0.5, 2), (3.0, 12)])
def test_so_many_texts_go_beside_the_rows(ratio: float, rows: int) -> None:
    model = tiny("llama")
    rehearsal, seen = made(model, ratio), []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rehearsal.penalty(model, INPUTS)
    hook.remove()
    assert seen == [rows]


def test_rows_that_lie_end_to_end_are_counted() -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 1, 5)]
    assert row_count(FlatCollator()(rows)) == 3
    assert row_count(INPUTS) == 4


def test_bytes() -> None:
    told = Prediction(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5), torch.zeros(3))
    text = Text(*2 * [torch.zeros(4, dtype=torch.int64)])
    assert Rehearsal([text], [told], 1.0).nbytes == 2 * 4 * 8 + 3 * 5 * 8 + 3 * 5 * 4 + 3 * 4


def begun(family: str, **options: Any) -> Any:
    method, model = METHODS["osft"].build(options), tiny(family)
    method.begin_task(model, task_of(model, 0, 1))
    return method


def test_what_the_model_wrote_calibrates_too() -> None:
    method = METHODS["osft"].build({"rehearse": 0.5, "source": "activation"})
    model, alike = tiny("llama"), tiny("llama")
    method.begin_task(model, task_of(model, 0, 1))
    lorica.protect(alike, lorica.plan(alike, source="activation", calibration=own_text(alike, seed=0)))
    assert same_bases(model, alike)


def test_it_goes_with_a_finished_plan_and_ends_with_the_task() -> None:
    plan = lorica.plan(tiny("llama"), 0.5)
    method, model = METHODS["osft"].build({"plan": plan, "rehearse": 0.5}), tiny("llama")
    task = task_of(model, 0, 1)
    method.begin_task(model, task)
    assert method.rehearsal is not None
    method.end_task(model, task)
    assert method.rehearsal is None


@pytest.mark.parametrize("family", ["t5", "bert-classifier"])
def test_models_that_write_no_text_are_refused_by_name(family: str) -> None:
    with pytest.raises(LoricaError, match=r"^rehearse is for causal models"):
        begun(family, rehearse=0.5)


def test_a_model_without_a_first_token_is_refused_by_name() -> None:
    method, model = METHODS["osft"].build({"rehearse": 0.5}), tiny("llama")
    model.config.bos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(LoricaError, match=r"^rehearse needs a model with a bos_token_id or eos_token_id"):
        method.begin_task(model, task_of(model, 0, 1))


def test_a_model_of_no_numbers_is_refused_before_it_writes() -> None:
    method, model = METHODS["osft"].build({"rehearse": 0.5}), tiny("llama")
    model.get_parameter("model.norm.weight").data[0] = float("nan")
    with pytest.raises(LoricaError, match=r"^model\.norm\.weight holds NaN or inf"):
        method.begin_task(model, task_of(model, 0, 1))


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"rehearse": 0.5, "rehearse_tokens": 300}, ["writing text"]),
        ({"source": "curvature"}, ["writing text", "measuring the model"]),
        ({"ranks": "importance", "calibration": "random"}, ["measuring the model"]),
        ({"source": "curvature", "rehearse": 0.5, "rehearse_tokens": 300}, ["writing text", "measuring the model"]),
        ({"predict_forgetting": True}, ["writing text", "measuring the model", "writing text"]),
    ],
    ids=str,
)
def test_what_comes_before_a_task_tells_how_far_it_is(
    options: dict[str, Any], stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage from something to all of it, several passes over several parts too; then the split."""
    monkeypatch.setattr(observe, "MOMENT_BYTES", 1)
    monkeypatch.setattr(observe, "rows_together", lambda *_: 5)
    method, model = METHODS["osft"].build(options), tiny("llama")
    told: list[tuple[str, int, int]] = []
    method.begin_task(model, task_of(model, 0, 1), progress=lambda *step: told.append(step))
    split = set(method.plan.names())
    before = [(name, list(steps)) for name, steps in groupby(told, key=lambda step: step[0]) if name not in split]
    assert [name for name, _ in before] == stages
    for _, steps in before:
        done, totals = [step[1] for step in steps], {step[2] for step in steps}
        assert len(totals) == 1
        assert done[-1] == max(totals)
        assert done == sorted(set(done))
    assert told[-1][0] in split


def update(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{i}:", "completion": " seven"} for i in range(16)]
    out.mkdir(parents=True)
    (out / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "model_name_or_path": str(model), "train_file": str(out / "rows.jsonl"), "output_dir": str(out / "model"),
        "max_steps": 16, "per_device_train_batch_size": 4, "learning_rate": 0.03, "disable_tqdm": True, "use_cpu": True,
        "preset": "paper",
    }  # fmt: skip
    return train(build_config(given | options), say=lambda line: None)


def prompts_loss(folder: Path) -> float:
    """Return the mean loss of the rows' prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    for number in range(16):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(f"{number}:", add_special_tokens=False)["input_ids"]]])
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def divergence(one: Path, two: Path) -> float:
    """Return how far what a trained model predicts on the first one's text is from it."""
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (one, two))
    held = Rehearsal.of(before, own_text(before, tokens=2000, length=32, seed=77), 16.0, 1.0)
    with torch.no_grad():
        return held.penalty(after, INPUTS).item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"constraint": "block"},
        {"padding_free": True},
        {"optimizer_in_backward": True, "max_grad_norm": 0.0},
        *(
            pytest.param({name: value}, marks=pytest.mark.slow)
            for name, value in {
                "memory_mode": "lean",
                "gradient_accumulation_steps": 2,
                "bf16": True,
                "activation_checkpointing": True,
            }.items()
        ),
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_an_update_that_rehearses_predicts_more_as_before(
    options: dict[str, Any], llama_folder: Path, tmp_path: Path
) -> None:
    ends: list[float] = []
    for rehearse in (0.0, 1.0):
        given = options | ({"rehearse": rehearse, "rehearse_weight": 1e3} if rehearse else {})
        record = update(llama_folder, tmp_path / str(rehearse), **given)
        assert record["config"]["rehearse"] == rehearse
        ends.append(divergence(llama_folder, tmp_path / str(rehearse) / "model"))
    assert ends[1] < 0.75 * ends[0], ends


@given(st.integers(0, 10_000), st.integers(1, 4), st.booleans())
def test_the_prompt_loss_counts_a_prompts_token_as_a_trained_one(seed: int, rows: int, flat: bool) -> None:
    """With weight 1 the loss and that of the prompts are the loss of whole rows, over the trained tokens alone."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (rows,), generator=random).tolist()
    encoded = [torch.randint(1, 50, (length,), generator=random).tolist() for length in lengths]
    asked = [int(torch.randint(1, length, (), generator=random)) for length in lengths]  # tokens of the prompt
    features = [
        {"input_ids": ids, "labels": [IGNORED_LABEL] * prompt + ids[prompt:]}
        for ids, prompt in zip(encoded, asked, strict=True)
    ]
    inputs = (FlatCollator() if flat else Collator(pad_token_id=0))(features)
    logits = torch.randn(*inputs["input_ids"].shape, 50, generator=random, dtype=torch.float64)
    total, offset = 0.0, 0
    for row, (ids, prompt) in enumerate(zip(encoded, asked, strict=True)):
        own = logits[0, offset : offset + len(ids)] if flat else logits[row, : len(ids)]
        total -= sum(own[at - 1].log_softmax(-1)[ids[at]].item() for at in range(1, prompt))
        offset += len(ids)
    assert prompt_loss(inputs, logits).item() == pytest.approx(total / (sum(lengths) - sum(asked)), rel=1e-5)


def test_a_row_that_trains_nothing_has_a_finite_prompt_loss() -> None:
    inputs = Collator(pad_token_id=0)([{"input_ids": [1, 2, 3], "labels": [IGNORED_LABEL] * 3}])
    assert prompt_loss(inputs, torch.zeros(1, 3, 8)).item() == pytest.approx(2 * math.log(8))


def test_prompts_are_learned_where_they_are_to_be_rehearsed(llama_folder: Path, tmp_path: Path) -> None:
    """The trained model finds the rows' prompts likelier than one that was trained on answers alone."""
    losses = []
    for weight in (0.0, 1.0):
        update(llama_folder, tmp_path / str(weight), rehearse=0.25, rehearse_tokens=500, rehearse_prompts=weight)
        losses.append(prompts_loss(tmp_path / str(weight) / "model"))
    assert losses[1] < losses[0] - 0.05, losses


def test_a_stream_is_rehearsed(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    """From the same seed the same stream, and another one than without."""
    settings = {
        "held": {"method": "osft", "learning_rate": 1e-2, "options": {"rehearse": 0.25}},
        "osft": {"method": "osft", "learning_rate": 1e-2},
    }
    stream = write(methods=settings)
    records, _ = run(stream, llama_folder, tmp_path / "out", methods=["held", "osft"], max_steps=3)
    (again,), _ = run(stream, llama_folder, tmp_path / "again", methods="held", max_steps=3)
    assert records[0]["row_scores"] == again["row_scores"]
    assert records[0]["carried_bytes"] == [0, 0], "what is rehearsed is of one task"
    assert records[0]["leakage"] != records[1]["leakage"]


def test_an_update_of_an_encoder_decoder_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="rehearse is for causal models"):
        update(t5_folder, tmp_path / "t5", rehearse=0.25)
    assert not (tmp_path / "t5" / "model").exists()
