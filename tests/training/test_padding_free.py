"""Rows laid end to end: the same loss and gradients as padded ones have, and models that cannot are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

import lorica
from lorica.data.collate import Collator, FlatCollator
from lorica.errors import LoricaError
from lorica.methods import METHODS, TaskData
from lorica.training.arguments import check_arguments, training_arguments
from lorica.training.padding_free import check_keeps_rows_apart, flat_collator
from lorica.training.trainer import fit
from tests.builders import ARCHITECTURES, EXPERTS, VOCABULARY, tiny, trainable
from tests.training.conftest import byte_tokenizer

Row = dict[str, list[int]]
Rows = Callable[..., str]

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ATTENDS = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}

KEPT_APART = ("llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "mixtral", "qwen3-moe")

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Bloom": (SIZES | {"n_layer": 2}, "takes no position_ids"),
    "Mamba": ({"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "takes no position_ids"),
    "Falcon": (SIZES, "lets a row see the one before it"),
    "Lfm2": (ATTENDS | {"layer_types": ["conv", "full_attention"]}, "lets a row see the one before it"),
}


def some_rows(lengths: tuple[int, ...] = (5, 9, 3, 1, 7), seed: int = 0) -> list[Row]:
    """Return rows of which the first token is predicted too, as some labels that come as tokens say."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100 if i % 4 == 3 else t for i, t in enumerate(row)]} for row in ids]


def model_of(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Return a protected model in float64, where only what is wrong makes a difference; experts know no float64."""
    config_name, model_name, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**sizes | changes, attn_implementation=attention)
    for field in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, field, 0.0)
    model = getattr(transformers, model_name)(config).train()
    model = model if name in EXPERTS else model.double()
    return lorica.protect(model, lorica.plan(model, 0.5, freeze_experts=name in EXPERTS))


CASES = [(name, attention, {}) for name in KEPT_APART for attention in ("sdpa", "eager")]
CASES += [("mistral", "sdpa", {"sliding_window": 3}), ("gemma3", "sdpa", {"sliding_window": 2})]


# --- the batch ---------------------------------------------------------------------------------------------------


def test_a_batch_by_hand() -> None:
    rows = [{"input_ids": [7, 8, 9], "labels": [7, -100, 9]}, {"input_ids": [4], "labels": [4]}]
    batch = FlatCollator()(rows)
    assert {name: value.tolist() for name, value in batch.items() if name != "use_cache"} == {
        "input_ids": [[7, 8, 9, 4]],
        "labels": [[-100, -100, 9, -100]],
        "position_ids": [[0, 1, 2, 0]],
    }
    assert batch["use_cache"] is False


@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), min_size=1, max_size=6))
def test_boundaries_are_those_that_transformers_gives_its_kernels(ids: list[list[int]]) -> None:
    rows = [{"input_ids": row, "labels": row} for row in ids]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([dict(row) for row in rows])
    mine = FlatCollator(boundaries=True)(rows)
    assert mine.pop("use_cache") is False
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert type(mine[name]) is type(value), name
        assert torch.equal(mine[name], value) if isinstance(value, Tensor) else mine[name] == value, name
        assert not isinstance(value, Tensor) or mine[name].dtype == value.dtype


def test_boundaries_are_for_flash_attention() -> None:
    model = tiny("llama")
    assert not flat_collator(model).boundaries
    model.config._attn_implementation = "flash_attention_2"
    assert flat_collator(model).boundaries


# --- the same loss and gradients -----------------------------------------------------------------------------------


def gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    loss = model(**batch).loss
    return loss, list(torch.autograd.grad(loss, trainable(model)))


@pytest.mark.parametrize(("name", "attention", "changes"), CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_loss_and_gradients_are_those_of_padded_rows(name: str, attention: str, changes: dict[str, Any]) -> None:
    model = model_of(name, attention, **changes)
    loss, flat = gradients(model, FlatCollator()(some_rows()))
    other, padded = gradients(model, Collator(pad_token_id=0)(some_rows()))
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)  # the sum of the tokens' is taken in float32
    # Eager attention takes its softmax in float32.
    precision = 1e-6 if name in EXPERTS else 1e-14 if attention == "sdpa" else 1e-7
    for mine, theirs in zip(flat, padded, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=precision)
    assert all(bool(gradient.any()) for gradient in flat)


def test_the_loss_is_the_mean_over_all_tokens_that_are_predicted_within_their_row() -> None:
    model, rows = tiny("llama").double().eval().requires_grad_(False), some_rows()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        if len(row["input_ids"]) > 1:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total = total + F.cross_entropy(logits, labels, reduction="sum")
            count += int((labels != -100).sum())
    assert float(model(**FlatCollator()(rows)).loss) == pytest.approx(float(total / count), rel=1e-6)


@pytest.mark.parametrize("place", range(5))
def test_no_row_sees_another(place: int) -> None:
    model, rows, changed = tiny("llama").eval(), some_rows(), some_rows()
    changed[place] = some_rows(seed=1)[place]
    ends = [0, *torch.tensor([len(row["input_ids"]) for row in rows]).cumsum(0).tolist()]
    with torch.no_grad():
        before, after = (model(**FlatCollator()(given)).logits[0] for given in (rows, changed))
    for index, (start, end) in enumerate(pairwise(ends)):
        assert torch.equal(before[start:end], after[start:end]) == (index != place)


# --- models that can and models that cannot ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KEPT_APART)
def test_models_that_keep_rows_apart_are_left_as_they_were(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype, dropout=0.1)
    weights, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    check_keeps_rows_apart(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_are_refused_by_name(name: str) -> None:
    sizes, reason = REFUSED[name]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    with pytest.raises(LoricaError, match=f"--padding_free: {name}ForCausalLM {reason}"):
        check_keeps_rows_apart(model)


def test_a_model_that_counts_positions_through_is_refused() -> None:
    class Through(transformers.GPT2LMHeadModel):
        """Keeps rows apart by a mask of its own, and counts the positions of all of them."""

        def forward(self, input_ids: Any = None, position_ids: Any = None, **given: Any) -> Any:  # type: ignore[override]
            row = (position_ids == 0).cumsum(1)
            apart = (row[:, None, :, None] == row[:, None, None, :]).tril()
            positions = torch.arange(input_ids.shape[1])[None]
            return super().forward(input_ids=input_ids, attention_mask=apart, position_ids=positions, **given)

    torch.manual_seed(0)
    model = Through(transformers.GPT2Config(**ARCHITECTURES["gpt2"][2], attn_implementation="sdpa"))
    with pytest.raises(LoricaError, match="Through does not begin the positions of each row anew"):
        check_keeps_rows_apart(model)
    assert model.training


# --- training ------------------------------------------------------------------------------------------------------


class Listed(torch.utils.data.Dataset[Row]):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def learned(method: Any, folder: Path, prepare: Callable[[Any], None] = lambda model: None, **chosen: Any) -> Any:
    """Learn two tasks and return the model and the last log."""
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    options |= {"learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    model = tiny("llama").double()
    prepare(model)
    log: list[dict[str, Any]] = []
    collate = Collator(pad_token_id=0)
    earlier: tuple[Listed, ...] = ()
    for index in range(2):
        data = Listed(some_rows((4, 9, 2, 6, 5, 7, 3, 8), seed=index))
        task = TaskData(f"task-{index}", index, 2, data, collate, earlier=earlier)  # type: ignore[arg-type]
        earlier = (data,)
        if method.learns(task):
            method.begin_task(model, task)
            arguments = training_arguments(options, str(folder), hidden_size=32, seq2seq=False)
            log = fit(model, method, method.training_data(task), None, collate, arguments, quiet=True, **chosen)
            method.end_task(model, task)
    return model, log


def assert_same(one: Any, other: Any, atol: float = 1e-6) -> None:
    for mine, theirs in zip(one[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)
    losses = [[row["loss"] for row in log if "loss" in row] for _, log in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


SMALL: dict[str, dict[str, Any]] = {
    "osft": {"unfreeze_rank_ratio": 0.5},
    "lwf": {"from_first_task": True},
    "replay": {"ratio": 0.5},
    "ewc": {"fisher_rows": 4, "ewc_lambda": 1e4},
    "gpm": {"rows": 4, "energy": 0.6},
    "sgp": {"rows": 4, "energy": 0.6},
    "ogd": {"gradients_per_task": 4},
    "lora": {"dropout": 0.0},
    "inclora": {"dropout": 0.0},
    "olora": {"dropout": 0.0},
}  # fmt: skip


QUICK = ("osft", "lwf")
"""The second runs another model on the batch."""


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in QUICK)]
)
def test_every_method_learns_the_same(name: str, tmp_path: Path) -> None:
    flat, padded = (
        learned(METHODS[name].build(SMALL.get(name, {})), tmp_path, padding_free=padding_free)
        for padding_free in (True, False)
    )
    # Its bases are kept in float32: what rounding leaves of a direction AdamW makes a step of.
    assert_same(flat, padded, atol=1e-5 if name == "osft-gradient" else 1e-6)
    moved = [
        (mine - own).detach().abs().max()
        for mine, own in zip(flat[0].parameters(), tiny("llama").parameters(), strict=True)
    ]
    assert max(moved) > 1e-3


def test_what_does_not_fit_is_run_in_halves_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, ...]] = []

    def narrow(model: Any) -> None:
        def limit(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if module.training:
                seen.append(tuple(kwargs["input_ids"].shape))
                if kwargs["input_ids"].shape[1] > 20:
                    raise torch.OutOfMemoryError

        model.register_forward_pre_hook(limit, with_kwargs=True)

    halved = learned(METHODS["seqft"].build({}), tmp_path, narrow, padding_free=True)
    assert "rows at a time; from this step on at most 2" in capsys.readouterr().out
    assert any(length > 20 for _, length in seen)
    assert all(rows == 1 for rows, _ in seen)
    assert_same(halved, learned(METHODS["seqft"].build({}), tmp_path))


# --- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A model without dropout, which falls elsewhere where the batch has another shape."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder, attention_dropout=0.0)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    lines = [{"prompt": f"{'long ' * (i % 5)}{i}?", "completion": f" {(7 * i) % 10}"} for i in range(16)]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "uneven.jsonl")


def update(model: Path, file: str, out: Path, **given: Any) -> dict[str, Any]:
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
    options |= {"model_name_or_path": str(model), "train_file": file, "output_dir": str(out)}
    options |= {"use_cpu": True, "preset": "paper"}
    return lorica.train(options | given, say=lambda line: None)


def test_lorica_train(model_folder: Path, uneven: str, tmp_path: Path) -> None:
    scored = {"eval_file": uneven, "eval_strategy": "steps", "eval_steps": 2}
    flat, padded = (
        update(model_folder, uneven, tmp_path / str(padding_free), padding_free=padding_free, **scored)
        for padding_free in (True, False)
    )
    mine, theirs = (load_file(tmp_path / str(way) / "model.safetensors") for way in (True, False))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-5
    assert any(not torch.equal(mine[name], theirs[name]) for name in theirs), "it was not laid end to end"
    for one, other in zip(flat["loss_curve"], padded["loss_curve"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"padding_free": True, "neftune_noise_alpha": 5.0}, "--neftune_noise_alpha with --padding_free"),
        ({"packing": True}, "--packing is not taken: .*--padding_free lays the rows"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str, llama_folder: Path, uneven: str, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=message):
        update(llama_folder, uneven, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_is_refused(t5_folder: Path, uneven: str, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="--padding_free is for causal models; this is an encoder-decoder"):
        update(t5_folder, uneven, tmp_path / "out", padding_free=True)


def test_a_model_that_cannot_is_refused_before_anything_is_written(uneven: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    opt = transformers.OPTConfig(**sizes, num_attention_heads=4, vocab_size=len(tokenizer))
    for part in (transformers.OPTForCausalLM(opt), tokenizer):
        part.save_pretrained(tmp_path / "opt")
    with pytest.raises(LoricaError, match="--padding_free: OPTForCausalLM lets a row see the one before it"):
        update(tmp_path / "opt", uneven, tmp_path / "out", padding_free=True)
    assert not (tmp_path / "out").exists()


def test_saying_no_to_packing_is_an_unknown_option() -> None:
    with pytest.raises(LoricaError, match="unknown option --packing"):
        check_arguments({"packing": False})
