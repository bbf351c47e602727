"""What each kind of adapter adds to a decode step on the CPU, against what its bytes and FLOPs explain.

    python -m loadtest.kinds --out runs/kinds
    python -m loadtest.kinds --only ia3,dora --rounds 30

The engine's own step in this process, without HTTP: rows that all have an adapter of one kind, each its own or four
rows sharing one, in pairs with the base alone (a kind that comes on top of another, in pairs with that one): the two
steps of a pair are neighbours, now the one first, now the other, and what is told is the median of the pairs' ratios.
Vectors add little, so they get more pairs than other kinds. Base and adapters are random. The floor is the greater of
two times: what reading the adapters takes at this machine's rate of memory, and what their arithmetic takes at the rate
of a product in fp32, both measured in the same run. A mask that is kept as bits makes its rows read the base's weights
again: they count once for each such adapter in the step. Run it on an idle machine; figures of two runs do not compare.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from loadtest.machine import stamp
from loadtest.small import Shape

RECORD = "record.json"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.kinds", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of kinds, comma-separated; default: all")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=128, help="positions before the step")
    parser.add_argument("--rounds", type=int, default=25, help="pairs of each case of a kind, at most")
    parser.add_argument("--seconds", type=float, default=9.0, help="for the rounds of a kind; one is always run")
    parser.add_argument("--longer", type=int, default=4, help="times these two for vectors, which add little")
    parser.add_argument("--layers", type=int, default=Shape().layers, help="fewer make a smaller base")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kinds"), help=f"folder for {RECORD}")
    return parser


def main(argv: Sequence[str] | None = None, shape: Shape | None = None) -> int:
    from deltaserve.openmp import let_threads_sleep

    let_threads_sleep()  # as the server does, before torch is there
    import torch

    from loadtest import kind_adapters, kind_steps

    parser = arguments()
    given = parser.parse_args(argv)
    for name in ("rows", "context", "rounds", "longer", "layers", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}; it must be at least 1")
    names = [name for name in given.only.split(",") if name]
    unknown = sorted(set(names) - set(kind_adapters.BY_NAME))
    if unknown:
        parser.error(f"no kind {', '.join(unknown)}; there are {', '.join(kind_adapters.BY_NAME)}")
    kinds = [kind for kind in kind_adapters.KINDS if not names or kind.name in names]
    shape = shape or Shape(layers=given.layers)
    torch.manual_seed(given.seed)
    torch.set_num_threads(given.threads)
    base = kind_steps.base_of(shape, getattr(torch, given.dtype))
    parameters = {
        **{name: getattr(given, name) for name in ("rows", "context", "rounds", "threads", "dtype")},
        "shape": asdict(shape),
        "instruction_set": kind_steps.instruction_set(),
    }
    record = {**stamp("kinds", given.seed, parameters), "rates": kind_steps.rates()}
    record["kinds"] = kind_steps.measure(
        base,
        kinds,
        rows=given.rows,
        context=given.context,
        rounds=given.rounds,
        seconds=given.seconds,
        longer=given.longer,
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {given.out / RECORD}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
