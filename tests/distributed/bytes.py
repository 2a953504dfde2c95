"""What a process receives from the others: counted by collective as they are called, and by the kernel in all."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Received(TorchDispatchMode):
    """Counts the bytes that collectives bring this process, by the pass they are called in and their kind.

    A gather brings what the output has more than the input, a reduce-scatter as much as it takes away, an all-reduce
    2 (R - 1) / R of its tensor, a reduce half of that as a mean over the processes, a broadcast its tensor unless it is
    this process's own, and an all-to-all all but what stays. The kernel counts the same of gloo, but twice as much in a
    reduce-scatter, which gloo makes of an all-reduce, and 1 + 1 / R as much in a reduce.

    Attributes:
        total: bytes by pass and kind, such as "backward, broadcast".
    """

    def __init__(self) -> None:
        super().__init__()
        self.total: Counter[str] = Counter()
        self._pass = ""

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count what is called meanwhile under the name of a pass."""
        self._pass = name
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its collectives come here next, on plain tensors
        result = func(*args, **(kwargs or {}))
        rules = {"c10d": _of_group, "_c10d_functional": _of_tensor}
        if func.namespace in rules:
            kind, nbytes = rules[func.namespace](func._overloadpacket.__name__, args, result)
            self.total[f"{self._pass}, {kind}"] += nbytes
        return result


def _of_group(name: str, args: Any, result: Any) -> tuple[str, int]:
    """Return kind and bytes of a call of ``dist.broadcast`` and the like, or of DDP's."""
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
    ranks, rank = group.size(), group.rank()
    match name:
        case "_allgather_base_":
            return "gather", args[0].nbytes - args[1].nbytes
        case "_reduce_scatter_base_":
            return "reduce-scatter", args[1].nbytes - args[0].nbytes
        case "allreduce_":
            return "all-reduce", 2 * (ranks - 1) * _nbytes(args[0]) // ranks
        case "reduce_":
            return "reduce", (ranks - 1) * _nbytes(args[0]) // ranks
        case "broadcast_":
            return "broadcast", 0 if rank == args[2] else _nbytes(args[0])
        case "alltoall_base_":
            output, splits = args[0], args[3]
            stays = splits[rank] if splits else len(output) // ranks
            return "all-to-all", output.nbytes - stays * output.itemsize
    raise AssertionError(f"no rule for {name}")


def _of_tensor(name: str, args: Any, result: Any) -> tuple[str, int]:
    """Return kind and bytes of a collective of a DTensor."""
    match name:
        case "all_gather_into_tensor":
            return "gather", result.nbytes - args[0].nbytes
        case "reduce_scatter_tensor":
            return "reduce-scatter", args[0].nbytes - result.nbytes
        case "all_reduce":
            ranks = dist.distributed_c10d._resolve_process_group(args[2]).size()
            return "all-reduce", 2 * (ranks - 1) * args[0].nbytes // ranks
        case "wait_tensor" | "_wrap_tensor_autograd":
            return "wait", 0
    raise AssertionError(f"no rule for {name}")


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))


_RECEIVED = 128
"""Where ``struct tcp_info`` of Linux has ``tcpi_bytes_received``, a 64-bit number."""


def from_sockets() -> int:
    """Return the bytes that all TCP connections of this process have received, as Linux counts them."""
    return sum(_received(int(file.name)) for file in Path("/proc/self/fd").iterdir())


def _received(descriptor: int) -> int:
    with suppress(OSError):  # no TCP, or the folder that was listed and is closed by now
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with socket.socket(fileno=os.dup(descriptor)) as one:
                told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                return int(struct.unpack_from("Q", told, _RECEIVED)[0])
    return 0
