"""``python -m deltatest.parity``: measure every kind and print the page, or write it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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
    rows = measure(chosen, is_timed=options.timed)
    page = parity_page(rows)
    if options.write is not None and options.only is None:
        options.write.write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)
    bad = [row.entry.name for row in rows if not row.is_good]
    if bad:
        sys.stderr.write(f"not in parity: {', '.join(bad)}\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
