"""Several processes that carry out one command, started by ``torchrun`` or ``accelerate launch``.

All of them go the same way. The first one speaks and writes; what goes wrong in one of them ends all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lorica.errors import LoricaError

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

_working_together = _have_met = False

PATIENCE = timedelta(hours=6)
"""How long a process waits for another one, of which the first has work of its own: lm-eval can take hours."""

_BROKEN_OFF = re.compile(r"[Cc]onnection (closed|reset|refused) by (remote )?peer|remote process exited")
"""What the two backends say where a process has ended."""

_TOLD = "lorica/told"

_PLACES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each process besides how many there are."""


class Elsewhere(LoricaError):
    """Something went wrong in another process, which tells what."""


class Ended(Elsewhere):
    """Another process has ended, perhaps without a word."""


def launched() -> int:
    """Return how many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def alone(what: str) -> str:
    """Return why something does not run on several processes."""
    return (
        f"{launched()} processes: {what} runs on one device, lorica train and lorica run on several; start it without "
        "torchrun or accelerate launch, and set CUDA_VISIBLE_DEVICES to one GPU"
    )


@contextmanager
def working_together(*, on_host: bool = False) -> Iterator[None]:
    """Let the functions of this module speak for all processes in here; outside of it each is on its own.

    Within another one it does nothing.

    Args:
        on_host: GPUs that exchange tensors are to exchange what lies on the host, too: a model that is offloaded.

    Raises:
        Elsewhere: in all processes but the first of those in which something went wrong.
    """
    global _working_together, _have_met
    if launched() == 1 or _working_together:
        yield
        return
    if missing := [name for name in _PLACES if name not in os.environ]:
        raise LoricaError(
            f"WORLD_SIZE is {launched()}, but {missing[0]} is not set: start the processes with torchrun or accelerate "
            "launch, or unset WORLD_SIZE for a single one"
        )
    import torch
    from accelerate import PartialState

    if on_host:
        _meet_with_hosts()
    # Joins the processes into a group. Not told so, Accelerate counts one process where there is no accelerator.
    PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    _working_together = _have_met = True
    try:
        yield
    except RuntimeError as error:
        if not _BROKEN_OFF.search(str(error)):
            raise
        raise Ended("another process has ended") from error
    finally:
        _working_together = False


def _meet_with_hosts() -> None:
    """Join the processes into a group that takes tensors of the accelerator and of the host; without one any does."""
    import torch
    import torch.distributed as dist

    device = torch.accelerator.current_accelerator()
    if device is not None and not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(f"cpu:gloo,{device.type}:{backend}", timeout=PATIENCE)


def exchange_on_host() -> bool:
    """Tell whether the processes can exchange tensors that lie on the host."""
    return size() == 1 or _device() == "cpu"


def size() -> int:
    """Return how many processes work together."""
    return launched() if _working_together else 1


def first() -> bool:
    """Tell whether this process is the one that speaks and writes."""
    return size() == 1 or rank() == 0


def leads() -> bool:
    """Tell, also before they work together and afterwards, whether this process is the first of all."""
    return launched() == 1 or int(os.environ.get("RANK") or 0) == 0


def tells() -> bool:
    """Tell whether a mistake in this process is to be told: the first one is, and of all that make it one tells."""
    if not _have_met:  # all make the same
        return leads()
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # where they met: a collective could not be agreed on any more
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        told: int = store.add(f"{_TOLD}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)
    except RuntimeError:  # the process that held it has ended: better told twice than not at all
        return True
    return told == 1


def name() -> str:
    """Return what to call this process's own files."""
    return f"process-{rank()}"


def largest(value: int) -> int:
    """Return the largest of the values that all processes give."""
    if size() == 1:
        return value
    import torch
    import torch.distributed as dist

    number = torch.tensor([value], device=_device())
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


@contextmanager
def agreed() -> Iterator[None]:
    """Wait for all processes at the end; what went wrong in one is raised by all.

    For work without a word between the processes.

    Raises:
        Elsewhere: something went wrong in another process, and in this one nothing or the same.
    """
    problem: BaseException | None = None
    try:
        yield
    except Exception as error:
        problem = error
    ranks = size()
    worst = largest(ranks - rank() if problem is not None else 0)  # of the first process that has a problem
    if problem is not None and (ranks == 1 or worst == ranks - rank()):
        raise problem
    if worst:
        raise Elsewhere(f"process {ranks - worst} could not go on") from problem


@contextmanager
def sharing(model: Any) -> Iterator[None]:
    """As ``agreed``, for work on a model that the processes may have shared out among them.

    Then they need each other for it, and nothing can be agreed any more where one fails: it raises at once and ends,
    and so end the others, which wait for it.
    """
    if in_step(model):
        yield
        return
    with agreed():
        yield


def by_first(work: Callable[[], Result]) -> Result | None:
    """Let the first process do something, and all wait for it.

    Returns:
        What it returned, there; None in the others.
    """
    result = None
    with agreed():
        if first():
            result = work()
    return result


def together(items: Sequence[Item], work: Callable[[Item], Result], *, in_step: bool = False) -> list[Result]:
    """Return what ``work`` makes of each item, in their order, each made by one of the processes.

    Args:
        items: the same in all processes.
        work: returns what JSON can hold.
        in_step: the processes need each other for it, and so work as often as each other: those that have no item left
            do the last one again. Where it fails in one of them nothing can be agreed any more; that one ends.
    """
    ranks, own = size(), []
    if ranks == 1:
        return [work(item) for item in items]
    if in_step:
        turns = range(rank(), -(-len(items) // ranks) * ranks, ranks)
        own = [work(items[min(turn, len(items) - 1)]) for turn in turns]
    else:
        with agreed():
            own = [work(item) for item in items[rank() :: ranks]]
    parts = gathered(own)
    return [parts[index % ranks][index // ranks] for index in range(len(items))]


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes, which JSON has to be able to hold, in their order."""
    if size() == 1:
        return [value]
    import torch
    import torch.distributed as dist

    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=_device())
    longest = largest(len(text))
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8, device=_device())
    padded[: len(text)] = text
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part.tolist())) for part in parts]


def in_step(model: Any) -> bool:
    """Tell whether all processes have to take the same passes through a model: FSDP2 has shared it out among them."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def reshard(model: Any) -> None:
    """Let go of what FSDP2 keeps gathered after a pass without a backward pass; parameters are parts again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the first process, by name; in the others as copies, on the CPU.

    What each process has computed by itself can differ from the others' in its last bits.
    """
    if size() == 1:
        return dict(tensors)
    import torch
    import torch.distributed as dist

    own = [[name, list(one.shape), str(one.dtype).removeprefix("torch.")] for name, one in tensors.items()]
    found = {}
    for name, shape, dtype in gathered(own if first() else [])[0]:
        mine = tensors[name] if first() else torch.empty(shape, dtype=getattr(torch, dtype))
        sent = mine.detach().to(_device()).contiguous()
        if sent.numel():
            dist.broadcast(sent, src=0)
        found[name] = mine if first() else sent.cpu()
    return found


def rank() -> int:
    """Return the number of this process, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if _working_together else 0


def _device() -> str:
    import torch.distributed as dist

    return "cuda" if dist.get_backend() == "nccl" else "cpu"
