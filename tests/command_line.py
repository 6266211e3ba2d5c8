"""The command line, called in this process."""

import pytest

from sotopia_rl.cli import main


def call(*arguments: object) -> int:
    """Its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0
