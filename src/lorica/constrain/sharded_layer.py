"""What a protected layer does besides where FSDP2 shards its parameters, before ``protect`` or after it."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lorica.constrain.core import Core, register
from lorica.constrain.exchange import Lent, mean_gradient, numbers
from lorica.constrain.reduced import Across
from lorica.constrain.sharded import Shards
from lorica.errors import LoricaError
from lorica.subspace.basis import Basis


class ShardedLayer(nn.Module):
    """The part of ``SubspaceLayer`` that knows of other processes; without them ``shards`` is None and it does nothing.

    Attributes:
        shards: where the parts of the layer lie, once FSDP2 has sharded it.
    """

    base: Tensor
    core: nn.Parameter
    out_basis: Basis
    in_basis: Basis
    _plain: tuple[nn.Linear | Conv1D]
    _exact: tuple[Basis, Basis] | None
    """The bases of the fold, where those of the gradient are others; beside W0, so in no list of submodules."""
    _folded: tuple[int, ...]
    shards: Shards | None = None

    @classmethod
    def wrap_sharded(cls, plain: nn.Linear | Conv1D, base: Tensor, bases: tuple[Basis, Basis], shards: Shards) -> Self:
        """Return the protected form of a layer whose weight FSDP2 has sharded.

        Args:
            plain: the layer; FSDP2 goes on putting gathered parameters into it.
            base: W0 (out, in); not looked at where another process owns it.
            bases: Q_U and Q_V, there without values.
            shards: the sharded weight, and a core that is sharded alike.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(plain.__dict__ | {"_buffers": {}, "_modules": {}})  # also the table of parameters
        layer._plain = (plain,)  # in a tuple: not a submodule
        layer.base, layer._exact = base, bases
        layer.core = core = nn.Parameter(shards.core)
        layer._folded = ()
        assert isinstance(core, DTensor)
        layer.shard(shards._replace(core=core))
        register(layer)  # type: ignore[arg-type]
        return layer.train(plain.training)

    def shard(self, shards: Shards) -> None:
        """Note where FSDP2 has put the parts of the layer, and keep W0 and the bases if they are this process's own."""
        base, exact = self.base, self.exact_bases
        if self.taken_over:
            self._plain[0]._parameters.clear()  # the whole weight
        self._buffers.pop("base", None)
        self.base = base if shards.mine else base.new_empty(0)
        self.out_basis, self.in_basis = (Lent(basis, shards.group, shards.owner) for basis in exact)
        self._exact = exact if shards.mine else None
        self.shards = shards

    @property
    def exact_bases(self) -> tuple[Basis, Basis]:
        """Q_U and Q_V as the fold takes them; they have no values where another process owns them."""
        return self._exact or (self.out_basis, self.in_basis)

    @property
    def held(self) -> int:
        """How many numbers W0 and the bases take."""
        return self.base.numel() + sum(map(numbers, self.exact_bases))

    @property
    def taken_over(self) -> bool:
        """Whether FSDP2, applied after ``protect``, has put parameters of its own in the place of the layer's."""
        (plain,) = self._plain
        if self._parameters is plain._parameters:  # those of a layer that was sharded before
            return False
        return self.shards is not None or (self.weight is not plain.weight and type(self.core) is not Core)

    def check_whole(self) -> None:
        """Raise a ``LoricaError`` if what makes the weight's change lies elsewhere, or in parts."""
        if isinstance(self.core, DTensor):
            raise LoricaError(
                "the core of this layer is sharded over processes, and W0 and the bases lie at one of them; its change "
                "can be read off the saved model (lorica.audit)"
            )

    def check_owned(self) -> None:
        """Raise a ``LoricaError`` if another process owns W0 and the bases."""
        if self.shards is not None and not self.shards.mine:
            raise LoricaError(
                f"W0 and the bases of this layer lie at another process, number {self.shards.owner} of its group"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.shards is not None:
            raise LoricaError(
                "a protected layer whose parts lie at several processes cannot be copied or pickled; save its state"
            )
        return super().__reduce_ex__(protocol)

    def _across(self) -> Across | None:
        """Return what makes the gradient of a sharded core; None where FSDP2 has gathered it and does so itself."""
        if self.shards is None or not isinstance(self.core, DTensor):
            return None
        return partial(mean_gradient, shards=self.shards)
