"""Files that are missing, foreign or hostile, JSON that is none, and safetensors headers that lie."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltatest.adapter_corpus.good import CONFIG, Q0_A, Q0_B, TENSORS, write_good_sparse
from deltatest.adapter_corpus.spoil import BadAdapter, edit_bytes, edit_header, write_file


class _Canary:
    """Unpickling this would leave a trace; nothing may ever do so."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (os.putenv, ("DELTASERVE_CANARY_PICKLE", "opened"))


PICKLE = pickle.dumps(_Canary())


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


FILES = (
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
        (("added_tokens", "tokenizer:<think>"),),
    ),
    BadAdapter(
        "token after a gap",
        "lora",
        write_file("tokenizer_config.json", b'{"added_tokens_decoder": {"95": {"content": "<new>"}}}'),
        (("added_tokens", "tokenizer:<new>"),),
    ),
    BadAdapter(
        "more added tokens than rows",
        "lora",
        write_file(
            "tokenizer.json",
            json.dumps({"added_tokens": [{"id": i, "content": f"<{i}>"} for i in range(90, 102)]}).encode(),
        ),
        (("added_tokens", "tokenizer"),),
    ),
    BadAdapter(
        "two added tokens with one text",
        "lora",
        write_file("tokenizer.json", b'{"added_tokens": [{"id": 90, "content": "<a>"}, {"id": 91, "content": "<a>"}]}'),
        (("duplicate_index", "tokenizer:<a>"),),
    ),
    BadAdapter(
        "an added token without a text",
        "lora",
        write_file("tokenizer.json", b'{"added_tokens": [{"id": 90, "content": " "}]}'),
        (("invalid_value", "tokenizer.json:90"),),
    ),
    BadAdapter(
        "an added token with a flag that is no flag",
        "lora",
        write_file("tokenizer.json", b'{"added_tokens": [{"id": 90, "content": "<a>", "special": 1}]}'),
        (("invalid_value", "tokenizer.json:90"),),
    ),
    BadAdapter(
        "a list of tokens in another format",
        "lora",
        write_file("tokens.json", b'{"format": "tokens", "tokens": [{"id": 90, "content": "<a>"}]}'),
        (("invalid_value", "tokens.json:format"),),
    ),
    BadAdapter(
        "a list of tokens without one",
        "lora",
        write_file("tokens.json", b'{"format": "deltaserve-tokens", "tokens": null}'),
        (("invalid_value", "tokens.json:tokens"),),
    ),
    BadAdapter(
        "a list of tokens with more than tokens",
        "lora",
        write_file(
            "tokens.json",
            json.dumps(
                {
                    "format": "deltaserve-tokens",
                    "version": 2,
                    "tokens": [
                        {"id": 90, "content": "<a>", "special": True},
                        "<b>",
                        {"id": "91", "content": "<c>"},
                        {"id": 3, "content": "<d>"},
                    ],
                }
            ).encode(),
        ),
        (
            ("unknown_field", "tokens.json:version"),
            ("unknown_field", "tokens.json:tokens[0]:special"),
            ("invalid_value", "tokens.json:tokens[1]"),
            ("invalid_value", "tokens.json:tokens[2].id"),
            ("invalid_value", "tokens.json:tokens[3].id"),
        ),
    ),
    BadAdapter("tokenizer is no JSON", "lora", write_file("tokenizer.json", b"["), (("bad_json", "tokenizer.json"),)),
)

JSON = (
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

HEADER = (
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
        "five dimensions",
        "lora",
        edit_header(lambda header: header[Q0_A].update(shape=[1, 1, 1, 4, 16])),
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
