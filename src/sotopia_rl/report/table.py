"""The comparison as a table for the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from sotopia_rl.report.wording import interval, is_clear, label, p_text, plain, signed
from sotopia_rl.results import Results

SHOWN = ("goal", "relationship", "knowledge", "overall", "secret_leaks", "words_per_utterance")


def results_table(results: Results, *, metrics: tuple[str, ...] = SHOWN) -> Table:
    """One line per comparison, setting and metric; differences whose interval leaves out zero are bold."""
    title = f"{results.manifest}: {results.num_matches} matches, judged by {results.judge}"
    table = Table(title=escape(title), title_justify="left")
    for name in ("comparison", "setting", "metric"):
        table.add_column(name)
    for name in ("pairs", "mean A", "mean B", "A - B", f"{results.config.confidence:.0%} interval", "p (Holm)"):
        table.add_column(name, justify="right", no_wrap=True)
    before: tuple[str, str, str] | None = None
    for row in results.rows:
        if row.metric not in metrics:
            continue
        group = (row.system_a, row.system_b, row.setting)
        if before is not None and group != before:
            table.add_section()
        names = (f"{row.system_a} - {row.system_b}", row.setting) if group != before else ("", "")
        before = group
        table.add_row(
            *(escape(name) for name in names),
            escape(label(row.metric)),
            f"{row.num_pairs}" + (f" (-{row.num_excluded})" if row.num_excluded else ""),
            plain(row.mean_a),
            plain(row.mean_b),
            signed(row.difference),
            escape(interval(row.low, row.high)),
            p_text(row.p_holm),
            style="bold" if is_clear(row) else "",
        )
    return table
