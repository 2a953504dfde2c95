"""Training state of Llama-3.1-8B, 3.2-3B and 3.2-1B in bytes, counted from shapes: nothing is computed or loaded.

    python benchmarks/arithmetic.py

Lorica's figures are not a formula: the model is built and protected on the meta device, where tensors have shapes but
no memory, takes one optimizer step there, and its tensors are added up. What ``lean`` sets aside, on the host or in
a memory map, is counted apart. The model is bfloat16.

The others, for a weight of m x n with s = min(m, n), l = max(m, n), k = floor(f s) directions protected, c = s - k,
in the dtypes that they use by default:

    plain fine-tuning   16 per parameter: float32 weight, gradient and both moments, everything trains
    mini_trainer 0.9    (4 k + 16 c) (m + n + 1), all factors float32; 16 per parameter elsewhere, which trains
    PEFT 0.21 osf       2 per parameter of the bfloat16 model; 20 c (m + n + 1): trained factors, gradients, moments
                        and the initial factors; 4 k l for the long side unless m = n
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from benchmarks.contestants import SHARES, adamw
from benchmarks.measures import RESULTS, storage_bytes, unique, write_result

MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                     "num_attention_heads": 32, "tie_word_embeddings": True},
    "Llama-3.2-3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128,
                     "num_attention_heads": 24, "tie_word_embeddings": True},
    "Llama-3.1-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
                     "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
Shapes = list[tuple[int, int]]


def on_meta(sizes: dict[str, Any]) -> LlamaForCausalLM:
    """Return a bfloat16 model without values."""
    config = LlamaConfig(**{"vocab_size": 128256, "num_key_value_heads": 8} | sizes)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def lorica_bytes(model: LlamaForCausalLM, share: float, memory: str) -> dict[str, int]:
    """Return what Lorica's tensors take after a step, and what it has set aside."""
    lorica.protect(model, lorica.plan(model, effective_rank=share), memory=memory)
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    everything = sum(map(storage_bytes, unique([model, optimizer.state])))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    kept = [
        *model.parameters(),
        *model.buffers(),
        *gradients,
        *(list(own.values()) for own in optimizer.state.values()),
    ]
    state = sum(map(storage_bytes, unique(kept)))
    return {"state_bytes": state, "aside_bytes": everything - state}


def plain_bytes(shapes: Shapes, total: int, share: float) -> int:
    """Return the state of full fine-tuning with float32 masters."""
    return 16 * total


def mini_trainer_bytes(shapes: Shapes, total: int, share: float) -> int:
    """Return the state of mini_trainer's OSFT as it runs by default."""
    elsewhere = total - sum(m * n for m, n in shapes)
    return 16 * elsewhere + sum((4 * k + 16 * c) * (m + n + 1) for m, n, k, c in _cut(shapes, share))


def peft_bytes(shapes: Shapes, total: int, share: float) -> int:
    """Return the state of PEFT's osf with float32 factors on a bfloat16 model."""
    factors = sum(20 * c * (m + n + 1) + (4 * k * max(m, n) if m != n else 0) for m, n, k, c in _cut(shapes, share))
    return 2 * total + factors


def _cut(shapes: Shapes, share: float) -> list[tuple[int, int, int, int]]:
    cuts = [(m, n, int(share * min(m, n))) for m, n in shapes]
    return [(m, n, k, min(m, n) - k) for m, n, k in cuts]


FORMULAS: dict[str, Callable[[Shapes, int, float], int]] = {
    "plain": plain_bytes,
    "mini_trainer": mini_trainer_bytes,
    "peft osf": peft_bytes,
}


def rows_of(name: str, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per method and protected share of one model."""
    model = on_meta(sizes)
    shapes = [(w.shape[0], w.shape[1]) for key, w in model.named_parameters() if key.endswith("_proj.weight")]
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for share in SHARES:
        same = {"model": name, "parameters": total, "protected": share}
        for family, formula in FORMULAS.items():
            rows.append(same | {"family": family, "state_bytes": formula(shapes, total, share), "aside_bytes": 0})
        for memory in ("fast", "lean"):
            rows.append(same | {"family": f"lorica {memory}"} | lorica_bytes(on_meta(sizes), share, memory))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    rows = [row for name, sizes in MODELS.items() for row in rows_of(name, sizes)]
    for row in rows:
        print(
            f"{row['model']} {row['protected']:<4g} {row['family']:13} {row['state_bytes'] / 1e9:6.1f} GB"
            f" {row['aside_bytes'] / 1e9:6.1f} GB set aside"
        )
    write_result(options.output / "arithmetic.json", {"dtype": "bfloat16", "models": MODELS}, rows, [])


if __name__ == "__main__":
    main()
