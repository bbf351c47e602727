"""What can go wrong in a training run. Messages say what was found, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltaserve.errors import DeltaserveError

MAX_LISTED_PROBLEMS = 50


class TrainingError(DeltaserveError):
    """Base of the trainer's errors; the command line prints ``message`` and exits with 1."""

    status, type, code = 400, "training_error", "training_failed"


class RecipeInvalid(TrainingError):
    """A key of the recipe is unknown, out of range or contradicts another."""

    code = "recipe_invalid"


class DataInvalid(TrainingError):
    """Rows of a data file are unusable. ``problems`` names each line, at most ``MAX_LISTED_PROBLEMS`` of them."""

    code = "data_invalid"

    def __init__(self, file: str, problems: Sequence[str], num_problems: int) -> None:
        listed = "\n".join(f"  {problem}" for problem in problems)
        hidden = num_problems - len(problems)
        rest = f"\n  ... and {hidden} more" if hidden > 0 else ""
        super().__init__(f"{file}: {num_problems} problem(s)\n{listed}{rest}", param=file)
        self.problems = tuple(problems)
        self.num_problems = num_problems


class ResumeRefused(TrainingError):
    """The run directory does not belong to this recipe, base or data, or holds a run that must not be overwritten."""

    code = "resume_refused"


class TrainingDiverged(TrainingError):
    """The loss or a gradient stopped being a number."""

    code = "training_diverged"


class GateRefused(TrainingError):
    """The trained adapter is not better than the base, or is not finite; nothing was registered."""

    code = "gate_refused"


class ParityFailed(TrainingError):
    """The engine's logits differ from the trainer's by more than the tolerance; nothing was registered."""

    code = "parity_failed"


class MergeRefused(TrainingError):
    """These adapters, this method and these options do not go together."""

    code = "merge_refused"


class ExtractRefused(TrainingError):
    """The fine-tune is no fine-tune of this base, or the budget holds nothing."""

    code = "extract_refused"


class RebaseRefused(TrainingError):
    """The adapter has no place on the new base."""

    code = "rebase_refused"


class TrainingInterrupted(Exception):
    """A signal stopped the run after its state was saved. ``exit_code`` is 130 for SIGINT and 143 for SIGTERM."""

    def __init__(self, signal_number: int, run_folder: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}; resume with --resume")
        self.exit_code = 128 + signal_number
        self.run_folder = run_folder
        self.step = step
