"""What is alive and what is done, against counts by hand and against torch's own profiler."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lorica.forecast.device_kernels import KernelsOf
from lorica.forecast.ledger import Ledger, Operation
from tests.builders import batch, tiny
from tests.forecast.conftest import profiled

DEVICES = ("meta", "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_is_what_was_alive_together(device: str) -> None:
    with Ledger() as ledger:
        a = torch.zeros(1000, device=device)
        b = a + 1
        del a
        c = torch.zeros(500, dtype=torch.float64, device=device)
        d = torch.zeros(10, device=device)
    assert ledger.peak.total() == 4000 + 4000 + 40
    assert ledger.now.total() == sum(x.nbytes for x in (b, c, d))


@pytest.mark.parametrize("device", DEVICES)
def test_a_storage_counts_once_and_as_long_as_a_view_of_it_lives(device: str) -> None:
    with Ledger() as ledger:
        whole = torch.zeros(10, 100, device=device)
        view = whole.T[3:5].reshape(-1)[:1]
        half = whole[:5]
        held = ledger.now.total()
        del whole, view
        assert ledger.now.total() == 4000
        del half
    assert held in (4000, 4000 + 80)  # reshape may copy the two rows
    assert ledger.now.total() == 0


def test_what_the_backward_pass_keeps_is_counted_until_it_is_used() -> None:
    x = torch.ones(8, 16, device="meta", requires_grad=True)
    with Ledger() as ledger:
        ledger.own("weights", [x])
        y = x.exp().sin()  # exp keeps its result, sin its input: the same tensor
        assert ledger.now["activations"] == 2 * x.nbytes
        y.sum().backward()
        del y
        assert ledger.now["activations"] == x.nbytes  # the gradient
        ledger.own("gradients", [x.grad])  # type: ignore[list-item]
    assert (ledger.now["activations"], ledger.now["gradients"], ledger.now["weights"]) == (0, x.nbytes, x.nbytes)


def test_what_lies_elsewhere_counts_nothing() -> None:
    ledger = Ledger()
    aside = torch.empty(100, device="meta")
    assert ledger.elsewhere([aside]) == 400
    with ledger:
        view = aside.view(10, 10).T
        assert ledger.now.total() == 0
        del aside, view
    assert ledger.now.total() == 0


def test_a_pause_stands_for_one_kernel() -> None:
    with Ledger() as ledger:
        x = torch.zeros(100, device="meta")
        ledger.restart()
        ledger.pause()
        x.add_(torch.zeros(10_000, device="meta").sum())
        ledger.resume(Operation(0, 800, narrow=False))
    assert ledger.peak.total() == 400
    assert ledger.work == {Operation(0, 800, narrow=False): 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_of_a_matrix_product_and_of_what_only_moves_memory(dtype: torch.dtype) -> None:
    a, b = torch.empty(3, 5, device="meta", dtype=dtype), torch.empty(5, 7, device="meta", dtype=dtype)
    size = a.element_size()
    with Ledger() as ledger:
        c = a @ b
        c.add_(1)
        c.T.reshape(7, 3)  # no work
    narrow = dtype == torch.bfloat16
    product = Operation(2 * 3 * 5 * 7, (15 + 35 + 21) * size, narrow)
    assert ledger.work == {product: 1, Operation(0, 2 * 21 * size, narrow): 1}


def test_what_is_broadcast_is_read_once() -> None:
    column = torch.empty(1, 1000, device="meta").expand(50, 1000)
    with Ledger() as ledger:
        _ = column + 0
    assert ledger.work == {Operation(0, 4000 + 200_000, narrow=False): 1}


def test_a_question_for_a_value_is_answered_with_yes() -> None:
    with Ledger():
        assert bool(torch.empty(3, device="meta").isfinite().all())


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_keeps_no_scores(device: str, dtype: torch.dtype, masked: bool, key_heads: int) -> None:
    length, heads, width = 512, 4, 16
    q = torch.empty(1, heads, length, width, device="meta", dtype=dtype, requires_grad=True)
    k, v = (torch.empty(1, key_heads, length, width, device="meta", dtype=dtype, requires_grad=True) for _ in "kv")
    mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta") if masked else None
    with KernelsOf(device), Ledger() as ledger:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, enable_gqa=key_heads < heads)
        out.sum().backward()
    assert out.shape == q.shape
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]  # type: ignore[union-attr]
    scores = heads * length * length * q.element_size()
    assert ledger.peak.total() < scores
    products = 2 * heads * length * length * width
    assert sum(op.flops * n for op, n in ledger.work.items()) == products * (2 + 5)


def test_dropout_on_the_cpu_keeps_the_scores() -> None:
    q = torch.empty(1, 4, 256, 16, device="meta", requires_grad=True)
    with KernelsOf("cpu"), Ledger() as ledger:
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    assert ledger.peak.total() > 4 * 256 * 256 * 4


def profiled_peak(model: nn.Module, inputs: dict[str, torch.Tensor], narrow: bool = False) -> int:
    """Return the most bytes that torch's profiler saw allocated at once in a forward and a backward pass."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        del loss
    return profiled(profiler)


@pytest.mark.parametrize(
    ("name", "narrow"), [("llama", False), ("qwen3", False), ("t5", False), ("gpt2", False), ("llama", True)]
)
def test_a_blank_step_holds_what_the_profiler_sees_of_a_real_one(name: str, narrow: bool) -> None:
    real = tiny(name)
    inputs = batch(real, rows=8, length=32)
    seen = profiled_peak(real, inputs, narrow)
    blank = tiny(name).to("meta")
    with KernelsOf("cpu", torch.bfloat16 if narrow else None), Ledger() as ledger:
        ledger.own("weights", [*blank.parameters(), *blank.buffers()])
        moved = {key: value.to("meta") for key, value in inputs.items()}
        ledger.own("inputs", moved.values())
        loss = blank(**moved, use_cache=False).loss
        loss.backward()
    told = ledger.peak.total() - ledger.peak["weights"] - ledger.peak["inputs"]
    assert told == pytest.approx(seen, rel=0.05)
