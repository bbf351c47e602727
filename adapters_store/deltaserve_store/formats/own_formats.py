"""The project's own formats by name; each of their parsers refuses a file that another format is named in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deltaserve_store.findings import Findings
from deltaserve_store.formats import (
    deltaserve_blocks,
    deltaserve_bottleneck,
    deltaserve_dense,
    deltaserve_rotations,
    deltaserve_sparse,
    deltaserve_terms,
    deltaserve_vectors,
)
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec

PARSERS: Mapping[str, Callable[[Mapping[str, Any], TensorFile, BaseSpec, Findings], ParsedAdapter | None]] = {
    deltaserve_blocks.FORMAT: deltaserve_blocks.parse_deltaserve_blocks,
    deltaserve_bottleneck.FORMAT: deltaserve_bottleneck.parse_deltaserve_bottleneck,
    deltaserve_dense.FORMAT: deltaserve_dense.parse_deltaserve_dense,
    deltaserve_rotations.FORMAT: deltaserve_rotations.parse_deltaserve_rotations,
    deltaserve_sparse.FORMAT: deltaserve_sparse.parse_deltaserve_sparse,
    deltaserve_terms.FORMAT: deltaserve_terms.parse_deltaserve_terms,
    deltaserve_vectors.FORMAT: deltaserve_vectors.parse_deltaserve_vectors,
}


def parse_own(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """By the field ``format``. None when ``findings`` got a reason; of a file with no known format the parser of the
    sparse one, which is the oldest, says all that is wrong with it."""
    name = config.get("format")
    parse = PARSERS.get(name) if isinstance(name, str) else None
    return (parse or deltaserve_sparse.parse_deltaserve_sparse)(config, tensors, base, findings)
