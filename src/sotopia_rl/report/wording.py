"""The numbers as sentences: what a reader should take away, with its uncertainty, and nothing more."""

from __future__ import annotations

from sotopia_rl.results import METRICS, SETTINGS, Decomposition, Effect, Results, Row, Setting

PLAYED: dict[Setting, str] = {"sampled": "when both sample", "greedy": "when both play greedily"}


def label(metric: str) -> str:
    """A metric's name for people."""
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ").capitalize()


def signed(value: float, digits: int = 2) -> str:
    """`+0.31`, with a true minus sign."""
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def plain(value: float, digits: int = 2) -> str:
    """`3.10`, with a true minus sign and no negative zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None) -> str:
    """`[0.12, 0.50]`, or that there is none."""
    return "[no interval]" if low is None or high is None else f"[{plain(low)}, {plain(high)}]"


def p_text(value: float) -> str:
    """A p-value, never as zero."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def effect(value: float, low: float | None, high: float | None) -> str:
    """`+0.31 [0.12, 0.50]`."""
    return f"{signed(value)} {interval(low, high)}"


def is_clear(effect: Row | Effect) -> bool:
    """Whether the interval leaves out zero."""
    return effect.low is not None and effect.high is not None and (effect.low > 0 or effect.high < 0)


def headline_metric(results: Results) -> str:
    """Goal where there is one, else overall, else the first metric."""
    present = {row.metric for row in results.rows}
    return next((m for m in ("goal", "overall") if m in present), results.rows[0].metric)


def comparisons(results: Results) -> list[tuple[str, str]]:
    """Pairs of systems in the order in which they were compared."""
    return list(dict.fromkeys((row.system_a, row.system_b) for row in results.rows))


def rows_of(results: Results, a: str, b: str, metric: str) -> dict[Setting, Row]:
    """The rows of one comparison and metric, by setting."""
    found = {row.setting: row for row in results.rows if (row.system_a, row.system_b, row.metric) == (a, b, metric)}
    return {setting: found[setting] for setting in SETTINGS if setting in found}


def headline_pair(results: Results) -> tuple[str, str]:
    """The comparison that leads the page: a trained variant over SFT where there is one, else the first."""
    pairs = comparisons(results)
    return next((pair for pair in pairs if pair[1] == "sft"), pairs[0])


def answer(results: Results) -> str:
    """The answer in one sentence."""
    a, b = headline_pair(results)
    metric = headline_metric(results)
    rows = list(rows_of(results, a, b, metric).values())
    clear = [row for row in rows if is_clear(row)]
    named = label(metric).lower()
    if not clear:
        first = rows[0]
        power = f"{results.config.power:.0%}"
        sizes = (
            ""
            if first.detectable is None
            else f"; a true difference of {plain(first.detectable)} would be found {power} of the time"
        )
        found = " and ".join(f"{effect(r.difference, r.low, r.high)} {PLAYED[r.setting]}" for r in rows)
        return f"No difference in {named} between {a} and {b} is shown: {found}{sizes}."
    verb = "beats" if clear[0].difference > 0 else "falls behind"
    parts = [f"{effect(r.difference, r.low, r.high)} points {PLAYED[r.setting]}" for r in clear]
    text = f"{a} {verb} {b} in {named}: {' and '.join(parts)}"
    text += "".join(
        f", but {PLAYED[r.setting]} the difference ({effect(r.difference, r.low, r.high)}) cannot be told from none"
        for r in rows
        if not is_clear(r)
    )
    return text + "."


def basis(results: Results) -> str:
    """What the answer rests on."""
    a, b = headline_pair(results)
    rows = list(rows_of(results, a, b, headline_metric(results)).values())
    pairs = ", ".join(f"{row.num_pairs} {row.setting}" for row in rows)
    level = f"{results.config.confidence:.0%}"
    return (
        f"Paired over the same matches and partners ({pairs} pairs in {rows[0].num_scenarios} scenarios), "
        f"{level} intervals clustered by scenario, judged by {results.judge}."
    )


def split_sentence(d: Decomposition) -> str:
    """How much of a gain is better play and how much less sampling noise."""
    named = label(d.metric).lower()
    total, play, noise = (effect(e.value, e.low, e.high) for e in (d.sampled_gain, d.greedy_gain, d.noise_saving))
    text = (
        f"Of the {total} points of {named} that {d.system_a} gains over {d.system_b} when both sample, "
        f"{play} remain when neither samples (better play), "
        f"and {noise} is what {d.system_a} loses less by sampling."
    )
    if d.sampled_gain.value > 0 and is_clear(d.sampled_gain) and d.greedy_gain.value > 0:
        share = min(1.0, d.greedy_gain.value / d.sampled_gain.value)
        text += f" Better play makes up about {share:.0%} of the gain."
    return text


def failure_text(failures: dict[str, int]) -> str:
    """`agent_failed: timeout 2, not judged 1`, or `none`."""
    return ", ".join(f"{cause} {count}" for cause, count in failures.items()) or "none"
