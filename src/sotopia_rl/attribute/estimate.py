"""What an annotation run would ask and cost, without asking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sotopia_rl.attribute.config import AttributionConfig
from sotopia_rl.attribute.items import AttributionKey, attribution_items, nothing_done
from sotopia_rl.attribute.methods import METHODS
from sotopia_rl.attribute.prompt import Question, questions
from sotopia_rl.episode import Episode, Rating
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.prices import price_of

CHARACTERS_PER_TOKEN = 4
"""Rule of thumb for English; estimates are only as good as it is."""


@dataclass(frozen=True)
class Preview:
    """One full prompt and an estimate of the whole run, without re-asked questions.

    `cost_usd` is None where the annotator's price is not known; `prompt` is empty where nothing is left to ask.
    """

    prompt: str
    items: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None

    def __str__(self) -> str:
        cost = "unknown price" if self.cost_usd is None else f"about ${self.cost_usd:.2f}"
        return (
            f"{self.items} attributions in {self.calls} calls: about {self.prompt_tokens:,} prompt tokens and "
            f"{self.completion_tokens:,} reply tokens, {cost}"
        )


def preview(
    items: Iterable[tuple[Episode, Rating]],
    config: AttributionConfig,
    annotator: str,
    *,
    prices: Mapping[str, tuple[float, float]] | None = None,
    done: Callable[[AttributionKey], bool] = nothing_done,
) -> Preview:
    """Render every question and count; `annotator` is the model string, `prices` as in `ModelLimits`."""
    method = METHODS[config.method]
    first, num_items, asked = "", 0, (0, 0, 0)
    for item in attribution_items(items, config, annotator, done):
        num_items += 1
        for question in questions(item, method, config) if method.asks else []:
            first = first or question.prompt
            asked = _sum(asked, _size(question))
    calls, prompt_tokens, completion_tokens = (total * config.samples for total in asked)
    price = price_of(annotator, prices or {})
    return Preview(
        prompt=first,
        items=num_items,
        calls=calls,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost_usd=0.0 if not calls else price.cost(prompt_tokens, completion_tokens) if price else None,
    )


def estimate(
    items: Iterable[tuple[Episode, Rating]], config: AttributionConfig, annotator: str | None, limits: ModelLimits
) -> str:
    """What `--dry-run` prints: one full prompt, then the estimate."""
    seen = preview(items, config, annotator or "", prices=limits.prices)
    return f"{seen.prompt}\n\n{seen}".lstrip()


def _size(question: Question) -> tuple[int, int, int]:
    """Calls, prompt tokens and reply tokens of one question; the reply is about as long as the example."""
    example = question.prompt.rstrip().rpartition("\n")[2]
    return 1, _tokens(question.prompt), _tokens(example)


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _sum(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
