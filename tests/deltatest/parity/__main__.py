"""``python -m deltatest.parity``: measure every kind and print the page, or write it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deltatest.parity.ensembles import BASE, CASES
from deltatest.parity.measure import measure
from deltatest.parity.page import parity_page
from deltatest.parity.registry import entries


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deltatest.parity", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there instead of printing it")
    parser.add_argument("--timed", action="store_true", help="time decode steps too; the machine should be idle")
    parser.add_argument("--only", metavar="KIND", help="only the entries of this kind (no whole page then)")
    options = parser.parse_args()
    chosen = [entry for entry in entries() if options.only in (None, entry.kind)]
    names = {entry.name for entry in chosen} | {BASE}
    cases = [case for case in CASES if names.issuperset(name for name, _ in case.members)]
    measured = measure(chosen, cases, is_timed=options.timed)
    page = parity_page(measured.rows, measured.ensembles)
    if options.write is not None and options.only is None:
        options.write.write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)
    if measured.bad:
        sys.stderr.write(f"not in parity: {', '.join(measured.bad)}\n")
    return 1 if measured.bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
