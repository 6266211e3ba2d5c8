"""What the rewards of a data set look like: distributions, correlations, examples; as text and as a page.

Holds a few numbers per utterance, and the texts of the examples only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined

from sotopia_rl.episode import Episode, UtteranceReward
from sotopia_rl.errors import DataError
from sotopia_rl.files import read_text, write_text
from sotopia_rl.observe import action_text
from sotopia_rl.reward import Credited, Normaliser, RewardConfig, utterance_rewards

BINS = 20
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Distribution:
    """One column of numbers; `counts` are those of `BINS` equal bins from `low` to `high`."""

    name: str
    mean: float
    deviation: float
    low: float
    median: float
    high: float
    counts: tuple[int, ...]

    @property
    def bars(self) -> str:
        """The histogram in one line of text."""
        top = max(self.counts)
        return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in self.counts)


@dataclass(frozen=True)
class Example:
    """One utterance and what it earned."""

    reward: UtteranceReward
    speaker: str
    text: str

    @property
    def vector(self) -> str:
        return ", ".join(f"{name} {points:+.1f}" for name, points in self.reward.points.items())


@dataclass(frozen=True)
class RewardReport:
    """All there is to show.

    `correlations` are Pearson's between the points of the dimensions, None where one of them is constant.
    """

    num_episodes: int
    num_utterances: int
    constant: tuple[str, ...]
    distributions: tuple[Distribution, ...]
    dimensions: tuple[str, ...]
    correlations: tuple[tuple[float | None, ...], ...]
    highest: tuple[Example, ...]
    lowest: tuple[Example, ...]


def reward_report(
    data: Iterable[Credited], config: RewardConfig, normaliser: Normaliser, *, examples: int = 5
) -> RewardReport:
    """Gather the report in one pass over the data.

    Raises:
        DataError: As `utterance_rewards`; or nothing has a reward.
    """
    columns: dict[str, list[float]] = {name: [] for name in (*config.weights, "reward")}
    highest: list[tuple[float, int, Example]] = []
    lowest: list[tuple[float, int, Example]] = []
    num_episodes = 0
    for credited in data:
        num_episodes += 1
        for reward in utterance_rewards(credited, config, normaliser):
            for name, points in reward.points.items():
                columns[name].append(points)
            columns["reward"].append(reward.reward)
            example = _example(credited.episode, reward)
            number = len(columns["reward"])
            _keep(highest, (reward.reward, -number, example), examples)
            _keep(lowest, (-reward.reward, -number, example), examples)
    if not columns["reward"]:
        raise DataError("no utterance has a reward, so there is nothing to report")
    names = tuple(config.weights)
    return RewardReport(
        num_episodes=num_episodes,
        num_utterances=len(columns["reward"]),
        constant=normaliser.constant,
        distributions=tuple(_distribution(name, values) for name, values in columns.items()),
        dimensions=names,
        correlations=_correlations([columns[name] for name in names]),
        highest=tuple(example for _, _, example in sorted(highest, reverse=True)),
        lowest=tuple(example for _, _, example in sorted(lowest, reverse=True)),
    )


def _example(episode: Episode, reward: UtteranceReward) -> Example:
    name = episode.match.characters[reward.seat].name
    return Example(reward=reward, speaker=name, text=action_text(episode.turns[reward.turn].action))


def _keep(heap: list[tuple[float, int, Example]], entry: tuple[float, int, Example], size: int) -> None:
    if len(heap) < size:
        heapq.heappush(heap, entry)
    elif entry > heap[0]:
        heapq.heapreplace(heap, entry)


def _distribution(name: str, values: Sequence[float]) -> Distribution:
    low, median, high = np.quantile(values, [0, 0.5, 1]).tolist()
    counts, _ = np.histogram(values, bins=BINS, range=(low, high))
    return Distribution(
        name=name,
        mean=float(np.mean(values)),
        deviation=float(np.std(values)),
        low=low,
        median=median,
        high=high,
        counts=tuple(int(count) for count in counts),
    )


def _correlations(columns: Sequence[Sequence[float]]) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(_correlation(a, b) for b in columns) for a in columns)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    if min(a) == max(a) or min(b) == max(b):
        return None
    return float(np.corrcoef(a, b)[0, 1])


# --- as text -------------------------------------------------------------------------------------------------------


def report_text(report: RewardReport) -> str:
    """The report for a terminal."""
    lines = [f"{report.num_utterances} utterances of {report.num_episodes} episodes", ""]
    width = max(len(d.name) for d in report.distributions)
    heads = ("mean", "sd", "min", "median", "max")
    lines.append(f"{'':{width}} " + "".join(f"{head:>7}" for head in heads) + "  from min to max")
    for d in report.distributions:
        numbers = (d.mean, d.deviation, d.low, d.median, d.high)
        lines.append(f"{d.name:{width}} " + "".join(f"{number:7.2f}" for number in numbers) + f"  {d.bars}")
    lines += [f"{name} is constant: it adds nothing to the reward" for name in report.constant]
    lines += ["", "correlation of the points"]
    lines.append(f"{'':{width}}   " + "".join(f"{number:7}" for number, _ in enumerate(report.dimensions, start=1)))
    for number, (name, row) in enumerate(zip(report.dimensions, report.correlations, strict=True), start=1):
        lines.append(f"{number} {name:{width}} " + "".join("      -" if r is None else f"{r:7.2f}" for r in row))
    for title, examples in (("highest rewards", report.highest), ("lowest rewards", report.lowest)):
        lines += ["", title]
        for e in examples:
            lines += [f"{e.reward.reward:5.2f}  {e.speaker} {_short(e.text)}", f"       {e.vector}"]
    return "\n".join(lines)


def _short(text: str, length: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


# --- as a page -----------------------------------------------------------------------------------------------------


def report_html(report: RewardReport) -> str:
    """The report as one self-contained page; charts are inline SVG."""
    files = resources.files("sotopia_rl.report")

    def source(name: str) -> str:
        return files.joinpath(name).read_text(encoding="utf-8")

    pages = Environment(loader=FunctionLoader(source), undefined=StrictUndefined, autoescape=True)
    pages.filters["bars"] = _svg_bars
    return pages.get_template("rewards.html.jinja").render(report=report, css=source("page.css"))


def _svg_bars(counts: Sequence[int], width: int = 320, height: int = 90) -> list[Mapping[str, float | int]]:
    """Rectangles of a histogram, in the picture's units, with the bin's count."""
    top = max(counts)
    edges = [round(width * i / len(counts), 2) for i in range(len(counts) + 1)]
    return [
        {"x": left, "width": right - left - 1, "y": height - height * count / top, "height": height * count / top,
         "count": count}
        for (left, right), count in zip(pairwise(edges), counts, strict=True)
    ]  # fmt: skip


def write_reward_report(data: Iterable[Credited], config: RewardConfig, folder: Path) -> str:
    """Write `report.html` beside the `normaliser.json` in `folder`; the report as text.

    Raises:
        DataError: The normaliser is missing, or as `reward_report`.
    """
    normaliser = Normaliser.model_validate_json(read_text(folder / "normaliser.json"))
    report = reward_report(data, config, normaliser)
    write_text(folder / "report.html", report_html(report))
    return report_text(report)
