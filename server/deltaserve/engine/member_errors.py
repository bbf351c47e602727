"""What is wrong with one member of an ensemble, told by the field that names the member."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deltaserve.core import Ensemble
from deltaserve.errors import AdapterUnavailable, DeltaserveError, inside


def field_of(index: int) -> str:
    return f"ensemble.members[{index}]"


@contextmanager
def told_of_member(index: int | None) -> Iterator[None]:
    """Errors about ``adapters`` become errors about the adapters of member ``index``; None: of no ensemble."""
    try:
        yield
    except DeltaserveError as error:
        if index is not None and error.param is not None and error.param.startswith("adapters"):
            error.param = f"{field_of(index)}.{error.param}"
            inside(error, field_of(index))
        raise


def blame_member(error: AdapterUnavailable, ensemble: Ensemble, failed: frozenset[str]) -> None:
    """Let an error about one of the ``failed`` versions, found among all of an ensemble's, name the member."""
    for index, member in enumerate(ensemble.members):
        for place, version in enumerate(member.binding.versions):
            if version in failed:
                alone = len(member.binding.parts) == 1
                error.param = field_of(index) if alone else f"{field_of(index)}.adapters[{place}].id"
                return
    error.param = "ensemble.members"
