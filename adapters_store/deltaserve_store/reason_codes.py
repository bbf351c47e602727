"""Every code a refusal may carry, with one line for a reader. ``docs/adapter-format.md`` lists exactly these."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

REASON_CODES: Mapping[str, str] = MappingProxyType(
    {
        # files and archives
        "missing_file": "A file that the format needs is not there.",
        "unexpected_file": "A file that is no part of an adapter; only the documented names are taken.",
        "duplicate_file": "The same name twice (also when only upper and lower case differ).",
        "pickle_refused": "A pickle; it is never opened. Convert the weights to safetensors.",
        "file_too_large": "A file, or the sum of all files, exceeds its cap.",
        "not_a_regular_file": "A link, device, sparse file or the like.",
        "ambiguous_format": "Files of two formats in one upload.",
        "bad_archive": "The archive is damaged, encrypted, or of another type than .zip, .tar, .tar.gz.",
        "archive_path": "An absolute path, a `..`, a path of more than one folder, or an unprintable name.",
        "archive_bomb": "Too many entries, too high a compression ratio, or sizes that lie.",
        "nested_archive": "An archive inside the archive.",
        # safetensors
        "bad_header": "The safetensors header is damaged or contradicts the file.",
        "header_too_large": "The safetensors header exceeds 4 MB or 20,000 tensors.",
        "bad_tensor_name": "A tensor name with characters that no module path has.",
        "bad_offsets": "Tensor offsets overlap, leave holes, or do not fill the file.",
        "unsupported_dtype": "A dtype that this tensor may not have.",
        "bad_shape": "A tensor of no dimension, of more than four, or whose shape is no list of sizes.",
        # config
        "bad_json": "A JSON file is malformed: syntax, encoding, duplicate keys, NaN, or too deep.",
        "missing_field": "A field of the config that must be there is not.",
        "unknown_field": "A field of the config that this version does not know.",
        "invalid_value": "A field has the wrong type or is out of range.",
        "rank_out_of_range": "A rank below 1, above 1024, or above what the linear or the method has room for.",
        "prefix_too_long": "More virtual tokens than are taken, or than the context of this server has room for.",
        "conversion_too_large": "The terms that an adapter is converted to, or the work of it, exceed a limit.",
        "unsupported_kind": "A kind of adapter that is not served; the kind is named, with the reason.",
        "unsupported_feature": "A feature that is not served; it is named, with what is served instead.",
        "seed_not_usable": "Tensors that the file leaves out cannot be made again for certain; save them in the file.",
        "unsupported_target": "A part of the base that this kind, format or base does not let adapters change.",
        "regex_target": "A regular expression where a list of module names is required.",
        "target_not_found": "The targets match nothing of the base that this kind changes.",
        "fan_in_fan_out_mismatch": "`fan_in_fan_out` contradicts how the base stores its weights.",
        "added_tokens": "Added tokens that do not follow on the base's, or that the base cannot take.",
        # tensors against the base
        "base_mismatch": "The adapter was made for another base.",
        "unknown_module": "The base has no linear, norm or other part of that name.",
        "missing_tensor": "A targeted layer lacks a tensor.",
        "unexpected_tensor": "A tensor that the config does not account for.",
        "shape_mismatch": "A tensor's shape contradicts the base, the config or its partner.",
        "non_finite": "NaN or infinity.",
        "value_out_of_range": "An absolute value above 65504.",
        "index_out_of_range": "A position, token or number outside of what it points into.",
        "duplicate_index": "The same position or token twice.",
        "unsorted_index": "Positions out of order.",
        # at rest
        "bit_rot": "Stored bytes differ from what was admitted; the version is not served.",
        "too_many_findings": "More findings than are listed; their number is given.",
    }
)
