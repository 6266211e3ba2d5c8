"""Attribution of many episodes: lazily fed, concurrent, resumable item by item, each failure contained."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable

from sotopia_rl import __version__
from sotopia_rl.attribute.config import AttributionConfig
from sotopia_rl.attribute.items import AttributionItem, AttributionKey, attribution_items, nothing_done
from sotopia_rl.attribute.methods import METHODS, Case, Method, Weights
from sotopia_rl.attribute.prompt import Question, questions
from sotopia_rl.attribute.reply import parse_reply, reply_schema
from sotopia_rl.episode import (
    Attribution,
    Episode,
    Failure,
    Provenance,
    Rating,
    Sampling,
    Usage,
    UtteranceWeight,
    sha256_text,
)
from sotopia_rl.llm.structured import Answer, UnusableReply, ask
from sotopia_rl.models import ChatModel
from sotopia_rl.sandbox import exact_credit
from sotopia_rl.work import bounded

COMPUTED = "computed"
"""Annotator of the methods that ask nobody."""


AttributionResult = tuple[AttributionItem, tuple[Attribution, ...] | Failure]


def annotator_name(model: ChatModel | None, config: AttributionConfig) -> str:
    """Under which name the attributions are recorded.

    Raises:
        ValueError: The method asks an annotator and there is none.
    """
    if METHODS[config.method].asks is None:
        return COMPUTED
    if model is None:
        raise ValueError(f"method {config.method} asks an annotator; give a model")
    return model.name


async def attribute_all(
    items: Iterable[tuple[Episode, Rating]],
    model: ChatModel | None,
    config: AttributionConfig,
    *,
    limit: int,
    done: Callable[[AttributionKey], bool] = nothing_done,
) -> AsyncIterator[AttributionResult]:
    """Attribute the scores of both agents of every episode, at most `limit` questions at once.

    Args:
        items: Episodes with the rating whose scores are attributed. May be long and lazy.
        model: The annotator; None for a method that asks nobody.
        done: Whether an attribution exists already and is to be left out.

    Yields:
        Per item, as it finishes, one `Attribution` per dimension, or why it failed. An agent without
        utterances gets attributions without weights, and no question is asked.
    """
    annotator = annotator_name(model, config)
    work = attribution_items(items, config, annotator, done)
    async for item, result in bounded(work, lambda item: attribute(item, model, config), limit=limit):
        yield item, result


async def attribute(
    item: AttributionItem, model: ChatModel | None, config: AttributionConfig
) -> tuple[Attribution, ...] | Failure:
    """Attribute one item.

    Returns:
        One `Attribution` per dimension, or a `bad_input` failure where the rating lacks a needed score.

    Raises:
        ModelCallError: The annotator gave no reply, or none that can be used.
    """
    method = METHODS[config.method]
    points = item.rating.points(item.seat)
    unscored = [name for name in item.dimensions if name not in points]
    if method.needs_score and unscored:
        return Failure(
            kind="bad_input",
            message=f"{config.method} needs the score of {', '.join(unscored)}, which the rating of episode "
            f"{item.episode.id} by {item.rating.judge} does not have for seat {item.seat}",
        )
    cases = {name: Case(config.dimension(name), points.get(name), config) for name in item.dimensions}
    if method.asks is None or not item.episode.utterances(item.seat):
        answers = _computed_answers(item, method)
        return answers if isinstance(answers, Failure) else _computed(item, method, cases, answers)
    assert model is not None
    return await _asked(item, method, cases, model)


def _computed_answers(item: AttributionItem, method: Method) -> dict[str, Weights] | Failure:
    """What stands in for an annotator's answers where nobody is asked."""
    turns = [turn.index for turn in item.episode.utterances(item.seat)]
    if method.name != "exact":
        return {name: dict.fromkeys(turns, 0.0) for name in item.dimensions}
    episode = item.episode
    try:
        return {name: exact_credit(episode.match, episode.turns, item.seat, name) for name in item.dimensions}
    except ValueError as error:
        return Failure(kind="bad_input", message=f"episode {episode.id} has no exact credit: {error}")


def _computed(
    item: AttributionItem, method: Method, cases: dict[str, Case], answers: dict[str, Weights]
) -> tuple[Attribution, ...]:
    """Attributions that no annotator was asked for; those of a silent agent have no weights."""
    provenance = Provenance(
        model=COMPUTED,
        sampling=Sampling(temperature=0),
        prompt_profile="",
        prompt_sha256="",
        attempts=0,
        package_version=__version__,
    )
    silent = not item.episode.utterances(item.seat)
    return tuple(
        _attribution(item, method, case, [] if silent else [answers[name]], provenance) for name, case in cases.items()
    )


async def _asked(
    item: AttributionItem, method: Method, cases: dict[str, Case], model: ChatModel
) -> tuple[Attribution, ...]:
    config = next(iter(cases.values())).config
    asked = questions(item, method, config)
    usage, attempts = Usage(), 0
    samples: list[dict[str, Weights]] = []
    for sample in range(config.samples):
        samples.append({name: {} for name in cases})
        for place, question in enumerate(asked):
            answer = await _ask(model, question, method, config, seed=_seed(config, item, place, sample))
            usage, attempts = usage + answer.usage, attempts + answer.attempts
            for name, numbers in answer.value.items():
                samples[-1][name].update(numbers)
    shares = _split_usage(usage, len(cases))
    return tuple(
        _attribution(
            item,
            method,
            case,
            [answers[name] for answers in samples],
            Provenance(
                model=model.name,
                sampling=config.sampling,
                prompt_profile=f"attribution_{config.label}",
                prompt_sha256=sha256_text("\n".join(question.prompt for question in asked)),
                attempts=attempts,
                usage=share,
                package_version=__version__,
            ),
        )
        for (name, case), share in zip(cases.items(), shares, strict=True)
    )


async def _ask(
    model: ChatModel, question: Question, method: Method, config: AttributionConfig, *, seed: int
) -> Answer[dict[str, dict[int, int]]]:
    return await ask(
        model,
        question.prompt,
        lambda text: _read(text, question, method),
        sampling=config.sampling,
        seed=seed,
        schema=reply_schema(question.ranges, question.turns),
        max_attempts=config.max_attempts,
    )


def _read(text: str, question: Question, method: Method) -> dict[str, dict[int, int]]:
    answers = parse_reply(text, question.ranges, question.turns)
    for name, numbers in answers.items():
        try:
            method.check(numbers)
        except UnusableReply as error:
            raise UnusableReply(f"{name}: {error}") from error
    return answers


def _attribution(
    item: AttributionItem, method: Method, case: Case, samples: list[Weights], provenance: Provenance
) -> Attribution:
    """Weigh each sample, then average, so that weights that sum to one still do."""
    weighed = [method.weigh(answers, case) for answers in samples]
    turns = [turn.index for turn in item.episode.utterances(item.seat)]
    return Attribution(
        episode_id=item.episode.id,
        seat=item.seat,
        dimension=case.dimension.name,
        method=case.config.label,
        annotator=provenance.model,
        weights=tuple(_mean_and_spread(turn, [w[turn] for w in weighed]) for turn in turns),
        top_weight=method.top(case),
        provenance=provenance,
    )


def _mean_and_spread(turn: int, weights: list[float]) -> UtteranceWeight:
    mean = math.fsum(weights) / len(weights)
    if len(weights) == 1:
        return UtteranceWeight(turn=turn, weight=mean)
    variance = math.fsum((weight - mean) ** 2 for weight in weights) / len(weights)
    return UtteranceWeight(turn=turn, weight=mean, spread=math.sqrt(variance))


def _split_usage(usage: Usage, parts: int) -> list[Usage]:
    """Whole calls and tokens shared out over the dimensions that one question served, so that sums stay right."""

    def part(total: int, place: int) -> int:
        return total // parts + (place < total % parts)

    return [
        Usage(
            calls=part(usage.calls, place),
            prompt_tokens=part(usage.prompt_tokens, place),
            completion_tokens=part(usage.completion_tokens, place),
            cost_usd=usage.cost_usd / parts,
        )
        for place in range(parts)
    ]


def _seed(config: AttributionConfig, item: AttributionItem, place: int, sample: int) -> int:
    """Different for every question and sample, and the same again in a resumed run."""
    parts = (config.seed, item.episode.id, item.seat, *item.dimensions, place, sample)
    return int(sha256_text("/".join(map(str, parts)))[:7], 16)
