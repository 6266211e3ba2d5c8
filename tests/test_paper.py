"""The paper's four scripts, run as it tells to run them, on the offline world and on the published golden lines."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sotopia_data import FOLDER, needs_sotopia_data
from sotopia_rl import sandbox
from sotopia_rl.episode import AgentSpec, Episode, Failure
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.judge import JudgeConfig, judge_all
from sotopia_rl.observe import agent_prompt
from sotopia_rl.paper import (
    EpisodeFile,
    Summary,
    annotate_file,
    attribution_config,
)
from sotopia_rl.paper_rows import read_annotated, write_reward_file
from sotopia_rl.simulate import Pairing, SimulateConfig, simulate
from sotopia_rl.store import export_file, open_store

SCRIPTS = Path(__file__).parent.parent / "scripts"
EPISODES = "sotopia_pi_episodes.jsonl"
SELECTED = "sotopia_pi_bc_episodes.jsonl"
ANNOTATED = "sotopia_pi_bc_episodes_annotated.jsonl"


def script(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), "--data_dir", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def played() -> list[Episode]:
    speakers = [AgentSpec(model=f"scripted/{name}") for name in ("fair", "tough")]
    matches = sandbox.matches("train", 6, seed=5)
    pairings = [Pairing(match=m, agents=(speakers[0], speakers[i % 2])) for i, m in enumerate(matches)]
    models = {spec.model: sandbox.SCRIPTED[spec.model.removeprefix("scripted/")]() for spec in speakers}
    return [e async for e in simulate(pairings, models.__getitem__, tag="paper", config=SimulateConfig())]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> Path:
    """Six episodes as sotopia writes them, three of them between two `scripted/fair`."""
    folder = tmp_path_factory.mktemp("paper")

    async def rated():
        judge = sandbox.SCRIPTED["judge"]()
        return [pair async for pair in judge_all(await played(), judge, JudgeConfig(), limit=2)]

    with open_store(folder / "store.db") as store:
        for episode, rating in asyncio.run(rated()):
            assert not isinstance(rating, Failure)
            store.add_episode(episode)
            store.add_rating(rating)
        export_file(store, folder / EPISODES, layout="sotopia")
    return folder / EPISODES


@pytest.fixture
def folder(episodes, tmp_path) -> Path:
    (tmp_path / EPISODES).write_bytes(episodes.read_bytes())
    return tmp_path


def select(folder, *more):
    files = ("--input_file", EPISODES, "--output_file", SELECTED)
    return script("annotate/process_sotopia_pi.py", folder, *files, "--model", "scripted/fair", *more)


def annotate(folder, *more):
    files = ("--llm_name", "scripted/annotator", "--input_file", SELECTED, "--output_file", ANNOTATED)
    return script("annotate/sample_episodes_and_annotate.py", folder, *files, *more)


def process(folder, *more):
    files = ("--input_file", ANNOTATED, "--reward_output_file", "reward.json", "--grpo_output_file", "grpo.json")
    return script("data_process/process_annotation_direct_attribution.py", folder, *files, *more)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_three_commands_of_step_1(folder):
    first = select(folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout == "episodes: 6 read, 3 written\n"
    kept = lines(folder / SELECTED)
    assert kept == [
        d for d in lines(folder / EPISODES) if d["experiment_model_name_pairs"][1:] == ["scripted/fair"] * 2
    ]

    second = annotate(folder, "--attribution_instruction_name", "default-goal", "--max_concurrency", "2")
    assert second.returncode == 0, second.stderr
    annotated = lines(folder / ANNOTATED)
    assert len(annotated) == 6
    for line in annotated:
        assert set(line) >= {"episode_id", "scenario", "agent", "goal", "attributed_utterances", "is_first_speaker"}
        for text, value in line["attributed_utterances"].values():
            assert isinstance(text, str)
            assert value == 0 or value["reward"] == pytest.approx(value["attribution"] / 3 * line["goal_score"])

    third = process(folder, "--sft_output_file", "sft.json")
    assert third.returncode == 0, third.stderr
    reward, grpo, sft = (json.loads((folder / f"{name}.json").read_text()) for name in ("reward", "grpo", "sft"))
    num_utterances = sum(len(line["turns"]) for line in annotated)
    assert len(reward) == len(grpo) == len(sft) == num_utterances
    assert [set(row) for row in reward] == [{"input", "output", "value"}] * num_utterances
    assert [set(row) for row in sft] == [{"input", "output"}] * num_utterances
    assert [(row["input"], row["output"]) for row in reward] == [(row["input"], row["output"]) for row in sft]
    values = {row["value"] for row in reward}
    assert values <= {v["reward"] for line in annotated for _, v in line["attributed_utterances"].values() if v}
    found = EpisodeFile(folder / SELECTED, Summary(), "refuse").get(annotated[0]["episode_id"]).episode
    turn = min(map(int, annotated[0]["turns"]))
    prompt = agent_prompt(found.match, found.turns[:turn], found.turns[turn].seat, profile="paper")
    assert reward[0]["input"] == prompt


def annotated_by(folder, name="annotator", *, method="direct", source=EPISODES, on_bad="refuse") -> Summary:
    model = sandbox.SCRIPTED[name]()
    config = attribution_config(method, "default-goal")
    return asyncio.run(annotate_file(folder / source, folder / ANNOTATED, model, config, limit=2, on_bad=on_bad))


def test_annotating_again_asks_nothing_and_a_torn_line_is_written_again(folder):
    annotated_by(folder)
    whole = (folder / ANNOTATED).read_text()
    assert annotated_by(folder).written == 0
    (folder / ANNOTATED).write_text(whole[:-40])
    assert annotated_by(folder).written == 1
    assert sorted((folder / ANNOTATED).read_text().splitlines()) == sorted(whole.splitlines())


def test_an_annotator_that_cannot_answer_fails_each_agent_alone_and_writes_no_zeros(folder):
    summary = annotated_by(folder, "judge")
    assert (summary.read, summary.written, len(summary.bad)) == (6, 0, 12)
    assert all(problem.startswith("episode ") for problem in summary.bad)
    assert (folder / ANNOTATED).read_text() == ""


def test_another_file_is_not_taken_for_an_annotated_one(folder):
    (folder / ANNOTATED).write_text('{"input": "x"}\n')
    with pytest.raises(DataError, match="not a line of an annotated file"):
        annotated_by(folder)


def as_the_papers_code(line: dict) -> dict:
    """A line as their script writes it: bare numbers, texts cut after a paragraph, no turns."""
    utterances = {
        key: [text.partition("\n\n")[0], value["attribution"] if value else 0]
        for key, (text, value) in line["attributed_utterances"].items()
    }
    kept = ("episode_id", "scenario", "agent", "goal", "is_first_speaker", "goal_score")
    return {**{name: line[name] for name in kept}, "attributed_utterances": utterances}


def annotated_lines(folder) -> list[dict]:
    annotated_by(folder)
    return lines(folder / ANNOTATED)


def read(folder, theirs, on_bad="refuse"):
    path = folder / "theirs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in theirs))
    summary = Summary()
    found = list(read_annotated(path, EpisodeFile(folder / EPISODES, Summary(), "refuse"), summary, on_bad=on_bad))
    return found, summary


def test_the_annotated_file_of_the_papers_code_is_imported(folder):
    ours = annotated_lines(folder)
    found, _ = read(folder, [as_the_papers_code(line) for line in ours])
    for line, (episode, one) in zip(ours, found, strict=True):
        assert one.attribution.by_turn() == {int(turn): weight for turn, weight in line["turns"].items()}
        assert one.score == line["goal_score"]
        assert episode.id == line["episode_id"]


def test_what_an_imported_line_gets_wrong_is_named_and_nothing_is_shifted(folder):
    good = as_the_papers_code(annotated_lines(folder)[0])
    own = [key for key in good["attributed_utterances"] if key.endswith(f"by {good['agent']}")]

    def changed(**changes):
        return {**good, "attributed_utterances": {**good["attributed_utterances"], **changes}}

    text = good["attributed_utterances"][own[0]][0]
    cases = [
        (changed(**{own[0]: [text, 99]}), "outside 0 to 3"),
        (changed(**{own[0]: [text, "2.5"]}), "is no number"),
        (changed(**{own[0]: [text, None]}), "is no number"),
        (changed(**{own[0]: ['said: "something else"', 1]}), "is not that of turn"),
        (changed(**{f"Utterance 99 by {good['agent']}": ["x", 1]}), "attributions for"),
        ({**good, "episode_id": "nobody"}, "has no episode nobody"),
        ({k: v for k, v in good.items() if k != "is_first_speaker"}, "is_first_speaker is missing"),
        ({k: v for k, v in good.items() if k != "goal_score"}, "no score of goal"),
        ({**good, "attributed_utterances": None}, "is not an object"),
    ]
    for line, said in cases:
        with pytest.raises(DataError) as refusal:
            read(folder, [good, line])
        assert "theirs.jsonl:2: " in str(refusal.value)
        assert said in str(refusal.value)
    found, summary = read(folder, [good, *(line for line, _ in cases)], on_bad="skip")
    assert len(found) == 1
    assert len(summary.bad) == len(cases)


def test_redundant_utterances_count_as_no_effect(folder):
    good = as_the_papers_code(annotated_lines(folder)[0])
    own = next(key for key in good["attributed_utterances"] if key.endswith(f"by {good['agent']}"))
    good["attributed_utterances"][own][1] = -1
    ((_, one),), summary = read(folder, [good])
    assert min(one.attribution.by_turn().values()) == 0
    assert summary.redundant == 1


@pytest.mark.parametrize(
    ("damage", "line", "said"),
    [
        (lambda text: text[:-60], 6, "half-written"),
        (lambda text: text + text.splitlines(keepends=True)[0], 7, "stands in line 1 already"),
        (lambda text: text.replace('"raw_rewards": [[', '"raw_rewards": [["x", [', 1), 1, "not JSON"),
        (lambda text: text.replace('"raw_messages": [[[', '"raw_messages": [[["x"], [', 1), 1, "messages"),
        (lambda text: "[]\n" + text, 1, "expected an object, found list"),
    ],
)
def test_a_damaged_episode_file_is_refused_with_its_line_or_skipped_and_counted(damage, line, said, folder):
    path = folder / EPISODES
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(DataError) as refusal:
        annotated_by(folder)
    assert f"{path}:{line}: " in str(refusal.value)
    assert said in str(refusal.value)
    (folder / ANNOTATED).unlink(missing_ok=True)
    summary = annotated_by(folder, on_bad="skip")
    assert len(summary.bad) == 1
    assert f"{path}:{line}: " in summary.bad[0]
    assert len(lines(folder / ANNOTATED)) in (10, 12)


def test_episodes_without_scores_are_named(folder):
    path = folder / EPISODES
    documents = lines(path)
    documents[2]["raw_rewards"] = [None, None]
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    summary = annotated_by(folder, on_bad="skip")
    assert summary.bad == [f"{path}: episode {documents[2]['episode_id']} has no scores"]
    assert summary.written == 10


def test_a_bad_file_is_one_line_on_the_terminal(folder):
    (folder / EPISODES).write_text("{")
    refused = select(folder)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {folder / EPISODES}:1: not JSON")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "instruction", "label", "dimension"),
    [
        ("direct", "default", "direct", "goal"),
        ("direct_generic", "10_scale-knowledge", "direct-10", "knowledge"),
        ("key_utterance", "default-goal", "singular", "goal"),
    ],
)
def test_the_papers_names_of_methods_and_instructions(method, instruction, label, dimension):
    config = attribution_config(method, instruction)
    assert (config.label, config.dimensions) == (label, (dimension,))


@pytest.mark.parametrize(
    ("method", "instruction"), [("best", "default"), ("direct", "7_scale"), ("direct", "default-x")]
)
def test_unknown_names_are_refused(method, instruction):
    with pytest.raises(ConfigError, match="unknown"):
        attribution_config(method, instruction)


@pytest.mark.slow
def test_episodes_are_serialized_by_tag_and_by_key(episodes, tmp_path):
    store = episodes.parent / "store.db"
    documents = lines(episodes)

    def serialize(*which):
        command = [sys.executable, str(SCRIPTS / "data_process/serialize.py"), "--store", str(store), *which]
        command += ["--output_file", str(tmp_path / "out.jsonl")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    by_tag = serialize("--tag", "paper")
    assert by_tag.returncode == 0, by_tag.stderr
    assert lines(tmp_path / "out.jsonl") == documents
    assert serialize("--pk", documents[1]["episode_id"]).returncode == 0
    assert lines(tmp_path / "out.jsonl") == documents[1:2]
    nothing = serialize("--pk", "nobody")
    assert nothing.returncode == 1
    assert "Traceback" not in nothing.stderr


@needs_sotopia_data
def test_published_lines_go_through_the_package(tmp_path):
    golden = (FOLDER / "golden/episodes_to_jsonl_sotopia-0.1.4.jsonl").read_text(encoding="utf-8")
    (tmp_path / EPISODES).write_text(golden, encoding="utf-8")
    assert annotated_by(tmp_path, method="all_the_same").written == 6
    summary = Summary()
    found = read_annotated(tmp_path / ANNOTATED, EpisodeFile(tmp_path / EPISODES, summary, "refuse"), summary)
    assert write_reward_file(found, tmp_path / "reward.json", profile="paper") > 10
    rows = json.loads((tmp_path / "reward.json").read_text())
    assert all(row["input"].startswith("Imagine you are ") for row in rows)
    assert len({row["value"] for row in rows}) > 1
