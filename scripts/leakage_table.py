"""Train one small Llama with Lorica and its peers and print how much of each update leaks into protected directions.

    python scripts/leakage_table.py [--steps 20] [--lr 1e-4] [--output docs/results/leakage.json]

All start from the same weights, protect half of the singular directions of the same matrices, see the same
random tokens and use AdamW. The directions are those of ``torch.linalg.svd`` in float64 of the weights before; a
share is ``|U^T D| / |D|`` over all constrained matrices together, about 0.71 for an unconstrained change D.

- ``master``: D is what training changed in the weights as the method holds them, multiplied out in float64.
- ``deployed``: D is the difference between the model that came in and the one handed over, in its dtype; it
  also counts what splitting into factors and rounding have changed. In bf16 rounding alone leaks, the more the
  smaller the change is, so read it beside ``relative_change``.

Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica.constrain.protect import protected_layers

PROTECTED = 0.5
VOCABULARY = 97
Weights = dict[str, Tensor]


class Outcome(NamedTuple):
    """What one method made of the model."""

    start: Tensor
    """Logits before the first step."""
    held: Weights
    """The weights as the method holds them, before the first step."""
    master: Weights
    """The same after the last step."""
    deployed: Weights
    losses: list[float]


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the model that every method starts from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def matrices(model: nn.Module) -> Weights:
    """Return copies of the constrained weights of a plain model, by module name."""
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith("_proj")
    }


def batches(steps: int) -> Iterator[Tensor]:
    """Yield the same random tokens every time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randint(VOCABULARY, (8, 16), generator=generator)


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    """Train on one batch a step and return the losses."""
    losses = []
    for ids in batches(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return the logits of the first batch."""
    return model(input_ids=next(batches(1))).logits.double()


def adamw(model: nn.Module, lr: float) -> AdamW:
    """Return the one optimizer of this comparison."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def with_lorica(model: LlamaForCausalLM, steps: int, lr: float) -> Outcome:
    """Lorica, two-sided."""
    lorica.protect(model, lorica.plan(model, effective_rank=PROTECTED))
    start, held = logits(model), matrices(model)
    losses = train(model, adamw(model, lr), steps)
    master = {name: layer.base.double() + layer.delta().double() for name, layer in protected_layers(model).items()}
    return Outcome(start, held, master, matrices(lorica.release(model)), losses)


def with_peft(model: LlamaForCausalLM, steps: int, lr: float) -> Outcome:
    """PEFT's OSF: factors trained with gradient hooks."""
    from peft import OSFConfig, get_peft_model

    before = matrices(model)
    wrapped = get_peft_model(model, OSFConfig(target_modules=r".*_proj", effective_rank=PROTECTED))
    start = logits(wrapped)
    losses = train(wrapped, adamw(wrapped, lr), steps)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "osf_svd_params")
    }
    master = {name: before[name].double() + _osf_change(layer) for name, layer in layers.items()}
    return Outcome(start, before, master, matrices(wrapped.merge_and_unload()), losses)


def _osf_change(layer: Any) -> Tensor:
    now = layer.osf_svd_params["default"]
    inits = (layer._osf_U_low_init, layer._osf_S_low_init, layer._osf_V_low_init)
    u0, s0, v0 = (init["default"].double() for init in inits)
    u, s, v = (now[key].detach().double() for key in ("U_low", "S_low", "V_low"))
    return (u * s) @ v - (u0 * s0) @ v0


def with_mini_trainer(model: LlamaForCausalLM, steps: int, lr: float) -> Outcome:
    """mini_trainer's OSFT: factors trained, gradients projected before and factors after each step."""
    from mini_trainer.osft_utils import auto_generate_target_osft_config, create_osft_model_class, optim_wrapper

    with contextlib.redirect_stdout(io.StringIO()):
        factored = create_osft_model_class(LlamaForCausalLM)(
            model.config, initialize_osft=False, upcast_dtype=torch.float32, output_dtype=model.dtype
        ).to(model.dtype)
        factored.load_state_dict(model.state_dict())
        factored.osft_config = auto_generate_target_osft_config(
            factored, model_name_or_class="llama", rank_ratio=PROTECTED
        )
        factored.reinitialize_osft(decompose_existing_weights=True)

    def weights(dtype: torch.dtype) -> Weights:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        keys = [key.removesuffix(".weight") for key in factored.osft_config]
        return {k: factored._reconstruct_weight(f"{k}.weight", wide, dtype).detach() for k in keys}

    start, held = logits(factored), weights(torch.float64)
    losses = train(factored, optim_wrapper(adamw(factored, lr), factored), steps)
    return Outcome(start, held, weights(torch.float64), weights(model.dtype), losses)


class Method(NamedTuple):
    """One line of the table: what must be importable, the distribution it comes from, and the adapter."""

    module: str
    distribution: str
    run: Callable[[LlamaForCausalLM, int, float], Outcome]


METHODS = {
    "lorica": Method("lorica", "lorica", with_lorica),
    "peft OSF": Method("peft", "peft", with_peft),
    "mini_trainer OSFT": Method("mini_trainer", "rhai-innovation-mini-trainer", with_mini_trainer),
}


def leakage(given: Weights, before: Weights, after: Weights) -> tuple[float, float]:
    """Return the shares of the change from before to after in the protected directions of the given weights."""
    total = leak_u = leak_v = 0.0
    for name, weight in given.items():
        u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        k = int(PROTECTED * min(weight.shape))
        d = after[name].double() - before[name].double()
        total += d.square().sum().item()
        leak_u += (u[:, :k].T @ d).square().sum().item()
        leak_v += (d @ vh[:k].T).square().sum().item()
    return (leak_u / total) ** 0.5, (leak_v / total) ** 0.5


def _norm(weights: Weights) -> float:
    return sum(weight.double().square().sum().item() for weight in weights.values()) ** 0.5


def row(name: str, dtype: torch.dtype, steps: int, lr: float) -> dict[str, Any]:
    """Train with one method and return its line of the table."""
    model = tiny_llama(dtype)
    given, plain = matrices(model), logits(model)
    outcome = METHODS[name].run(copy.deepcopy(model), steps, lr)
    master, deployed = leakage(given, outcome.held, outcome.master), leakage(given, given, outcome.deployed)
    return {
        "method": name,
        "dtype": str(dtype).removeprefix("torch."),
        "leak_u_master": master[0],
        "leak_v_master": master[1],
        "leak_u_deployed": deployed[0],
        "leak_v_deployed": deployed[1],
        "relative_change": _norm({n: outcome.deployed[n].double() - given[n].double() for n in given}) / _norm(given),
        "step_0_logit_error": ((outcome.start - plain).norm() / plain.norm()).item(),
        "first_loss": outcome.losses[0],
        "last_loss": outcome.losses[-1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    columns = [key for key in rows[0] if key not in ("method", "dtype")]
    lines = [f"{'method':18} {'dtype':9}" + "".join(f"{column:>19}" for column in columns)]
    lines += [f"{r['method']:18} {r['dtype']:9}" + "".join(f"{r[column]:19.2e}" for column in columns) for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("docs/results/leakage.json"))
    options = parser.parse_args()
    present = [name for name, method in METHODS.items() if importlib.util.find_spec(method.module)]
    for name in set(METHODS) - set(present):
        print(f"{name} is not installed and left out")
    dtypes = (torch.float32, torch.bfloat16)
    rows = [row(name, dtype, options.steps, options.lr) for dtype in dtypes for name in present]
    peers = [METHODS[name].distribution for name in present if name != "lorica"]
    versions = {"python": platform.python_version(), "lorica": lorica.__version__}
    versions |= {name: version(name) for name in ("torch", "transformers", *peers)}
    record = {
        "steps": options.steps,
        "lr": options.lr,
        "protected_share": PROTECTED,
        "unconstrained_share": PROTECTED**0.5,
        "versions": versions,
        "rows": rows,
    }
    print(table(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
