"""Which of two systems does better, over the same matches against the same partners, pair by pair.

A manifest freezes what is played. A pair is one match against one partner in one setting (sampled or greedy), played
by both systems. Whatever has no score on one side is left out of the means, counted by cause, and bounded: it never
becomes a zero. The arithmetic is in `statistics.py` and `variance.py`, the page in `report/`.

    cells.py    pairs and their metrics       whole.py     checks, then everything of `results.json`
    paired.py   comparisons                   noise.py     judges and partners as sources of spread
    folder.py   the folder of an evaluation   play.py      plays and judges what it lacks
    matrix.py   every pair, ranked            contrast.py  conversations that show a difference
    bundle.py   results to pass on            claims.py    whether they follow from the episodes
"""

from sotopia_rl.evaluate.cells import Played, metrics_of, pooled, setting_of
from sotopia_rl.evaluate.paired import compare, decompose
from sotopia_rl.evaluate.whole import Panel, evaluate, evaluate_panel
from sotopia_rl.manifest import Manifest, evaluation_pairings, load_manifest
from sotopia_rl.results import EvaluateConfig, Results, load_results

__all__ = [
    "EvaluateConfig",
    "Manifest",
    "Panel",
    "Played",
    "Results",
    "compare",
    "decompose",
    "evaluate",
    "evaluate_panel",
    "evaluation_pairings",
    "load_manifest",
    "load_results",
    "metrics_of",
    "pooled",
    "setting_of",
]
