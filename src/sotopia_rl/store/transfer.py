"""Import and export: from any store to any other, and to and from files in our form or in SOTOPIA's.

Files are written beside their place and moved there when whole, so that an export is never half a file.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from sotopia_rl.episode import Attribution, Episode, Rating
from sotopia_rl.errors import DataError, StoreError
from sotopia_rl.files import not_written, written_whole
from sotopia_rl.profiles import Profiles
from sotopia_rl.store.interface import (
    EVERYTHING,
    EpisodeQuery,
    EpisodeStore,
    Original,
    episode_of,
    refuse_empty,
    with_counts,
)
from sotopia_rl.store.jsonl import Deletion, JsonlWriter, StageFailure, Torn, read_json_lines, read_records
from sotopia_rl.store.records import batches
from sotopia_rl.store.sotopia_read import NOTHING_KNOWN, Imported, LeftOutError, is_line, read_document
from sotopia_rl.store.sotopia_write import line_document

logger = logging.getLogger(__name__)

Layout = Literal["sotopia-rl", "sotopia"]
"""Our own lines, which hold everything; or those of sotopia's `episodes_to_jsonl`."""

T = TypeVar("T")


@dataclass
class TransferReport:
    """What was moved, and what could not be, by cause."""

    episodes: int = 0
    ratings: int = 0
    attributions: int = 0
    failures: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """What the other side cannot represent, by cause."""
    notes: Counter[str] = field(default_factory=Counter)
    """What imported episodes lacked, by kind."""

    def __str__(self) -> str:
        moved = f"{self.episodes} episodes, {self.ratings} ratings, {self.attributions} attributions"
        moved += f", {self.failures} failures" if self.failures else ""
        notes = "; ".join(f"{count} {note}" for note, count in sorted(self.notes.items()))
        return moved + (f". Left out: {self.causes}" if self.left_out else "") + (f". Note: {notes}" if notes else "")

    @property
    def causes(self) -> str:
        """Why something was left out."""
        return "; ".join(f"{count} {cause}" for cause, count in sorted(self.left_out.items()))


@dataclass(frozen=True)
class _Whole:
    """An episode with all that is said of it."""

    episode: Episode
    ratings: tuple[Rating, ...]
    attributions: tuple[Attribution, ...]
    original: Original | None


def _wholes(source: EpisodeStore, query: EpisodeQuery) -> Iterator[_Whole]:
    for episode in source.episodes(query):
        ratings, attributions = source.ratings(episode.id), source.attributions(episode.id)
        yield _Whole(episode, tuple(ratings), tuple(attributions), source.original(episode.id))


def _failures(source: EpisodeStore, query: EpisodeQuery) -> Iterator[StageFailure]:
    """All of them with a whole store; with a choice of episodes, only theirs."""
    chosen = None if query == EVERYTHING else set(source.ids(query))
    for stage, item_id, failure in source.failures():
        if chosen is None or episode_of(item_id) in chosen:
            yield StageFailure(stage=stage, item_id=item_id, failure=failure)


def copy(source: EpisodeStore, target: EpisodeStore, query: EpisodeQuery = EVERYTHING) -> TransferReport:
    """Copy episodes with their ratings, attributions, failures and originals. Copying again changes nothing."""
    report = TransferReport()
    for batch in batches(_wholes(source, query)):
        report.episodes += target.add_episodes(whole.episode for whole in batch)
        for whole in batch:
            if whole.original:
                target.add_original(whole.original)
        report.ratings += target.add_ratings(rating for whole in batch for rating in whole.ratings)
        report.attributions += target.add_attributions(a for whole in batch for a in whole.attributions)
    for entry in _failures(source, query):
        target.add_failure(entry.stage, entry.item_id, entry.failure)
        report.failures += 1
    return report


def export_jsonl(source: EpisodeStore, path: Path, query: EpisodeQuery = EVERYTHING) -> TransferReport:
    """Write a file in our form, ordered by episode id, each episode followed by what is said of it.

    Raises:
        StoreError: The file cannot be written; an older one in its place is kept.
    """
    report = TransferReport()
    with _exported(path) as part, JsonlWriter(part, start=True) as writer:
        for whole in _wholes(source, query):
            original = (whole.original,) if whole.original else ()
            for record in (whole.episode, *original, *whole.ratings, *whole.attributions):
                writer.write(record)
            report.episodes += 1
            report.ratings += len(whole.ratings)
            report.attributions += len(whole.attributions)
        for entry in _failures(source, query):
            writer.write(entry)
            report.failures += 1
    return report


def import_jsonl(path: Path, target: EpisodeStore, *, torn: Torn = "refuse") -> TransferReport:
    """Read a file in our form into a store.

    Raises:
        DataError: A line is no record of ours; what came before it has been imported.
    """
    report = TransferReport()
    for batch in batches(record for _, record in read_records(path, torn=torn)):
        for cls, records in _runs(batch):
            if cls is Episode:
                report.episodes += target.add_episodes(r for r in records if isinstance(r, Episode))
            elif cls is Rating:
                report.ratings += target.add_ratings(r for r in records if isinstance(r, Rating))
            elif cls is Attribution:
                report.attributions += target.add_attributions(r for r in records if isinstance(r, Attribution))
            else:
                report.failures += sum(_import_other(target, record) for record in records)
    return report


def _import_other(target: EpisodeStore, record: object) -> bool:
    """Whether it is a failure."""
    match record:
        case StageFailure():
            target.add_failure(record.stage, record.item_id, record.failure)
            return True
        case Original():
            target.add_original(record)
        case Deletion(what="episode"):
            target.delete_episodes(record.key)
        case Deletion():
            target.delete_failures(record.key[0], record.key[1:])
    return False


def export_sotopia(
    source: EpisodeStore, path: Path, query: EpisodeQuery = EVERYTHING, *, judge: str | None = None
) -> TransferReport:
    """Write the lines of sotopia's `episodes_to_jsonl`: judged episodes with one judge's scores, nothing else.

    Args:
        judge: Whose scores, where an episode has those of several.

    Raises:
        DataError: The judge has rated nothing, or no episode has a place in that form; an older file is kept.
        StoreError: The file cannot be written; an older one in its place is kept.
    """
    if judge is not None and judge not in (judges := source.judges()):
        raise DataError(f"no episode was rated by {judge!r}; judges in this store: {with_counts(judges)}")
    report = TransferReport()
    with _exported(path) as part, part.open("w", encoding="utf-8") as file:
        for whole in _wholes(source, query):
            line = _sotopia_line(whole, judge, report)
            if line:
                file.write(line + "\n")
        if not report.episodes:
            raise DataError(f"{path}: not written, as sotopia's lines have no place for any episode: {report.causes}")
    return report


def _sotopia_line(whole: _Whole, judge: str | None, report: TransferReport) -> str | None:
    try:
        rating = chosen_rating(whole.episode.id, whole.ratings, judge)
        line = json.dumps(line_document(whole.episode, rating, whole.original))
    except LeftOutError as error:
        report.left_out[error.cause] += 1
        return None
    report.episodes += 1
    report.ratings += rating is not None
    others = len(whole.ratings) - (rating is not None)
    report.left_out += Counter({"ratings of other judges": others, "attributions": len(whole.attributions)})
    return line


def chosen_rating(episode_id: str, ratings: Iterable[Rating], judge: str | None) -> Rating | None:
    """The one rating that SOTOPIA's layout has room for.

    Raises:
        LeftOutError: There are several, and no judge is named.
    """
    found = [rating for rating in ratings if judge in (None, rating.judge)]
    if len(found) > 1:
        raise LeftOutError(episode_id, "rated by several judges, and none was chosen")
    return found[0] if found else None


def import_sotopia(
    path: Path, target: EpisodeStore, *, known: Profiles = NOTHING_KNOWN, torn: Torn = "refuse"
) -> TransferReport:
    """Read the lines of sotopia's `episodes_to_jsonl` into a store, each with its original beside it.

    Args:
        known: Whole characters and scenarios by id; without them, what the lines say of them.

    Raises:
        DataError: A line is not JSON, or no episode; what came before it has been imported.
    """
    report = TransferReport()
    imported = _read_sotopia(path, report, known=known, torn=torn)
    for batch in batches(imported):
        add_imported(batch, target, report)
    return report


def add_imported(batch: Iterable[Imported], target: EpisodeStore, report: TransferReport) -> None:
    """Store what was read from foreign records, and count it."""
    items = list(batch)
    report.episodes += target.add_episodes(item.episode for item in items)
    for item in items:
        target.add_original(item.original)
        report.notes.update(item.notes)
    report.ratings += target.add_ratings(item.rating for item in items if item.rating)


def _read_sotopia(path: Path, report: TransferReport, *, known: Profiles, torn: Torn) -> Iterator[Imported]:
    for line in read_json_lines(path, torn=torn):
        where = f"{path}:{line.number}"
        try:
            yield read_document(line.data, where=where, known=known)
        except LeftOutError as error:
            logger.warning("%s: left out: %s", where, error)
            report.left_out[error.cause] += 1


def layout_of(path: Path) -> Layout:
    """In which form a file of episodes is.

    Raises:
        DataError: It is empty, or in neither form.
    """
    first = next(read_json_lines(path, torn="skip"), None)
    if first is None:
        raise DataError(f"{path}: empty; there is nothing to import")
    if first.data.get("kind") == "header":
        return "sotopia-rl"
    if is_line(first.data):
        return "sotopia"
    raise DataError(f"{path}:1: neither a sotopia-rl file nor lines of sotopia's episodes_to_jsonl")


def import_file(
    path: Path, target: EpisodeStore, *, known: Profiles = NOTHING_KNOWN, torn: Torn = "refuse"
) -> TransferReport:
    """`import_jsonl` or `import_sotopia`, as the file requires."""
    if layout_of(path) == "sotopia":
        return import_sotopia(path, target, known=known, torn=torn)
    return import_jsonl(path, target, torn=torn)


def export_file(
    source: EpisodeStore,
    path: Path,
    query: EpisodeQuery = EVERYTHING,
    *,
    layout: Layout = "sotopia-rl",
    judge: str | None = None,
) -> TransferReport:
    """`export_jsonl` or `export_sotopia`.

    Raises:
        DataError: No episode is meant; an older file in its place is kept.
    """
    refuse_empty(source, query)
    if layout == "sotopia":
        return export_sotopia(source, path, query, judge=judge)
    return export_jsonl(source, path, query)


@contextmanager
def _exported(path: Path) -> Iterator[Path]:
    """`written_whole`, in a folder that is made, with errors that say what to do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            yield part
    except OSError as error:
        raise StoreError(not_written(path, error)) from error


def _runs(records: list[T]) -> Iterator[tuple[type[T], list[T]]]:
    """Neighbours of one type together, in order: a deletion must not overtake what it deletes."""
    run: list[T] = []
    for record in records:
        if run and type(record) is not type(run[0]):
            yield type(run[0]), run
            run = []
        run.append(record)
    if run:
        yield type(run[0]), run
