"""The page of a ranking: standings with their intervals, and who did how well against whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sotopia_rl import __version__
from sotopia_rl.evaluate.matrix import MatrixResults, Meeting, Standing
from sotopia_rl.files import write_text
from sotopia_rl.report import wording
from sotopia_rl.report.charts import Span, forest
from sotopia_rl.report.write import environment, source


@dataclass(frozen=True)
class Cell:
    """The row's system against the column's."""

    difference: float
    low: float | None
    high: float | None
    won: int
    tied: int
    lost: int
    share: int
    """Percent of the full colour, by the size of the difference."""

    @property
    def clear(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def write_matrix(results: MatrixResults, out_dir: Path, *, provenance: Mapping[str, object]) -> Path:
    """Write `matrix.json`, `matrix.html` and `matrix.md`; the path of the page.

    Args:
        provenance: As of `ReportInput`.
    """
    values: dict[str, Any] = {
        "results": results,
        "w": wording,
        "answer": answer(results),
        "cells": cells(results),
        "left_out": left_out(results),
        "provenance": provenance,
        "version": __version__,
    }
    reach = _reach(results.standings)
    marks = {s.system: _mark(s, reach, ticks=s is results.standings[-1]) for s in results.standings}
    page = environment(html=True).get_template("matrix.html.jinja")
    css = Markup(source("page.css"))  # noqa: S704  our own file
    write_text(out_dir / "matrix.html", page.render(**values, css=css, marks=marks))
    write_text(out_dir / "matrix.md", environment(html=False).get_template("matrix.md.jinja").render(**values))
    write_text(out_dir / "matrix.json", results.model_dump_json(indent=1) + "\n")
    return out_dir / "matrix.html"


def answer(results: MatrixResults) -> str:
    """The ranking in one sentence: the leader, and whether its lead can be told from none."""
    first, second = results.standings[0], results.standings[1]
    named = wording.label(results.metric).lower()
    meeting = next((m for m in results.meetings if {m.system_a, m.system_b} == {first.system, second.system}), None)
    if meeting is None:
        return f"{first.system} leads in {named}; it did not meet {second.system}, the second, itself."
    d = meeting.difference
    sign = 1 if meeting.system_a == first.system else -1
    ends = sorted(sign * end for end in (d.low, d.high) if end is not None)
    low, high = (ends[0], ends[1]) if len(ends) == 2 else (None, None)
    gap = f"{wording.signed(sign * d.value)} points {wording.interval(low, high)} against {second.system}"
    if low is not None and low > 0:
        return f"{first.system} leads in {named}: {gap}, at the same seats."
    return f"{first.system} stands first in {named}, but its lead is not shown: {gap}, at the same seats."


def cells(results: MatrixResults) -> dict[tuple[str, str], Cell]:
    """By row and column."""
    top = max((abs(m.difference.value) for m in results.meetings), default=0.0) or 1.0
    found = {}
    for m in results.meetings:
        found[m.system_a, m.system_b] = _cell(m, 1, top)
        found[m.system_b, m.system_a] = _cell(m, -1, top)
    return found


def _cell(m: Meeting, sign: int, top: float) -> Cell:
    d = m.difference
    low, high = (d.low, d.high) if sign > 0 else (_negative(d.high), _negative(d.low))
    won, lost = (m.won, m.lost) if sign > 0 else (m.lost, m.won)
    return Cell(sign * d.value, low, high, won, m.tied, lost, round(100 * abs(d.value) / top))


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def left_out(results: MatrixResults) -> list[str]:
    """One line per pair of systems that lacks comparisons."""
    return [
        f"{m.system_a} and {m.system_b}: {sum(m.left_out.values())} comparisons have no score on one side "
        f"({wording.failure_text(m.left_out)})"
        for m in results.meetings
        if m.left_out
    ]


def _reach(standings: Sequence[Standing]) -> float:
    return max(abs(end) for s in standings for end in (s.low, s.high, s.strength) if end is not None) * 1.06 or 1.0


def _mark(s: Standing, reach: float, *, ticks: bool) -> Markup:
    text = f"{s.system}: {wording.effect(s.strength, s.low, s.high)}"
    return forest([Span(s.strength, s.low, s.high, "sampled clear", text)], reach=reach, ticks=ticks)


def matrix_table(results: MatrixResults) -> Table:
    """The standings for the terminal."""
    title = f"{results.manifest}: {results.num_boards} boards, judged by {', '.join(results.judges)}"
    caption = "strength: log-odds of the higher score at the same seat, against the average (Bradley-Terry, ties half)"
    table = Table(title=escape(title), caption=caption, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("")
    for name in ("strength", "95%", "won", "tied", "lost", wording.label(results.metric), "both"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in results.standings:
        numbers = (wording.signed(s.strength), escape(wording.interval(s.low, s.high)), s.won, s.tied, s.lost)
        means = wording.plain(s.mean), wording.plain(s.mean_of_both)
        table.add_row(escape(s.system), *map(str, numbers), *means)
    return table
