"""The numbers as sentences: what a reader should take away, with its uncertainty, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence

from sotopia_rl.results import HEADLINE, METRICS, SETTINGS, Decomposition, Effect, Results, Row, Setting, Unpaired

PLAYED: dict[Setting, str] = {"sampled": "when both sample", "greedy": "when both play greedily"}

NOT_STATED = "not stated where read"
"""Of a published figure: what the place where it was read leaves out."""


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


def short(value: float) -> str:
    """`7`, `7.5`, with a true minus sign."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None) -> str:
    """`[0.12, 0.50]`; or that there is none, or that the pairs do not differ among themselves."""
    if low is None or high is None:
        return "[no interval]"
    return "[all equal]" if low == high else f"[{plain(low)}, {plain(high)}]"


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
    return next((m for m in HEADLINE if m in present), results.rows[0].metric)


def comparisons(results: Results) -> list[tuple[str, str]]:
    """Pairs of systems in the order in which they were compared; those without a pair of episodes last."""
    answered = [(row.system_a, row.system_b) for row in results.rows]
    return list(dict.fromkeys([*answered, *((u.system_a, u.system_b) for u in results.unpaired)]))


def rows_of(results: Results, a: str, b: str, metric: str) -> dict[Setting, Row]:
    """The rows of one comparison and metric, by setting."""
    found = {row.setting: row for row in results.rows if (row.system_a, row.system_b, row.metric) == (a, b, metric)}
    return {setting: found[setting] for setting in SETTINGS if setting in found}


def unpaired_of(results: Results, a: str, b: str) -> list[Unpaired]:
    """The settings in which a comparison has no pair."""
    return [u for u in results.unpaired if (u.system_a, u.system_b) == (a, b)]


def headline_pair(results: Results) -> tuple[str, str]:
    """The comparison that leads the page: a trained variant over SFT where there is one, else the first."""
    pairs = comparisons(results)
    answered = {(row.system_a, row.system_b) for row in results.rows}
    return next((pair for pair in pairs if pair[1] == "sft" and pair in answered), pairs[0])


def answers(results: Results) -> list[str]:
    """One sentence per comparison, the leading one first."""
    first = headline_pair(results)
    return [_sentence(results, *pair) for pair in (first, *(p for p in comparisons(results) if p != first))]


def _sentence(results: Results, a: str, b: str) -> str:
    metric = headline_metric(results)
    named = label(metric).lower()
    rows = list(rows_of(results, a, b, metric).values())
    lacking = "".join(f"; {PLAYED[u.setting]}, {unpaired_text(u, results)}" for u in unpaired_of(results, a, b))
    clear = [row for row in rows if is_clear(row)]
    if clear:
        doubts = "".join(f"; {_gain(row)} cannot be told from none" for row in rows if not is_clear(row))
        return f"{a} {_verb(clear)} {b} in {named}: {', and '.join(_gain(row) for row in clear)}{doubts}{lacking}."
    found = " and ".join(_gain(row) for row in rows)
    if all(row.low is None for row in rows):
        told = f"{found}{lacking}" if rows else lacking.removeprefix("; ")
        return f"Whether {a} or {b} does better in {named} cannot be told: {told}."
    return f"No difference in {named} between {a} and {b} is shown: {found}{_could_find(rows, results)}{lacking}."


def unpaired_text(u: Unpaired, results: Results) -> str:
    """That no pair has a score on both sides, and why."""
    failures = {s.system: s.failures for s in results.systems if s.setting == u.setting}
    names = (u.system_a, u.system_b)
    causes = [f"{name}: {failure_text(failures[name])}" for name in names if failures.get(name)]
    causes += [f"{name}: not played" for name in names if name not in failures]
    return f"no pair has a score on both sides, {u.num_excluded} left out ({'; '.join(causes)})"


def _gain(row: Row) -> str:
    return f"{signed(row.difference)} points {interval(row.low, row.high)} {PLAYED[row.setting]}{_left_out(row)}"


def _left_out(row: Row) -> str:
    """How many pairs lack a score, and whether they could turn the answer."""
    if not row.num_excluded:
        return ""
    text = f"{row.num_excluded} of {counted(row.num_pairs + row.num_excluded, 'pair')} left out"
    if row.worst is None or row.best is None:
        return f" ({text})"
    if is_clear(row) and min(row.worst * row.difference, row.best * row.difference) > 0:
        return f" ({text}, which cannot turn it)"
    turns = ", which could turn it" if is_clear(row) else ""
    return f" ({text}{turns}; with them anything from {signed(row.worst)} to {signed(row.best)})"


def counted(number: int, noun: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _verb(rows: Sequence[Row]) -> str:
    signs = {row.difference > 0 for row in rows}
    if len(signs) == 2:
        return "beats or falls behind, by setting,"
    return "beats" if signs == {True} else "falls behind"


def _could_find(rows: Sequence[Row], results: Results) -> str:
    sizes = [row.detectable for row in rows if row.detectable is not None]
    if not sizes:
        return ""
    return f"; a true difference of {plain(max(sizes))} would have been found {results.config.power:.0%} of the time"


def excluded_text(row: Row) -> str:
    """How many pairs were left out, and what they could have changed."""
    count = "1 pair has" if row.num_excluded == 1 else f"{row.num_excluded} pairs have"
    text = f"{PLAYED[row.setting].capitalize()}, {count} no score on one side and stay out of the means."
    if row.worst is None or row.best is None:
        return text
    return (
        f"{text} Had they gone as badly or as well for {row.system_a} as scores can, the difference in "
        f"{label(row.metric).lower()} would lie between {signed(row.worst)} and {signed(row.best)}."
    )


def basis(results: Results) -> str:
    """What the answer rests on."""
    a, b = headline_pair(results)
    pairs = pairs_text(list(rows_of(results, a, b, headline_metric(results)).values()))
    level = f"{results.config.confidence:.0%}"
    return (
        f"Paired over the same matches and partners ({pairs}), "
        f"{level} intervals clustered by scenario, judged by {results.judge}."
    )


def pairs_text(rows: Sequence[Row]) -> str:
    """`32 sampled pairs in 8 scenarios`, by setting."""
    return ", ".join(
        f"{counted(row.num_pairs, f'{row.setting} pair')} in {counted(row.num_scenarios, 'scenario')}" for row in rows
    )


def plan_text(row: Row, results: Results) -> str:
    """What a comparison of this size can find, what a wanted difference takes, and what length has to do with it."""
    named, played = label(row.metric).lower(), PLAYED[row.setting]
    parts = []
    if row.detectable is not None:
        parts.append(
            f"{played.capitalize()}, a true difference of {plain(row.detectable)} points of {named} would be found "
            f"{results.config.power:.0%} of the time"
        )
        wanted = short(results.config.wanted_points)
        if row.required_scenarios is not None:
            parts.append(
                f"to find {wanted} points so often takes {row.required_scenarios} scenarios with as many pairs in each "
                f"(here: {row.num_scenarios})"
            )
    if row.equal_length is not None:
        e = row.equal_length
        parts.append(f"at equal words per utterance the difference is {effect(e.value, e.low, e.high)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def tests_text(results: Results) -> str:
    """How often this page asks whether there is a difference, and what that does to p-values."""
    count = len(results.rows)
    return (
        f"This page tests {count} differences. Were there none at all, one in twenty plain p-values "
        f"({0.05 * count:.0f} or so) would still fall below 0.05; Holm's allow for it within a table."
    )


def alpha_text(alpha: float | None, low: float | None, high: float | None) -> str:
    """Krippendorff's alpha; undetermined where all scores are equal."""
    return "all equal" if alpha is None else f"{plain(alpha)} {interval(low, high)}"


def source_name(source: str) -> str:
    """A source of spread for people."""
    return source.replace(" x ", " \N{MULTIPLICATION SIGN} ")


def sd_text(variance: float | None, low: float | None, high: float | None) -> str:
    """A variance as a standard deviation in points; what was estimated below zero is shown as 0."""
    if variance is None:
        return "\N{EN DASH}"
    value, *ends = (None if v is None else plain(max(0.0, v) ** 0.5) for v in (variance, low, high))
    return f"{value} [{', '.join(map(str, ends))}]" if None not in ends else str(value)


def split_sentence(d: Decomposition) -> str:
    """How much of a gain is better play and how much less sampling noise."""
    named = label(d.metric).lower()
    total, play, noise = (effect(e.value, e.low, e.high) for e in (d.sampled_gain, d.greedy_gain, d.noise_saving))
    text = (
        f"Of the {total} points of {named} that {d.system_a} gains over {d.system_b} when both sample, "
        f"{play} remain when neither samples (better play), "
        f"and {noise} is what {d.system_a} loses less by sampling."
    )
    if d.sampled_gain.value > 0 and is_clear(d.sampled_gain):
        share = d.greedy_gain.value / d.sampled_gain.value
        text += " " + _share_sentence(share)
    return text


def _share_sentence(share: float) -> str:
    if share >= 1:
        return "Better play accounts for all of the gain."
    if share <= 0:
        return "None of the gain is better play."
    return f"Better play makes up about {share:.0%} of the gain."


def failure_text(failures: dict[str, int]) -> str:
    """`agent_failed: timeout 2, not judged 1`, or `none`."""
    return ", ".join(f"{cause} {count}" for cause, count in failures.items()) or "none"
