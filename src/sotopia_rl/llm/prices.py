"""What a model's tokens cost: the published list prices in `prices.yaml`, and the run's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources

import yaml

_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """In USD. Discounts (batches, cached prompts) are not counted: the real cost may be lower."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def price_of(model: str, own: Mapping[str, tuple[float, float]]) -> Price | None:
    """The price of a model string: the run's own (exact, then by pattern), else the list's; None if unknown.

    A dated snapshot (`openai/gpt-4o-2024-11-20`) costs what its model costs unless it is listed itself.
    """
    if model in own:
        return Price(*own[model])
    for pattern, price in own.items():
        if fnmatchcase(model, pattern):
            return Price(*price)
    listed = _listed()
    return listed.get(model) or listed.get(_SNAPSHOT.sub("", model))


@cache
def _listed() -> dict[str, Price]:
    text = resources.files("sotopia_rl.llm").joinpath("prices.yaml").read_text(encoding="utf-8")
    return {name: Price(*price) for name, price in yaml.safe_load(text)["usd_per_million_tokens"].items()}
