"""Counters and gauges of a running deltaserve, read from its ``/metrics``."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp


async def scrape(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """``name{labels}`` to value for every ``deltaserve_`` sample; empty where the server offers none."""
    try:
        async with session.get(f"{url}/metrics") as response:
            text = await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError):
        return {}
    samples = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("deltaserve_"):
            try:
                samples[name] = float(value)
            except ValueError:
                continue
    return samples


def total(samples: Mapping[str, float], metric: str, label: str = "") -> float:
    """Sum of a metric over its label sets; of those that contain ``label`` where given (``level="device"``)."""
    prefix = f"deltaserve_{metric}"
    return sum(
        value
        for name, value in samples.items()
        if (name == prefix or name.startswith(prefix + "{")) and (not label or label in name)
    )
