"""What the command line shows a person: progress, conversations, summaries.

Results go to stdout, the rest to stderr.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from sotopia_rl.episode import Episode, Rating, Seat, Turn, UtteranceReward
from sotopia_rl.stages import Tally, Watch

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

SEAT_STYLE = ("cyan", "magenta")


class Bars:
    """A progress bar per stage; on a pipe nothing but what `close` says."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._tasks: dict[int, int] = {}

    def watch(self, tally: Tally) -> None:
        """Show where a stage is."""
        key = id(tally)
        if key not in self._tasks:
            self._tasks[key] = self.progress.add_task(tally.stage, total=tally.total, detail="")
        self.progress.update(
            self.progress.task_ids[self._tasks[key]], completed=tally.done, total=tally.total, detail=detail(tally)
        )


@contextmanager
def bars() -> Iterator[Watch]:
    """Progress bars for as long as the block runs."""
    shown = Bars()
    with shown.progress:
        yield shown.watch


def detail(tally: Tally) -> str:
    """Failures by cause, calls, tokens and cost, in a few words."""
    parts = [f"{kind} {count}" for kind, count in sorted(tally.failed.items())]
    if tally.usage.calls:
        tokens = tally.usage.prompt_tokens + tally.usage.completion_tokens
        parts.append(f"{tally.usage.calls} calls, {_short(tokens)} tokens")
    if tally.usage.cost_usd:
        parts.append(f"${tally.usage.cost_usd:.2f}")
    return tally.note or "; ".join(parts)


def _short(number: int) -> str:
    for limit, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number)


@contextmanager
def timed() -> Iterator[list[float]]:
    """The seconds the block took, as the one entry of a list filled at its end."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def show_episode(episode: Episode, ratings: list[Rating], rewards: dict[int, UtteranceReward] | None = None) -> Group:
    """A conversation as a person would read it: who they are, what each wants, what was said, what it earned."""
    scenario = episode.match.scenario
    head = Text(scenario.description.strip(), style="italic")
    parts: list[Text | Panel | Padding] = [Panel(head, title=f"{scenario.codename or scenario.id}  {episode.id}")]
    seats: tuple[Seat, Seat] = (0, 1)
    for seat in seats:
        character = episode.match.characters[seat]
        goal = Text.assemble(
            (character.name, f"bold {SEAT_STYLE[seat]}"),
            (f"  {episode.agents[seat].model}\n", "dim"),
            scenario.goals[seat].strip(),
        )
        parts.append(Padding(goal, (0, 0, 1, 2)))
    parts += [_turn(episode, turn, (rewards or {}).get(turn.index)) for turn in episode.turns]
    parts.append(Text(_ending(episode), style="yellow" if episode.failure else "dim"))
    parts += [Padding(_scores(episode, rating), (1, 0, 0, 0)) for rating in ratings]
    return Group(*parts)


def _turn(episode: Episode, turn: Turn, reward: UtteranceReward | None) -> Padding:
    name = episode.match.characters[turn.seat].first_name
    line = Text.assemble((f"{turn.index:>2} ", "dim"), (name, f"bold {SEAT_STYLE[turn.seat]}"), "  ")
    action = turn.action
    if action.action_type == "speak":
        line.append(action.argument)
    elif action.action_type in ("none", "leave"):
        line.append({"none": "says nothing", "leave": "leaves"}[action.action_type], style="dim")
    else:
        line.append(f"[{action.action_type}] {action.argument}", style="italic")
    if reward is not None:
        line.append(f"  {reward.reward:.1f}", style="green")
    return Padding(line, (0, 0, 0, 2 if turn.seat == 0 else 6))


def _ending(episode: Episode) -> str:
    if episode.failure is not None:
        return f"{episode.status} at turn {episode.failure.turn}: {episode.failure.message}"
    return {"left": "somebody left", "stale": "nobody had more to say", "turn_limit": "the turns were used up"}[
        episode.end_reason or "turn_limit"
    ]


def _scores(episode: Episode, rating: Rating) -> Text:
    text = Text(f"{rating.judge}\n", style="dim")
    seats: tuple[Seat, Seat] = (0, 1)
    for seat in seats:
        points = "  ".join(f"{name} {value:g}" for name, value in rating.points(seat).items())
        text.append(f"{episode.match.characters[seat].name}: ", style=f"bold {SEAT_STYLE[seat]}")
        text.append(f"overall {rating.overall(seat):.2f}  {points}\n", style="default")
    return text
