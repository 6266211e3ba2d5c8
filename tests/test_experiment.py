from collections.abc import Mapping
from pathlib import Path

import pytest

from played_systems import PARTNERS, manifest, played
from sotopia_rl.episode import Failure
from sotopia_rl.errors import ConfigError
from sotopia_rl.experiment import Experiment, Stage, is_done, load_experiment, run_stage
from sotopia_rl.llm.limits import Budget, ModelLimits
from sotopia_rl.pipeline import Graph, build
from sotopia_rl.results import load_results
from sotopia_rl.steps import Run, compare, stage_store

RECIPES = Path(__file__).parents[1] / "recipes"


def appending(letter: str, log: list[str]):
    """A step that writes its inputs' text and a letter, and logs that it worked."""

    def work(out: Path, inputs: Mapping[str, Path]) -> None:
        log.append(letter)
        before = "".join((folder / "text").read_text() for folder in inputs.values())
        (out / "text").write_text(before + letter)

    return work


def chain(log: list[str], *, first: int = 0, second: int = 0) -> tuple[Stage, Stage]:
    one = Stage("one", {"setting": first}, {}, appending("a", log))
    return one, Stage("two", {"setting": second}, {"one": one}, appending("b", log))


def graph_of(experiment: Experiment) -> Graph:
    return build(experiment, Run(lambda tally: None, ModelLimits(), Budget()))


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    for _ in range(2):
        for stage in chain(log):
            run_stage(stage, tmp_path)
    assert log == ["a", "b"]
    assert (chain(log)[1].folder(tmp_path) / "text").read_text() == "ab"


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    log: list[str] = []
    for stage in (*chain(log), *chain(log, second=1)):
        run_stage(stage, tmp_path)
    assert log == ["a", "b", "b"]
    for stage in chain(log, first=1):
        run_stage(stage, tmp_path)
    assert log == ["a", "b", "b", "a", "b"]


def test_a_stage_that_failed_is_not_done_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    def work(out: Path, inputs: Mapping[str, Path]) -> None:
        if (out / "half").exists():
            (out / "text").write_text("whole")
            return
        (out / "half").write_text("half")
        raise OSError("the disk is full")

    stage = Stage("fragile", {}, {}, work)
    with pytest.raises(OSError, match="disk"):
        run_stage(stage, tmp_path)
    assert not is_done(stage, tmp_path)
    run_stage(stage, tmp_path)
    assert (stage.folder(tmp_path) / "text").read_text() == "whole"


def test_without_resume_a_torn_stage_starts_from_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    stage = chain(log)[0]
    stage.folder(tmp_path).mkdir(parents=True)
    (stage.folder(tmp_path) / "half").write_text("torn")
    run_stage(stage, tmp_path, resume=False)
    assert not (stage.folder(tmp_path) / "half").exists()


def test_the_seed_reaches_every_section_that_does_not_set_its_own(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("seed: 7\nsft: {seed: 3}\n")
    loaded = load_experiment(path)
    assert (loaded.grpo.seed, loaded.rm.seed, loaded.world.seed, loaded.base.tiny.seed) == (7, 7, 7, 7)
    assert loaded.sft.seed == 3


def test_a_file_extends_another_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("name: parent\nsft: {max_steps: 5, batch_size: 2}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nname: child\nsft: {max_steps: 6}\n")
    loaded = load_experiment(tmp_path / "child.yaml", overrides={"sft": {"batch_size": 4}})
    assert (loaded.name, loaded.sft.max_steps, loaded.sft.batch_size) == ("child", 6, 4)


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_experiment(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {sft: {}}\n", "the name is taken"),
        ("arms: {a: {world: {seed: 1}}}\n", "an arm may change"),
        ("arms: {a: {grpo: {max_stepz: 1}}}\n", "did you mean 'max_steps'"),
        ("arms: {}\n", "arms"),
        ("world: {source: profiles}\n", "needs a folder"),
        ("simulat: {}\n", "did you mean 'simulate'"),
    ],
)
def test_a_wrong_experiment_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_experiment(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_stages_come_after_their_inputs_and_the_report_last() -> None:
    seen: set[str] = set()
    stages = list(graph_of(Experiment()).stages.values())
    for stage in stages:
        assert {needed.key for needed in stage.inputs.values()} <= seen
        seen.add(stage.key)
    assert stages[-1].name == "report"


def test_another_learning_rate_of_grpo_touches_grpo_and_what_follows() -> None:
    before = graph_of(Experiment())
    after = graph_of(Experiment.model_validate({"grpo": {"learning_rate": 1e-3}}))
    changed = {stage.name for key, stage in after.stages.items() if key not in before.stages}
    assert changed == {"grpo", "play", "compare", "report"}


def test_arms_share_what_they_have_in_common() -> None:
    arms = {"utterance": {}, "episode": {"reward": {"granularity": "episode"}}}
    graph = graph_of(Experiment.model_validate({"arms": arms}))
    counts = {name: len(graph.named(name)) for name in ("simulate", "annotate", "sft", "base", "reward", "rm", "grpo")}
    assert counts == {"simulate": 1, "annotate": 1, "sft": 1, "base": 1, "reward": 2, "rm": 2, "grpo": 2}
    assert len(graph.named("play")) == 4


def test_what_the_policy_plays_goes_to_the_reward_model_and_leaves_cloning_alone() -> None:
    plain = graph_of(Experiment())
    exploring = graph_of(Experiment.model_validate({"explore": {"matches": 5}}))
    counts = {name: len(exploring.named(name)) for name in ("explore", "judge", "annotate", "reward", "rm", "sft")}
    assert counts == {"explore": 1, "judge": 2, "annotate": 2, "reward": 1, "rm": 1, "sft": 1}
    assert not plain.named("explore")
    changed = {stage.name for key, stage in exploring.stages.items() if key not in plain.stages}
    expected = {"explore", "judge", "annotate", "reward", "rows", "rm", "grpo", "play", "compare", "report"}
    assert changed == expected
    plays = [s for s in exploring.named("play") if s.key in plain.stages]
    assert len(plays) == 2  # base and SFT


@pytest.mark.parametrize(
    "changes",
    [
        {"simulate": {"concurrency": 1}, "concurrency": 1},
        {"sft": {"trackers": ["wandb"], "push_to_hub": "me/it"}, "grpo": {"gradient_checkpointing": True}},
    ],
)
def test_what_changes_no_result_is_no_part_of_a_key(changes: dict[str, object]) -> None:
    changed = graph_of(Experiment.model_validate(changes))
    assert changed.stages.keys() == graph_of(Experiment()).stages.keys()


def test_every_recipe_is_a_valid_experiment() -> None:
    recipes = sorted(RECIPES.rglob("*.yaml"))
    assert recipes
    for path in recipes:
        overrides = {"world": {"profiles": "somewhere"}} if "source: profiles" in path.read_text() else None
        graph_of(load_experiment(path, overrides=overrides))


def test_an_arm_whose_episodes_all_failed_leaves_the_other_comparisons(tmp_path: Path) -> None:
    over = manifest()
    timeout = Failure(kind="timeout", message="no reply in 30 s", turn=2)
    (tmp_path / "world").mkdir()
    over.save(tmp_path / "world" / "held_out.json")
    for name, skill, failed in (("base", 2, 0), ("sft", 4, 0), ("grpo", 6, 32)):
        system = played(name, skill, over, temperatures=[0.7], failures=dict.fromkeys(range(failed), timeout))
        with stage_store(tmp_path / name) as store:
            store.add_episodes(system.episodes)
            store.add_ratings(system.ratings.values())
    partners = [partner.model for partner in PARTNERS]
    e = Experiment(name="toy", judge_model="scripted/judge", evaluate={"partners": partners})
    inputs = {name: tmp_path / name for name in ("world", "base", "sft", "grpo")}
    compare(Run(lambda _: None, ModelLimits(), Budget(None)), e, tmp_path, inputs)
    results = load_results(tmp_path / "results.json")
    assert {(row.system_a, row.system_b) for row in results.rows} == {("sft", "base")}
    assert [(u.system_a, u.system_b, u.num_excluded) for u in results.unpaired] == [("grpo", "sft", 32)]
