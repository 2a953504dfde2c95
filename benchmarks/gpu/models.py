"""The models of the suite: true widths, random weights, made on the device, as deep as asked.

One decoder layer is made (and protected), then copied to the full depth: the copies are separate tensors of the same
values, so time and memory are those of the whole model, while the split is paid for one layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lorica.constrain.linear import SubspaceLayer
from lorica.subspace.basis import Basis

_SMALL = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _SMALL
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"tie_word_embeddings": True},
    "Llama-3.2-3B": _SMALL
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"tie_word_embeddings": True},
    "Llama-3.1-8B": _SMALL
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"tie_word_embeddings": False},
}
"""The published shapes, from each model's config.json."""

TINY = {
    "hidden_size": 32,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
"""In place of each of them in a tiny run; wide and tall like them."""


def config_of(shape: str, *, tiny: bool, layers: int | None = None) -> LlamaConfig:
    """Return the configuration of a shape, with another depth if one is given."""
    values = (TINY | {"tie_word_embeddings": SHAPES[shape]["tie_word_embeddings"]}) if tiny else SHAPES[shape]
    values = values | ({} if layers is None else {"num_hidden_layers": layers})
    return LlamaConfig(**values, bos_token_id=None, eos_token_id=None, use_cache=False)


def one_layer(shape: str, dtype: torch.dtype, device: str, *, tiny: bool, attention: str = "sdpa") -> Any:
    """Return a model of one decoder layer, its weights drawn on the device; the same ones every time."""
    torch.manual_seed(0)
    config = config_of(shape, tiny=tiny, layers=1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.train()


def deepen(model: Any, layers: int) -> None:
    """Copy the only decoder layer of a model until there are ``layers``, in place."""
    blocks = model.model.layers
    for index in range(1, layers):
        block = copy.deepcopy(blocks[0])
        block.self_attn.layer_idx = index
        _pin_alike(block, blocks[0])
        blocks.append(block)
    model.config.num_hidden_layers = layers


def _pin_alike(copied: nn.Module, original: nn.Module) -> None:
    """Page-lock what the original holds page-locked on the host: a copy of it is not."""
    for new, old in zip(copied.modules(), original.modules(), strict=True):
        if isinstance(new, SubspaceLayer) and isinstance(old, SubspaceLayer) and _pinned(old.base):
            for name, value in list(vars(new).items()):
                if isinstance(value, Tensor):
                    setattr(new, name, value.pin_memory())
                elif isinstance(value, tuple) and all(isinstance(part, Basis) for part in value):
                    setattr(new, name, tuple(basis.mapped(Tensor.pin_memory) for basis in value))


def _pinned(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and torch.cuda.is_available() and tensor.is_pinned()


def freeze_outside_blocks(model: nn.Module) -> None:
    """Leave the linear layers of the blocks trainable and nothing else: what the other methods train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)


def storage_bytes(tensors: list[Tensor], device: str) -> int:
    """Return the bytes of these tensors on one kind of device, each storage counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == device
    }
    return sum(storages.values())
