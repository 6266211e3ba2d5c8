"""What the command line shows a person: progress, conversations, summaries.

Results go to stdout, the rest to stderr.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sotopia_rl.episode import Episode, EpisodeStatus, Rating, Seat, Turn, Usage, UtteranceReward
from sotopia_rl.observe import goal_text, scenario_text
from sotopia_rl.store.interface import episode_of
from sotopia_rl.store.jsonl import StageFailure
from sotopia_rl.tally import Tally, Watch

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

SEATS: tuple[Seat, Seat] = (0, 1)
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
    return tally.note or "; ".join(part for part in (tally.causes, used(tally.usage)) if part)


def used(usage: Usage) -> str:
    """Calls, tokens and cost; nothing where no model was asked."""
    if not usage.calls:
        return ""
    cost = f"; ${usage.cost_usd:.2f}" if usage.cost_usd else ""
    return f"{usage.calls} calls, {_short(usage.prompt_tokens + usage.completion_tokens)} tokens{cost}"


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


WIDEST = 100
"""Columns of a conversation; longer lines are hard to read."""

STATUS_STYLE = {"completed": "green", "cancelled": "yellow"}


def status_style(status: EpisodeStatus) -> str:
    """The colour of a status; every failure has the same."""
    return STATUS_STYLE.get(status, "red")


def show_episode(
    episode: Episode,
    ratings: list[Rating],
    rewards: dict[int, UtteranceReward] | None = None,
    failures: Iterable[StageFailure] = (),
) -> Group:
    """A conversation as a person would read it: who they are, what each wants, what was said, what it earned."""
    codename = episode.match.scenario.codename or episode.match.scenario.id
    title = Text.assemble((codename, "bold"), (f"  {episode.tag}  {episode.id}", "dim"))
    place = Text(scenario_text(episode.match).strip(), style="italic")
    parts: list[RenderableType] = [
        title,
        Text(),
        place,
        Text(),
        _people(episode),
        Text(),
        _talk(episode, rewards or {}),
    ]
    parts += [Text(), Text(_ending(episode), style="yellow" if episode.failure else "dim")]
    for rating in ratings:
        parts += [Text(), _scores(episode, rating)]
    parts += [part for failed in failures for part in (Text(), Text(_failed(failed), style="yellow"))]
    return Group(*(Constrain(part, WIDEST) for part in parts))


def _people(episode: Episode) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for seat in SEATS:
        grid.add_row(_name(episode, seat, full=True), Text(goal_text(episode.match, seat).strip()))
        grid.add_row("", Text(episode.agents[seat].model, style="dim", overflow="fold"))
    return grid


def _name(episode: Episode, seat: Seat, *, full: bool = False) -> Text:
    character = episode.match.characters[seat]
    return Text(character.name if full else character.first_name or character.name, style=f"bold {SEAT_STYLE[seat]}")


def _talk(episode: Episode, rewards: dict[int, UtteranceReward]) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(justify="right", style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    if rewards:
        grid.add_column(justify="right", style="green", no_wrap=True)
    for turn in episode.turns:
        reward = rewards.get(turn.index)
        earned = [f"{reward.reward:.1f}" if reward else ""] if rewards else []
        grid.add_row(str(turn.index), _name(episode, turn.seat), _said(turn), *earned)
    return grid


def _said(turn: Turn) -> Text:
    action = turn.action
    match action.action_type:
        case "speak":
            return Text(action.argument)
        case "none":
            return Text("says nothing", style="dim")
        case "leave":
            return Text("leaves" + (f": {action.argument}" if action.argument else ""), style="dim")
        case "non-verbal communication" | "action":
            return Text(f"[{action.action_type}] {action.argument}", style="italic")


def _ending(episode: Episode) -> str:
    if episode.failure is not None:
        return f"{episode.status} at turn {episode.failure.turn} ({episode.failure.kind}): {episode.failure.message}"
    turns = f"{len(episode.turns)} turns"
    return {
        "left": f"{turns}; somebody left",
        "stale": f"{turns}; nobody had more to say",
        "turn_limit": f"{turns}, which were all there were",
    }[episode.end_reason or "turn_limit"]


def _failed(failed: StageFailure) -> str:
    what = failed.item_id.removeprefix(episode_of(failed.item_id)).removeprefix("/")
    return f"{failed.stage} {what} failed ({failed.failure.kind}): {failed.failure.message}"


def _scores(episode: Episode, rating: Rating) -> Table:
    """A row per dimension, a column per agent."""
    table = Table(title=f"scores by {rating.judge}", title_justify="left", title_style="dim", box=None, padding=(0, 2))
    table.add_column("")
    for seat in SEATS:
        table.add_column(_name(episode, seat), justify="right")
    for dimension in rating.scores[0]:
        table.add_row(dimension, *(f"{rating.points(seat)[dimension]:g}" for seat in SEATS))
    table.add_row("overall", *(f"{rating.overall(seat):.2f}" for seat in SEATS), style="bold")
    return table
