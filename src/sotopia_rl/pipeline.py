"""An experiment as a graph of stages.

    world ─ simulate ─ judge ─┬─ annotate ───────────────────┬─ reward ─ rows ─ rm ─┐
                              └─ clone ─ base ─ sft ─ explore ┴─────────────────────┴─ grpo ─ play ─ compare ─ report

`explore`, with a judge and an annotate stage of its own, is left out unless the experiment asks for it.

Arms share every stage whose settings and inputs are equal. What a step does is in `steps.py` and `report_step.py`, when
it is redone in `experiment.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sotopia_rl import report_step, steps
from sotopia_rl.attribute import METHODS
from sotopia_rl.config import Config
from sotopia_rl.experiment import DONE, Experiment, Stage
from sotopia_rl.llm.folders import check_model_folder
from sotopia_rl.llm.open import ModelPool, resolve_model_folder
from sotopia_rl.steps import Run
from sotopia_rl.train.folder import FREE

Step = Callable[[Run, Experiment, Path, Mapping[str, Path]], None]


@dataclass(frozen=True)
class Graph:
    """The stages of an experiment.

    Attributes:
        stages: By key, every stage after its inputs.
        systems: What is evaluated, by name: the stage it takes its adapter from, None for the bare base.
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    systems: dict[str, Stage | None] = field(default_factory=dict)

    def named(self, name: str) -> list[Stage]:
        """The stages of that name, one per arm that needs its own."""
        return [stage for stage in self.stages.values() if stage.name == name]


def build(experiment: Experiment, run: Run) -> Graph:
    """All stages of an experiment, the report last."""
    return _Builder(experiment, run).graph


def check_models(e: Experiment, run: Run) -> None:
    """Open every model that the experiment names, without asking it anything, and look at its base model.

    Raises:
        ConfigError: A model string is wrong, its key or price is missing, or a folder is no model.
        MissingExtraError: One needs an optional dependency.
    """
    arms = [e.arm(name) for name in e.arms]
    asking = [arm for arm in arms if arm.reward.granularity == "utterance" and METHODS[arm.annotate.method].asks]
    names = {*e.cast.speakers, *e.evaluate.partners, e.judge_model, *(arm.annotator_model for arm in asking)}

    async def open_all(pool: ModelPool) -> None:
        pool.open(sorted(names))

    run.with_models(open_all)
    if e.base.path is not None:
        check_model_folder(resolve_model_folder(e.base.path))


def reopen_failed(graph: Graph, stages: Path) -> None:
    """Mark stages in which something failed as unfinished, and remove whatever was made of their results."""
    again: set[str] = set()
    for stage in graph.stages.values():
        folder = stage.folder(stages)
        if any(source.key in again for source in stage.inputs.values()):
            shutil.rmtree(folder, ignore_errors=True)
        elif steps.has_failures(folder):
            (folder / DONE).unlink(missing_ok=True)
        else:
            continue
        again.add(stage.key)


def _dump(config: Config) -> dict[str, Any]:
    """The settings that a result depends on."""
    return config.model_dump(mode="json", exclude=set(FREE))


class _Builder:
    def __init__(self, experiment: Experiment, run: Run) -> None:
        self.e = experiment
        self.run = run
        self.graph = Graph()
        self.judging = {"judge_model": experiment.judge_model, "judge": experiment.judge.key()}
        self.panel = {"evaluate": _dump(experiment.evaluate), "simulate": _rules(experiment), **self.judging}
        self._data()
        self._models()
        self._evaluation()

    def _add(
        self,
        name: str,
        step: Step,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Stage],
        arm: Experiment | None = None,
    ) -> Stage:
        """The stage, or the equal one that another arm has added."""
        stage = Stage(name, settings, inputs, partial(step, self.run, arm or self.e))
        return self.graph.stages.setdefault(stage.key, stage)

    def _data(self) -> None:
        e = self.e
        self.world = self._add("world", steps.world, _dump(e.world), {})
        settings = {"cast": _dump(e.cast), "simulate": _rules(e)}
        simulate = self._add("simulate", steps.simulate, settings, {"world": self.world})
        judge = self._add("judge", steps.judge, self.judging, {"simulate": simulate})
        self.rated = {"simulate": simulate, "judge": judge}

    def _models(self) -> None:
        e = self.e
        clone = self._add("clone", steps.clone, _dump(e.cloning), self.rated)
        self.base = self._add(
            "base", steps.base, _dump(e.base), {"simulate": self.rated["simulate"]} if e.base.path is None else {}
        )
        sft = self._add("sft", steps.sft, _dump(e.sft), {"clone": clone, "base": self.base})
        self.graph.systems.update({"base": None, "sft": sft})
        self.explored = self._explored(sft) if e.explore.matches else {}
        for name in e.arms:
            self.graph.systems[name] = self._arm(e.arm(name), sft)

    def _explored(self, sft: Stage) -> dict[str, Stage]:
        """What the SFT policy plays for the reward model, and its judge."""
        e = self.e
        rules = _rules(e) | {"constrain": e.evaluate.constrain}
        settings = {"explore": _dump(e.explore), "cast": _dump(e.cast), "simulate": rules}
        explore = self._add("explore", steps.explore, settings, {"world": self.world, "base": self.base, "sft": sft})
        judge = self._add("judge", steps.judge, self.judging, {"simulate": explore})
        return {"explore": explore, "explore judge": judge}

    def _arm(self, e: Experiment, sft: Stage) -> Stage:
        """The stages of one arm, up to its policy."""
        credit: dict[str, Stage] = {}
        if e.reward.granularity == "utterance":
            asks = METHODS[e.annotate.method].asks is not None
            settings = {"annotator_model": e.annotator_model if asks else "", "annotate": _dump(e.annotate)}
            credit["annotate"] = self._add("annotate", steps.annotate, settings, self.rated, e)
            if self.explored:
                rated = {"simulate": self.explored["explore"], "judge": self.explored["explore judge"]}
                credit["explore annotate"] = self._add("annotate", steps.annotate, settings, rated, e)
        rated = self.rated | self.explored
        reward = self._add("reward", steps.reward, _dump(e.reward), rated | credit, e)
        rows = self._add("rows", steps.rows, {}, rated | {"reward": reward}, e)
        rm = self._add("rm", steps.rm, _dump(e.rm), {"rows": rows, "base": self.base}, e)
        inputs = {"world": self.world, "rows": rows, **self.rated, **self.explored}
        inputs |= {"base": self.base, "sft": sft, "rm": rm}
        settings = _dump(e.grpo)
        if e.world.validation_matches:
            settings |= {"validation": self.panel}
        return self._add("grpo", steps.grpo, settings, inputs, e)

    def _evaluation(self) -> None:
        e = self.e
        plays: dict[str, Stage] = {}
        for name, adapter in self.graph.systems.items():
            inputs = {"world": self.world, "base": self.base} | ({"adapter": adapter} if adapter else {})
            plays[name] = self._add("play", steps.play, self.panel, inputs)
        arms = list(e.arms)
        pairs = [("sft", "base"), *((arm, "sft") for arm in arms), *((arms[0], arm) for arm in arms[1:])]
        settings = {"comparisons": [list(pair) for pair in pairs], "notes": list(e.notes), "judge": e.judge_model}
        compare = self._add("compare", steps.compare, settings, {"world": self.world} | plays)
        self._add("report", report_step.report, {"name": e.name}, self._shown(compare, plays))

    def _shown(self, compare: Stage, plays: Mapping[str, Stage]) -> dict[str, Stage]:
        """What the report draws on."""
        shown = {"compare": compare, "base": self.base, **self.rated}
        shown |= {f"play {name}": stage for name, stage in plays.items()}
        for name, stage in self.graph.systems.items():
            if stage is not None and stage.name == "grpo":
                shown |= {f"grpo {name}": stage, f"rm {name}": stage.inputs["rm"], "sft": stage.inputs["sft"]}
                shown[f"reward {name}"] = stage.inputs["rows"].inputs["reward"]
        return shown


def _rules(e: Experiment) -> dict[str, Any]:
    """The engine's settings that change what is played."""
    return e.simulate.model_dump(mode="json", exclude={"concurrency", "stop_after_connection_failures"})
