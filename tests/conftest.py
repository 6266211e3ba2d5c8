"""Things that several test modules share and that take a while to make; torch is imported only when they are used."""

import atexit
import gc
import logging
import os
from pathlib import Path

import hypothesis
import pytest

import training_rows

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a trained model come first: xdist hands out runs of neighbours, so one worker trains it."""
    items.sort(key=lambda item: "base" not in item.fixturenames)


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Torch and its relatives are a million objects that live for good; the collector need not walk them each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # of 700: what tests make and keep is walked less often
    gc.enable()
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True  # 80 of torch do not, and get pytest's handlers one by one, six times per test


@atexit.register
def leave() -> None:
    """Later than pytest's own collections of garbage, and than the ends of what was imported after this file."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(0)  # to take torch and all the rest apart takes three seconds
    gc.unfreeze()  # or extension modules report what they leak


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training rows of 24 talks."""
    return training_rows.rows_file(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def base(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.1 million parameters, barely trained."""
    from sotopia_rl.train.tiny import train_base
    from training_settings import TINY

    return train_base(rows, TINY, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sft_adapter(rows: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sotopia_rl.train.sft import train_sft
    from training_settings import SFT

    return train_sft(rows, base, SFT, tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="session")
def reward_adapter(rows: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sotopia_rl.train.reward_model import train_reward_model
    from training_settings import RM

    return train_reward_model(rows, base, RM, tmp_path_factory.mktemp("rm"))
