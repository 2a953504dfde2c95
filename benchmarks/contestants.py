"""The methods that are compared: each takes the same model and trains the same weights with the same optimizer.

Trained are the projections of the blocks; everything else is frozen, in the peers too. AdamW, no weight decay, no
clipping, float32. A protected share of 0.75 leaves a quarter of each weight's singular directions to train.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica.constrain.protect import protected_layers
from lorica.subspace.plan_entry import Constraint, Source

VOCABULARY = 512
SHARES = (0.5, 0.75, 0.9)
RATE = 1e-5
PLAIN, LORA = "plain fine-tuning", "LoRA r=16"
PEERS = {"mini_trainer": "rhai-innovation-mini-trainer", "peft": "peft"}
"""Module and distribution of each peer."""

Change = Callable[[str], Tensor]


@dataclass
class Runner:
    """A method that is ready to step.

    Attributes:
        finish: returns the plain model, or its tensors, as it is handed over after training.
        watch: called before the first step, returns what tells how far a weight, by its name in the plain model, has
            moved since, as the method holds it, multiplied out in float64; None for methods that protect nothing.
    """

    model: nn.Module
    optimizer: Optimizer
    finish: Callable[[], nn.Module | dict[str, Tensor]]
    watch: Callable[[], Change] | None = None

    def step(self, ids: Tensor) -> None:
        """Take one step and keep the gradients."""
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()


@dataclass(frozen=True)
class Contestant:
    """One line of every table; ``build`` makes the given model, which it owns, ready to train."""

    name: str
    family: str
    build: Callable[[LlamaForCausalLM], Runner]
    share: float | None = None
    module: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def llama_config(width: int, layers: int, length: int) -> LlamaConfig:
    """Return a Llama with heads of 64 and a feed-forward part of 2.75 times the width."""
    heads = width // 64
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=int(2.75 * width), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def llama(width: int, layers: int, length: int) -> LlamaForCausalLM:
    """Return the model that every method starts from."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(width, layers, length))


def batches(count: int, tokens: int, length: int) -> Iterator[Tensor]:
    """Yield random tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(VOCABULARY, (tokens // length, length), generator=generator)


def adamw(model: nn.Module) -> AdamW:
    """Return the one optimizer of all comparisons."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)


def plain(model: LlamaForCausalLM) -> Runner:
    """Fine-tuning of the same weights without a constraint."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)
    return Runner(model, adamw(model), lambda: model)


def with_lora(model: LlamaForCausalLM) -> Runner:
    """PEFT's LoRA of rank 16."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules=r".*_proj"))
    return Runner(wrapped, adamw(wrapped), wrapped.merge_and_unload)


def with_lorica(share: float, memory: str, **options: Any) -> Callable[[LlamaForCausalLM], Runner]:
    """Lorica, two-sided unless the options of its plan say otherwise."""

    def build(model: LlamaForCausalLM) -> Runner:
        lorica.protect(model, lorica.plan(model, effective_rank=share, **options), memory=memory)
        layers = protected_layers(model)
        return Runner(
            model, adamw(model), lambda: lorica.release(model), lambda: lambda name: layers[name].delta().double()
        )

    return build


def with_source(share: float, source: Source, constraint: Constraint) -> Callable[[LlamaForCausalLM], Runner]:
    """Lorica with directions from a source, equally many from each; those that measure do so on random tokens."""
    options = {"source": source, "constraint": constraint} | ({} if source == "weight" else {"calibration": "random"})

    def build(model: LlamaForCausalLM) -> Runner:
        least = {"down_proj": int(share * model.config.hidden_size)}  # else ``activation`` takes a share of its inputs
        return with_lorica(share, "fast", rank_pattern=least, **options)(model)

    return build


def with_peft(share: float) -> Callable[[LlamaForCausalLM], Runner]:
    """PEFT's ``osf``."""

    def build(model: LlamaForCausalLM) -> Runner:
        from peft import OSFConfig, get_peft_model

        wrapped = get_peft_model(model, OSFConfig(target_modules=r".*_proj", effective_rank=share))
        factors = {
            name.removeprefix("base_model.model."): dict(module.osf_svd_params["default"].items())
            for name, module in wrapped.named_modules()
            if hasattr(module, "osf_svd_params")
        }
        return Runner(wrapped, adamw(wrapped), wrapped.merge_and_unload, _moved(factors))

    return build


def with_mini_trainer(share: float) -> Callable[[LlamaForCausalLM], Runner]:
    """mini_trainer's OSFT model class with its optimizer wrapper, embeddings and head frozen."""

    def build(model: LlamaForCausalLM) -> Runner:
        from mini_trainer.osft_utils import auto_generate_target_osft_config, create_osft_model_class, optim_wrapper

        with contextlib.redirect_stdout(io.StringIO()):
            factored = create_osft_model_class(LlamaForCausalLM)(
                model.config, initialize_osft=False, upcast_dtype=torch.float32, output_dtype=torch.float32
            )
            factored.load_state_dict(model.state_dict())
            factored.osft_config = auto_generate_target_osft_config(
                factored, model_name_or_class="llama", rank_ratio=share
            )
            factored.reinitialize_osft(decompose_existing_weights=True)
        for name, parameter in factored.named_parameters():
            if "osft_params" not in name:
                parameter.requires_grad_(False)
        factors = {
            name: dict(module.osft_params.named_parameters())
            for name, module in factored.named_modules()
            if hasattr(module, "osft_U_high")
        }
        return Runner(
            factored,
            optim_wrapper(adamw(factored), factored),
            lambda: factored.prepare_state_dict_for_save(factored.state_dict()),
            _moved(factors),
        )

    return build


def _moved(factors: dict[str, dict[str, Any]]) -> Callable[[], Change]:
    """Return the ``watch`` of factored weights: the high factors are frozen, so the change is that of the low ones."""

    def watch() -> Change:
        start = {name: {key: value.detach().clone() for key, value in own.items()} for name, own in factors.items()}
        return lambda name: _product(factors[name]) - _product(start[name])

    return watch


def _product(low: dict[str, Any]) -> Tensor:
    u, s, v = (low[key].detach().double() for key in ("U_low", "S_low", "V_low"))
    return (u * s) @ v


CONTESTANTS: dict[str, Contestant] = {
    one.name: one
    for one in (
        Contestant(PLAIN, "plain", plain),
        Contestant(LORA, "LoRA", with_lora, module="peft"),
        *(
            Contestant(f"lorica {memory} {share:g}", f"lorica {memory}", with_lorica(share, memory), share)
            for memory in ("fast", "lean")
            for share in SHARES
        ),
        *(
            Contestant(f"mini_trainer {share:g}", "mini_trainer", with_mini_trainer(share), share, "mini_trainer")
            for share in SHARES
        ),
        *(Contestant(f"peft osf {share:g}", "peft osf", with_peft(share), share, "peft") for share in SHARES),
    )
}
"""Every method by name; plain fine-tuning, what all are measured against, first."""

SOURCE_PAIRS: dict[Constraint, tuple[Source, Source]] = {
    "two-sided": ("weight", "curvature"),
    "input": ("weight", "activation"),
}
"""By constraint: the source that measures nothing, and the one that is measured against it."""

SOURCES: dict[str, Contestant] = {
    one.name: one
    for share in SHARES
    for constraint, pair in SOURCE_PAIRS.items()
    for source in pair
    for one in [
        Contestant(
            f"{source} {constraint} {share:g}", f"{source} {constraint}", with_source(share, source, constraint), share
        )
    ]
}
"""Lorica by source of what it protects, and by name; see ``benchmarks/source_time.py``."""


def chosen(shares: tuple[float, ...] = SHARES) -> tuple[list[Contestant], list[str]]:
    """Return the installed contestants that protect one of these shares or nothing, and the names left out."""
    wanted = [one for one in CONTESTANTS.values() if one.share is None or one.share in shares]
    missing = [one.name for one in wanted if not one.installed]
    for name in missing:
        print(f"{name} is not installed and left out")
    return [one for one in wanted if one.installed], missing
