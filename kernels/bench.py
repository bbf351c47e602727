"""Benchmarks of the operators and of a decode step.

    python kernels/bench.py [cpu] [--quick] [--threads N] [--dtype D] [--json PATH]     the CPU operators
    python kernels/bench.py step [--rows N] [--rank R] [--out FOLDER]                   a decode step on the CPU
    python kernels/bench.py gpu [--budget SECONDS] [--out FOLDER] [--only SECTIONS]     everything for a GPU: `make gpu`

``--help`` after either tells the rest.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    command, rest = (
        ("cpu", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    )
    # Imported here, so that one benchmark needs nothing that only another uses.
    if command == "cpu":
        from deltabench import cpu

        cpu.main(rest)
        return 0
    if command == "step":
        from deltaserve.openmp import let_threads_sleep

        let_threads_sleep()  # as the server does
        from deltabench import cpu_step

        return cpu_step.main(rest)
    if command == "gpu":
        from deltabench import gpu

        return gpu.main(rest)
    if command == "section":
        from deltabench import section

        return section.main(rest)
    print(f"unknown benchmark {command!r}; allowed: cpu, step, gpu", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
