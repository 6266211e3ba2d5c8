"""Plays and judges what a folder of evaluation lacks; every call goes on from what is there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import product
from pathlib import Path

from sotopia_rl import stages
from sotopia_rl.episode import Sampling
from sotopia_rl.errors import EvaluationError, ModelCallError
from sotopia_rl.evaluate.folder import Plan, save_plan, store_path
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.open import CustomName, ModelPool, OpenAIName, parse_name
from sotopia_rl.manifest import Manifest, evaluation_pairings
from sotopia_rl.models import Message
from sotopia_rl.simulate import Pairing, episode_id
from sotopia_rl.stages import played_ids
from sotopia_rl.store import EpisodeQuery, open_store
from sotopia_rl.tally import Tally, Watch

SILENT = frozenset({"connection", "timeout", "http_4xx", "http_5xx", "rate_limited"})
"""Failures that say that an endpoint, not a reply, is wrong."""


def pairings_of(plan: Plan, manifest: Manifest, system: str) -> list[Pairing]:
    """Everything one system plays."""
    partners = [plan.spec(name) for name in plan.partners]
    return [p for spec in plan.specs(plan.systems[system]) for p in evaluation_pairings(manifest, spec, partners)]


async def play(
    pool: ModelPool, folder: Path, plan: Plan, manifest: Manifest, watch: Watch, *, retry_failed: bool = False
) -> list[Tally]:
    """Play every system and have every judge rate it, leaving out what is there.

    Every model is opened, and every endpoint asked for a word, before the folder is claimed by writing the plan.

    Raises:
        ConfigError: A model string is wrong.
        EvaluationError: An endpoint does not answer.
        ModelCallError: The spend cap is reached, or an endpoint was given up.
    """
    names = [*plan.systems.values(), *plan.partners, *plan.judges]
    pool.open(names)
    if _missing(folder, plan, manifest, retry_failed=retry_failed):
        await refuse_silent(pool, names)
    save_plan(plan, manifest, folder)
    tallies = []
    for system in plan.systems:
        with closing(open_store(store_path(folder, system))) as store:
            pairings = pairings_of(plan, manifest, system)
            tally = await stages.simulate_into(
                store, pairings, pool.get, tag=system, config=plan.simulate, watch=watch, retry_failed=retry_failed
            )
        tally.stage = f"episodes of {system}"
        tallies.append(tally)
    return tallies + await judge(pool, folder, plan, watch)


async def judge(
    pool: ModelPool, folder: Path, plan: Plan, watch: Watch, *, judges: Sequence[str] | None = None
) -> list[Tally]:
    """Have judges rate every completed episode as often as the plan says, leaving out what is rated.

    Args:
        judges: Only these; all of the plan's by default. One that has nothing left to rate is not opened.
    """
    rounds = [(name, again) for name in judges or plan.judges for again in range(1, plan.judgements.get(name, 1) + 1)]
    tallies = []
    for system, (name, again) in product(plan.systems, rounds):
        query = EpisodeQuery(tag=system, status="completed")
        with (
            closing(open_store(store_path(folder, system), create=False)) as episodes,
            closing(open_store(store_path(folder, system, again))) as target,
        ):
            meant = episodes.ids(query)
            if set(meant) <= target.rated_ids(name):
                tally = Tally("judgements", total=0, skipped=len(meant))
            else:
                config = _asked(plan.judging, again)
                tally = await stages.judge_into(
                    episodes, target, query, pool.get(name), config=config, limit=config.concurrency, watch=watch
                )
        tally.stage = f"judgements of {system} by {name}" + (f", time {again}" if again > 1 else "")
        tallies.append(tally)
    return tallies


def _asked(config: JudgeConfig, again: int) -> JudgeConfig:
    """Settings of the first, second, … judgement; from the second on, a judge that samples draws anew."""
    return config if again == 1 else config.model_copy(update={"seed": (config.seed or 0) + again - 1})


def _missing(folder: Path, plan: Plan, manifest: Manifest, *, retry_failed: bool) -> bool:
    """Whether anything is left to play."""
    for system in plan.systems:
        wanted = {episode_id(p, tag=system, config=plan.simulate) for p in pairings_of(plan, manifest, system)}
        if lacks(store_path(folder, system), wanted, tag=system, retry_failed=retry_failed):
            return True
    return False


def lacks(path: Path, wanted: set[str], *, tag: str, retry_failed: bool) -> bool:
    """Whether a store, which may not be there yet, lacks episodes."""
    if not path.is_file():
        return True
    with closing(open_store(path, create=False)) as store:
        present = played_ids(store, tag, retry_failed=retry_failed)
    return not wanted <= present


async def refuse_silent(pool: ModelPool, names: Iterable[str]) -> None:
    """Open models and ask the HTTP ones for a word, so that a wrong one is found before anything is paid for.

    Raises:
        ConfigError: A model string is wrong.
        EvaluationError: One of them gives no answer; names all that do not.
    """
    names = list(names)
    pool.open(names)
    http = [name for name in dict.fromkeys(names) if isinstance(parse_name(name), OpenAIName | CustomName)]
    answers = await asyncio.gather(*(_word(pool, name) for name in http))
    if silent := [answer for answer in answers if answer]:
        raise EvaluationError(f"{'; '.join(silent)}. Nothing was played or judged")


async def _word(pool: ModelPool, name: str) -> str:
    """Why a model does not answer; empty where it does, whatever it says."""
    question: Sequence[Message] = [Message(role="user", content="Reply with the word yes.")]
    try:
        await pool.get(name).complete(question, Sampling(temperature=0.0, max_tokens=16))
    except ModelCallError as error:
        return str(error) if error.kind in SILENT else ""
    return ""
