"""The offline world: scenarios whose outcome can be computed, and scripted people, judge and annotators.

Nothing here needs a network, a key or torch. `docs/sandbox.md` explains the rules.
"""

from sotopia_rl.sandbox.credit import exact_credit
from sotopia_rl.sandbox.play import points
from sotopia_rl.sandbox.scenarios import FAMILIES, Family, Side, apart_matches, matches, sides
from sotopia_rl.sandbox.scripted import SCRIPTED, ScriptedModel
from sotopia_rl.sandbox.speakers import TEMPERAMENTS, Temperament
from sotopia_rl.sandbox.verdict import gives_away, verdict

__all__ = [
    "FAMILIES",
    "SCRIPTED",
    "TEMPERAMENTS",
    "Family",
    "ScriptedModel",
    "Side",
    "Temperament",
    "apart_matches",
    "exact_credit",
    "gives_away",
    "matches",
    "points",
    "sides",
    "verdict",
]
