"""The errors of the package, one class per border it can fail at.

SotopiaRLError
├── ConfigError            a config file, a flag or a model string is wrong
├── DataError              a file or a record cannot be used (names the file and line)
├── StoreError             the episode store cannot be opened, read or written
│   └── DamagedRecordError one record in it cannot be read; the others can
├── ModelCallError         a model gave no reply: timeout, refusal, connection, HTTP status
│   ├── ReplyError         it replied, but the reply is unusable after every attempt
│   ├── ContextLengthError the prompt, or what is asked for on top of it, is too long for the model
│   ├── BudgetError        the run's spend cap is reached; no further call is made
│   └── EndpointDownError  the endpoint answers nothing or refuses all; no further call is made
├── TrainingError          a training stage cannot start or must stop
│   ├── GateError          the reward model is below the gate that GRPO asks for
│   └── RolloutError       what samples for GRPO (a vLLM server) fails or is not to be trusted
├── EvaluationError        two systems cannot be compared as asked
├── ServingError           a server cannot start, has died, or refuses what it is asked
└── MissingExtraError      an optional dependency is not installed

The command line prints any of these as one line and exits with 1 (2 for `ConfigError`).
Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sotopia_rl.episode import Usage

FailureKind = Literal[
    "timeout",
    "connection",
    "rate_limited",
    "http_4xx",
    "http_5xx",
    "bad_reply",
    "budget",
    "model",
    "cancelled",
    "bad_input",
]
"""Why something has no result, for counting. `model`: an in-process model raised. `bad_input`: what it would
be made of is missing or contradicts itself, so no call was made."""


class SotopiaRLError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SotopiaRLError):
    """A config file, a command-line flag or a model string is wrong."""


class DataError(SotopiaRLError):
    """A file or record cannot be used; the message names the file and the line."""


class StoreError(SotopiaRLError):
    """The episode store cannot be opened, read or written."""


class DamagedRecordError(StoreError):
    """One record of a store cannot be read; the others can."""

    def __init__(self, where: object, what: str, cause: str) -> None:
        super().__init__(
            f"{where}: {what} cannot be read ({cause}); remove the episode with `sotopia-rl episodes delete`, and "
            "import it again from where it came"
        )


class ModelCallError(SotopiaRLError):
    """A model gave no reply.

    Attributes:
        model: The model string.
        kind: The cause, for counting.
        usage: What the attempts took whose replies were refused; None where there was no reply.
    """

    def __init__(self, message: str, *, model: str, kind: FailureKind) -> None:
        super().__init__(message)
        self.model = model
        self.kind: FailureKind = kind
        self.usage: Usage | None = None


class ReplyError(ModelCallError):
    """A model replied, but no attempt gave a usable reply.

    Attributes:
        replies: What it said at each attempt, first to last.
    """

    def __init__(self, message: str, *, model: str, replies: tuple[str, ...] = ()) -> None:
        super().__init__(message, model=model, kind="bad_reply")
        self.replies = replies


class ContextLengthError(ModelCallError):
    """The prompt, or the reply that is asked for on top of it, has no room in the model's context."""


class BudgetError(ModelCallError):
    """The run's spend cap is reached; no further call is made."""

    def __init__(self, message: str, *, model: str) -> None:
        super().__init__(message, model=model, kind="budget")


class EndpointDownError(ModelCallError):
    """An endpoint answers nothing, or refuses everything; no further call is made, and the run should stop."""


class TrainingError(SotopiaRLError):
    """A training stage cannot start or must stop."""


class GateError(TrainingError):
    """The reward model is below the gate that GRPO asks for."""


class RolloutError(TrainingError):
    """What samples the completions for GRPO fails or is not to be trusted; the message names the server."""


class EvaluationError(SotopiaRLError):
    """Two systems cannot be compared as asked."""


class ServingError(SotopiaRLError):
    """A server of ours, or vLLM started by us, cannot start, has died, or refuses what it is asked."""


class MissingExtraError(SotopiaRLError):
    """An optional dependency is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'sotopia-rl[{extra}]'")
        self.package = package
        self.extra = extra
