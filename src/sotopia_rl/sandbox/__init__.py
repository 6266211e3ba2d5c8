"""The offline world: scenarios whose outcome can be computed, and scripted people, judge and annotators.

Nothing here needs a network, a key or torch. `docs/sandbox.md` explains the rules.
"""

from sotopia_rl.sandbox.credit import exact_credit
from sotopia_rl.sandbox.play import points
from sotopia_rl.sandbox.scenarios import FAMILIES, Family, Side, matches, sides
from sotopia_rl.sandbox.scripted import SCRIPTED, ScriptedModel
from sotopia_rl.sandbox.speakers import TEMPERAMENTS, Temperament
from sotopia_rl.sandbox.verdict import verdict

__all__ = [
    "FAMILIES",
    "SCRIPTED",
    "TEMPERAMENTS",
    "Family",
    "ScriptedModel",
    "Side",
    "Temperament",
    "exact_credit",
    "matches",
    "points",
    "sides",
    "verdict",
]
