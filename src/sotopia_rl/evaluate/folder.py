"""The folder of one evaluation: what is to be played, what was played, and what it comes to.

manifest.json      the matches, frozen         evaluation.json   systems, partners, judges, settings
NAME.db            one system's episodes       NAME.again2.db    ratings by judges asked a second time
results.json, report.html, report.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, PositiveInt, ValidationError, field_validator

from sotopia_rl.episode import AgentSpec, Episode, Rating, Record, Sampling, Usage
from sotopia_rl.errors import ConfigError, DataError, EvaluationError
from sotopia_rl.evaluate.cells import Played
from sotopia_rl.evaluate.whole import Panel, evaluate_panel
from sotopia_rl.files import read_text, write_text
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.manifest import Manifest, load_manifest
from sotopia_rl.observe import get_profile
from sotopia_rl.prompts import template_sha256
from sotopia_rl.results import EvaluateConfig, Results
from sotopia_rl.simulate import SimulateConfig
from sotopia_rl.store import open_store
from sotopia_rl.store.interface import episode_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


class Plan(Record):
    """`evaluation.json`: who plays what against whom, and who judges."""

    systems: dict[str, str] = Field(min_length=1)
    """Model strings by name; the first is what the others are compared with."""
    partners: tuple[str, ...] = ()
    """Whom every system meets; empty in a matrix, where the systems meet one another."""
    judges: tuple[str, ...] = Field(min_length=1)
    temperature: float = Field(default=0.7, ge=0)
    """Of systems and partners."""
    greedy: bool = False
    """Systems are played greedily as well."""
    max_tokens: int = Field(default=512, gt=0)
    judgements: dict[str, PositiveInt] = Field(default={})
    """By judge, times it rates an episode, where more than once; the first counts, the others tell its noise."""
    simulate: SimulateConfig = SimulateConfig()
    judging: JudgeConfig = JudgeConfig()

    @field_validator("systems")
    @classmethod
    def _file_names(cls, systems: dict[str, str]) -> dict[str, str]:
        """Each names a file of the folder."""
        for name in systems:
            if not _NAME.fullmatch(name) or ".again" in name:
                raise ValueError(f"{name!r} cannot name a system; use letters, digits, and . _ + -")
        return systems

    @field_validator("partners", "judges")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there twice")
        return names

    def specs(self, model: str) -> list[AgentSpec]:
        """A system as it is played: sampled, and greedily if asked."""
        return [self.spec(model, t) for t in ([self.temperature, 0.0] if self.greedy else [self.temperature])]

    def spec(self, model: str, temperature: float | None = None) -> AgentSpec:
        """A model and how it samples."""
        t = self.temperature if temperature is None else temperature
        return AgentSpec(model=model, sampling=Sampling(temperature=t, max_tokens=self.max_tokens))

    @property
    def rounds(self) -> range:
        """Numbers of the judgements of an episode."""
        return range(1, max(self.judgements.values(), default=1) + 1)

    def comparisons(self, baseline: str | None = None) -> list[tuple[str, str]]:
        """Every other system against the baseline, by default the first.

        Raises:
            ConfigError: No system has that name.
        """
        first = baseline or next(iter(self.systems))
        if first not in self.systems:
            raise ConfigError(f"no system is called {first!r}; there are {', '.join(self.systems)}")
        return [(name, first) for name in self.systems if name != first]


def extended(old: Plan, new: Plan, where: Path) -> Plan:
    """A plan that does what both ask: systems, partners and judges may be added, nothing else may change.

    Raises:
        ConfigError: Something else differs; episodes made under both would be no comparison.
    """
    fixed = ("temperature", "greedy", "max_tokens", "simulate", "judging")
    # how many at once, and how long to wait, changes no episode
    ignored = {"concurrency", "stop_after_connection_failures", "episode_timeout_seconds"}

    def settings(plan: Plan) -> dict[str, object]:
        found = plan.model_dump(mode="json", include=set(fixed))
        for stage in ("simulate", "judging"):
            found |= {f"{stage}.{k}": v for k, v in found.pop(stage).items() if k not in ignored}
        return found

    before, after = settings(old), settings(new)
    changed = [f"{key} ({before[key]!r}, now {after[key]!r})" for key in before if before[key] != after[key]]
    changed += [
        f"system {name} ({old.systems[name]}, now {model})"
        for name, model in new.systems.items()
        if old.systems.get(name, model) != model
    ]
    if changed:
        raise ConfigError(
            f"{where} holds an evaluation with other settings: {', '.join(changed)}; choose another folder"
        )
    return new.model_copy(
        update={
            "systems": old.systems | new.systems,
            "partners": tuple(dict.fromkeys((*old.partners, *new.partners))),
            "judges": tuple(dict.fromkeys((*old.judges, *new.judges))),
            "judgements": {
                judge: max(old.judgements.get(judge, 1), new.judgements.get(judge, 1))
                for judge in (*old.judgements, *new.judgements)
            },
        }
    )


@dataclass(frozen=True)
class Evaluation:
    """What a folder (or several of one manifest) holds."""

    plan: Plan
    manifest: Manifest
    panel: Panel
    cost: Mapping[str, Usage]
    """Of the stored records, by `system NAME` and `judge MODEL`."""

    def results(self, *, config: EvaluateConfig | None = None, baseline: str | None = None) -> Results:
        """Every other system against the baseline.

        Raises:
            EvaluationError: As `evaluate_panel`.
        """
        return evaluate_panel(
            self.panel,
            self.plan.comparisons(baseline),
            partners=self.plan.partners,
            config=config or EvaluateConfig(),
        )

    def provenance(self) -> dict[str, object]:
        """What a reader needs to make the same numbers again."""
        played = next(iter(self.panel.values()))
        return provenance(self.plan, (e for p in played for e in p.episodes), self.cost)


def provenance(plan: Plan, episodes: Iterable[Episode], cost: Mapping[str, Usage]) -> dict[str, object]:
    """What a reader needs to make the same numbers again."""
    agent, judge = get_profile(plan.simulate.prompt_profile), get_profile(plan.judging.prompt_profile)
    versions = sorted({e.package_version for e in episodes if e.package_version})
    return {
        "systems": dict(plan.systems),
        "temperature": f"{plan.temperature:g}" + (", and 0" if plan.greedy else ""),
        "prompts": {
            f"agents, {agent.name}": template_sha256(agent.agent),
            f"judge, {judge.name}": template_sha256(judge.judge),
        },
        "judge's temperature": plan.judging.temperature,
        "turns at most": plan.simulate.max_turns,
        "played with": [f"sotopia-rl {version}" for version in versions],
        "calls and cost": {name: usage_text(usage) for name, usage in cost.items()},
    }


def usage_text(usage: Usage) -> str:
    """Calls, tokens and, where it is known, cost."""
    text = f"{usage.calls:,} calls, {usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens"
    return text + (f", {usage.cost_usd:.2f} USD" if usage.cost_usd else "")


def joined_plan(plan: Plan, manifest: Manifest, folder: Path) -> Plan:
    """What will be played in a folder: the plan, joined with the one that is there. Writes nothing.

    Raises:
        ConfigError: The folder holds another evaluation.
    """
    file = folder / "manifest.json"
    if file.exists() and (there := load_manifest(file)).sha256 != manifest.sha256:
        raise ConfigError(f"{folder} holds an evaluation over {there}, not {manifest}; choose another folder")
    if (folder / "evaluation.json").exists():
        kept = load_plan(folder)
        if bool(kept.partners) != bool(plan.partners):
            held = "a comparison" if kept.partners else "a matrix"
            raise ConfigError(f"{folder} holds {held}; choose another folder")
        plan = extended(kept, plan, folder)
    return plan


def save_plan(plan: Plan, manifest: Manifest, folder: Path) -> None:
    """Freeze what will be played in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest.save(folder / "manifest.json")
    write_text(folder / "evaluation.json", plan.model_dump_json(indent=1) + "\n")


def load_plan(folder: Path) -> Plan:
    """The plan of a folder.

    Raises:
        DataError: There is none.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise DataError(f"{folder}: no evaluation in it; `sotopia-rl evaluate play --output {folder}` makes one")
    try:
        return Plan.model_validate_json(read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def store_path(folder: Path, system: str, again: int = 1) -> Path:
    """The store of a system's episodes and first ratings, or of the ratings of a later round."""
    return folder / (f"{system}.db" if again == 1 else f"{system}.again{again}.db")


def load_evaluation(folders: Sequence[Path]) -> Evaluation:
    """What one folder holds, or several that played the same manifest.

    Raises:
        DataError: A folder holds no evaluation, or lacks a system's store.
        EvaluationError: The folders do not fit together.
    """
    plans = [load_plan(folder) for folder in folders]
    for folder, plan in zip(folders, plans, strict=True):
        if not plan.partners:
            raise DataError(f"{folder} holds a matrix; `sotopia-rl evaluate matrix` writes its results")
    manifests = [load_manifest(folder / "manifest.json") for folder in folders]
    _check_fit(folders, plans, manifests)
    plan = plans[0]
    for other in plans[1:]:
        plan = plan.model_copy(
            update={
                "systems": plan.systems | other.systems,
                "partners": tuple(dict.fromkeys((*plan.partners, *other.partners))),
            }
        )
    panel: dict[str, list[Played]] = {judge: [] for judge in plan.judges}
    cost: dict[str, Usage] = {}
    for folder, own in zip(folders, plans, strict=True):
        for system in own.systems:
            for judge, played in _played(folder, own, system, manifests[0], cost).items():
                panel[judge].append(played)
    return Evaluation(plan, manifests[0], panel, dict(sorted(cost.items(), key=lambda item: item[0], reverse=True)))


def _check_fit(folders: Sequence[Path], plans: Sequence[Plan], manifests: Sequence[Manifest]) -> None:
    for folder, plan, manifest in zip(folders[1:], plans[1:], manifests[1:], strict=True):
        if manifest.sha256 != manifests[0].sha256:
            shared = len({m.id for m in manifest.matches} & {m.id for m in manifests[0].matches})
            raise EvaluationError(
                f"{folders[0]} played {manifests[0]} and {folder} played {manifest}: different manifests with "
                f"{shared} matches in common; play both over one manifest"
            )
        if lacking := sorted(set(plans[0].judges) ^ set(plan.judges)):
            raise EvaluationError(
                f"{folders[0]} and {folder} were judged by different judges: {', '.join(lacking)} judged one of them "
                "only; `sotopia-rl evaluate rejudge` adds a judge"
            )
        if twice := sorted(set(plans[0].systems) & set(plan.systems)):
            raise EvaluationError(f"{', '.join(twice)} is a system of {folders[0]} and of {folder}; names must differ")


def _played(folder: Path, plan: Plan, system: str, manifest: Manifest, cost: dict[str, Usage]) -> dict[str, Played]:
    """One system by judge; what it cost is added to `cost`."""
    with closing(open_store(store_path(folder, system), create=False)) as store:
        episodes = list(store.episodes())
        ratings = {judge: {r.episode_id: r for r in store.ratings(judge=judge)} for judge in plan.judges}
        failures = list(store.failures("judge"))
    again: list[Rating] = []
    for number in plan.rounds[1:]:
        path = store_path(folder, system, number)
        if path.is_file():
            with closing(open_store(path, create=False)) as store:
                again += store.ratings()
    cost[f"system {system}"] = total_usage(e.usage for e in episodes)
    for judge in plan.judges:
        own = [*ratings[judge].values(), *(r for r in again if r.judge == judge)]
        cost[f"judge {judge}"] = cost.get(f"judge {judge}", Usage()) + total_usage(r.provenance.usage for r in own)
    return {
        judge: Played(
            system,
            manifest,
            episodes,
            ratings[judge],
            {episode_of(item): f for _, item, f in failures if item == f"{episode_of(item)}/{judge}"},
            [r for r in again if r.judge == judge],
        )
        for judge in plan.judges
    }


def total_usage(usages: Iterable[Usage]) -> Usage:
    """What several calls took together."""
    return sum(usages, Usage())
