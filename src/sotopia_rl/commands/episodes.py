"""`episodes list|show|export|import`: what is in a store, to read, and its way in and out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile
from rich.text import Text

from sotopia_rl import stages
from sotopia_rl.commands.options import DEFAULT_STORE
from sotopia_rl.console import err, out, show_episode, status_style
from sotopia_rl.episode import EpisodeStatus
from sotopia_rl.errors import DataError
from sotopia_rl.store import (
    EpisodeQuery,
    EpisodeStore,
    EpisodeSummary,
    copy,
    export_file,
    import_file,
    open_store,
    refuse_empty,
)
from sotopia_rl.store.transfer import Layout


@dataclass(frozen=True)
class Choice:
    """Which episodes are meant."""

    tag: str | None = None
    """Name under which they were made."""
    model: str | None = None
    """Model string of an agent, in either seat."""
    codename: str | None = None
    """Codename of the scenario; several scenarios may share one."""
    scenario_id: str | None = None
    """Id of the scenario."""
    status: EpisodeStatus | None = None
    """How they ended."""

    def query(self, limit: int | None = None) -> EpisodeQuery:
        return EpisodeQuery(
            tag=self.tag,
            model=self.model,
            codename=self.codename,
            scenario_id=self.scenario_id,
            status=self.status,
            limit=limit,
        )


def list_episodes(
    *,
    store: str = DEFAULT_STORE,
    limit: int | None = None,
    choice: Annotated[Choice, Parameter(name="*")] = Choice(),
) -> None:
    """One line per episode, by id; on a pipe all fields with tabs between them.

    On a terminal at most 50, unless --limit says otherwise.

    Parameters
    ----------
    store
        Episode store: FILE.db, FILE.jsonl or redis://HOST:PORT.
    limit
        At most so many.
    """
    shown = limit if limit is not None or not out.is_terminal else 50
    with closing(open_store(store, create=False)) as episodes:
        query = choice.query(shown)
        write = _terminal_lines if out.is_terminal else _tab_separated
        write(episodes.summaries(query))
        err.print(_total(episodes, query), markup=False, soft_wrap=True)


def _tab_separated(summaries: Iterable[EpisodeSummary]) -> None:
    for s in summaries:
        cause = s.failure_kind or ""
        print(s.id, s.status, cause, s.num_turns, s.codename or s.scenario_id, *s.models, s.tag, sep="\t")  # noqa: T201


def _terminal_lines(summaries: Iterable[EpisodeSummary]) -> None:
    for s in summaries:
        how = s.failure_kind or s.status
        line = Text.assemble(
            (s.id, "dim"),
            (f" {how:<12}", status_style(s.status)),
            (f"{s.num_turns:>3} turns  ", "dim"),
            f"{s.tag}  {s.codename or s.scenario_id}  ",
            (" / ".join(s.models), "dim"),
        )
        out.print(line, no_wrap=True, overflow="ellipsis", crop=True)


def _total(store: EpisodeStore, query: EpisodeQuery) -> str:
    everything = query.model_copy(update={"limit": None})
    count = store.count(everything)
    kept = count if query.limit is None else min(count, query.limit)
    tags = ", ".join(f"{tag} {number}" for tag, number in store.tags().items())
    return f"{kept} of {count} episodes" + (f"; tags in this store: {tags}" if tags else "")


def show_episodes(
    episode: str,
    /,
    *,
    store: str = DEFAULT_STORE,
    rewards: ExistingFile | None = None,
) -> None:
    """One conversation, to read: who they are, what each wants, what was said, what it scored.

    Parameters
    ----------
    episode
        Its id, or the first characters of it.
    store
        Episode store: FILE.db, FILE.jsonl or redis://HOST:PORT.
    rewards
        rewards.jsonl of `sotopia-rl reward`: each utterance's reward is shown beside it.
    """
    with closing(open_store(store, create=False)) as episodes:
        found = episodes.episode(_the_id(episodes, episode))
        earned = {} if rewards is None else {r.turn: r for r in stages.read_rewards(rewards).get(found.id, [])}
        out.print(show_episode(found, list(episodes.ratings(found.id)), earned))


def _the_id(store: EpisodeStore, start: str) -> str:
    """The one id that starts so.

    Raises:
        DataError: There is none, or there are several.
    """
    found = [i for i in store.ids() if i.startswith(start.upper())]
    if len(found) != 1:
        several = f"{len(found)} episodes' ids start with {start!r}; give more of it"
        none = f"no episode's id starts with {start!r}; sotopia-rl episodes list shows them"
        raise DataError(several if found else none)
    return found[0]


def export_episodes(
    target: str,
    /,
    *,
    store: str = DEFAULT_STORE,
    layout: Layout = "sotopia-rl",
    judge: str | None = None,
    choice: Annotated[Choice, Parameter(name="*")] = Choice(),
) -> None:
    """Copy episodes with their ratings and attributions into a JSONL file or another store.

    Parameters
    ----------
    target
        FILE.jsonl, FILE.db or redis://HOST:PORT (sotopia reads what is written there).
    store
        Where they are: FILE.db, FILE.jsonl or redis://HOST:PORT.
    layout
        Of a JSONL file: ours, which holds everything, or the lines of sotopia's episodes_to_jsonl, which hold judged
        conversations only.
    judge
        Whose scores go into sotopia's lines, where several judges rated.
    """
    query = choice.query()
    with closing(open_store(store, create=False)) as source:
        if target.endswith(".jsonl"):
            report = export_file(source, Path(target), query, layout=layout, judge=judge)
        else:
            refuse_empty(source, query)
            with closing(open_store(target)) as into:
                report = copy(source, into, query)
    err.print(f"{target}: {report}", markup=False, soft_wrap=True)


def import_episodes(
    source: str,
    /,
    *,
    store: str = DEFAULT_STORE,
    profiles: Path | None = None,
    skip_torn_line: bool = False,
    choice: Annotated[Choice, Parameter(name="*")] = Choice(),
) -> None:
    """Copy episodes from a JSONL file (ours or sotopia's, which is found out) or from another store.

    Importing again changes nothing.

    Parameters
    ----------
    source
        FILE.jsonl, FILE.db or redis://HOST:PORT.
    store
        Where they go: FILE.db or redis://HOST:PORT.
    profiles
        Folder with the published SOTOPIA profiles: imported lines then get their whole characters and scenarios.
    skip_torn_line
        Leave out a half-written last line of a file, with a warning, instead of refusing it.
    """
    from sotopia_rl.profiles import load_profiles
    from sotopia_rl.store.sotopia_read import NOTHING_KNOWN

    query = choice.query()
    is_file = source.endswith(".jsonl")
    if is_file and choice != Choice():
        raise DataError("a file is imported whole; choose among its episodes when they are exported or used")
    with closing(open_store(store)) as into:
        if is_file:
            known = NOTHING_KNOWN if profiles is None else load_profiles(profiles)
            report = import_file(Path(source), into, known=known, torn="skip" if skip_torn_line else "refuse")
        else:
            with closing(open_store(source, create=False)) as other:
                refuse_empty(other, query)
                report = copy(other, into, query)
    err.print(f"{store}: {report}", markup=False, soft_wrap=True)
