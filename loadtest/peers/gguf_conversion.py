"""Converts one base and many adapters to GGUF in one process, in the converter's own Python; imports nothing of ours.

PYTHON gguf_conversion.py LLAMA_CPP_FOLDER BASE_FOLDER OUTTYPE SOURCE=FILE...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main(sources: Path, base: Path, outtype: str, pairs: list[str]) -> None:
    sys.path.insert(0, str(sources))
    from conversion.base import TextModel  # llama.cpp's

    # The converter knows pre-tokenizers by a hash of what they do to a text; the fixture's splits words as GPT-2 does.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for pair in pairs:
        source, _, file = pair.partition("=")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        unfinished = f"{file}.part"
        words = [source, "--outfile", unfinished, "--outtype", outtype]
        script = sources / "convert_hf_to_gguf.py"
        if Path(source, "adapter_config.json").exists():
            script = sources / "convert_lora_to_gguf.py"
            words += ["--base", str(base)]
        sys.argv = [str(script), *words]
        runpy.run_path(str(script), run_name="__main__")
        Path(unfinished).rename(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
