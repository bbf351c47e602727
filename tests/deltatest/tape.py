"""What a CUDA graph does, on the host: record the operations of a pass and run those again, on the same memory.

A tape holds every torch operation (as the dispatcher sees it) and every Triton launch, with the tensors, numbers and
grids it was given. A replay runs no code of ours: whatever a pass read from the host when it was recorded stays as it
was, just as in a graph. Triton launches need the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SyncError(AssertionError):
    """A pass looked into a tensor: on a GPU it would wait, and a graph would freeze what it saw."""


LOOKS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
# Memory is handed out, or looked at in another shape: nothing runs on a device.
MEMORY_OPS = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view")
LOOKING_OPS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal")


class NoLooking(TorchFunctionMode):
    """Raises ``SyncError`` where a tensor's content would come to the host, or its shape follow from its content, and
    where a list becomes an index, which a device has to wait for; after ``num_allowed`` looks."""

    def __init__(self, num_allowed: int = 0) -> None:
        super().__init__()
        self.num_allowed = num_allowed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in LOOKS and args and isinstance(args[0], Tensor):
            self.num_allowed -= 1
        if self.num_allowed < 0:
            raise SyncError(f"Tensor.{name} in a pass that is to be captured")
        if name == "__getitem__" and any(_is_mask(leaf) for leaf in tree_leaves(args[1:])):
            raise SyncError("indexing with a mask in a pass that is to be captured")
        if name in ("__getitem__", "__setitem__") and _has_list(args[1]):
            raise SyncError("indexing with a list in a pass that is to be captured")
        return func(*args, **(kwargs or {}))


def _has_list(index: object) -> bool:
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.bool


class NoLookingOps(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in LOOKING_OPS:
            raise SyncError(f"{func._schema.name} in a pass that is to be captured")
        return func(*args, **(kwargs or {}))


def watched(run: Callable[[], None]) -> Callable[[], None]:
    """A ``Capture`` that runs the pass itself, raising ``SyncError`` when it looks into a tensor."""

    def replay() -> None:
        with NoLooking(), NoLookingOps():
            run()

    replay()
    return replay


class _Recorder(TorchDispatchMode):
    def __init__(self, steps: list[Callable[[], None]], launches: list[str]) -> None:
        super().__init__()
        self._steps, self._launches = steps, launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in LOOKING_OPS:
            raise SyncError(f"{name} in a pass that is to be captured")
        result = func(*args, **kwargs)
        inputs = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        # New results are written where the recorded pass had them; views and results in place are there already.
        fresh = [
            place
            for place, leaf in enumerate(tree_leaves(result))
            if isinstance(leaf, Tensor) and _memory(leaf) not in inputs
        ]
        held = tree_leaves(result)

        def step() -> None:
            again = tree_leaves(func(*args, **kwargs))
            for place in fresh:
                held[place].copy_(again[place])

        self._steps.append(step)
        if name not in MEMORY_OPS and not func.is_view:
            self._launches.append(name)
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


@contextmanager
def _recorded_launches(steps: list[Callable[[], None]], launches: list[str]) -> Iterator[None]:
    """Triton's interpreter runs a launch with torch operations of its own: kept off the tape, whole launches are on."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    plain = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        def step() -> None:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                plain(self, *args, **kwargs)

        step()
        steps.append(step)
        launches.append(self.fn.__name__)

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = plain


class Tape:
    """A ``Capture``. Runs the pass once, without letting it look into a tensor, and replays what it did.

    ``launches``: of what was recorded last, in order, the operations that a GPU would run a kernel for at least.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.launches: list[str] = []

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # as before a capture: what is made once is made now
        steps: list[Callable[[], None]] = []
        launches: list[str] = []
        with _recorded_launches(steps, launches), NoLooking(), _Recorder(steps, launches):
            run()
        self.num_steps, self.launches = len(steps), launches

        def replay() -> None:
            for step in steps:
                step()

        return replay
