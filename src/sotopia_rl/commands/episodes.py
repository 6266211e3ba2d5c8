"""`episodes list|show|export|import|delete`: what is in a store, to read, and its way in and out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile
from pydantic import Field
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from sotopia_rl import stages
from sotopia_rl.commands.options import DEFAULT_STORE
from sotopia_rl.console import err, out, show_episode, status_style
from sotopia_rl.episode import EpisodeStatus
from sotopia_rl.errors import ConfigError, DataError
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
from sotopia_rl.store.interface import episode_of
from sotopia_rl.store.jsonl import StageFailure
from sotopia_rl.store.transfer import Layout

TERMINAL_LINES = 50


@dataclass(frozen=True)
class Counts:
    """By episode id."""

    ratings: Counter[str]
    failures: Counter[str]


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
    limit: Annotated[int | None, Field(ge=0)] = None,
    counts: bool = False,
    choice: Annotated[Choice, Parameter(name="*")] = Choice(),
) -> None:
    """One line per episode, by id; on a pipe all fields with tabs between them.

    On a terminal at most 50, unless --limit says otherwise, and of each id as much as `episodes show` needs.

    Parameters
    ----------
    store
        Episode store: FILE.db, FILE.jsonl or redis://HOST:PORT.
    limit
        At most so many.
    counts
        Also how many ratings each has, and how many judgements and attributions of it failed.
    """
    shown = limit if limit is not None or not out.is_terminal else TERMINAL_LINES
    with closing(open_store(store, create=False)) as episodes:
        query = choice.query(shown)
        _print(episodes, episodes.summaries(query), _counts(episodes) if counts else None)
        err.print(_total(episodes, query), markup=False, soft_wrap=True)


def _counts(store: EpisodeStore) -> Counts:
    ratings = Counter(episode_id for judge in store.judges() for episode_id in store.rated_ids(judge))
    return Counts(ratings, Counter(episode_of(item_id) for _, item_id, _ in store.failures()))


def _print(store: EpisodeStore, summaries: Iterable[EpisodeSummary], counts: Counts | None = None) -> None:
    if out.is_terminal:
        for line in terminal_lines(list(summaries), _telling_length(store.ids()), out.width, counts):
            out.print(line)
        return
    for s in summaries:
        cause = s.failure_kind or ""
        more = (counts.ratings[s.id], counts.failures[s.id]) if counts else ()
        print(s.id, s.status, cause, s.num_turns, s.codename or s.scenario_id, *s.models, s.tag, *more, sep="\t")  # noqa: T201


def _telling_length(ids: Iterable[str], least: int = 8) -> int:
    """How many first characters tell all ids apart."""
    upper = {i.upper() for i in ids}
    return next(length for length in count(least) if len({i[:length] for i in upper}) == len(upper))


def terminal_lines(
    summaries: Sequence[EpisodeSummary], id_length: int, width: int, counts: Counts | None = None
) -> Iterator[RenderableType]:
    """A line per episode; two or more where one of them needs more than `width` columns."""
    heads, rests = [], []
    for s in summaries:
        how = f"{s.failure_kind or s.status:<12}"
        turns = (f" {s.num_turns:>3} turns  ", "dim")
        said = f"  {counts.ratings[s.id]} ratings, {counts.failures[s.id]} failed" if counts else ""
        heads.append(Text.assemble((s.id[:id_length], "dim"), (f" {how}", status_style(s.status)), turns, s.tag))
        rests.append(Text.assemble(f"{s.codename or s.scenario_id}  ", (" / ".join(s.models), "dim"), said))
    fits = all(head.cell_len + 2 + rest.cell_len <= width for head, rest in zip(heads, rests, strict=True))
    for head, rest in zip(heads, rests, strict=True):
        if fits:
            yield Text.assemble(head, "  ", rest)
        else:
            yield head
            yield Padding(rest, (0, 0, 0, id_length + 1), expand=False)


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
        out.print(show_episode(found, list(episodes.ratings(found.id)), earned, _failures(episodes, found.id)))


def _failures(store: EpisodeStore, episode_id: str) -> list[StageFailure]:
    """What a judge or an annotator gave no answer to."""
    failures = store.failures()
    return [StageFailure(stage=s, item_id=i, failure=f) for s, i, f in failures if episode_of(i) == episode_id]


def _the_id(store: EpisodeStore, start: str) -> str:
    """The id that is so, or the one that starts so.

    Raises:
        DataError: There is none, or there are several.
    """
    ids = store.ids()
    if start in ids:
        return start
    found = [i for i in ids if i.upper().startswith(start.upper())]
    if len(found) != 1:
        several = f"{len(found)} episodes' ids start with {start!r}; give more of it"
        none = f"no episode's id starts with {start!r}; sotopia-rl episodes list shows them"
        raise DataError(several if found else none)
    return found[0]


def delete_episodes(
    *ids: str,
    store: str = DEFAULT_STORE,
    yes: bool = False,
    choice: Annotated[Choice, Parameter(name="*")] = Choice(),
) -> None:
    """Remove episodes with their ratings, attributions and failures: those that are named, or those of a choice.

    Parameters
    ----------
    ids
        Their ids, or the first characters of each.
    store
        Episode store: FILE.db, FILE.jsonl or redis://HOST:PORT.
    yes
        Do it; without, the episodes are only listed.
    """
    if bool(ids) == (choice != Choice()):
        raise ConfigError("say which episodes go: their ids, or a choice such as --tag NAME")
    with closing(open_store(store, create=False)) as episodes:
        query = choice.query()
        refuse_empty(episodes, query)
        meant = {_the_id(episodes, start) for start in ids} or set(episodes.ids(query))
        if not yes:
            listed = (s for s in episodes.summaries(query) if s.id in meant)
            _print(episodes, islice(listed, TERMINAL_LINES if out.is_terminal else None))
            raise DataError(f"nothing is deleted yet; add --yes to delete {len(meant)} episodes for good")
        deleted = episodes.delete_episodes(sorted(meant))
    err.print(f"{store}: {deleted} episodes deleted, with all that was said of them", markup=False, soft_wrap=True)


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
