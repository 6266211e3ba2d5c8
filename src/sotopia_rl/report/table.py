"""The comparison as a table for the terminal, narrow enough for 80 columns."""

from __future__ import annotations

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sotopia_rl.report.wording import interval, is_clear, label, p_text, plain, signed
from sotopia_rl.results import Results, Row

SHOWN = ("goal", "relationship", "knowledge", "overall", "secret_leaks", "words_per_utterance")


def results_table(results: Results, *, metrics: tuple[str, ...] = SHOWN) -> Table:
    """One section per comparison and setting; differences whose interval leaves out zero are bold."""
    title = f"{results.manifest}: {results.num_matches} matches, judged by {results.judge}"
    caption = "A - B with its interval, clustered by scenario; p of a permutation test, adjusted (Holm)"
    table = Table(title=escape(title), caption=caption, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("")
    for name in ("pairs", "A", "B", "A - B", f"{results.config.confidence:.0%}", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = [row for row in results.rows if row.metric in metrics]
    for (a, b, setting), rows in groupby(shown, key=lambda row: (row.system_a, row.system_b, row.setting)):
        listed = list(rows)
        left_out = f"\n  {listed[0].num_excluded} left out" if listed[0].num_excluded else ""
        table.add_row(escape(f"{a} - {b}, {setting}{left_out}"), style="bold cyan")
        for row in listed:
            table.add_row(*_cells(row), style="bold" if is_clear(row) else "", end_section=row is listed[-1])
    for u in results.unpaired:
        title = f"{u.system_a} - {u.system_b}, {u.setting}\n  no pair, {u.num_excluded} left out"
        table.add_row(escape(title), style="bold cyan", end_section=True)
    return table


def _cells(row: Row) -> list[str]:
    return [
        f"  {escape(label(row.metric))}",
        str(row.num_pairs),
        plain(row.mean_a),
        plain(row.mean_b),
        signed(row.difference),
        escape(interval(row.low, row.high)),
        p_text(row.p_holm),
    ]
