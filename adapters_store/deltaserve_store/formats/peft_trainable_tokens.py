"""PEFT TRAINABLE_TOKENS: ``<module>.trainable_tokens_delta [k, width]``, rows in the order of ``token_indices``.

They stand in place of the base's rows. Targets are the embedding (the default) and the head; a head tied to a targeted
embedding takes the embedding's rows, which PEFT then writes twice. (It cannot run a tied head that is a target itself.)
Source: peft 0.21, ``tuners/trainable_tokens/{config,layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import LORA_FIELDS, FieldRule, check_fields, off
from deltaserve_store.formats.tensor_checks import (
    FLOAT_DTYPES,
    PEFT_PREFIX,
    check_dtype,
    check_shape,
    check_values,
    name_stray_tensor,
)
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
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec

_COMMON = ("task_type", "base_model_name_or_path")
_DESCRIPTIVE = ("auto_mapping", "peft_version", "revision", "inference_mode")


def _are_targets(value: Any) -> bool:
    """PEFT writes the embedding's path as a string, where it was not told; read as a path, never as an expression."""
    return value is None or isinstance(value, str) or LORA_FIELDS["exclude_modules"].accepts(value)


TOKENS_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "peft_type": FieldRule(
            "understood", lambda value: value == "TRAINABLE_TOKENS", "TRAINABLE_TOKENS", required=True
        ),
        **{field: LORA_FIELDS[field] for field in (*_COMMON, *_DESCRIPTIVE)},
        "modules_to_save": off(None, [], why="PEFT has it beside other kinds"),
        "token_indices": FieldRule(
            "understood", are_token_ids, f"a list of 1 to {MAX_TRAINED_TOKENS} token ids", required=True
        ),
        "target_modules": FieldRule("understood", _are_targets, "null, or names of the embedding and the head"),
        "init_weights": FieldRule("descriptive", lambda value: isinstance(value, bool), "true or false"),
    }
)


def parse_peft_trainable_tokens(
    config: Mapping[str, Any], config_name: str, tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    check_fields(_without_path(config), TOKENS_FIELDS, config_name, findings)
    if findings:
        return None
    ids = config["token_indices"]
    check_ids(ids, base, f"{config_name}:token_indices", findings)
    modules = _targets(config, base, config_name, findings)
    if findings:
        return None
    names = {module: f"{PEFT_PREFIX}{module}.trainable_tokens_delta" for module in modules}
    shares = _shared_names(modules, tensors, base)
    copies = copies_in(tensors, base, names)
    for name, module in [(name, module) for module, name in names.items()] + list(shares.items()):
        info = tensors.header.tensors.get(name)
        if info is None:
            findings.add("missing_tensor", name, "nothing", f"{[len(ids), rows_shape(module, base)[1]]} (targeted)")
            continue
        check_dtype(info, FLOAT_DTYPES, findings)
        check_shape(info, (len(ids), rows_shape(module, base)[1]), "by config and base", findings)
    for name, module in copies.items():
        check_rows(tensors.header.tensors[name], module, base, findings)
    for name in tensors.header.tensors:
        if name not in (*names.values(), *shares, *copies):
            name_stray_tensor(name, base, findings)
    if findings:
        return None
    deltas = []
    for module, name in names.items():
        values = tensors.read(name)
        check_values(name, values, findings)
        deltas.append(sorted_rows(module, ids, values))
    for name in shares:
        if not torch.equal(tensors.read(name), tensors.read(next(iter(names.values())))):
            findings.add("shape_mismatch", name, "other rows than the embedding's", "the same: both are tied")
    for name, module in copies.items():
        values = read_rows(tensors, name, module, base)
        check_values(name, values, findings)
        deltas.append(RowsDelta(module, None, values, is_copy=True))
    head = tied_head(base)
    if head is not None and head not in names:
        deltas.append(RowsDelta(head, deltas[0].ids, deltas[0].values))
    if findings:
        return None
    return ParsedAdapter(
        kind="rows",
        file_format="peft-trainable-tokens",
        deltas=tuple(deltas),
        config=config,
        base_name=config.get("base_model_name_or_path") or None,
        base_fingerprint=None,
        rank=None,
        num_parameters=sum(len(ids) * rows_shape(module, base)[1] for module in names),
    )


def _without_path(config: Mapping[str, Any]) -> dict[str, Any]:
    """A single target as a list, which is how it is read: ``check_fields`` takes a string for an expression."""
    target = config.get("target_modules")
    return {**config, "target_modules": [target]} if isinstance(target, str) else dict(config)


def _targets(config: Mapping[str, Any], base: BaseSpec, where: str, findings: Findings) -> list[str]:
    """Embedding before head; a head tied to a targeted embedding is left out."""
    embedding, given = base.embedding, config.get("target_modules")
    if not given:
        given = [embedding.name if embedding is not None else "embed_tokens"]
    found: list[str] = []
    for name in [given] if isinstance(given, str) else given:
        matrices = named_matrices(name, base)
        if not matrices:
            allowed = ", ".join(base.vocabulary) or "no embedding of this base can be changed"
            findings.add("target_not_found", f"{where}:target_modules", name, allowed)
        found += matrices
    if embedding is not None and embedding.name in found and tied_head(base) in found:
        found.remove(str(tied_head(base)))
    return [module for module in base.vocabulary if module in found]


def _shared_names(modules: list[str], tensors: TensorFile, base: BaseSpec) -> dict[str, str]:
    """Tensors in the file that repeat the embedding's rows for the head tied to it, by name: the head."""
    head = tied_head(base)
    if head is None or head in modules:
        return {}
    name = f"{PEFT_PREFIX}{head}.trainable_tokens_delta"
    return {name: head} if name in tensors.header.tensors else {}
