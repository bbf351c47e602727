"""``python -m loadtest [COMMAND] ...``: without a command, open-loop load on a running server (``load.py``).

Each command is a module of its own with its own ``--help``; ``python -m loadtest.COMMAND`` is the same.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "small": "write the fixture that figures are taken on",
    "register": "give a fixture's adapters to the store before a run",
    "compare": "servers side by side, interleaved in one run",
    "registered": "base-only traffic beside many registered adapters",
    "sweep": "raise the rate to the knee",
    "churn": "adapters come and go under a steady stream",
    "capacity": "throughput against adapters, overhead against rank",
    "offline": "the engine in its own process against the same over HTTP",
    "kinds": "what each kind of adapter adds to a decode step, without HTTP",
    "tables": "render records into docs/benchmarks.md",
}


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return int(importlib.import_module(f"loadtest.{argv[0]}").main(argv[1:]))
    if argv and not argv[0].startswith("-"):
        listed = "\n".join(f"  {name:<12}{purpose}" for name, purpose in COMMANDS.items())
        print(f"loadtest: no command {argv[0]!r}; there are\n{listed}", file=sys.stderr)
        return 2
    from loadtest import load

    return asyncio.run(load.main(load.arguments().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
