"""Sharded tensors brought together at one process each, and sent back to where their parts belong.

They travel between the devices that compute, also where FSDP2 keeps the parts on the host (``CPUOffloadPolicy``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lorica.errors import LoricaError


def put_back(model: nn.Module) -> None:
    """Put the sharded parameters back in their places, where a forward pass has left gathered ones: FSDP2's root unit.

    What is done to those, such as freezing, would not be done to the model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def group_of(tensor: DTensor) -> dist.ProcessGroup:
    """Return the processes that a tensor is sharded over.

    Raises:
        LoricaError: it is sharded over no dimension of the mesh, or over more than one.
    """
    return tensor.device_mesh.get_group(_axis(tensor))


def other_groups(tensor: DTensor) -> list[dist.ProcessGroup]:
    """Return the processes that hold the same part of a tensor, by dimension of the mesh: none without replicas."""
    mesh = tensor.device_mesh
    return [mesh.get_group(axis) for axis in range(mesh.ndim) if axis != _axis(tensor)]


def to_owners(tensors: Sequence[DTensor | None], group: dist.ProcessGroup) -> Tensor | None:
    """Bring the parts of one tensor of each process together there.

    Args:
        tensors: by rank in the group, the tensor that this process is to get the whole of; of one dtype.
        group: all of its processes have to call this, with the same tensors.

    Returns:
        This process's own, if it has one; on the device that computes.
    """
    own = tensors[group.rank()]
    there = [tensor.to_local().to(tensor.device_mesh.device_type) for tensor in tensors if tensor is not None]
    sent = [0 if tensor is None else tensor.to_local().numel() for tensor in tensors]
    shapes = [] if own is None else _part_shapes(own, group)
    received = [math.prod(shape) for shape in shapes] or [0] * group.size()
    parts = _exchange(torch.cat([part.flatten() for part in there]), sent, received, group)
    if own is None:
        return None
    return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], _dim(own))


def from_owners(whole: Tensor | None, tensors: Sequence[DTensor | None], group: dist.ProcessGroup) -> None:
    """Write to each process's parts what the owners have; the reverse of ``to_owners``.

    Args:
        whole: what this process's own tensor, if it has one, is to be; on the device that computes.
        tensors, group: as for ``to_owners``.
    """
    own = tensors[group.rank()]
    targets = [None if tensor is None else tensor.to_local() for tensor in tensors]
    received = [0 if target is None else target.numel() for target in targets]
    if whole is None or own is None:
        first = next(tensor for tensor in tensors if tensor is not None)
        flat = torch.empty(0, dtype=first.dtype, device=first.device_mesh.device_type)
        sent = [0] * group.size()
    else:
        pieces = whole.split([shape[_dim(own)] for shape in _part_shapes(own, group)], _dim(own))
        flat, sent = torch.cat([piece.flatten() for piece in pieces]), [piece.numel() for piece in pieces]
    for target, part in zip(targets, _exchange(flat, sent, received, group), strict=True):
        if target is not None:
            target.copy_(part.view(target.shape))


def _exchange(flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Sequence[Tensor]:
    output = flat.new_empty(sum(received))
    dist.all_to_all_single(output, flat, received, sent, group=group)
    return output.split(received)


def _axis(tensor: DTensor) -> int:
    axes = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(axes) != 1 or not isinstance(tensor.placements[axes[0]], Shard):
        raise LoricaError(
            f"a protected weight is placed as {tensor.placements}; Lorica trains weights that FSDP2 shards over one "
            "dimension of the mesh, not tensor parallel ones"
        )
    return axes[0]


def _dim(tensor: DTensor) -> int:
    placement = tensor.placements[_axis(tensor)]
    assert isinstance(placement, Shard)
    return placement.dim


def _part_shapes(tensor: DTensor, group: dist.ProcessGroup) -> list[list[int]]:
    """Return the shape of each process's part: chunks of one length, the last ones shorter or empty."""
    shape, dim = list(tensor.shape), _dim(tensor)
    chunk = -(-shape[dim] // group.size())
    lengths = [min(max(shape[dim] - rank * chunk, 0), chunk) for rank in range(group.size())]
    return [[*shape[:dim], length, *shape[dim + 1 :]] for length in lengths]
