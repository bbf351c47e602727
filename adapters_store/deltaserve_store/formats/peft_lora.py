"""PEFT LoRA: ``base_model.model.<module>.lora_A.weight [r, in]`` and ``...lora_B.weight [out, r]``.

The delta of a linear is ``scaling * B @ A`` in ``[out, in]`` orientation also where the base stores ``[in, out]``:
PEFT keeps A and B in linear layout and transposes their product (``fan_in_fan_out``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltaserve_store.findings import Findings
from deltaserve_store.formats import lora_variants, lora_vocabulary
from deltaserve_store.formats.activated_lora import check_alone, take_invocation
from deltaserve_store.formats.conversion_cost import MAX_FLOPS
from deltaserve_store.formats.lora_beside_initial import beside_initial, in_initial, less_initial
from deltaserve_store.formats.lora_initial import KASA, check_initial, check_ranks, residual_delta
from deltaserve_store.formats.lora_variants import LoraVariants
from deltaserve_store.formats.lora_vectors import LoraVectors, split_config, vector_names
from deltaserve_store.formats.lora_vocabulary import LoraVocabulary
from deltaserve_store.formats.peft_config import parse_lora_config
from deltaserve_store.formats.tensor_checks import (
    FLOAT_DTYPES,
    PEFT_PREFIX,
    check_dtype,
    check_shape,
    check_values,
    name_stray_tensor,
)
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import LoraDelta, ParsedAdapter, ResidualDelta
from deltaserve_store.spec import BaseSpec


def parse_peft_lora(
    config: Mapping[str, Any],
    config_name: str,
    tensors: TensorFile,
    base: BaseSpec,
    findings: Findings,
    initial: TensorFile | None = None,
    max_flops: float = MAX_FLOPS,
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason. Shapes are settled from the header before a tensor is read. ``initial``:
    the factors that training took out of the base; ``max_flops``: for finding such a part that is not in a file."""
    given = config if initial is None else beside_initial(config, config_name, findings)
    always, invocation = take_invocation(given, base, config_name, findings)
    plain, options = split_config(always, config_name, findings)
    plain, wanted = lora_vocabulary.split_config(plain, config_name, findings)
    plain, varied = lora_variants.split_config({**plain, "use_dora": options["use_dora"]}, config_name, findings)
    plain["use_dora"] = False
    lora = parse_lora_config(plain, base, config_name, findings)
    method = check_initial(given, config_name, findings)
    if lora is None or findings:
        _name_strays_without_config(tensors, base, findings)
        return None
    vocabulary = LoraVocabulary(wanted, lora, tensors, base, config_name, findings)
    modules = vocabulary.whole.not_saved(lora.targets.select(base), findings)
    if not modules and not vocabulary.low_rank:
        allowed = "a target that is not saved whole"
        findings.add("target_not_found", f"{config_name}:target_modules", "only modules_to_save", allowed)
    variants = LoraVariants(varied, lora, modules, base, config_name, findings)
    variants.check_layout(tensors, findings)
    if not variants.is_plain and (method is not None or initial is not None):
        allowed = "null where training took another part out of the base"
        findings.add("unsupported_feature", f"{config_name}:{variants.field}", "an object", allowed)
    method = KASA if variants.has_diagonal else method
    if method is not None:
        check_ranks(method, {m: lora.rank_of(m) for m in modules}, base, f"{config_name}:r", findings, max_flops)
    is_beside_part = method is not None or initial is not None or not variants.is_plain
    vectors = LoraVectors(options, modules, vocabulary.low_rank, base, vocabulary.whole, tensors)
    vectors.check_layout(tensors, findings)
    vocabulary.check_layout(tensors, findings)
    if vocabulary.low_rank and is_beside_part:
        allowed = "LoRA without such a part or form on embedding and head"
        findings.add("unsupported_feature", f"{config_name}:target_modules", vocabulary.low_rank[0], allowed)
    if options["lora_bias"] and base.embedding is not None and base.embedding.name in vocabulary.low_rank:
        allowed = "false with the embedding as a target: PEFT gives it no bias"
        findings.add("invalid_value", f"{config_name}:lora_bias", True, allowed)
    if invocation:
        check_alone(
            config_name,
            findings,
            terms_of_embedding_and_head=bool(vocabulary.shapes or vocabulary.saved),
            modules_saved_whole=bool(vocabulary.whole.linears or vocabulary.whole.norms),
            an_initial_part_of_the_base=is_beside_part,
        )
    others = {*vectors.names, *vocabulary.names, *variants.names_in(tensors)}
    _check_layout(variants, modules, tensors, base, findings, others=others)
    if initial is not None:
        of_initial = Findings()
        _check_layout(variants, modules, initial, base, of_initial, others=())
        in_initial(of_initial, findings)
    if findings:
        return None
    found = vectors.read(tensors, findings)
    of_vocabulary = vocabulary.read(tensors, lambda module: vectors.magnitude(module, found), findings)
    deltas = []
    for module in modules:
        name_a, name_b = _names(module)
        a, b = tensors.read(name_a), tensors.read(name_b)
        check_values(name_a, a, findings)
        check_values(name_b, b, findings)
        delta = LoraDelta(module, a, b, lora.scaling_of(module), magnitude=vectors.magnitude(module, found))
        deltas.append(variants.whole(delta, tensors, findings))
    if initial is not None:
        deltas = [less_initial(delta, _names(delta.module), initial, findings) for delta in deltas]
    if findings:
        return None
    residual: tuple[ResidualDelta, ...] = (
        () if method is None else tuple(residual_delta(delta, method) for delta in deltas)
    )
    biases = vectors.deltas(found, {module: lora.scaling_of(module) for module in (*modules, *vocabulary.low_rank)})
    return ParsedAdapter(
        kind="lora",
        file_format="peft-lora",
        deltas=(*(() if residual else deltas), *biases, *of_vocabulary),
        config=config,
        base_name=lora.base_name,
        base_fingerprint=None,
        rank=max(
            delta.rank
            for delta in (*(residual or deltas), *of_vocabulary)
            if isinstance(delta, LoraDelta | ResidualDelta)
        ),
        num_parameters=sum(variants.num_parameters(module) for module in modules)
        + sum(vectors.sizes.values())
        + vocabulary.num_parameters,
        weight_deltas=residual,
        invocation_token_ids=invocation,
    )


def _names(module: str) -> tuple[str, str]:
    return f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"


def _check_layout(
    variants: LoraVariants,
    modules: tuple[str, ...],
    tensors: TensorFile,
    base: BaseSpec,
    findings: Findings,
    *,
    others: Iterable[str],
) -> None:
    """Exactly A and B of every targeted linear, in the shapes that base and config give, and the ``others``."""
    expected = set(others)
    for module in modules:
        shapes = variants.shapes(module)
        for name, shape in zip(_names(module), shapes, strict=True):
            expected.add(name)
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"{list(shape)} (targeted, by the config)")
                continue
            check_dtype(info, FLOAT_DTYPES, findings)
            check_shape(info, shape, "rank by the config, the rest by the base", findings)
    for name in tensors.header.tensors:
        if name not in expected:
            name_stray_tensor(name, base, findings)


def _name_strays_without_config(tensors: TensorFile, base: BaseSpec, findings: Findings) -> None:
    """With a refused config, name at least the tensors that no LoRA config could account for."""
    possible = {name for module in base.linears for name in (*_names(module), *vector_names(module))}
    possible |= lora_vocabulary.possible_names(base)
    for name in tensors.header.tensors:
        if name not in possible:
            name_stray_tensor(name, base, findings)
