"""Whether what a folder states follows from its records: who played, which records there are, every row and value.

Rows are matched by what they are about (systems, setting, metric, …), never by their place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sotopia_rl.episode import Episode, Rating, Record, other
from sotopia_rl.evaluate.folder import Evaluation, Plan, load_evaluation, store_path
from sotopia_rl.evaluate.matrix import (
    SEATS,
    STORE,
    MatrixResults,
    boards,
    boards_left_out,
    load_matrix,
    matrix_results,
    talks_of,
)
from sotopia_rl.evaluate.whole import pooled_cells
from sotopia_rl.manifest import load_manifest
from sotopia_rl.results import Results, load_results
from sotopia_rl.store import open_store
from sotopia_rl.store.jsonl import read_records

_KEYS = ("by", "name", "system", "judge", "system_a", "system_b", "setting", "metric", "scenario_id", "source")
"""Fields that say what a row is about."""
_UNNAMED = frozenset({"rows", "meetings"})
"""Lists whose rows need no other name than what they are about."""
_SHOWN = 3
"""Of many things of one kind."""
_TOLERANCE = 1e-9
"""Relative; other processors and libraries round differently."""


def recomputed(folder: Path, plan: Plan) -> tuple[Results | MatrixResults, list[str]]:
    """What a folder claims, and all of it that its records do not give again.

    Raises:
        DataError: Something is missing or unreadable.
        EvaluationError: The records give no results.
    """
    if plan.partners:
        results = load_results(folder / "results.json")
        found = load_evaluation([folder])
        ours = found.results(config=results.config, baseline=results.rows[0].system_b if results.rows else None)
        kept = {"notes": results.notes, "seeds": results.seeds, "package_version": results.package_version}
        differing = _differing("results.json", results, ours.model_copy(update=kept))
        return results, [*_lacking(found, results), *differing]
    matrix = load_matrix(folder / "matrix.json")
    manifest = load_manifest(folder / "manifest.json")
    again = matrix_results(folder, plan, manifest, metric=matrix.metric, tie_margin=matrix.tie_margin)
    again = again.model_copy(update={"package_version": matrix.package_version})
    if unlike := list(_differing("matrix.json", matrix, again)):
        unlike = [*_lacking_talks(folder, plan, matrix), *unlike]
    return matrix, unlike


def other_players(folder: Path, plan: Plan) -> list[str]:
    """What evaluation.json says of the systems and the episodes contradict."""
    if not plan.partners:
        return _other_models(plan, _episodes(folder / STORE))
    problems = []
    for name, model in plan.systems.items():
        episodes = _episodes(store_path(folder, name))
        others = sorted({e.agents[e.match.seat].model for e in episodes} - {model})
        if others:
            problems.append(
                f"evaluation.json: states that {name} is {model}, its episodes were played by {', '.join(others)}"
            )
            continue
        if unlike := [e for e in episodes if not _as_planned(e, plan, model)]:
            problems.append(
                f"evaluation.json: {len(unlike)} of {len(episodes)} episodes of {name} were played with another "
                f"temperature, length or prompt than it states; first: {unlike[0].id}"
            )
    return problems


def _as_planned(episode: Episode, plan: Plan, model: str) -> bool:
    own, partner = episode.agents[episode.match.seat], episode.agents[other(episode.match.seat)]
    return (
        own in plan.specs(model)
        and partner == plan.spec(partner.model)
        and episode.prompt_profile == plan.simulate.prompt_profile
    )


def _other_models(plan: Plan, episodes: Sequence[Episode]) -> list[str]:
    played, stated = {agent.model for e in episodes for agent in e.agents}, set(plan.systems.values())
    if not episodes or played == stated:
        return []
    one, two = ", ".join(sorted(stated)), ", ".join(sorted(played))
    return [f"evaluation.json: states the systems {one}, its episodes were played by {two}"]


def _episodes(path: Path) -> list[Episode]:
    if not path.is_file():
        return []
    with closing(open_store(path, create=False)) as store:
        return list(store.episodes())


def repeated_records(path: Path, name: str) -> list[str]:
    """Episodes and ratings that stand more than once in a file of records, which an import would merge."""
    counts: Counter[str] = Counter()
    for _, record in read_records(path):
        if isinstance(record, Episode):
            counts[f"episode {record.id}"] += 1
        elif isinstance(record, Rating):
            counts[f"rating of {record.episode_id} by {record.judge}"] += 1
    return [f"{name}: {what} stands in it {count} times" for what, count in counts.items() if count > 1]


def _lacking(found: Evaluation, results: Results) -> Iterator[str]:
    """Pairs without a score that the results do not count as such: their records are missing or are others."""
    cells = pooled_cells(found.panel, found.plan.partners)
    for stated in results.systems:
        file = f"episodes/{stated.system}.jsonl"
        cell = cells.get((stated.system, stated.setting))
        if cell is None:
            yield f"{file}: no {stated.setting} episode in it, results.json states {stated.scored} with a score"
            continue
        by_cause: dict[str, list[str]] = {}
        for (match, partner), cause in sorted(cell.failed.items()):
            by_cause.setdefault(cause, []).append(f"match {match} against {partner}")
        yield from _uncounted(f"{file}: {stated.setting}", by_cause, "results.json", stated.failures)


def _lacking_talks(folder: Path, plan: Plan, matrix: MatrixResults) -> Iterator[str]:
    """Conversations without a score that their meeting does not count as such."""
    manifest = load_manifest(folder / "manifest.json")
    talks, played = talks_of(folder, plan, manifest), boards(manifest)
    for meeting in matrix.meetings:
        a, b = meeting.system_a, meeting.system_b
        if not {a, b} <= plan.systems.keys():
            continue  # a row that the episodes do not give
        by_cause: dict[str, list[str]] = {}
        for board, cause in boards_left_out(a, b, played, talks).items():
            lacking = [first for first, second in ((a, b), (b, a)) if talks[board, first, second].cause]
            by_cause.setdefault(cause, []).append(f"match {board} with {' and '.join(lacking)} in the first seat")
        stated = {cause: count // len(SEATS) for cause, count in meeting.left_out.items()}
        yield from _uncounted(f"episodes/matrix.jsonl: {a} - {b}", by_cause, "matrix.json", stated)


def _uncounted(
    where: str, by_cause: Mapping[str, Sequence[str]], claim: str, stated: Mapping[str, int]
) -> Iterator[str]:
    """Causes that are there more often than is stated, with what lacks its score for them."""
    for cause, names in by_cause.items():
        if len(names) > (count := stated.get(cause, 0)):
            yield f"{where}, {cause}: {len(names)}, {claim} states {count}: {_listed(names)}"


def _differing(file: str, stated: Record, ours: Record) -> Iterator[str]:
    """What two records do not share: rows that one of them lacks or has twice, then values."""
    before, after = stated.model_dump(mode="json"), ours.model_dump(mode="json")
    values: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    for name in before:
        if not (_is_table(before[name]) or _is_table(after[name])):
            values.append(("", {name: before[name]}, {name: after[name]}))
            continue
        old, new = _by_key(before[name]), _by_key(after[name])
        if missing := [key for key in new if key not in old]:
            yield f"{file}: {name}: {len(missing)} missing that the episodes give: {_listed(missing)}"
        if extra := [key for key in old if key not in new]:
            yield f"{file}: {name}: {len(extra)} that the episodes do not give: {_listed(extra)}"
        if twice := [key for key, count in Counter(map(_key, before[name])).items() if count > 1]:
            yield f"{file}: {name}: {len(twice)} more than once: {_listed(twice)}"
        label = "" if name in _UNNAMED else f"{name}, "
        values += [(f"{label}{key}.", old[key], new[key]) for key in old if key in new]
    for label, one, two in values:
        left, right = dict(_leaves(one)), dict(_leaves(two))
        for place in sorted(left.keys() | right.keys()):
            if not _equal(left.get(place), right.get(place)):
                yield f"{file}: {label}{place} {_contrasted(left.get(place), right.get(place))}"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _by_key(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {_key(row): row for row in rows}


def _key(row: Mapping[str, Any]) -> str:
    """What a row is about, for people: `fair - tough, sampled, goal`."""
    told = [str(row[name]) for name in _KEYS if name in row and not name.startswith("system_")]
    if "system_a" in row:
        told.insert(0, f"{row['system_a']} - {row['system_b']}")
    if "row" in row:
        told.append(_key(row["row"]))
    return ", ".join(told)


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its place: rows by what they are about, and a list of other things as one value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{name}" if place else str(name))
    elif _is_table(value):
        yield f"{place}.length", len(value)
        for key, row in _by_key(value).items():
            yield from _leaves(row, f"{place}[{key}]")
    else:
        yield place, value


def _contrasted(stated: Any, given: Any) -> str:
    """`states 3, the episodes give 4`; of lists of pairs how many they have, or how many differ."""
    if not (isinstance(stated, list) and isinstance(given, list) and isinstance((stated or given)[0], list)):
        return f"states {stated}, the episodes give {given}"
    if len(stated) != len(given):
        return f"states {len(stated)} entries, the episodes give {len(given)}"
    count = sum(not _equal(a, b) for a, b in zip(stated, given, strict=True))
    return f"states {count} of {len(given)} entries that the episodes do not give"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b)):
        return bool(abs(a - b) <= _TOLERANCE * max(1.0, abs(a), abs(b)))
    return bool(a == b)


def _listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more


def count_values(value: Any) -> int:
    """Values that are no container."""
    if isinstance(value, Mapping):
        return sum(map(count_values, value.values()))
    return sum(map(count_values, value)) if isinstance(value, list) else 1
