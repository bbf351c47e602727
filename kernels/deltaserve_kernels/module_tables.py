"""Tables of residual modules: bottlenecks with an activation, at attach points of the base. Points are numbered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaserve_kernels.errors import OutOfRange, ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": torch.relu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
        "identity": _identity,
    }
)


_PLACES = {name: place for place, name in enumerate(ACTIVATIONS)}


class ModuleEntry(NamedTuple):
    """``up(phi(down x + down_bias)) + up_bias``; its own scaling is inside ``up_t`` and ``up_bias``.

    down, up_t: [r, H] of one float dtype (up is kept transposed)
    down_bias:  fp32 [r] or None;  up_bias: fp32 [H] or None
    reads:      the point whose tensor it reads; -1: the one at which it is added
    """

    down: Tensor
    up_t: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    activation: str
    reads: int = -1

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.down_bias, self.up_bias, self.up_t, self.down) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> ModuleEntry:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return self._replace(
            down=self.down.to(device),
            up_t=self.up_t.to(device),
            down_bias=move(self.down_bias),
            up_bias=move(self.up_bias),
        )


class ModuleTables(PointerTables):
    """Residual modules by (point, slot), at most one at each.

    pointers: int64 [num_points, 4, num_slots]  addresses of down, up_t, down_bias, up_bias; 0 where there is none
    sizes:    int32 [num_points, 3, num_slots]  rank; place of the activation in ACTIVATIONS; 1 + the point that is read
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("pointers", "sizes")
    NOUN: ClassVar[str] = "point"

    def __init__(self, num_points: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_points, num_slots, device)
        self.pointers = self._array(4)
        self.sizes = self._array(3, dtype=torch.int32)
        # By point: other points that modules here read, or once did.
        self._reads: list[frozenset[int]] = [frozenset()] * num_points
        self._entries: dict[tuple[int, int], ModuleEntry] = {}

    def entry(self, point: int, slot: int) -> ModuleEntry | None:
        return self._entries.get((point, slot))

    def reads(self, point: int) -> frozenset[int]:
        """Other points whose rows modules at this one may read."""
        return self._reads[point] if self.has_any(point) else frozenset()

    def set_all(self, slot: int, entries: Sequence[tuple[int, ModuleEntry]]) -> None:
        """Put the modules of a whole adapter into a slot. Raises a KernelError and leaves the table as it was."""
        points = [point for point, _ in entries]
        self._check_places(slot, points)
        held = self.dtype
        for point, entry in entries:
            for name, tensor in (("down", entry.down), ("up_t", entry.up_t)):
                self._check_tensor(name, tensor, 2, FLOAT_DTYPES)
                self._check_value_dtype(name, tensor.dtype, held)
                held = tensor.dtype
            rank, size = entry.down.shape
            if entry.up_t.shape != entry.down.shape or not rank or not size:
                raise ShapeMismatch(
                    f"down {list(entry.down.shape)} and up_t {list(entry.up_t.shape)} must both be [r, H], r >= 1"
                )
            for name, bias, wanted in (("down_bias", entry.down_bias, rank), ("up_bias", entry.up_bias, size)):
                if bias is not None:
                    self._check_tensor(name, bias, 1, (torch.float32,))
                    if bias.numel() != wanted:
                        raise ShapeMismatch(f"{name} has {bias.numel()} numbers; {wanted} are needed")
            if entry.activation not in ACTIVATIONS:
                raise OutOfRange(f"activation {entry.activation!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")
            if not -1 <= entry.reads < self.num_linears:
                raise OutOfRange(f"point {entry.reads} is not in 0..{self.num_linears - 1}")
            self._check_dim(point, 1, size)
        if not entries:
            return
        sizes = [(0, entry.down.shape[1]) for _, entry in entries]
        modules = [entry for _, entry in entries]
        self._put(
            slot,
            points,
            [tuple(entry.tensors()) for entry in modules],
            sizes,
            pointers=[[_address(t) for t in (e.down, e.up_t, e.down_bias, e.up_bias)] for e in modules],
            sizes=[(e.down.shape[0], _PLACES[e.activation], 1 + e.reads) for e in modules],
        )
        for point, entry in entries:
            if entry.reads >= 0:
                self._reads[point] |= {entry.reads}
        self._entries |= {(point, slot): entry for point, entry in entries}

    def _forget(self, linear: int, slot: int) -> None:
        self._entries.pop((linear, slot), None)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
