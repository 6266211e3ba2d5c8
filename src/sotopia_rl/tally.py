"""How far a stage is and what of it failed: for progress bars, for the summary at its end, and to stop a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sotopia_rl.episode import Failure, Usage
from sotopia_rl.errors import SotopiaRLError


@dataclass
class Tally:
    """How far a stage is: for progress bars, and for the summary at its end."""

    stage: str
    total: int
    done: int = 0
    skipped: int = 0
    """Finished by an earlier call."""
    failed: Counter[str] = field(default_factory=Counter)
    """By cause."""
    messages: dict[str, str] = field(default_factory=dict)
    """What the newest failure of each cause said."""
    usage: Usage = field(default_factory=Usage)
    stopped: str = ""
    """Why not everything was tried: the endpoint was given up, or the spend cap reached."""
    note: str = ""
    """Shown instead of counts, for instance the loss of a training step."""

    def add(self, failure: Failure | None, usage: Usage) -> None:
        self.done += 1
        self.usage += usage
        if failure is not None:
            self.failed[failure.kind] += 1
            self.messages[failure.kind] = failure.message

    @property
    def causes(self) -> str:
        """Failures by cause."""
        return ", ".join(f"{kind} {count}" for kind, count in sorted(self.failed.items()))

    def require(self, *, some: bool = True) -> None:
        """Make sure that there is something to go on with.

        Args:
            some: At least one item must have succeeded, if any was tried.

        Raises:
            SotopiaRLError: Not every item was tried, or every one failed.
        """
        if self.stopped:
            raise SotopiaRLError(f"stopped after {self.done} of {self.total} {self.stage}: {self.stopped}")
        if some and self.done and self.failed.total() == self.done:
            worst, _ = self.failed.most_common(1)[0]
            raise SotopiaRLError(f"all {self.done} {self.stage} failed, {worst} most often: {self.messages[worst]}")

    def __str__(self) -> str:
        parts = [f"{self.done - self.failed.total()} of {self.total} {self.stage}"]
        parts += [f"{self.skipped} were there already"] if self.skipped else []
        parts += [f"failed: {self.causes}"] if self.failed else []
        return "; ".join(parts)


Watch = Callable[[Tally], None]
StepWatch = Callable[[int, int], None]
"""Told the optimizer steps done and the steps in all."""


def step_watch(stage: str, watch: Watch) -> StepWatch:
    """Shows training steps as a tally."""
    tally = Tally(stage, total=0)

    def step(done: int, total: int) -> None:
        tally.done, tally.total = done, total
        watch(tally)

    return step
