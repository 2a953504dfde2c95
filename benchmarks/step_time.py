"""Step time and training state of Lorica, plain fine-tuning and the peers: same model, batch and data, in turn.

    python benchmarks/step_time.py [--width 512] [--tokens 2048] [--repeats 15] [--output docs/results/step-time.json]

In each round every method takes one step on the same tokens, one method after the other, so that a drift of the
machine's speed meets all alike. What is compared is the ratio to plain fine-tuning within a round; the table gives
its median and quartiles. ``state`` counts parameters, buffers, gradients and optimizer state in bytes, after a step.

Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica.record import environment, write_json

VOCABULARY = 512
LAYERS = 4


class Runner(NamedTuple):
    """A method that is ready to step."""

    model: nn.Module
    optimizer: Optimizer


def llama(width: int, length: int) -> LlamaForCausalLM:
    """Return the model that every method starts from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config)


def adamw(model: nn.Module) -> AdamW:
    """Return the one optimizer of this comparison."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)


def plain(model: LlamaForCausalLM) -> Runner:
    """Fine-tuning of the same weights without a constraint."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)
    return Runner(model, adamw(model))


def with_lorica(protected: float) -> Callable[[LlamaForCausalLM], Runner]:
    """Lorica, two-sided, with a share of the directions protected."""

    def build(model: LlamaForCausalLM) -> Runner:
        lorica.protect(model, lorica.plan(model, effective_rank=protected))
        return Runner(model, adamw(model))

    return build


def with_lora(model: LlamaForCausalLM) -> Runner:
    """PEFT's LoRA of rank 16 on all linear layers of the blocks."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules=r".*_proj"))
    return Runner(wrapped, adamw(wrapped))


def with_peft(protected: float) -> Callable[[LlamaForCausalLM], Runner]:
    """PEFT's OSF."""

    def build(model: LlamaForCausalLM) -> Runner:
        from peft import OSFConfig, get_peft_model

        wrapped = get_peft_model(model, OSFConfig(target_modules=r".*_proj", effective_rank=protected))
        return Runner(wrapped, adamw(wrapped))

    return build


def with_mini_trainer(protected: float) -> Callable[[LlamaForCausalLM], Runner]:
    """mini_trainer's OSFT model class with its optimizer wrapper."""

    def build(model: LlamaForCausalLM) -> Runner:
        from mini_trainer.osft_utils import auto_generate_target_osft_config, create_osft_model_class, optim_wrapper

        with contextlib.redirect_stdout(io.StringIO()):
            factored = create_osft_model_class(LlamaForCausalLM)(
                model.config, initialize_osft=False, upcast_dtype=torch.float32, output_dtype=torch.float32
            )
            factored.load_state_dict(model.state_dict())
            factored.osft_config = auto_generate_target_osft_config(
                factored, model_name_or_class="llama", rank_ratio=protected
            )
            factored.reinitialize_osft(decompose_existing_weights=True)
        for parameter in (*factored.model.embed_tokens.parameters(), *factored.lm_head.parameters()):
            parameter.requires_grad_(False)
        return Runner(factored, optim_wrapper(adamw(factored), factored))

    return build


METHODS: dict[str, tuple[str, Callable[[LlamaForCausalLM], Runner]]] = {
    "plain fine-tuning": ("torch", plain),
    "LoRA r=16": ("peft", with_lora),
    **{f"lorica {share:g}": ("lorica", with_lorica(share)) for share in (0.5, 0.75, 0.9)},
    **{f"mini_trainer {share:g}": ("mini_trainer", with_mini_trainer(share)) for share in (0.5, 0.75, 0.9)},
    **{f"peft osf {share:g}": ("peft", with_peft(share)) for share in (0.5, 0.75, 0.9)},
}


def step(runner: Runner, ids: Tensor) -> float:
    """Take one step and return its seconds."""
    start = time.perf_counter()
    runner.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    runner.optimizer.step()
    runner.optimizer.zero_grad()
    return time.perf_counter() - start


def state_bytes(runner: Runner, ids: Tensor) -> int:
    """Return the bytes of parameters, buffers, gradients and optimizer state, each storage counted once."""
    runner.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    runner.optimizer.step()
    tensors = [*runner.model.parameters(), *runner.model.buffers()]
    tensors += [p.grad for p in runner.model.parameters() if p.grad is not None]
    tensors += [v for state in runner.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    runner.optimizer.zero_grad()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(width: int, tokens: int, length: int, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """Return one row per method."""
    model = llama(width, length)
    runners = {name: METHODS[name][1](copy.deepcopy(model)) for name in names}
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(VOCABULARY, (tokens // length, length), generator=generator) for _ in range(repeats + 2)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index, ids in enumerate(batches):
        for name in names:
            seconds[name].append(step(runners[name], ids))
        print(f"\rround {index + 1} of {len(batches)}", end="", flush=True)
    print()
    base = seconds["plain fine-tuning"][2:]  # the first two rounds warm up
    rows = []
    for name in names:
        ratios = [mine / theirs for mine, theirs in zip(seconds[name][2:], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "method": name,
                "seconds_median": statistics.median(seconds[name][2:]),
                "ratio_median": middle,
                "ratio_quartiles": [low, high],
                "state_bytes": state_bytes(runners[name], batches[0]),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    plain_bytes = rows[0]["state_bytes"]
    lines = [f"{'method':20} {'s / step':>9} {'x plain':>8} {'quartiles':>13} {'state':>9} {'x plain':>8}"]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"{row['method']:20} {row['seconds_median']:9.3f} {row['ratio_median']:8.2f} {low:6.2f}-{high:5.2f} "
            f"{row['state_bytes'] / 1e6:6.0f} MB {row['state_bytes'] / plain_bytes:8.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("docs/results/step-time.json"))
    options = parser.parse_args()
    names = [name for name, (module, _) in METHODS.items() if importlib.util.find_spec(module)]
    for name in [name for name in METHODS if name not in names]:
        print(f"{name} is not installed and left out")
    rows = measure(options.width, options.tokens, options.length, options.repeats, names)
    print(table(rows))
    settings = {"width": options.width, "layers": LAYERS, "tokens": options.tokens, "length": options.length}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.output,
        {"settings": settings | {"repeats": options.repeats, "dtype": "float32", "threads": torch.get_num_threads()},
         "rows": rows, **environment()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
