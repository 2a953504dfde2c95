"""What meta tensors do not do by themselves: take a device's attention kernel, and follow autocast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten

_NARROW = {
    F.linear, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,
    torch.bmm, Tensor.bmm, torch.addmm, torch.baddbmm, torch.einsum,
}  # fmt: skip
"""Functions that autocast runs in the narrow dtype (torch.amp, "CUDA Ops that can autocast to float16")."""

_WIDE = {F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, F.cross_entropy, F.layer_norm}
"""Functions that autocast runs in float32, as far as models call them."""


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return arguments with all float16, bfloat16 and float32 tensors in one dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if isinstance(value, tuple | list) else value


class KernelsOf(TorchFunctionMode):
    """Lets ``scaled_dot_product_attention`` on meta tensors take the kernel of a device, where meta has the plain form.

    The plain form keeps the scores, (length x length) per head; no kernel does.

    Args:
        device: "cpu" or "cuda".
        autocast: the dtype of matrix products under mixed precision; None: that of the tensors.
    """

    def __init__(self, device: str, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.device, self.autocast = device, autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and func in _NARROW | _WIDE:
            dtype = self.autocast if func in _NARROW else torch.float32
            args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # the kernels add a mask
        trained_bias = attn_mask is not None and attn_mask.requires_grad
        if self.device == "cpu" and (dropout_p or trained_bias):  # the CPU's kernel knows neither
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if self.device == "cpu":
            return _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if query.dtype == torch.float32 or attn_mask is not None:
            if enable_gqa:
                repeats = query.shape[-3] // key.shape[-3]
                key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
            return _aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
            )[0]
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
