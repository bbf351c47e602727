"""What a reader of one PEFT type says about itself, and the one walk that every such file takes.

A reader lists the config fields it knows, the tensors it expects for each targeted linear, and how they become a delta.
Conversion happens here, before folding: the server runs the terms it always runs. Each converted delta also carries
its method's own formula (``LoraDelta.dense``), and the admission proof compares the served term with that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.beside import Beside
from deltaserve_store.formats.conversion_cost import check_flops
from deltaserve_store.formats.module_match import PatternTable
from deltaserve_store.formats.peft_config import check_orientation, targets_of
from deltaserve_store.formats.peft_fields import MAX_RANK, FieldRule, check_fields
from deltaserve_store.formats.peft_kinds.low_rank import DEFAULT_LIMITS, ConversionLimits
from deltaserve_store.formats.tensor_checks import (
    FLOAT_DTYPES,
    PEFT_PREFIX,
    check_dtype,
    check_shape,
    check_values,
    name_stray_tensor,
)
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import FunctionDelta, Kind, LoraDelta, ParsedAdapter, SparseDelta, WeightDelta
from deltaserve_store.rotation_deltas import RotationDelta
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltaserve_store.vector_deltas import VectorDelta

INDEX_DTYPES = ("I32", "I64")
Delta = LoraDelta | SparseDelta | WeightDelta | FunctionDelta | RotationDelta | VectorDelta
_RANKED = LoraDelta | WeightDelta | FunctionDelta


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One expected tensor: its exact shape (or the ``other`` one), and the dtypes it may have. Floats must be finite.
    ``optional``: files without it are as good."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    optional: bool = False
    other: tuple[int, ...] | None = None


class PeftReader(ABC):
    """Reads one adapter of one PEFT type; made once per file, after the config's fields were accepted.

    ``linears`` are the targeted linears of the base, in its order; ``where`` is the config file's name; ``conversion``
    says how large the term of a delta of high rank may be. ``registered`` are the targeted linears of the model in the
    order in which it registers them, empty where that is not known.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    """The tensors of the file, for the documentation."""
    delta: ClassVar[str]
    """The formula of one linear's delta, for the documentation."""
    term: ClassVar[str] = "low rank, rank r"
    """The term it becomes and its size, for the documentation."""
    limits: ClassVar[str]
    """What is refused of this type, for the documentation."""
    kind: ClassVar[Kind] = "lora"
    notes: ClassVar[tuple[str, ...]] = ()
    """What whoever uploads such a file is told."""
    fields: ClassVar[Mapping[str, FieldRule]]

    def __init__(
        self,
        config: Mapping[str, Any],
        linears: tuple[LinearSpec, ...],
        where: str,
        conversion: ConversionLimits = DEFAULT_LIMITS,
        registered: tuple[str, ...] = (),
    ) -> None:
        self.config = config
        self.linears = linears
        self.where = where
        self.conversion = conversion
        self.registered = registered
        self._patterns: dict[str, PatternTable] = {}

    def patterns(self, field: str) -> PatternTable:
        """A field that maps module paths to numbers, as a table: made once, since each of its keys is compiled."""
        if field not in self._patterns:
            self._patterns[field] = PatternTable(self.config.get(field) or {})
        return self._patterns[field]

    def check(self, findings: Findings) -> None:
        """Constraints between config and base that no single field shows (divisibility, ...)."""
        del findings

    def told(self) -> tuple[str, ...]:
        """``notes``, as far as they are true of this file."""
        return self.notes

    def bound(self, linear: LinearSpec) -> int | None:
        """The largest rank that the delta of this linear may have, where the term need not have as much: what exceeds
        ``conversion`` becomes the best term. None where there is no such choice."""
        del linear
        return None

    def rank(self, linear: LinearSpec) -> int | None:
        """The rank of the term that this linear gets; None where the term has none."""
        bound = self.bound(linear)
        return None if bound is None else self.conversion.rank_of(linear, bound)

    def num_entries(self, linear: LinearSpec) -> int:
        """Entries of a sparse term, at most, that are more than the file has numbers."""
        del linear
        return 0

    def flops(self, linear: LinearSpec) -> float:
        """Of the decompositions that the conversion takes."""
        bound = self.bound(linear)
        return 0.0 if bound is None else self.conversion.flops(linear, bound)

    def shared_layout(self) -> Mapping[str, TensorRule]:
        """Tensors that belong to no linear, by their full name."""
        return {}

    @abstractmethod
    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        """Tensors of one linear, by what follows ``base_model.model.<module>.`` in their names."""

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        """Takes the shared tensors, all checked, before the first ``convert``."""
        del shared, findings

    @abstractmethod
    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> Delta | tuple[Delta, ...]:
        """The delta of one linear from its checked tensors, in ``[out, in]`` orientation; a tuple where a linear has
        two (one of low rank and one sparse) or none."""

    def is_left_alone(self, linear: LinearSpec) -> bool:
        """Whether training has taken the linear's delta away: ``rank`` may be 0 then."""
        del linear
        return False


def read_kind(
    reader_type: type[PeftReader],
    config: Mapping[str, Any],
    where: str,
    tensors: TensorFile,
    base: BaseSpec,
    findings: Findings,
    limits: ConversionLimits = DEFAULT_LIMITS,
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason. Shapes are settled from the header before a tensor is read."""
    check_fields(config, reader_type.fields, where, findings)
    targets = targets_of(config, where, findings)
    if findings:
        return None
    beside = Beside(config, targets.select(base), tensors, base, where, findings)
    modules = beside.targets
    if "fan_in_fan_out" in reader_type.fields or not modules:
        check_orientation(modules, config.get("fan_in_fan_out", False), base, where, findings)
    else:
        for module in modules:
            if base.linears[module].transposed:
                allowed = f"linears stored as [out, in]: PEFT's {reader_type.title} has no others"
                findings.add("unsupported_target", f"{where}:target_modules", module, allowed)
    linears = tuple(base.linears[module] for module in modules)
    registered = tuple(beside.saved.not_saved((n for n in base.registered if targets.matches(n)), Findings()))
    reader = reader_type(config, linears, where, limits, registered)
    if not findings:
        reader.check(findings)
    if not findings:
        beside.check_layout(tensors, findings)
        _check_layout(reader, tensors, base, findings, others=beside.names)
    if not findings:  # after the layout: a rank may hang on positions, of which the file bounds the number
        _check_terms(reader, findings)
    if not findings:
        total = sum(reader.flops(linear) for linear in linears)
        check_flops(total, limits.max_flops, where, "target fewer linears", findings)
    if findings:
        return None
    deltas = tuple(_deltas(reader, tensors, findings))
    others = beside.read(tensors, findings)
    if findings:
        return None
    return ParsedAdapter(
        kind="sparse" if deltas and all(isinstance(delta, SparseDelta) for delta in deltas) else reader.kind,
        file_format=f"peft-{reader.peft_type.lower()}",
        deltas=(*(delta for delta in deltas if not isinstance(delta, WeightDelta | FunctionDelta)), *others),
        config=config,
        base_name=config.get("base_model_name_or_path") or None,
        base_fingerprint=None,
        rank=max((delta.rank for delta in deltas if isinstance(delta, _RANKED)), default=None),
        num_parameters=beside.num_parameters
        + sum(_count(info.shape) for name, info in tensors.header.tensors.items() if name not in beside.names),
        weight_deltas=tuple(delta for delta in deltas if isinstance(delta, WeightDelta | FunctionDelta)),
        notes=reader.told(),
    )


def _check_terms(reader: PeftReader, findings: Findings) -> None:
    """The ranks of all terms, and the bytes that they take together: nothing has been made of the tensors so far."""
    total = largest = 0
    for linear in reader.linears:
        rank = reader.rank(linear)
        total += reader.conversion.bytes_of(linear, rank or 0, reader.num_entries(linear))
        largest = max(largest, rank or 0)
        if rank is not None and not 1 <= rank <= MAX_RANK and not reader.is_left_alone(linear):
            allowed = f"an exact rank from 1 to {MAX_RANK}; beyond that the delta is as good as dense"
            findings.add("rank_out_of_range", linear.name, f"exact rank {rank}", allowed)
    if total > (limit := reader.conversion.max_bytes):
        found = f"terms of {total} bytes in {len(reader.linears)} linears, of rank {largest} at most"
        more = "more --adapter-device-bytes and --adapter-host-bytes"
        if any(_is_cut(reader, linear) for linear in reader.linears):  # whatever rank the file has
            ways = f"target fewer linears, or serve with a smaller --conversion-rank, or {more}"
        else:
            ways = f"target fewer linears, train a smaller rank or fewer coefficients, or serve with {more}"
        allowed = f"at most {limit} bytes for one adapter: {ways}"
        findings.add("conversion_too_large", reader.where, found, allowed)


def _is_cut(reader: PeftReader, linear: LinearSpec) -> bool:
    """Whether the linear gets the best term, whose rank is the server's choice."""
    bound = reader.bound(linear)
    return bound is not None and not reader.conversion.is_exact(linear, bound)


def _names(reader: PeftReader, linear: LinearSpec) -> Mapping[str, tuple[str, TensorRule]]:
    """Suffix -> (full name, rule)."""
    return {suffix: (f"{PEFT_PREFIX}{linear.name}.{suffix}", rule) for suffix, rule in reader.layout(linear).items()}


def _check_layout(
    reader: PeftReader, tensors: TensorFile, base: BaseSpec, findings: Findings, *, others: Collection[str]
) -> None:
    """Exactly the expected tensors, in the shapes that base and config give, and the ``others``."""
    expected = dict(reader.shared_layout())
    for linear in reader.linears:
        expected.update(_names(reader, linear).values())
    for name, rule in expected.items():
        info = tensors.header.tensors.get(name)
        if info is None:
            if not rule.optional:
                findings.add("missing_tensor", name, "nothing", f"{list(rule.shape)}, by config and base")
            continue
        check_dtype(info, rule.dtypes, findings)
        if info.shape != rule.other:
            check_shape(info, rule.shape, "by config and base", findings)
    for name in tensors.header.tensors:
        if name in expected or name in others:
            continue
        if _is_at_a_linear(name, base) or not name.startswith(PEFT_PREFIX):
            findings.add("unexpected_tensor", name, "a tensor the config does not account for", "only those it implies")
        else:
            name_stray_tensor(name, base, findings)


def _is_at_a_linear(name: str, base: BaseSpec) -> bool:
    """Whether the name is a linear of the base followed by something."""
    module = name.removeprefix(PEFT_PREFIX)
    return any(module[:end] in base.linears for end, letter in enumerate(module) if letter == ".")


def _read(name: str, tensors: TensorFile, findings: Findings) -> Tensor:
    values = tensors.read(name)
    if values.is_floating_point() and values.numel():
        check_values(name, values, findings)
    return values


def _deltas(reader: PeftReader, tensors: TensorFile, findings: Findings) -> Iterator[Delta]:
    reader.begin({name: _read(name, tensors, findings) for name in reader.shared_layout()}, findings)
    for linear in reader.linears:
        names = {suffix: name for suffix, (name, _) in _names(reader, linear).items()}
        held = {suffix: name for suffix, name in names.items() if name in tensors.header.tensors}
        parts = {suffix: _read(name, tensors, findings) for suffix, name in held.items()}
        if not findings:  # values that are not finite would only make a second finding of the same fault
            made = convert_one(reader, linear, parts, findings)
            yield from made if isinstance(made, tuple) else (made,)


def convert_one(
    reader: PeftReader, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings
) -> Delta | tuple[Delta, ...]:
    """The one place where conversions happen; tests break it to see that the proof notices."""
    return reader.convert(linear, parts, findings)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
