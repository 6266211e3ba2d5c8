"""The offline world's `ChatModel`s: speakers, judge and annotators, asked and answering in text like any model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

from sotopia_rl.episode import Sampling, Usage, sha256_text
from sotopia_rl.errors import ModelCallError
from sotopia_rl.models import JsonSchema, Message, Reply
from sotopia_rl.sandbox.annotator import annotate
from sotopia_rl.sandbox.play import replay
from sotopia_rl.sandbox.reading import Observed, Unreadable, read_agent, read_observed
from sotopia_rl.sandbox.speakers import TEMPERAMENTS, Temperament, act
from sotopia_rl.sandbox.verdict import judge

Answer = Callable[[str, random.Random], str]
"""From a prompt and a source of randomness to a reply; may raise `Unreadable`."""


class ScriptedModel:
    """A deterministic model: the same prompt, attempt and seed give the same reply.

    Only the first message is read: a re-asked question is the same question, answered with fresh randomness.
    """

    def __init__(self, name: str, answer: Answer) -> None:
        self.name = f"scripted/{name}"
        self._answer = answer

    async def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling,  # noqa: ARG002  (the seed alone decides)
        *,
        seed: int | None = None,
        schema: JsonSchema | None = None,  # noqa: ARG002  (it answers in the form that the prompt names)
    ) -> Reply:
        """Answer the first message.

        Raises:
            ModelCallError: It cannot be read, or only in more than one way (kind `model`).
        """
        prompt = messages[0].content
        rng = random.Random(f"{self.name} {seed or 0} {len(messages)} {sha256_text(prompt)}")
        try:
            text = self._answer(prompt, rng)
        except Unreadable as error:
            raise ModelCallError(f"{self.name}: {error}", model=self.name, kind="model") from error
        # Words stand in for tokens: nothing here has a tokenizer.
        usage = Usage(calls=1, prompt_tokens=len(prompt.split()), completion_tokens=len(text.split()))
        return Reply(text=text, usage=usage)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None


def speak(temper: Temperament) -> Answer:
    """A speaker of this temperament."""

    def answer(prompt: str, rng: random.Random) -> str:
        return act(temper, read_agent(prompt), rng).to_json()

    return answer


def garbled(temper: Temperament, *, broken: float = 0.3) -> Answer:
    """A speaker whose reply is, at this chance, no usable JSON: cut short, prose, or an unknown action."""

    def answer(prompt: str, rng: random.Random) -> str:
        good = act(temper, read_agent(prompt), rng).to_json()
        if rng.random() >= broken:
            return good
        return rng.choice(
            (good[: len(good) // 2], "Well, I would rather talk.", '{"action_type": "sing", "argument": "la"}')
        )

    return answer


def give_verdict(prompt: str, rng: random.Random) -> str:  # noqa: ARG001  (a judge has no mood)
    """The verifiable judge, in the reply form that the prompt asks for."""
    seen: Observed = read_observed(prompt)
    verdicts = judge(replay(seen.sides, seen.heard))
    asked = seen.rest
    if "agent_1_evaluation" in asked or '"evaluations"' in asked:
        pairs = [{name: [s.reason, int(s.score)] for name, s in scores.items()} for scores in verdicts]
        if "agent_1_evaluation" in asked:
            return _json({"agent_1_evaluation": pairs[0], "agent_2_evaluation": pairs[1]})
        return _json({"evaluations": {"agent_1": pairs[0], "agent_2": pairs[1]}})
    named = [
        {name: {"reasoning": s.reason, "score": int(s.score)} for name, s in scores.items()} for scores in verdicts
    ]
    return _json({"agent_1": named[0], "agent_2": named[1]})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _model(name: str, answer: Answer) -> Callable[[], ScriptedModel]:
    return lambda: ScriptedModel(name, answer)


SCRIPTED: dict[str, Callable[[], ScriptedModel]] = {
    **{name: _model(name, speak(temper)) for name, temper in TEMPERAMENTS.items()},
    "garbled": _model("garbled", garbled(TEMPERAMENTS["fair"])),
    "judge": _model("judge", give_verdict),
    "annotator": _model("annotator", annotate),
    "annotator-noisy": _model("annotator-noisy", partial(annotate, noise=0.5)),
    **{
        f"annotator-noise-{p}": _model(f"annotator-noise-{p}", partial(annotate, noise=p / 100))
        for p in (25, 50, 75, 100)
    },
}
"""What `scripted/NAME` can name. `annotator-noise-P` errs in P percent of its numbers; `annotator-noisy` in 50."""
