"""What a PEFT LoRA file may hold for the embedding, the head and norms.

Low rank: ``<embedding>.lora_embedding_A [r, vocab]`` and ``lora_embedding_B [width, r]``; ``<head>.lora_A.weight`` and
``lora_B.weight`` as of any linear. ``trainable_token_indices``: ``<module>.token_adapter.trainable_tokens_delta
[k, width]``, rows in the order of the config, which stand in place of the base's (the tensor's name notwithstanding);
those of the embedding are the head's too where both are tied. ``modules_to_save``: ``<module>.weight`` (and ``.bias``
of a norm) whole, in place of the base's; a tied head keeps the base's matrix unless the file brings its own
(``ensure_weight_tying``). Beside them PEFT may write copies of the base's matrices.
Source: peft 0.21, ``utils/other.py``, ``utils/save_and_load.py``, ``tuners/lora/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_config import PeftLoraConfig
from deltaserve_store.formats.peft_fields import LORA_FIELDS, FieldRule, check_fields, is_bool
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, PEFT_PREFIX, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.formats.vocabulary_rows import (
    MAX_TRAINED_TOKENS,
    are_token_ids,
    check_ids,
    check_rows,
    copies_in,
    named_matrices,
    read_rows,
    rows_shape,
    sorted_rows,
    tied_head,
)
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta


def _are_trained(value: Any) -> bool:
    if isinstance(value, dict):
        return 0 < len(value) <= 2 and all(are_token_ids(ids) for ids in value.values())
    return value is None or are_token_ids(value)


FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "trainable_token_indices": FieldRule(
            "understood",
            _are_trained,
            f"null, a list of 1 to {MAX_TRAINED_TOKENS} token ids, or such lists by name of embedding and head",
        ),
        "modules_to_save": FieldRule(
            "understood",
            LORA_FIELDS["exclude_modules"].accepts,
            "null or names of the embedding, the head or norms",
        ),
        "ensure_weight_tying": FieldRule("understood", is_bool, "true or false"),
    }
)


def split_config(config: Mapping[str, Any], where: str, findings: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config with the fields of ``FIELDS`` switched off, and those fields, checked and with their defaults."""
    own = {"trainable_token_indices": None, "modules_to_save": None, "ensure_weight_tying": False}
    given = {field: value for field, value in config.items() if field in FIELDS}
    before = len(findings.reasons)
    check_fields(given, FIELDS, where, findings)
    plain = {field: own.get(field, value) for field, value in config.items()}
    return plain, own if len(findings.reasons) > before else own | given


def possible_names(base: BaseSpec) -> set[str]:
    """Every tensor that a file may hold for embedding and head."""
    parts = (
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_A.weight",
        "lora_B.weight",
        "token_adapter.trainable_tokens_delta",
        "weight",
        "base_layer.weight",
    )
    return {f"{PEFT_PREFIX}{module}.{part}" for module in base.vocabulary for part in parts}


class LoraVocabulary:
    """The tensors of embedding, head and norms that a file with this config must hold (``shapes``) or may (``copies``).

    Names that the base does not have, and what PEFT itself would not do, are added to ``findings``.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        lora: PeftLoraConfig,
        tensors: TensorFile,
        base: BaseSpec,
        where: str,
        findings: Findings,
    ) -> None:
        self._base, self._lora, self._where, self._findings = base, lora, where, findings
        self._is_tying = options["ensure_weight_tying"] and tied_head(base) is not None
        self.low_rank = [module for module in base.vocabulary if lora.targets.matches(module)]
        self.tokens = self._trained_tokens(options["trainable_token_indices"])
        self.saved, self.norms = self._saved_modules(options["modules_to_save"] or ())
        embedding, head = base.embedding, tied_head(base)
        if self._is_tying and embedding is not None and head is not None:
            # PEFT shares what it trains with the head, and writes the head's own tensors for the same numbers.
            if embedding.name in self.low_rank and f"{PEFT_PREFIX}{head}.lora_A.weight" in tensors.header.tensors:
                self.low_rank = list(dict.fromkeys([*self.low_rank, head]))
            if embedding.name in self.saved and f"{PEFT_PREFIX}{head}.weight" in tensors.header.tensors:
                self.saved = list(dict.fromkeys([*self.saved, head]))
        for module in self.low_rank:
            if module in (*self.tokens, *self.saved):
                self._refuse("unsupported_feature", module, "low rank and trained rows", "one of them for a matrix")
        self.shapes = self._shapes()
        # PEFT may write the embedding's rows a second time for the head that is tied to it.
        repeats = {self._rows_name(module): module for module in self.tokens if not self._has_own_rows(module)}
        repeats |= self._repeat_of_tied()
        self.repeats = {name: module for name, module in repeats.items() if name in tensors.header.tensors}
        self.copies = copies_in(tensors, base, self.shapes)

    def _refuse(self, code: str, field: str, found: object, allowed: str) -> None:
        self._findings.add(code, f"{self._where}:{field}", found, allowed)

    def _trained_tokens(self, value: Any) -> dict[str, list[int]]:
        """Token ids by matrix, in the order of the file's rows."""
        embedding = self._base.embedding
        if value is None:
            return {}
        if isinstance(value, list):
            value = {embedding.name if embedding is not None else "embed_tokens": value}
        field = "trainable_token_indices"
        found: dict[str, list[int]] = {}
        for name, ids in value.items():
            matrices = named_matrices(name, self._base)
            if not matrices:
                self._refuse("unknown_module", field, name, ", ".join(self._base.vocabulary) or "no embedding here")
            check_ids(ids, self._base, f"{self._where}:{field}", self._findings)
            found |= dict.fromkeys(matrices, ids)
        if self._is_tying and len({tuple(ids) for ids in found.values()}) > 1:
            self._refuse("invalid_value", field, "different tokens of tied matrices", "the same with tied weights")
        return found

    def _saved_modules(self, names: Any) -> tuple[list[str], list[str]]:
        """Matrices and norms. PEFT compares endings of the whole path here, without looking for a dot."""
        base = self._base
        matrices: list[str] = []
        norms: list[str] = []
        for name in names:
            linears = [module for module in base.linears if module.endswith(name)]
            own = [module for module in base.vocabulary if module.endswith(name)]
            of_norms = [module for module in base.norms if module.endswith(name)]
            if linears:
                self._refuse(
                    "unsupported_feature",
                    "modules_to_save",
                    linears[0],
                    "embedding, head and norms; of a linear a LoRA",
                )
            elif not own and not of_norms:
                self._refuse("unknown_module", "modules_to_save", name, "names of the embedding, the head or norms")
            matrices += own
            norms += of_norms
        for module in matrices:
            if module in self.tokens:
                self._refuse("invalid_value", "modules_to_save", module, "a matrix whole or rows of it, not both")
        return list(dict.fromkeys(matrices)), list(dict.fromkeys(norms))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        base = self._base
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self.low_rank:
            spec, rank = base.vocabulary[module], self._lora.rank_of(module)
            for name, shape in zip(
                self._pair(module), ((rank, spec.in_features), (spec.out_features, rank)), strict=True
            ):
                shapes[name] = shape
        for module, ids in self.tokens.items():
            if self._has_own_rows(module):
                shapes[self._rows_name(module)] = (len(ids), rows_shape(module, base)[1])
        for module in self.saved:
            shapes[f"{PEFT_PREFIX}{module}.weight"] = rows_shape(module, base)
        for norm in self.norms:
            for part in ("weight", "bias") if base.norms[norm].has_bias else ("weight",):
                shapes[f"{PEFT_PREFIX}{norm}.{part}"] = (base.norms[norm].size,)
        return shapes

    def _pair(self, module: str) -> tuple[str, str]:
        """Names of A and B."""
        if self._base.embedding is not None and module == self._base.embedding.name:
            return f"{PEFT_PREFIX}{module}.lora_embedding_A", f"{PEFT_PREFIX}{module}.lora_embedding_B"
        return f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"

    def _rows_name(self, module: str) -> str:
        return f"{PEFT_PREFIX}{module}.token_adapter.trainable_tokens_delta"

    def _has_own_rows(self, module: str) -> bool:
        """False for a tied head that takes the embedding's."""
        embedding = self._base.embedding
        of_embedding = None if embedding is None else self.tokens.get(embedding.name)
        return module != tied_head(self._base) or self.tokens[module] != of_embedding

    @property
    def _whole(self) -> dict[str, str]:
        """Tensors that are a matrix with a row for every token, by name: the matrix."""
        return {f"{PEFT_PREFIX}{module}.weight": module for module in self.saved}

    @property
    def names(self) -> set[str]:
        return {*self.shapes, *self.copies, *self.repeats}

    @property
    def num_parameters(self) -> int:
        """Numbers in the file; copies are none of the adapter's."""
        total = 0
        for shape in self.shapes.values():
            total += shape[0] * (shape[1] if len(shape) == 2 else 1)
        return total

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        """Every tensor is there, of the base's sizes."""
        for name, shape in self.shapes.items():
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"{list(shape)} by the config")
            elif name in self._whole:
                check_rows(info, self._whole[name], self._base, findings)
            else:
                check_dtype(info, FLOAT_DTYPES, findings)
                check_shape(info, shape, "by config and base", findings)
        for name, module in self.copies.items():
            check_rows(tensors.header.tensors[name], module, self._base, findings)

    def _repeat_of_tied(self) -> dict[str, str]:
        """The head that the config does not name, where the embedding it is tied to has trained rows."""
        head, embedding = tied_head(self._base), self._base.embedding
        if head is None or embedding is None or head in self.tokens or embedding.name not in self.tokens:
            return {}
        return {self._rows_name(head): head}

    def _check_repeats(self, tensors: TensorFile, findings: Findings) -> None:
        embedding = self._base.embedding
        for name in self.repeats:
            own = None if embedding is None else self._rows_name(embedding.name)
            if own is None or not torch.equal(tensors.read(name), tensors.read(own)):
                findings.add("shape_mismatch", name, "other rows than the embedding's", "the same: both are tied")

    def read(self, tensors: TensorFile, findings: Findings) -> list[LoraDelta | RowsDelta | NormDelta]:
        """The deltas, checked for their values."""
        whole = {**self._whole, **self.copies}
        found = {
            name: read_rows(tensors, name, whole[name], self._base) if name in whole else tensors.read(name)
            for name in (*self.shapes, *self.copies)
        }
        for name, values in found.items():
            check_values(name, values, findings)
        self._check_repeats(tensors, findings)
        deltas: list[LoraDelta | RowsDelta | NormDelta] = []
        for module in self.low_rank:
            a, b = (found[name] for name in self._pair(module))
            deltas.append(LoraDelta(module, a, b, self._lora.scaling_of(module)))
        for module, ids in self.tokens.items():
            if self._has_own_rows(module):
                deltas.append(sorted_rows(module, ids, found[self._rows_name(module)]))
        deltas += self._tied(deltas)
        deltas += [RowsDelta(module, None, found[f"{PEFT_PREFIX}{module}.weight"]) for module in self.saved]
        deltas += [RowsDelta(module, None, found[name], is_copy=True) for name, module in self.copies.items()]
        for norm in self.norms:
            prefix = f"{PEFT_PREFIX}{norm}"
            deltas.append(NormDelta(norm, found[f"{prefix}.weight"], found.get(f"{prefix}.bias"), replaces=True))
        return deltas

    def _tied(self, deltas: list[Any]) -> list[RowsDelta]:
        """The embedding's trained rows as the tied head's, unless the file trains others there."""
        head, embedding = tied_head(self._base), self._base.embedding
        if head is None or embedding is None or self._is_apart(head, embedding.name):
            return []
        rows = [delta for delta in deltas if isinstance(delta, RowsDelta) and delta.module == embedding.name]
        if rows and head in self.low_rank:
            self._findings.add("unsupported_feature", head, "low rank and trained rows", "one of them for a matrix")
        return [RowsDelta(head, delta.ids, delta.values) for delta in rows]

    def _is_apart(self, head: str, embedding: str) -> bool:
        return head in self.saved or (head in self.tokens and self.tokens[head] != self.tokens.get(embedding))
