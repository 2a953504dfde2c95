"""Part 3: the lift ``Q_U M Q_V^T``, the fold and the gradient's reduction, in each arithmetic that a GPU offers.

A product of two matrices is computed in float32, in TF32, or from bfloat16 parts: with a = a_high + a_low,

    a b = a_high b_high + a_high b_low + a_low b_high        (each summed in float32; a_low b_low is below its rounding)

Shape suffixes: M output rows, N input columns, K protected, P / Q free output / input directions, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

import lorica
from benchmarks.gpu.hardware import float32_products
from benchmarks.gpu.workbench import Row, Workbench
from lorica.constrain.audit_weight import leakage
from lorica.constrain.protect import protected_layers
from lorica.constrain.reduced import ORDERS, core_gradient
from lorica.subspace.basis import Explicit, Reflector
from lorica.subspace.orthonormal import reflector

SHAPES, TINY_SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096)), ((48, 48), (112, 32))
TOKENS, TINY_TOKENS = 8192, 64
SHARE = 0.75

Parts = tuple[Tensor, ...]
"""A matrix as a product takes it: itself, or its high and low bfloat16 parts."""


@dataclass(frozen=True)
class Arithmetic:
    """How a product of float32 matrices is computed.

    Attributes:
        precision: of torch's float32 products meanwhile.
        parts: what is made of a matrix beforehand.
        product: of two matrices made into parts.
    """

    name: str
    precision: str
    parts: Callable[[Tensor], Parts]
    product: Callable[[Parts, Parts], Tensor]


def high_low(a: Tensor) -> Parts:
    """Return bfloat16 parts whose sum is ``a`` to 16 bits."""
    high = a.bfloat16()
    return high, (a - high).bfloat16()


def arithmetics(bench: Workbench) -> list[Arithmetic]:
    """Return what is compared."""
    mm = bench.device.product

    def three(a: Parts, b: Parts) -> Tensor:
        return mm(a[0], b[0]).add_(mm(a[0], b[1])).add_(mm(a[1], b[0]))

    def whole(a: Parts, b: Parts) -> Tensor:
        return a[0] @ b[0]

    return [
        Arithmetic("fp32", "highest", lambda a: (a,), whole),
        Arithmetic("tf32", "high", lambda a: (a,), whole),
        Arithmetic("bf16 hi+lo", "highest", high_low, three),
        Arithmetic("bf16", "highest", lambda a: (a.bfloat16(),), lambda a, b: mm(a[0], b[0])),
    ]


@dataclass
class Case:
    """One weight with its exact bases (float64), a core and tokens."""

    w: Tensor
    u: Tensor
    v: Tensor
    q_u: Tensor
    q_v: Tensor
    core: Tensor

    @classmethod
    def make(cls, bench: Workbench, m: int, n: int) -> Case:
        torch.manual_seed(0)
        device = bench.device.name
        k = int(SHARE * min(m, n))
        (u, q_u), (v, q_v) = (_orthogonal(size, k, device) for size in (m, n))
        core = 1e-3 * torch.randn(m - k, n - k, device=device)
        return cls(0.02 * torch.randn(m, n, device=device).bfloat16(), u, v, q_u, q_v, core)

    @cached_property
    def reflector(self) -> Tensor:
        """Z of the output side, float64."""
        return reflector(self.u)

    @property
    def labels(self) -> Row:
        return {"rows": self.w.shape[0], "columns": self.w.shape[1], "k": self.u.shape[1]}


def _orthogonal(size: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    """Return k orthonormal directions and a basis of the rest."""
    q = torch.linalg.qr(torch.randn(size, size, device=device, dtype=torch.float64)).Q
    return q[:, :k].contiguous(), q[:, k:].contiguous()


Lift = tuple[Callable[[], Tensor], Tensor]
"""What computes a lift, and the basis of the free output directions (float64) that it computes it with."""


def explicit_lift(case: Case, how: Arithmetic) -> Lift:
    """Return the lift by explicit bases: ``(Q_U M) Q_V^T``."""
    q_u, q_v_t = how.parts(case.q_u.float()), how.parts(case.q_v.float().T.contiguous())

    def lift() -> Tensor:
        return how.product(how.parts(how.product(q_u, how.parts(case.core))), q_v_t)

    return lift, case.q_u


def reflector_lift(case: Case, how: Arithmetic) -> Lift:
    """Return the lift with Q_U = [0; I] - 2 Z Z_free^T, a reflector, and Q_V explicit."""
    z = case.reflector
    k = z.shape[1]
    z_parts, z_free_t = how.parts(z.float()), how.parts(z[k:].T.float().contiguous())
    q_v_t = how.parts(case.q_v.float().T.contiguous())

    def lift() -> Tensor:
        out = how.product(z_parts, how.parts(how.product(z_free_t, how.parts(case.core)))).mul_(-2)
        out[k:] += case.core
        return how.product(how.parts(out), q_v_t)

    q_u = -2 * z @ z[k:].T
    q_u[k:].diagonal().add_(1)
    return lift, q_u


def run(bench: Workbench) -> None:
    """Compare arithmetics and forms on each shape, then time Lorica's own layers and the gradient's reduction."""
    for m, n in TINY_SHAPES if bench.tiny else SHAPES:
        case = Case.make(bench, m, n)
        for how in arithmetics(bench):
            _lifts(bench, case, how)
        _gradients(bench, case)
        _layers(bench, m, n)
        del case
        bench.device.free()


def _lifts(bench: Workbench, case: Case, how: Arithmetic) -> None:
    (m, n), (p, q), k = case.w.shape, case.core.shape, case.u.shape[1]
    last = m * q * n
    forms: dict[str, tuple[Callable[[Case, Arithmetic], Lift], int]] = {"explicit": (explicit_lift, m * p * q + last)}
    if k < m - k:  # else the larger form
        forms["reflector"] = (reflector_lift, p * k * q + m * k * q + last)
    for form, (build, products) in forms.items():
        labels = case.labels | {"what": "lift", "form": form, "arithmetic": how.name}
        bench.measure(labels, _lift, bench, case, how, build, 2 * products)


def _lift(bench: Workbench, case: Case, how: Arithmetic, build: Callable[[Case, Arithmetic], Lift], flops: int) -> Row:
    lift, q_u = build(case, how)
    weight = torch.empty_like(case.w)
    with float32_products(how.precision):
        seconds = bench.device.median(lift)
        fold = bench.device.median(lambda: weight.copy_(lift().add_(case.w)))
        delta = lift().double()
    exact = q_u @ case.core.double() @ case.q_v.T
    return {
        "ms": 1e3 * seconds,
        "fold_ms": 1e3 * fold,
        "tflops": flops / seconds / 1e12,
        "leakage": max(leakage(delta, case.u, case.v)),
        "error": float((delta - exact).norm() / exact.norm()),
    }


def _gradients(bench: Workbench, case: Case) -> None:
    """Time ``Q_U^T (dY^T X) Q_V`` of bfloat16 tokens: orders of products, and bases in bfloat16 or float32."""
    tokens = TINY_TOKENS if bench.tiny else TOKENS
    m, n = case.w.shape
    dy = torch.randn(tokens, m, device=bench.device.name).bfloat16()
    x = torch.randn(tokens, n, device=bench.device.name).bfloat16()
    out, inp = Explicit(case.q_u.float()), Explicit(case.q_v.float())
    exact = (case.q_u.T @ (dy.double().T @ x.double())) @ case.q_v
    forms: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "dense gradient alone, bf16": ("highest", lambda: dy.T @ x),
        **{f"{order}, bf16 bases": ("highest", partial(core_gradient, dy, x, out, inp, order)) for order in ORDERS},
        "fewest operations, fp32": ("highest", lambda: core_gradient(dy.float(), x.float(), out, inp)),
        "fewest operations, tf32": ("high", lambda: core_gradient(dy.float(), x.float(), out, inp)),
    }
    if case.u.shape[1] < m - case.u.shape[1]:  # the long side may be stored as a reflector: another basis
        long = Reflector(case.reflector.float())
        forms["fewest operations, bf16 reflector"] = ("highest", partial(core_gradient, dy, x, long, inp))
    for form, (precision, reduce) in forms.items():
        labels = case.labels | {"what": "gradient", "form": form, "tokens": tokens}
        bench.measure(labels, _gradient, bench, precision, reduce, None if "reflector" in form else exact)


def _gradient(bench: Workbench, precision: str, reduce: Callable[[], Tensor], exact: Tensor | None) -> Row:
    with float32_products(precision):
        seconds = bench.device.median(reduce)
        found = reduce().double()
    if exact is None or found.shape != exact.shape:  # another basis, or no reduction at all
        return {"ms": 1e3 * seconds, "error": None}
    return {"ms": 1e3 * seconds, "error": float((found - exact).norm() / exact.norm())}


def _layers(bench: Workbench, m: int, n: int) -> None:
    for memory in ("fast", "lean"):
        bench.measure(
            {"rows": m, "columns": n, "what": "fold", "form": f"lorica {memory}"}, _layer, bench, m, n, memory
        )


def _layer(bench: Workbench, m: int, n: int, memory: str) -> Row:
    """Time one layer's own fold as ``lorica.protect`` makes it, in float32 and TF32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=False, device=bench.device.name, dtype=torch.bfloat16))
    bench.device.synchronize()
    start = time.monotonic()
    lorica.protect(model, lorica.plan(model, effective_rank=SHARE, target_modules="0"), memory=memory)
    bench.device.synchronize()
    taken = time.monotonic() - start
    (layer,) = protected_layers(model).values()
    nn.init.normal_(layer.core, std=1e-3)
    milliseconds = {}
    for name, precision in (("ms", "highest"), ("tf32_ms", "high")):
        with float32_products(precision):
            milliseconds[name] = 1e3 * bench.device.median(layer.fold)
    forms = [type(basis).__name__ for basis in (layer.out_basis, layer.in_basis)]
    return milliseconds | {"protect_seconds": taken, "bases": forms}
