"""What a PEFT LoRA file may hold for the embedding, the head and norms.

Low rank: ``<embedding>.lora_embedding_A [r, vocab]`` and ``lora_embedding_B [width, r]``; ``<head>.lora_A.weight`` and
``lora_B.weight`` as of any linear. ``trainable_token_indices``: ``<module>.token_adapter.trainable_tokens_delta
[k, width]``, rows in the order of the config, which stand in place of the base's (the tensor's name notwithstanding);
those of the embedding are the head's too where both are tied. ``modules_to_save``: see ``saved_modules``; a tied head
keeps the base's matrix unless the file brings its own (``ensure_weight_tying``). Beside them PEFT may write copies of
the base's matrices.
Source: peft 0.21, ``utils/other.py``, ``utils/save_and_load.py``, ``tuners/lora/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_config import PeftLoraConfig
from deltaserve_store.formats.peft_fields import SAVED, FieldRule, check_fields, is_bool
from deltaserve_store.formats.saved_modules import SavedDelta, SavedModules
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
        "modules_to_save": SAVED,
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
        "lora_B.bias",
        "lora_magnitude_vector",
        "token_adapter.trainable_tokens_delta",
        "weight",
        "bias",
        "base_layer.weight",
        "base_layer.bias",
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
        self.whole = SavedModules(options["modules_to_save"], base, where, findings)
        self.low_rank = list(self.whole.not_saved(self.low_rank, findings))
        for module in self.saved:
            if module in self.tokens:
                self._refuse("invalid_value", "modules_to_save", module, "a matrix whole or rows of it, not both")
        embedding, head = base.embedding, tied_head(base)
        if self._is_tying and embedding is not None and head is not None:
            # PEFT shares what it trains with the head, and writes the head's own tensors for the same numbers.
            if embedding.name in self.low_rank and f"{PEFT_PREFIX}{head}.lora_A.weight" in tensors.header.tensors:
                self.low_rank = list(dict.fromkeys([*self.low_rank, head]))
            if embedding.name in self.saved and f"{PEFT_PREFIX}{head}.weight" in tensors.header.tensors:
                self.whole.matrices = list(dict.fromkeys([*self.saved, head]))
        for module in self.low_rank:
            if module in (*self.tokens, *self.saved):
                self._refuse("unsupported_feature", module, "low rank and trained rows", "one of them for a matrix")
        self.shapes = self._shapes()
        # PEFT may write the embedding's rows a second time for the head that is tied to it.
        repeats = {self._rows_name(module): module for module in self.tokens if not self._has_own_rows(module)}
        repeats |= self._repeat_of_tied()
        self.repeats = {name: module for name, module in repeats.items() if name in tensors.header.tensors}
        self.copies = copies_in(tensors, base, {*self.shapes, *self.whole.names})

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

    @property
    def saved(self) -> list[str]:
        """Matrices that the file holds whole."""
        return self.whole.matrices

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
    def names(self) -> set[str]:
        return {*self.shapes, *self.copies, *self.repeats, *self.whole.names}

    @property
    def num_parameters(self) -> int:
        """Numbers in the file; copies are none of the adapter's."""
        return sum(shape[0] * shape[1] for shape in self.shapes.values()) + self.whole.num_parameters

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        """Every tensor is there, of the base's sizes."""
        for name, shape in self.shapes.items():
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"{list(shape)} by the config")
            else:
                check_dtype(info, FLOAT_DTYPES, findings)
                check_shape(info, shape, "by config and base", findings)
        for name, module in self.copies.items():
            check_rows(tensors.header.tensors[name], module, self._base, findings)
        self.whole.check_layout(tensors, findings)

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

    def read(
        self, tensors: TensorFile, magnitude_of: Callable[[str], Tensor | None], findings: Findings
    ) -> list[LoraDelta | SavedDelta]:
        """The deltas, checked for their values; ``magnitude_of`` a matrix with low rank is DoRA's."""
        found = {name: tensors.read(name) for name in self.shapes}
        found |= {name: read_rows(tensors, name, module, self._base) for name, module in self.copies.items()}
        for name, values in found.items():
            check_values(name, values, findings)
        self._check_repeats(tensors, findings)
        deltas: list[LoraDelta | SavedDelta] = []
        for module in self.low_rank:
            a, b = (found[name] for name in self._pair(module))
            deltas.append(LoraDelta(module, a, b, self._lora.scaling_of(module), magnitude=magnitude_of(module)))
        for module, ids in self.tokens.items():
            if self._has_own_rows(module):
                deltas.append(sorted_rows(module, ids, found[self._rows_name(module)]))
        deltas += self._tied(deltas)
        deltas += self.whole.read(tensors, findings)
        deltas += [RowsDelta(module, None, found[name], is_copy=True) for name, module in self.copies.items()]
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
