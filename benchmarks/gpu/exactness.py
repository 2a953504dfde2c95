"""Part 5: on this device, does the constraint hold, and does every step reach the weight?

Fused AdamW writes to the cores without raising their version counter, a compiled model reads weights that are folded
outside of it, and autocast narrows what the layers see: each case trains some steps and is then checked against the
definition ``W = W0 + Q_U M Q_V^T``, written out in float64.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import lorica
from benchmarks.gpu.methods import adamw
from benchmarks.gpu.workbench import Row, Workbench
from lorica.constrain.audit_weight import leakage
from lorica.constrain.protect import protected_layers
from lorica.subspace.linalg import split

STEPS, TINY_STEPS = 20, 4
WIDTH, TINY_WIDTH = 512, 32
SHARE = 0.75
MASTER_LEAKAGE = 1e-5
"""Largest allowed share of the change M stands for that lies in protected directions."""


CASES = (
    ("eager", torch.bfloat16),
    ("eager", torch.float32),
    ("autocast", torch.float32),
    ("compiled", torch.bfloat16),
)
"""How the model runs and the dtype of its weights; what has to be compiled comes last."""


def run(bench: Workbench) -> None:
    """Train and check every case."""
    for mode, dtype in CASES:
        took = 0.0
        for memory in ("fast", "lean"):
            labels = {"memory": memory, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
            if bench.fits(labels, took):
                start = time.monotonic()
                bench.measure(labels, check, bench, memory, dtype, mode)
                took = time.monotonic() - start


def check(bench: Workbench, memory: str, dtype: torch.dtype, mode: str) -> Row:
    """Train a small model and return the worst leakage over its layers.

    Raises:
        AssertionError: the constraint does not hold, or a step did not reach the weight.
    """
    model = _model(bench, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lorica.protect(model, lorica.plan(model, effective_rank=SHARE), memory=memory)
    _train(bench, model, mode)
    worst = {"master": 0.0, "stored": 0.0}
    for name, layer in protected_layers(model).items():
        start = before[f"{name}.weight"]
        found = _check_layer(name, start, layer.matrix.detach(), layer.core.detach(), layer.delta())
        worst = {key: max(value, found[key]) for key, value in worst.items()}
    for name, parameter in model.named_parameters():
        frozen = name in before and not parameter.requires_grad and not name.endswith("_proj.weight")
        assert not frozen or torch.equal(parameter, before[name]), f"{name} is frozen and has changed"
    assert worst["master"] <= MASTER_LEAKAGE, f"leakage {worst['master']:.1e} is above {MASTER_LEAKAGE:g}"
    return {"master_leakage": worst["master"], "stored_leakage": worst["stored"]}


def _check_layer(name: str, start: Tensor, weight: Tensor, core: Tensor, delta: Tensor) -> dict[str, float]:
    assert float(core.abs().max()) > 0, f"{name}: the core has not moved"
    folded = (start.to(delta.dtype) + delta).to(weight.dtype)
    rounding = 2 * torch.finfo(weight.dtype).eps * float(start.abs().max())
    off = float((weight.double() - folded.double()).abs().max())
    assert off <= rounding, f"{name}: the weight is {off:.1e} away from W0 + Q_U M Q_V^T: a step was not folded"
    lifted, moved = float(delta.double().norm()), float(core.double().norm())
    assert abs(lifted - moved) <= 1e-4 * moved, f"{name}: |lift(M)| = {lifted:.6g} but |M| = {moved:.6g}"
    parts = split(start, int(SHARE * min(start.shape)))
    stored = weight.double() - start.double()
    return {
        "master": max(leakage(delta, parts.u_MK, parts.v_NK)),
        "stored": max(leakage(stored, parts.u_MK, parts.v_NK)),
    }


def _model(bench: Workbench, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    width = TINY_WIDTH if bench.tiny else WIDTH
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device(bench.device.name):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def _train(bench: Workbench, model: nn.Module, mode: str) -> None:
    device = bench.device
    torch.compiler.reset()
    forward = torch.compile(model, backend=device.compiler) if mode == "compiled" else model
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    generator = torch.Generator(device.name).manual_seed(1)
    length = 32 if bench.tiny else 256
    ids = torch.randint(256, (4, length), generator=generator, device=device.name)
    for _ in range(TINY_STEPS if bench.tiny else STEPS):
        with torch.autocast(device.name, torch.bfloat16, enabled=mode == "autocast"):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool(torch.isfinite(loss)), f"the loss is {loss.item()}"
