"""Damaged, mis-named and hostile adapters, each with the reason codes and places its refusal must carry.

A case starts from a good adapter of a tiny base and does one bad thing to it. Everything is made with the standard
library and safetensors; no case needs PEFT, a model or the network.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deltaserve_store.formats.deltaserve_sparse import write_sparse_adapter
from deltaserve_store.parsed import SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec

FINGERPRINT = "ab" * 32
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Q0_A = f"{PREFIX}{Q0}.lora_A.weight"
Q0_B = f"{PREFIX}{Q0}.lora_B.weight"
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def corpus_base(*, transposed: bool = False) -> BaseSpec:
    """A two-layer base of width 16 with ``q_proj``, ``v_proj`` and ``down_proj``; vocabulary 100."""
    linears = {}
    for layer in range(2):
        for path, out_features, in_features in (
            ("self_attn.q_proj", 16, 16),
            ("self_attn.v_proj", 8, 16),
            ("mlp.down_proj", 16, 24),
        ):
            name = f"model.layers.{layer}.{path}"
            linears[name] = LinearSpec(name, out_features, in_features, False, transposed)
    paths = [f"model.layers.{layer}.input_layernorm" for layer in range(2)] + ["model.norm"]
    norms = {name: NormSpec(name, 16) for name in paths}
    return BaseSpec(FINGERPRINT, ("tests/corpus-base",), "llama", linears, 100, 2, 16, num_tokens=90, norms=norms)


def write_good_lora(folder: Path, *, rank: int = 4, seed: int = 0, fan_in_fan_out: bool = False) -> Path:
    """A PEFT LoRA of rank ``rank`` on ``q_proj`` and ``v_proj`` of both layers, as PEFT 0.21 would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in corpus_base().linears.items():
        if name.endswith(("q_proj", "v_proj")):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "tests/corpus-base",
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": rank,
        "rank_pattern": {},
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def write_good_shira(folder: Path, *, rank: int = 2, seed: int = 0) -> Path:
    """A PEFT SHiRA of ``rank`` on ``v_proj`` of both layers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in corpus_base().linears.items():
        if name.endswith("v_proj"):
            count = rank * (linear.in_features + linear.out_features)
            flat = torch.randperm(linear.in_features * linear.out_features, generator=generator)[:count].sort().values
            indices = torch.stack([flat // linear.in_features, flat % linear.in_features]).to(torch.int32)
            tensors[f"{PREFIX}{name}.shira_indices"] = indices
            tensors[f"{PREFIX}{name}.shira_weight"] = torch.randn(count, generator=generator)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "tests/corpus-base",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": "random",
        "modules_to_save": None,
        "peft_type": "SHIRA",
        "peft_version": "0.21.2",
        "r": rank,
        "random_seed": 7,
        "revision": None,
        "target_modules": ["v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def write_good_sparse(folder: Path, *, count: int = 5, seed: int = 0, fingerprint: str = FINGERPRINT) -> Path:
    """An adapter of the project's own format with ``count`` entries in ``q_proj`` of each layer."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for layer in range(2):
        flat = torch.randperm(256, generator=generator)[:count]
        name = f"model.layers.{layer}.self_attn.q_proj"
        deltas.append(SparseDelta(name, flat // 16, flat % 16, torch.randn(count, generator=generator)))
    write_sparse_adapter(folder, deltas, fingerprint, base_name="tests/corpus-base", method="magnitude")
    return folder


GOOD: dict[str, Callable[[Path], Path]] = {
    "lora": write_good_lora,
    "shira": write_good_shira,
    "sparse": write_good_sparse,
}


@dataclass(frozen=True)
class BadAdapter:
    """``spoil`` makes a good adapter bad; the refusal must name exactly ``reasons`` as (code, where) pairs, unless
    ``is_exact`` is off: then at least those. ``good`` makes the good adapter, by default that of ``kind``.
    """

    name: str
    kind: str
    spoil: Callable[[Path], None]
    reasons: tuple[tuple[str, str], ...]
    is_exact: bool = True
    good: Callable[[Path], Path] | None = None

    def write(self, folder: Path) -> Path:
        (self.good or GOOD[self.kind])(folder)
        self.spoil(folder)
        return folder


# What a case does to a folder


def edit_config(name: str = CONFIG, **changes: Any) -> Callable[[Path], None]:
    """Sets fields of a JSON file; ``...`` removes one."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        config.update({key: value for key, value in changes.items() if value is not ...})
        for key in [key for key, value in changes.items() if value is ...]:
            config.pop(key)
        (folder / name).write_text(json.dumps(config))

    return spoil


def edit_tensors(changes: dict[str, Any], name: str = TENSORS) -> Callable[[Path], None]:
    """Replaces tensors; a value may be a function of the old tensor, None removes."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        for key, value in changes.items():
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value(tensors[key]) if callable(value) else value
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)

    return spoil


def write_file(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return spoil


def edit_bytes(change: Callable[[bytes], bytes], name: str = TENSORS) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def edit_header(change: Callable[[dict[str, Any]], Any], name: str = TENSORS) -> Callable[[Path], None]:
    """Changes the safetensors header; the data stays as it is."""

    def edit(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header = change(header) or header
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit_bytes(edit, name)


def set_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def _set_last_row(indices: torch.Tensor, value: int) -> torch.Tensor:
    indices = indices.clone()
    indices[0, -1] = value
    return indices


def _repeat_first(indices: torch.Tensor) -> torch.Tensor:
    indices = indices.clone()
    indices[:, 1] = indices[:, 0]
    return indices


def _smuggle(data: bytes) -> bytes:
    """Sixteen bytes between the first tensor and the second, which no tensor accounts for."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    entries = sorted((entry for key, entry in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"])
    cut = entries[0]["data_offsets"][1]
    for entry in entries[1:]:
        entry["data_offsets"] = [offset + 16 for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[:cut] + PICKLE[:16].ljust(16) + body[cut:]


class _Canary:
    """Unpickling this would leave a trace; nothing may ever do so."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (os.putenv, ("DELTASERVE_CANARY_PICKLE", "opened"))


PICKLE = pickle.dumps(_Canary())


def _replace_by_link(folder: Path) -> None:
    target = folder.parent / "elsewhere.json"
    os.rename(folder / CONFIG, target)
    (folder / CONFIG).symlink_to(target)


def _replace_by_pipe(folder: Path) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def _only(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    return spoil


def _pickled_weights_only(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    (folder / "adapter_model.bin").write_bytes(PICKLE)


def _both_formats(folder: Path) -> None:
    write_good_sparse(folder)


def _duplicate_header_key(data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)[Q0_A])
    text = header[:-1] + f',"{Q0_A}":{entry}}}'.encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _deep(depth: int) -> bytes:
    return b'{"r":' + b"[" * depth + b"]" * depth + b"}"


def _rename_layers(header: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("model.layers", "transformer.h"): value for key, value in header.items()}


def _config(
    field: str, value: Any, code: str, *, kind: str = "lora", name: str = "", is_exact: bool = True
) -> BadAdapter:
    """A case that sets one config field."""
    shown = name or f"{field}={json.dumps(value)[:40]}"
    return BadAdapter(
        f"config {shown}", kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),), is_exact=is_exact
    )


def _tensor(
    name: str, code: str, changes: dict[str, Any], where: str, *, kind: str = "lora", file: str = TENSORS
) -> BadAdapter:
    return BadAdapter(name, kind, edit_tensors(changes, file), ((code, where),))


_FILES = (
    BadAdapter("nothing at all", "lora", _only(), (("missing_file", CONFIG), ("missing_file", TENSORS))),
    BadAdapter("no config", "lora", _only(TENSORS), (("missing_file", CONFIG),)),
    BadAdapter("no tensors", "lora", _only(CONFIG), (("missing_file", TENSORS),)),
    BadAdapter("sparse without json", "sparse", _only("adapter.safetensors"), (("missing_file", "adapter.json"),)),
    BadAdapter("two formats", "lora", _both_formats, (("ambiguous_format", "files"),)),
    BadAdapter(
        "pickle beside", "lora", write_file("training_args.bin", PICKLE), (("pickle_refused", "training_args.bin"),)
    ),
    BadAdapter(
        "pickled weights only",
        "lora",
        _pickled_weights_only,
        (("pickle_refused", "adapter_model.bin"), ("missing_file", TENSORS)),
    ),
    BadAdapter("executable beside", "lora", write_file("run.py", b"print()"), (("unexpected_file", "run.py"),)),
    BadAdapter("archive beside", "lora", write_file("more.zip", b"PK\x03\x04"), (("nested_archive", "more.zip"),)),
    BadAdapter(
        "case twin", "lora", write_file("Adapter_Config.json", b"{}"), (("unexpected_file", "Adapter_Config.json"),)
    ),
    BadAdapter(
        "config is a link", "lora", _replace_by_link, (("not_a_regular_file", CONFIG), ("missing_file", CONFIG))
    ),
    BadAdapter(
        "tensors are a pipe", "lora", _replace_by_pipe, (("not_a_regular_file", TENSORS), ("missing_file", TENSORS))
    ),
    BadAdapter(
        "folder inside",
        "lora",
        lambda folder: (folder / "checkpoint-10").mkdir(),
        (("not_a_regular_file", "checkpoint-10"),),
    ),
    BadAdapter(
        "huge config",
        "lora",
        write_file(CONFIG, b'{"r":8,"x":"' + b"x" * (1 << 20) + b'"}'),
        (("file_too_large", CONFIG),),
    ),
    BadAdapter(
        "token beyond the embedding",
        "lora",
        write_file("added_tokens.json", b'{"<think>": 100}'),
        (("added_tokens", "added_tokens.json:<think>"),),
    ),
    BadAdapter(
        "token in the padding",
        "lora",
        write_file("tokenizer_config.json", b'{"added_tokens_decoder": {"95": {"content": "<new>"}}}'),
        (("added_tokens", "tokenizer_config.json:<new>"),),
    ),
)

_JSON = (
    BadAdapter("config is no JSON", "lora", write_file(CONFIG, b"{'r': 8}"), (("bad_json", CONFIG),)),
    BadAdapter("config is a list", "lora", write_file(CONFIG, b"[]"), (("bad_json", CONFIG),)),
    BadAdapter("config is empty", "lora", write_file(CONFIG, b""), (("bad_json", CONFIG),)),
    BadAdapter("config is not UTF-8", "lora", write_file(CONFIG, b'{"r": "\xff"}'), (("bad_json", CONFIG),)),
    BadAdapter("config with NaN", "lora", write_file(CONFIG, b'{"r": NaN}'), (("bad_json", CONFIG),)),
    BadAdapter("config with 1e999", "lora", write_file(CONFIG, b'{"r": 1e999}'), (("bad_json", CONFIG),)),
    BadAdapter("config with a twin key", "lora", write_file(CONFIG, b'{"r": 8, "r": 4}'), (("bad_json", CONFIG),)),
    BadAdapter("config too deep", "lora", write_file(CONFIG, _deep(100_000)), (("bad_json", CONFIG),)),
    BadAdapter(
        "config with a lone surrogate", "lora", write_file(CONFIG, b'{"r": "\\ud800"}'), (("bad_json", CONFIG),)
    ),
    BadAdapter(
        "config with endless digits",
        "lora",
        write_file(CONFIG, b'{"r": ' + b"9" * 9999 + b"}"),
        (("bad_json", CONFIG),),
    ),
)

_HEADER = (
    BadAdapter("empty tensor file", "lora", write_file(TENSORS, b""), (("bad_header", TENSORS),)),
    BadAdapter("pickle named safetensors", "lora", write_file(TENSORS, PICKLE), (("bad_header", TENSORS),)),
    BadAdapter(
        "header length of 2^63",
        "lora",
        edit_bytes(lambda data: struct.pack("<Q", 1 << 63) + data[8:]),
        (("bad_header", TENSORS),),
    ),
    BadAdapter(
        "header of 5 MB",
        "lora",
        write_file(TENSORS, struct.pack("<Q", 5 << 20) + b"{" + b" " * (5 << 20)),
        (("header_too_large", TENSORS),),
    ),
    BadAdapter(
        "200,000 tensors",
        "lora",
        write_file(TENSORS, struct.pack("<Q", 3_400_001) + b"{" + b'"aaaaaaaaaaaa":{},' * 188_888 + b" " * 16),
        (("header_too_large", TENSORS),),
    ),
    BadAdapter("cut short", "lora", edit_bytes(lambda data: data[:-100]), (("bad_offsets", TENSORS),)),
    BadAdapter(
        "bytes after the end", "lora", edit_bytes(lambda data: data + b"PK\x03\x04"), (("bad_offsets", TENSORS),)
    ),
    BadAdapter("bytes between tensors", "lora", edit_bytes(_smuggle), (("bad_offsets", Q0_B),)),
    BadAdapter("the same tensor twice", "lora", edit_bytes(_duplicate_header_key), (("bad_header", TENSORS),)),
    BadAdapter(
        "a path as tensor name",
        "lora",
        edit_header(lambda header: header.update({"../../etc/passwd": header.pop(Q0_A)})),
        (("bad_tensor_name", "../../etc/passwd"),),
    ),
    BadAdapter(
        "fp8 tensor",
        "lora",
        edit_header(lambda header: header[Q0_A].update(dtype="F8_E4M3")),
        (("unsupported_dtype", Q0_A),),
    ),
    BadAdapter(
        "zero-size tensor",
        "lora",
        edit_header(lambda header: header[Q0_A].update(shape=[0, 10**15])),
        (("bad_shape", Q0_A),),
    ),
    BadAdapter(
        "shape that lies",
        "lora",
        edit_header(lambda header: header[Q0_A].update(shape=[4, 10**15])),
        (("bad_offsets", Q0_A),),
    ),
    BadAdapter(
        "negative shape",
        "lora",
        edit_header(lambda header: header[Q0_A].update(shape=[-4, 16])),
        (("bad_shape", Q0_A),),
    ),
    BadAdapter(
        "four dimensions",
        "lora",
        edit_header(lambda header: header[Q0_A].update(shape=[1, 1, 4, 16])),
        (("bad_shape", Q0_A),),
    ),
    BadAdapter(
        "overlapping tensors",
        "lora",
        edit_header(lambda header: header[Q0_B].update(data_offsets=header[Q0_A]["data_offsets"])),
        (("bad_offsets", Q0_B),),
    ),
    BadAdapter(
        "extra key in an entry",
        "lora",
        edit_header(lambda header: header[Q0_A].update(note="x")),
        (("bad_header", Q0_A),),
    ),
    BadAdapter(
        "nested metadata",
        "lora",
        edit_header(lambda header: header.update(__metadata__={"format": {"a": 1}})),
        (("bad_header", f"{TENSORS}:__metadata__"),),
    ),
)

_KINDS = tuple(
    _config("peft_type", kind, "unsupported_kind")
    for kind in ("BOFT", "PREFIX_TUNING", "XLORA", "OFT", "RANDLORA", "FOURIERFT", "NO_SUCH_KIND", ["LORA"])
)

_CONFIG = (
    _config("peft_type", ..., "missing_field", name="without peft_type"),
    _config("r", ..., "missing_field", name="without r"),
    _config("target_modules", ..., "missing_field", name="without target_modules"),
    _config("r", 0, "rank_out_of_range"),
    _config("r", 10**6, "rank_out_of_range"),
    _config("r", True, "rank_out_of_range"),
    _config("r", "8", "rank_out_of_range"),
    _config("lora_alpha", 10**9, "invalid_value"),
    _config("lora_alpha", -1, "invalid_value"),
    _config("use_rslora", "yes", "invalid_value"),
    BadAdapter(
        "DoRA without magnitudes",
        "lora",
        edit_config(use_dora=True),
        (("missing_tensor", f"{PREFIX}{Q0}.lora_magnitude_vector"),),
        is_exact=False,
    ),
    BadAdapter(
        "biases of B missing",
        "lora",
        edit_config(lora_bias=True),
        (("missing_tensor", f"{PREFIX}{Q0}.lora_B.bias"),),
        is_exact=False,
    ),
    _config("modules_to_save", ["lm_head"], "unsupported_feature"),
    _config("trainable_token_indices", [1, 2], "unsupported_feature"),
    _config("target_parameters", ["mlp.experts.gate_up_proj"], "unsupported_feature"),
    _config("layer_replication", [[0, 2]], "unsupported_feature"),
    _config("megatron_config", {"a": 1}, "unsupported_feature"),
    _config("use_qalora", True, "unsupported_feature"),
    _config("task_type", "SEQ_CLS", "unsupported_feature"),
    *(
        _config("init_lora_weights", init, "unsupported_feature")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    ),
    _config("auto_map", {"AutoModel": "evil.Model"}, "unknown_field"),
    _config("auto_mapping", {"base_model_class": "os;system"}, "invalid_value"),
    _config("new_fancy_scaling", 3, "unknown_field"),
    _config("target_modules", "(a+)+$", "regex_target"),
    _config("exclude_modules", ".*", "regex_target"),
    _config("target_modules", ["q_proj", "(v|k)_proj"], "invalid_value"),
    _config("target_modules", [], "invalid_value"),
    _config("target_modules", ["c_attn"], "target_not_found", is_exact=False),
    _config("target_modules", ["q_proj", "v_proj", "lm_head"], "unsupported_target"),
    _config("target_modules", ["q_proj", "v_proj", "embed_tokens"], "unsupported_target"),
    BadAdapter(
        "rank pattern of a hostile regex",
        "lora",
        edit_config(rank_pattern={"(a|a)*b": 4}),
        (("regex_target", f"{CONFIG}:rank_pattern"),),
    ),
    BadAdapter(
        "rank pattern of rank 0",
        "lora",
        edit_config(rank_pattern={"q_proj": 0}),
        (("rank_out_of_range", f"{CONFIG}:rank_pattern:q_proj"),),
    ),
    BadAdapter(
        "alpha pattern of text",
        "lora",
        edit_config(alpha_pattern={"q_proj": "8"}),
        (("invalid_value", f"{CONFIG}:alpha_pattern:q_proj"),),
    ),
    _config("layers_pattern", "layers", "invalid_value", name="layers_pattern alone"),
    _config("layers_to_transform", ["0"], "invalid_value"),
    BadAdapter(
        "layers that do not exist",
        "lora",
        edit_config(layers_to_transform=[7]),
        (("target_not_found", f"{CONFIG}:target_modules"),),
        is_exact=False,
    ),
    _config("fan_in_fan_out", True, "fan_in_fan_out_mismatch"),
    BadAdapter(
        "several faults at once",
        "lora",
        edit_config(use_qalora=True, r=-3, wings=2, target_modules=".*"),
        (
            ("unsupported_feature", f"{CONFIG}:use_qalora"),
            ("rank_out_of_range", f"{CONFIG}:r"),
            ("unknown_field", f"{CONFIG}:wings"),
            ("regex_target", f"{CONFIG}:target_modules"),
        ),
    ),
)

_LORA = (
    _tensor("missing A", "missing_tensor", {Q0_A: None}, Q0_A),
    _tensor("missing B", "missing_tensor", {Q0_B: None}, Q0_B),
    BadAdapter(
        "a whole layer missing",
        "lora",
        edit_tensors({Q0_A: None, Q0_B: None}),
        (("missing_tensor", Q0_A), ("missing_tensor", Q0_B)),
    ),
    _tensor("another rank than said", "shape_mismatch", {Q0_A: torch.ones(8, 16), Q0_B: torch.ones(16, 4)}, Q0_A),
    _tensor("transposed B", "shape_mismatch", {Q0_B: lambda b: b.T}, Q0_B),
    _tensor("A of another width", "shape_mismatch", {Q0_A: torch.ones(4, 32)}, Q0_A),
    _tensor("one dimension", "shape_mismatch", {Q0_A: torch.ones(64)}, Q0_A),
    _tensor("integers as weights", "unsupported_dtype", {Q0_A: torch.ones(4, 16, dtype=torch.int32)}, Q0_A),
    _tensor("NaN in A", "non_finite", {Q0_A: set_value(float("nan"))}, Q0_A),
    _tensor("infinity in B", "non_finite", {Q0_B: set_value(float("inf"))}, Q0_B),
    _tensor(
        "minus infinity in half precision", "non_finite", {Q0_B: lambda b: set_value(float("-inf"))(b.half())}, Q0_B
    ),
    _tensor("a huge value", "value_out_of_range", {Q0_A: set_value(1e30)}, Q0_A),
    _tensor(
        "untargeted linear",
        "unexpected_tensor",
        {f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(4, 24)},
        f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight",
    ),
    _tensor(
        "layer 2 of 2",
        "unknown_module",
        {f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
        f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight",
    ),
    _tensor(
        "adapter name left in",
        "unknown_module",
        {f"{PREFIX}{Q0}.lora_A.default.weight": torch.ones(4, 16)},
        f"{PREFIX}{Q0}.lora_A.default.weight",
    ),
    _tensor(
        "DoRA magnitude",
        "unsupported_feature",
        {f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(16)},
        f"{PREFIX}{Q0}.lora_magnitude_vector",
    ),
    _tensor(
        "LoRA bias", "unsupported_feature", {f"{PREFIX}{Q0}.lora_B.bias": torch.ones(16)}, f"{PREFIX}{Q0}.lora_B.bias"
    ),
    _tensor(
        "head factors",
        "unsupported_target",
        {f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 16)},
        f"{PREFIX}lm_head.lora_A.weight",
    ),
    _tensor(
        "whole embedding",
        "unsupported_target",
        {f"{PREFIX}model.embed_tokens.weight": torch.ones(101, 16)},
        f"{PREFIX}model.embed_tokens.weight",
    ),
    _tensor(
        "embedding factors",
        "unsupported_feature",
        {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 100)},
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
    ),
    _tensor(
        "trained tokens",
        "unsupported_feature",
        {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)},
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    BadAdapter(
        "names of another architecture",
        "lora",
        edit_header(_rename_layers),
        (("missing_tensor", Q0_A), ("unknown_module", Q0_A.replace("model.layers", "transformer.h"))),
        is_exact=False,
    ),
    BadAdapter(
        "no PEFT prefix",
        "lora",
        edit_header(lambda header: {key.removeprefix(PREFIX): value for key, value in header.items()}),
        (("missing_tensor", Q0_A),),
        is_exact=False,
    ),
)

_V0 = f"{PREFIX}model.layers.0.self_attn.v_proj"
_SHIRA = (
    BadAdapter(
        "another r than the tensors",
        "shira",
        edit_config(r=3),
        tuple(
            ("shape_mismatch", f"{PREFIX}model.layers.{layer}.self_attn.v_proj.shira_{part}")
            for layer in range(2)
            for part in ("indices", "weight")
        ),
    ),
    _config("modules_to_save", ["lm_head"], "unsupported_feature", kind="shira"),
    _config("rank_pattern", {}, "unknown_field", kind="shira"),
    _tensor("indices missing", "missing_tensor", {f"{_V0}.shira_indices": None}, f"{_V0}.shira_indices", kind="shira"),
    _tensor(
        "values cut", "shape_mismatch", {f"{_V0}.shira_weight": torch.ones(7)}, f"{_V0}.shira_weight", kind="shira"
    ),
    _tensor(
        "row beyond the layer",
        "index_out_of_range",
        {f"{_V0}.shira_indices": lambda i: _set_last_row(i, 8)},
        f"{_V0}.shira_indices",
        kind="shira",
    ),
    _tensor(
        "negative row",
        "index_out_of_range",
        {f"{_V0}.shira_indices": lambda i: _set_last_row(i, -1)},
        f"{_V0}.shira_indices",
        kind="shira",
    ),
    _tensor(
        "a position twice",
        "duplicate_index",
        {f"{_V0}.shira_indices": lambda i: _repeat_first(i)},
        f"{_V0}.shira_indices",
        kind="shira",
    ),
    _tensor(
        "NaN in SHiRA",
        "non_finite",
        {f"{_V0}.shira_weight": set_value(float("nan"))},
        f"{_V0}.shira_weight",
        kind="shira",
    ),
)


SPARSE_JSON = "adapter.json"
SPARSE = "adapter.safetensors"


def _json(field: str, value: Any, code: str, *, name: str = "") -> BadAdapter:
    shown = name or f"{field}={json.dumps(value)[:40]}"
    spoil = edit_config(SPARSE_JSON, **{field: value})
    return BadAdapter(f"sparse {shown}", "sparse", spoil, ((code, f"{SPARSE_JSON}:{field}"),))


def _sparse(
    name: str, code: str, where: str, *, rows: list[int] | None = None, cols: list[int] | None = None
) -> BadAdapter:
    changes: dict[str, Any] = {f"{Q0}.rows": torch.tensor(rows or [0, 0, 1, 2, 3], dtype=torch.int32)}
    changes[f"{Q0}.cols"] = torch.tensor(cols or [0, 1, 2, 3, 4], dtype=torch.int32)
    return BadAdapter(name, "sparse", edit_tensors(changes, SPARSE), ((code, where),))


_SPARSE = (
    _json("base_fingerprint", "cd" * 32, "base_mismatch"),
    _json("base_fingerprint", ..., "missing_field", name="without fingerprint"),
    _json("base_fingerprint", 7, "invalid_value"),
    _json("format", "somebody-else", "unsupported_kind"),
    _json("format_version", 2, "invalid_value"),
    _json("format_version", True, "invalid_value"),
    _json("chat_template", "{{ messages }}", "invalid_value"),
    _json("stop_token_ids", [100], "invalid_value"),
    _json("stop_token_ids", list(range(17)), "invalid_value"),
    _json("scale", 2.0, "unknown_field"),
    BadAdapter(
        "no modules",
        "sparse",
        edit_config(SPARSE_JSON, modules={}),
        (("target_not_found", f"{SPARSE_JSON}:modules"), ("unexpected_tensor", f"{Q0}.rows")),
        is_exact=False,
    ),
    BadAdapter(
        "a module the base does not have",
        "sparse",
        edit_config(SPARSE_JSON, modules={Q0: 5, "model.layers.1.self_attn.q_proj": 5, "model.norm": 5}),
        (("unknown_module", f"{SPARSE_JSON}:modules:model.norm"),),
    ),
    BadAdapter(
        "the head",
        "sparse",
        edit_config(SPARSE_JSON, modules={Q0: 5, "model.layers.1.self_attn.q_proj": 5, "lm_head": 5}),
        (("unsupported_target", f"{SPARSE_JSON}:modules:lm_head"),),
    ),
    BadAdapter(
        "more entries than the layer",
        "sparse",
        edit_config(SPARSE_JSON, modules={Q0: 257, "model.layers.1.self_attn.q_proj": 5}),
        (("shape_mismatch", f"{SPARSE_JSON}:modules:{Q0}"),),
    ),
    BadAdapter(
        "a module left out of the list",
        "sparse",
        edit_config(SPARSE_JSON, modules={"model.layers.1.self_attn.q_proj": 5}),
        tuple(("unexpected_tensor", f"{Q0}.{part}") for part in ("rows", "cols", "values")),
    ),
    _tensor("columns missing", "missing_tensor", {f"{Q0}.cols": None}, f"{Q0}.cols", kind="sparse", file=SPARSE),
    _tensor(
        "rows cut",
        "shape_mismatch",
        {f"{Q0}.rows": torch.ones(4, dtype=torch.int32)},
        f"{Q0}.rows",
        kind="sparse",
        file=SPARSE,
    ),
    _tensor(
        "64-bit columns", "unsupported_dtype", {f"{Q0}.cols": torch.arange(5)}, f"{Q0}.cols", kind="sparse", file=SPARSE
    ),
    _tensor(
        "integer values",
        "unsupported_dtype",
        {f"{Q0}.values": torch.ones(5, dtype=torch.int32)},
        f"{Q0}.values",
        kind="sparse",
        file=SPARSE,
    ),
    _tensor(
        "infinite sparse value",
        "non_finite",
        {f"{Q0}.values": set_value(float("inf"))},
        f"{Q0}.values",
        kind="sparse",
        file=SPARSE,
    ),
    _sparse("row 16 of 16", "index_out_of_range", Q0, rows=[0, 0, 1, 2, 16]),
    _sparse("column -1", "index_out_of_range", Q0, cols=[-1, 1, 2, 3, 4]),
    _sparse("sparse position twice", "duplicate_index", Q0, cols=[0, 0, 2, 3, 4]),
    _sparse("rows out of order", "unsorted_index", Q0, rows=[3, 0, 1, 2, 3]),
)

CORPUS: tuple[BadAdapter, ...] = _FILES + _JSON + _HEADER + _KINDS + _CONFIG + _LORA + _SHIRA + _SPARSE
