"""Rebuild the demonstration adapters that ship with the embedded base.

Run as ``python -m deltaserve_trainer.demo_adapters --fingerprint HEX [--out DIR] [--only NAME]``. The fingerprint is
the base's (``/version`` of a server shows it): adapter files carry it, and computing it is the server's business.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deltaserve.tinybase import CHECKPOINT, DEMO_ADAPTERS
from deltaserve_trainer.base import Base, load_model
from deltaserve_trainer.data import read_dataset
from deltaserve_trainer.demos import DEMOS, Demo
from deltaserve_trainer.encoding import Encoder
from deltaserve_trainer.errors import GateRefused
from deltaserve_trainer.evaluate import greedy_answer
from deltaserve_trainer.methods import load_method
from deltaserve_trainer.progress import Progress
from deltaserve_trainer.register import check_gate
from deltaserve_trainer.train import TrainingResult, run_training

BASE_NAME = "tinybase"
MIN_SHARE = 0.9
MAX_BYTES = 450_000
MAX_ANSWER_TOKENS = 160

logger = logging.getLogger(__name__)


def build_demo(demo: Demo, base: Base, out: Path) -> TrainingResult:
    """Train ``demo`` and put its folder at ``out/NAME``. Raises ``GateRefused`` when its voice does not show."""
    with tempfile.TemporaryDirectory() as scratch:
        result = run_training(
            demo.recipe(),
            base=base,
            data=demo.data,
            eval_data=demo.eval_data,
            out_dir=Path(scratch) / demo.name,
            title=demo.name,
            on_progress=_log,
        )
        check_gate(result)
        share = share_with_voice(demo, base, result.adapter_folder)
        size = sum(path.stat().st_size for path in result.adapter_folder.iterdir())
        logger.info("%s: %s; %.0f %% of held-out answers; %d bytes", demo.name, result.evaluation, 100 * share, size)
        if share < MIN_SHARE or size > MAX_BYTES:
            raise GateRefused(
                f"{demo.name}: {share:.0%} of the answers have the voice (at least {MIN_SHARE:.0%}), "
                f"{size} bytes (at most {MAX_BYTES}); nothing was written"
            )
        shutil.rmtree(out / demo.name, ignore_errors=True)
        shutil.copytree(result.adapter_folder, out / demo.name)
    return result


def share_with_voice(demo: Demo, base: Base, folder: Path) -> float:
    """Share of greedy answers to the held-out prompts that have the demo's voice."""
    method = load_method(load_model(base.folder), folder, base)
    encoder = Encoder.from_folder(base.folder, 256)
    rows = read_dataset(demo.eval_data).examples
    answers = [greedy_answer(method, encoder, encoder.prompt_ids(row), MAX_ANSWER_TOKENS) for row in rows]
    return sum(map(demo.shows_in, answers)) / len(answers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m deltaserve_trainer.demo_adapters", description=__doc__)
    parser.add_argument("--fingerprint", required=True, help="64 hex digits: the base's fingerprint")
    parser.add_argument("--out", type=Path, default=DEMO_ADAPTERS, help="folder that receives one folder a demo")
    parser.add_argument("--only", choices=[demo.name for demo in DEMOS], help="rebuild this one")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = Base(CHECKPOINT, BASE_NAME, options.fingerprint)
    for demo in DEMOS:
        if options.only in (None, demo.name):
            build_demo(demo, base, options.out)


def _log(progress: Progress) -> None:
    if progress.eval_loss is not None:
        logger.info("step %d of %d: held-out loss %.4f", progress.step, progress.total_steps, progress.eval_loss)


if __name__ == "__main__":
    main()
