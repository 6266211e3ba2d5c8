"""Conversations that show what a difference is made of: the largest wins and losses of one system over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sotopia_rl.episode import Episode, Rating
from sotopia_rl.evaluate.cells import PairKey, Played, cell_of, key_of, pooled, setting_of
from sotopia_rl.evaluate.whole import Panel
from sotopia_rl.results import Results, Setting


@dataclass(frozen=True)
class Contrast:
    """One match against one partner, as both systems played it. The ratings are the first judge's."""

    system_a: str
    system_b: str
    metric: str
    setting: Setting
    score_a: float
    score_b: float
    """Of the whole panel."""
    a: tuple[Episode, Rating]
    b: tuple[Episode, Rating]

    @property
    def difference(self) -> float:
        return self.score_a - self.score_b


def contrasts(panel: Panel, results: Results, a: str, b: str, metric: str, *, count: int = 3) -> list[Contrast]:
    """At most `count` of A's largest wins over B, then at most `count` of its largest losses.

    Greedy conversations where both played greedily, since those show the policies without their sampling noise.
    """
    settings = {row.setting for row in results.rows if (row.system_a, row.system_b) == (a, b)}
    setting: Setting = "greedy" if "greedy" in settings else "sampled"
    scores = []
    for name in (a, b):
        cells = [
            cell
            for judge, played in panel.items()
            if (cell := cell_of(_named(played, name), setting, results.partners, judge)) is not None
        ]
        scores.append({k: m[metric] for k, m in pooled(cells).scored.items() if metric in m})
    of_a, of_b = scores
    ranked = sorted(of_a.keys() & of_b.keys(), key=lambda key: (of_b[key] - of_a[key], key))
    wins = [key for key in ranked[:count] if of_a[key] > of_b[key]]
    losses = [key for key in reversed(ranked[-count:]) if of_a[key] < of_b[key]]
    first = next(iter(panel.values()))
    talks = [_talks(_named(first, name), setting) for name in (a, b)]
    return [Contrast(a, b, metric, setting, of_a[k], of_b[k], talks[0][k], talks[1][k]) for k in (*wins, *losses)]


def contrasts_of_each(
    panel: Panel, results: Results, pairs: Sequence[tuple[str, str]], metric: str, *, most: int = 24
) -> list[Contrast]:
    """The contrasts of every comparison, about `most` in all: the more comparisons, the fewer of each.

    Beyond `most` / 2 comparisons the last ones show none.
    """
    shown = pairs[: most // 2]
    count = min(3, most // (2 * max(1, len(shown))))
    return [c for a, b in shown for c in contrasts(panel, results, a, b, metric, count=count)]


def _named(played: Sequence[Played], name: str) -> Played:
    return next(p for p in played if p.system == name)


def _talks(p: Played, setting: Setting) -> Mapping[PairKey, tuple[Episode, Rating]]:
    return {key_of(e): (e, p.ratings[e.id]) for e in p.episodes if e.id in p.ratings and setting_of(e) == setting}
