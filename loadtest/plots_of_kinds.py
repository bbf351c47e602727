"""The plot of what each kind of adapter adds to a decode step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loadtest.figures import spread
from loadtest.plots import BLUE, ORANGE, RED, Record, canvas
from loadtest.tables_of_kinds import added, floor_seconds

VECTOR_GOAL = 0.03
LEAST = 0.1
"""Per cent at the left border, where what is less is drawn."""


def draw_kinds(record: Record, path: Path) -> None:
    """Added time as a share of the reference's step and where its median lies at 95 %, every row its own adapter and
    four rows sharing one, beside the floor; logarithmic."""
    entries = record["kinds"]
    rows = record["parameters"]["rows"]
    places = np.arange(len(entries))[::-1]
    with canvas(path, width=8.0, height=1.5 + 0.34 * len(entries)) as (_, axes):
        for case, colour, shift in (("distinct", ORANGE, 0.17), ("shared", BLUE, -0.17)):
            count = rows if case == "distinct" else max(1, rows // 4)
            cases = [added(entry, case) for entry in entries]
            shares = [max(100 * found.share, LEAST) for found in cases]
            axes.barh(places + shift, shares, height=0.32, color=colour, label=f"{count} adapters")
            for place, entry, found in zip(places, entries, cases, strict=True):
                if found.interval is not None:
                    axes.hlines(
                        place + shift, *(max(100 * end, LEAST) for end in found.interval), color="grey", linewidth=1.2
                    )
                floor = 100 * floor_seconds(record, entry, case) / spread(found.reference)["median"]
                axes.vlines(max(floor, LEAST), place + shift - 0.16, place + shift + 0.16, color="black", linewidth=1.5)
        axes.axvline(100 * VECTOR_GOAL, color=RED, linestyle=":", label="3 %, the goal for vectors")
        axes.plot([], [], color="black", label="floor: bytes or FLOPs")
        axes.plot([], [], color="grey", linewidth=1.2, label="95 %")
        axes.set_yticks(places, [entry["title"] for entry in entries])
        axes.set_xscale("log")
        axes.set_xlim(left=LEAST)
        axes.set(xlabel="added to the step (%)", title=f"What each kind adds to a decode step of {rows} rows")
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.3, -0.06), ncols=3)
