from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.errors import LoricaError
from lorica.methods import METHODS
from lorica.subspace.calibration import own_text, random_tokens
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.observe import observe
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.sources import protected_directions
from tests.builders import batch, matrix, tiny


class Masked(nn.Module):
    """A linear layer that takes what a calibration batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(x)


def test_moments_and_cosines_are_those_of_the_rows_that_count() -> None:
    model = Masked()
    x = matrix(6, 4, 1, torch.float64).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [{"x": x[:1], "attention_mask": mask[:1]}, {"x": x[1:], "attention_mask": mask[1:]}]
    seen = observe(model, {"layer": model.layer}, batches, moments=True)["layer"]
    rows = x[mask.bool()]
    assert seen.rows == 3
    torch.testing.assert_close(seen.moment_NN, sum(torch.outer(row, row) for row in rows))
    expected = [torch.cosine_similarity(row[:3], model.layer.weight @ row, dim=0).item() for row in rows]
    assert seen.similarity == pytest.approx(sum(expected) / 3)


def test_observing_leaves_no_trace() -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = {"q": model.model.layers[0].self_attn.q_proj}
    observe(model, layers, [batch(model)], moments=False)
    assert model.training
    assert not layers["q"]._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_without_inputs_is_named() -> None:
    model = Masked()
    batches = [{"x": torch.ones(1, 2, 4, dtype=torch.float64), "attention_mask": torch.ones(1, 2)}]
    with pytest.raises(LoricaError, match="never reached unused"):
        observe(model, {"unused": model.unused}, batches, moments=False)
    with pytest.raises(LoricaError, match="never reached layer"):
        observe(model, {"layer": model.layer}, [], moments=False)


def test_random_tokens_are_the_same_every_time_and_in_range() -> None:
    first, second = (
        random_tokens(11, sequences=5, length=4, batch_size=2),
        random_tokens(11, sequences=5, length=4, batch_size=2),
    )
    assert [len(part["input_ids"]) for part in first] == [2, 2, 1]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert max(int(part["input_ids"].max()) for part in first) < 11


def test_activation_protects_the_principal_inputs() -> None:
    moment = torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.0]))
    entry = PlanEntry(name="w", shape=(3, 4), k=2, source="activation", constraint="input")
    u, v = protected_directions(matrix(3, 4), entry, Factors(inputs=Factor.of(moment)))
    assert u.shape == (3, 0)
    torch.testing.assert_close(v @ v.T, torch.diag(torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_old_outputs_stay_when_all_their_inputs_are_protected(name: str) -> None:
    model = tiny(name).eval()
    old = batch(model, rows=1, length=5)
    plan = lorica.plan(model, source="activation", calibration=[old], effective_rank=12)
    lorica.protect(model, plan)
    before = model(**old).logits.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    new = batch(model, seed=1)
    for _ in range(5):
        model(**new).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(**new).logits, tiny(name).eval()(**new).logits, atol=1e-2)
    torch.testing.assert_close(model(**old).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_random_tokens_calibrate_any_family(name: str) -> None:
    model = tiny(name)
    plan = lorica.plan(model, source="activation", calibration="random", unfreeze_rank_ratio=0.5)
    assert {entry.constraint for entry in plan.entries} == {"input"}
    lorica.protect(model, plan)


def test_own_text_is_what_the_model_would_write_up_to_its_end() -> None:
    model = tiny("llama").train()
    model.generation_config.eos_token_id = 5
    with torch.no_grad():
        model.lm_head.weight[5] = 0.0  # EOS is likely enough to be met
    state = torch.get_rng_state()
    batches = own_text(model, tokens=300, length=12, batch_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    counts = [int(batch["attention_mask"].sum()) for batch in batches]
    assert sum(counts) >= 300 > sum(counts[:-1]), "so many tokens were asked for"
    assert max(counts) < 2 * 16 * 12, "and about so many at a time"
    again = own_text(model, tokens=300, length=12, batch_size=16)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    ended = 0
    for part in batches:
        for ids, mask in zip(part["input_ids"].tolist(), part["attention_mask"].tolist(), strict=True):
            end = ids.index(5, 1) if 5 in ids[1:] else len(ids) - 1
            ended += 5 in ids[1:]
            assert mask == [1] * (end + 1) + [0] * (len(ids) - end - 1)
    assert ended > 0


def test_own_text_follows_the_model() -> None:
    """A model that can only write one token writes it."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every logit is 0 ...
        model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), -1e4))
        model.lm_head.bias[7] = 1e4  # ... but for this one
    (batch,) = own_text(model, tokens=24, length=6, batch_size=4)
    assert (batch["input_ids"][:, 1:] == 7).all()


def test_own_text_is_sampled_from_the_model_alone() -> None:
    """What a generation configuration adds, as those of published models do, is no knowledge of the model."""
    plain, model = tiny("llama"), tiny("llama")
    for name, value in {"repetition_penalty": 5.0, "top_k": 1, "suppress_tokens": [3, 4], "min_new_tokens": 9}.items():
        setattr(model.generation_config, name, value)
    own, said = model.generation_config, model.generation_config.to_dict()
    texts, others = (own_text(one, tokens=200, length=10) for one in (plain, model))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(texts, others, strict=True))
    assert model.generation_config is own
    assert own.to_dict() == said


def test_own_text_ends_at_any_of_the_ends() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = [5, 6]
    with torch.no_grad():
        model.lm_head.weight[5:7] = 0.0
    texts = own_text(model, tokens=300, length=12)
    rows = [ids[: int(mask.sum())].tolist() for one in texts for ids, mask in zip(*one.values(), strict=True)]
    assert {row[-1] for row in rows if len(row) < 12} == {5, 6}
    assert not any({5, 6} & set(row[1:-1]) for row in rows)


def test_a_first_token_outside_of_the_vocabulary_is_none() -> None:
    with pytest.raises(LoricaError, match="bos_token_id or eos_token_id in its vocabulary"):
        own_text(tiny("gpt2"))


def test_own_text_of_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(LoricaError, match='calibration "self" is for causal models'):
        own_text(tiny("t5"))


def test_plan_takes_own_text() -> None:
    model = tiny("llama")
    plan = lorica.plan(model, source="activation", calibration="self")
    for entry in plan.entries:
        factors = plan.factors(entry.name)
        assert factors is not None
        assert factors.inputs is not None
        assert float(factors.inputs.energies_R.min()) > 0


def test_plan_says_how_many_tokens_the_model_writes() -> None:
    """As many as asked of text; of random tokens whole sequences."""
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    text = own_text(model, tokens=500)
    assert 500 <= sum(int(part["attention_mask"].sum()) for part in text) < 500 + 64
    drawn = random_tokens(model.config.vocab_size, sequences=5, length=64)
    for calibration, batches, tokens in (("self", text, 500), ("random", drawn, 257)):
        made = lorica.plan(model, source="activation", calibration=calibration, calibration_tokens=tokens)
        given = lorica.plan(model, source="activation", calibration=batches)
        for name in made.names():
            assert torch.equal(made.factors(name).inputs.vectors_DR, given.factors(name).inputs.vectors_DR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "curvature", "calibration": "self", "calibration_tokens": 0}, "calibration_tokens = 0 is out of"),
        ({"calibration_tokens": 100}, "calibration_tokens has no effect: nothing of what is protected is measured"),
        ({"source": "activation", "calibration": [{}], "calibration_tokens": 100}, "beside calibration inputs of your"),
    ],
)
def test_calibration_tokens_that_nothing_takes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        lorica.plan(tiny("llama"), **options)
    with pytest.raises(LoricaError, match=message):
        METHODS["osft"].build(options)
