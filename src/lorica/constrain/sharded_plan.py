"""What a plan looks at in a model that FSDP2 has sharded; all processes come to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorica.constrain.owners import agree, at_owners, device_of, sharded_weight, shared_layers, told_to_all
from lorica.constrain.transport import group_of, other_groups, put_back
from lorica.errors import LoricaError
from lorica.subspace.measure import Sums
from lorica.subspace.moment import Moment
from lorica.subspace.observe import InputStatistics


def sharded_layers(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return those of the layers whose weights are sharded."""
    return {name: layer for name, layer in layers.items() if isinstance(layer.weight, DTensor)}


def sharded_spectra(
    model: nn.Module, layers: Mapping[str, nn.Module], singular_values: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the singular values of sharded weights, each computed by its owner.

    Args:
        layers: by name, all sharded.
        singular_values: gets a layer's name and its whole weight (M x N).
    """
    spectra: dict[str, Tensor] = {}
    for alike in shared_layers(model, layers):
        own = at_owners(alike, layers, singular_values)
        spectra |= told_to_all(own, {name: min(sharded_weight(layers[name]).shape) for name in alike.owners}, alike)
    return spectra


def add_up(model: nn.Module, observed: Mapping[str, InputStatistics], layers: Mapping[str, nn.Module]) -> None:
    """Add to what this process observed in sharded layers what the others did; each had batches of its own."""
    put_back(model)
    if not layers:
        return
    statistics = [observed[name] for name in layers]
    mesh = sharded_weight(next(iter(layers.values()))).device_mesh
    groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    sums = torch.tensor([[one.cosine, one.rows] for one in statistics], dtype=torch.float64).to(device_of(groups[0]))
    for group in groups:
        dist.all_reduce(sums, group=group)
    for one, (cosine, rows) in zip(statistics, sums.tolist(), strict=True):
        one.cosine, one.rows = cosine, int(rows)


def sums_at_owners(model: nn.Module, layers: Mapping[str, nn.Module]) -> Callable[[Sums], Sums]:
    """Return what adds up the second moments of all processes, those of each layer at its owner alone.

    Args:
        layers: by name, all sharded; as many as ``protect`` is to give owners to.
    """
    places: dict[str, tuple[dist.ProcessGroup, int, list[dist.ProcessGroup]]] = {}
    for alike in shared_layers(model, layers):
        for name, owner in alike.owners.items():
            places[name] = (alike.group, owner, other_groups(sharded_weight(layers[name])))

    def together(sums: Sums) -> Sums:
        for name, sides in sums.items():
            for _, moment in sorted(sides.items()):
                _add_up_at_owner(moment, *places[name])
        return {name: sides for name, sides in sums.items() if places[name][0].rank() == places[name][1]}

    return together


def _add_up_at_owner(
    moment: Moment, group: dist.ProcessGroup, owner: int, replicas: Sequence[dist.ProcessGroup]
) -> None:
    counts = torch.tensor([moment.trace, moment.count], dtype=torch.float64, device=moment.sum.device)
    for tensor in (moment.sum, counts):
        dist.reduce(tensor, group=group, group_dst=owner)
        if group.rank() == owner:
            for owners in replicas:
                dist.all_reduce(tensor, group=owners)
    moment.trace, moment.count = float(counts[0]), int(counts[1])


def check_numbers(model: nn.Module) -> None:
    """Refuse a model that computes no numbers, and say which weight it is; in all processes, if they share the model.

    Raises:
        LoricaError: a parameter holds NaN or inf.
    """
    wrong = next((name for name, parameter in model.named_parameters() if not _of_numbers(parameter)), None)
    problem = None
    if wrong is not None:
        problem = LoricaError(f"{wrong} holds NaN or inf; nothing can be calibrated on such a model")
    shared = next((parameter for parameter in model.parameters() if isinstance(parameter, DTensor)), None)
    if shared is not None:
        agree(problem, group_of(shared))
    elif problem is not None:
        raise problem


def _of_numbers(parameter: Tensor) -> bool:
    own = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
    return not own.numel() or bool(torch.stack(own.aminmax()).isfinite().all())
