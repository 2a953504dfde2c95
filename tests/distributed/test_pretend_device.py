"""Parts that rest on the host and are computed with on a device: a pretended one, of tensors without values.

What would mix tensors of both raises there as it does on a GPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lorica.constrain.exchange import mean_gradient
from lorica.constrain.linear import SubspaceLinear
from lorica.constrain.origin import on_host
from lorica.constrain.sharded import Shards, fold
from lorica.constrain.sharded_audit import _own
from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from tests.distributed.ranks import on_ranks

M, N = 8, 12


class Pretended(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


FORMS = {"one side": (5, 9), "both sides": (M, N)}
"""Free directions of each side; where all are free nothing is left to the owner."""


def bases(form: str) -> tuple[Basis, Basis]:
    if form == "both sides":
        return Everything(M), Everything(N)
    return Explicit(there(M, 5)), Reflector(there(N, 3))


def there(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="pretend:0")


def at_rest(rows: int, columns: int, mesh: DeviceMesh) -> DTensor:
    """Return the half of a tensor that process 0 of 2 has, on the host."""
    half, shape = there(-(-rows // 2), columns), torch.Size((rows, columns))
    whole = DTensor.from_local(half, mesh, [Shard(0)], run_check=False, shape=shape, stride=(columns, 1))
    return whole.to("cpu")  # type: ignore[return-value]


def offloaded(form: str, owner: int, mesh: DeviceMesh) -> SubspaceLinear:
    weight, core = at_rest(M, N, mesh), at_rest(*FORMS[form], mesh)
    plain = nn.Linear(N, M, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    w0, sides = on_host(there(M, N), bases(form), {})
    assert sides is not None
    return SubspaceLinear.wrap_sharded(plain, w0, sides, Shards(mesh.get_group(), owner, core, weight))


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("form", list(FORMS))
def test_what_is_offloaded_is_used_there_and_comes_back(form: str, owner: int) -> None:
    def work(rank: int) -> None:
        dist.destroy_process_group()
        _setup_privateuseone_for_python_backend("pretend", Pretended())
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        mesh = dist.init_device_mesh("pretend", (2,))
        with FakeTensorMode():
            layer = offloaded(form, owner, mesh)
            shards = layer.shards
            assert shards is not None
            assert {layer.base.device.type, shards.core.device.type, shards.weight.device.type} == {"cpu"}
            fold([layer])
            sides = (layer.out_basis, layer.in_basis)
            gradient = mean_gradient(there(6, M), there(6, N), there(M, N), sides, shards)()  # type: ignore[arg-type]
            assert gradient.shape == shards.core.shape
            assert gradient.placements == shards.core.placements
            assert gradient.device.type == gradient.to_local().device.type == "cpu"
            for audited in _own({"0": layer}):
                assert {part.device.type for part in audited[1:]} == {"pretend"}  # type: ignore[union-attr]
            assert shards.weight.to_local().device.type == "cpu"

    on_ranks(1, work)
