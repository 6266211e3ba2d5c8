"""The experiment file: every stage's settings in one YAML, and the runner that redoes only what changed.

A stage is keyed by its settings, by the keys of its inputs and by the package version. Its results live in
`<run folder>/stages/<name>-<key>/` (several experiments may share one stages folder) and count as finished once
`done.json` stands there. So a second run does nothing, a changed setting redoes only what depends on it, and a killed
stage goes on where it stopped. What the stages do is in `steps.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sotopia_rl import __version__
from sotopia_rl.attribute import AttributionConfig
from sotopia_rl.config import Config, parse_config, read_yaml
from sotopia_rl.dataset import CloningFilter
from sotopia_rl.episode import Sampling, canonical_json, sha256_text
from sotopia_rl.errors import ConfigError
from sotopia_rl.files import write_text
from sotopia_rl.judge import JudgeConfig
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.reward import RewardConfig
from sotopia_rl.sandbox import Family
from sotopia_rl.simulate import SimulateConfig
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings, TinyModelSettings


class WorldConfig(Config):
    """Which matches the experiment trains on and which it holds out."""

    source: Literal["sandbox", "profiles"] = Field(default="sandbox")
    """`sandbox`: the offline world. `profiles`: published SOTOPIA profiles."""
    families: tuple[Family, ...] = Field(default=())
    """Scenario families of the offline world; empty means all."""
    profiles: Path | None = Field(default=None)
    """Folder with the published SOTOPIA profiles."""
    train_matches: int = Field(default=400, gt=0)
    """Matches played for training data."""
    held_out_matches: int = Field(default=40, gt=0)
    """Matches that every system plays in the evaluation, both seats counted."""
    validation_matches: int = Field(default=0, ge=0)
    """Matches the judge sees the policy play every `grpo.eval_every` steps; 0 leaves the judge out of training."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _folder_for_profiles(self) -> Self:
        if self.source == "profiles" and self.profiles is None:
            raise ValueError("source: profiles needs a folder; give it as `profiles:` or with --profiles")
        return self


class CastConfig(Config):
    """Who plays the training episodes: both seats are drawn from the speakers by weight."""

    speakers: dict[str, float] = Field(default={"scripted/fair": 1.0}, min_length=1)
    """Model string to weight."""
    temperature: float = Field(default=0.7, ge=0)
    max_tokens: int = Field(default=256, gt=0)
    seed: int = Field(default=0, ge=0)

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)


class ExploreConfig(Config):
    """Training matches that the SFT policy plays, judged and attributed like the others, for the reward model.

    A reward model that has seen other people's utterances only does not know what the policy's own slips are worth,
    and GRPO finds those that it overrates.
    """

    matches: int = Field(default=0, ge=0)
    """How many of the training matches, from the first; 0 leaves this out."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the policy. The partner is drawn from the cast."""
    max_tokens: int = Field(default=96, gt=0)


class BaseConfig(Config):
    """The base language model: trained on the spot, or an existing folder."""

    path: str | None = Field(default=None)
    """Model folder, or `smollm2`; None trains the tiny model of `tiny`."""
    tiny: TinyModelSettings = Field(default=TinyModelSettings())


class PanelConfig(Config):
    """How systems are evaluated: against whom, and how they sample."""

    partners: tuple[str, ...] = Field(default=("scripted/fair",), min_length=1)
    """Model strings of the fixed partners; each system meets each of them in every held-out match."""
    temperature: float = Field(default=0.7, gt=0)
    """Of the systems in the sampled setting."""
    greedy: bool = Field(default=True)
    """Play every system greedily as well."""
    max_tokens: int = Field(default=96, gt=0)
    constrain: bool = Field(default=True)
    """Constrain replies to the action's JSON schema, as one would when serving; without, invalid replies show."""
    shown_episodes: int = Field(default=6, ge=0)
    """Episodes printed in full in the report."""


class Experiment(Config):
    """One experiment, from matches to report."""

    name: str = Field(default="experiment", pattern=r"^[\w.-]+$")
    seed: int = Field(default=0, ge=0)
    """Seed of every stage that does not set its own."""
    notes: tuple[str, ...] = Field(default=())
    """Said on top of the report and after the run."""
    world: WorldConfig = Field(default=WorldConfig())
    cast: CastConfig = Field(default=CastConfig())
    simulate: SimulateConfig = Field(default=SimulateConfig())
    judge_model: str = Field(default="scripted/judge")
    judge: JudgeConfig = Field(default=JudgeConfig())
    annotator_model: str = Field(default="scripted/annotator")
    annotate: AttributionConfig = Field(default=AttributionConfig())
    reward: RewardConfig = Field(default=RewardConfig())
    cloning: CloningFilter = Field(default=CloningFilter())
    """Which agents of the training episodes SFT imitates."""
    base: BaseConfig = Field(default=BaseConfig())
    sft: SFTSettings = Field(default=SFTSettings())
    explore: ExploreConfig = Field(default=ExploreConfig())
    """What the SFT policy adds to the reward model's data."""
    rm: RewardModelSettings = Field(default=RewardModelSettings())
    grpo: GRPOSettings = Field(default=GRPOSettings())
    evaluate: PanelConfig = Field(default=PanelConfig())
    arms: dict[str, dict[str, Any]] = Field(default={"grpo": {}}, min_length=1)
    """Trained variants by name, each a mapping of the sections above to the settings it changes."""
    limits: ModelLimits = Field(default=ModelLimits())
    """What calls to models may take. Not part of any stage's key."""
    concurrency: int = Field(default=64, gt=0)
    """Judgements or attributions under way at once."""

    @model_validator(mode="after")
    def _arms_are_valid(self) -> Self:
        for name in self.arms:
            if name in ("base", "sft"):
                raise ValueError(f"arm {name!r}: the name is taken")
            self.arm(name)
        return self

    def arm(self, name: str) -> Experiment:
        """The experiment with this arm's settings in place."""
        changes = self.arms[name]
        allowed = {"annotate", "annotator_model", "reward", "rm", "grpo"}
        if unknown := set(changes) - allowed:
            raise ValueError(f"arm {name!r} changes {sorted(unknown)}; an arm may change {sorted(allowed)}")
        updates: dict[str, Any] = {}
        for section, values in changes.items():
            current = getattr(self, section)
            if isinstance(current, Config):
                merged = {**current.model_dump(exclude_unset=True), **values}
                updates[section] = parse_config(type(current), merged, where=f"arms.{name}.{section}")
            else:
                updates[section] = values
        return self.model_copy(update=updates)

    def seeded(self) -> Experiment:
        """The experiment with its seed in every section that has a seed of its own left unset."""
        updates = {
            name: section.model_copy(update={"seed": self.seed})
            for name in type(self).model_fields
            if isinstance(section := getattr(self, name), Config)
            and "seed" in type(section).model_fields
            and "seed" not in section.model_fields_set
        }
        if "tiny" not in self.base.model_fields_set or "seed" not in self.base.tiny.model_fields_set:
            tiny = self.base.tiny.model_copy(update={"seed": self.seed})
            updates["base"] = self.base.model_copy(update={"tiny": tiny})
        return self.model_copy(update=updates)


def load_experiment(path: Path, *, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read an experiment file; `overrides` are merged over it, section by section.

    A file may start from another one with `extends: FILE`, relative to itself; its own sections are merged over
    those in the same way (`arms` as a whole).

    Raises:
        ConfigError: A file or a setting in it is wrong.
    """
    data = merge_sections(_extended(path, ()), overrides or {})
    return parse_config(Experiment, data, where=str(path)).seeded()


def _extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself")
    data = read_yaml(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    return merge_sections(_extended(path.parent / str(parent), (*seen, path.resolve())), data)


def merge_sections(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `data`: a section's settings one by one, anything else as a whole."""
    merged = dict(data)
    for name, value in changes.items():
        old = merged.get(name)
        is_section = name != "arms" and isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[name] = {**old, **value} if is_section and old is not None else value
    return merged


@dataclass(frozen=True)
class Stage:
    """One step of an experiment.

    `work(folder, inputs)` writes its results into `folder`, reading those of its inputs, and picks up
    whatever an interrupted call left there.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Stage]
    work: Callable[[Path, Mapping[str, Path]], None] = field(compare=False)

    @property
    def key(self) -> str:
        """Hash of everything the results depend on."""
        inputs = {name: stage.key for name, stage in self.inputs.items()}
        content = {"name": self.name, "settings": dict(self.settings), "inputs": inputs, "version": __version__}
        return sha256_text(canonical_json(content))[:12]

    def folder(self, stages: Path) -> Path:
        return stages / f"{self.name}-{self.key}"


DONE = "done.json"


def is_done(stage: Stage, stages: Path) -> bool:
    """Whether the stage has finished in this folder of stages."""
    return (stage.folder(stages) / DONE).is_file()


def run_stage(stage: Stage, stages: Path, *, resume: bool = True, again: bool = False) -> bool:
    """Run a stage whose inputs have finished, unless it has finished itself; whether there was work.

    Args:
        resume: Keep what an interrupted call left; otherwise start the stage from nothing.
        again: Run it although it has finished.
    """
    folder = stage.folder(stages)
    if is_done(stage, stages) and not again:
        return False
    if not resume and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage.work(folder, {name: other.folder(stages) for name, other in stage.inputs.items()})
    record = {"stage": stage.name, "key": stage.key, "settings": dict(stage.settings), "version": __version__}
    write_text(folder / DONE, json.dumps(record, indent=1, ensure_ascii=False))
    return True
