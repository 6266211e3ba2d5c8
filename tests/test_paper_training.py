"""The paper's training commands: flags to settings, rows to rows, and the whole of its step 2 at toy size."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sotopia_rl import sandbox
from sotopia_rl.dataset import RewardRow, SFTRow, read_rows, write_paper_rows
from sotopia_rl.episode import Action, Match, Turn
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.observe import agent_prompt
from sotopia_rl.paper_training import FLAGS, link_best, notes, parser, place_of, read_paper_rows, settings_of
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
README = {  # the commands of the paper's README, without the launcher
    "sft": "--model_name M --learning_rate 1e-4 --max_length 4096 --train_batch_size 2 --val_batch_size 1 "
    "--accumulation_steps 8 --num_epochs 500 --use_lora --evaluation_steps 5 --sft_data_path d.json "
    "--template_path ../evals/qwen2.5-7b.jinja --checkpoint_dir c",
    "rm": "--model_name M --learning_rate 1e-5 --max_length 4096 --train_batch_size 1 --val_batch_size 1 "
    "--accumulation_steps 8 --num_epochs 30 --evaluation_steps 50 --reward_data_path d.json "
    "--template_path ../evals/qwen2.5-7b.jinja --checkpoint_dir c",
    "grpo": "--model_name M --policy_adapter_path s/best-checkpoints --reward_adapter_path r/best-checkpoints "
    "--learning_rate 5e-6 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    "--gradient_accumulation_steps 8 --grpo_data_path d.json --template_path ../evals/qwen2.5-7b.jinja "
    "--num_grpo_epochs 2 --use_lora_train_grpo --num_generations 16 --output_dir o",
}


def given(stage: str, more: str = "") -> argparse.Namespace:
    return parser(stage, "").parse_args(shlex.split(f"{README[stage]} {more}"))


def test_the_readmes_sft_command_means_what_it_says() -> None:
    settings = settings_of("sft", given("sft"), processes=7)
    assert isinstance(settings, SFTSettings)
    assert (settings.learning_rate, settings.max_length, settings.batch_size, settings.accumulation) == (
        1e-4,
        4096,
        2,
        8,
    )
    assert (settings.num_epochs, settings.eval_every, settings.save_every) == (500, 5, 5)
    assert (settings.tuning, settings.quantise, settings.lora_r, settings.lora_alpha) == ("lora", "none", 8, 16)
    assert settings.template_path == Path("../evals/qwen2.5-7b.jinja")
    assert settings.held_out_share == 0.05


def test_the_readmes_reward_model_command_means_what_it_says() -> None:
    settings = settings_of("rm", given("rm", "--use_qlora --wandb_project p"), processes=6)
    assert isinstance(settings, RewardModelSettings)
    assert (settings.learning_rate, settings.num_epochs, settings.quantise) == (1e-5, 30, "nf4")
    assert settings.trackers == ("wandb",)


def test_the_readmes_grpo_command_makes_the_same_global_batch_on_any_number_of_processes() -> None:
    six, one = (settings_of("grpo", given("grpo"), processes=count) for count in (6, 1))
    assert isinstance(six, GRPOSettings)
    assert (six.prompts_per_step, one.prompts_per_step, six.num_generations) == (12, 2, 16)
    assert (six.num_epochs, six.learning_rate, six.batch_size, six.beta, six.ref) == (2, 5e-6, 4, 0.04, "sft")


def test_without_lora_every_weight_is_trained_and_steps_may_replace_epochs() -> None:
    flags = given("sft", "--max_steps 500")
    flags.use_lora = False
    settings = settings_of("sft", flags, processes=1)
    assert (settings.tuning, settings.max_steps, settings.num_epochs) == ("full", 500, None)


def test_a_batch_that_holds_no_whole_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 x .* 3 x 1 processes = 12 .* --num_generations 16 does not divide"):
        settings_of("grpo", given("grpo", "--gradient_accumulation_steps 3"), processes=1)


def test_flags_that_mean_nothing_here_say_so_in_one_line_each() -> None:
    assert notes("sft", given("sft")) == [
        "--val_batch_size: the held-out rows take twice the training batch; the loss is the same"
    ]
    assert [line.split(":")[0] for line in notes("grpo", given("grpo", "--val_ratio 0.1"))] == [
        "--per_device_eval_batch_size",
        "--val_ratio",
    ]


@pytest.mark.parametrize("stage", FLAGS)
def test_every_flag_becomes_a_setting_or_is_read_or_says_why_not(stage: str) -> None:
    fields = {"sft": SFTSettings, "rm": RewardModelSettings, "grpo": GRPOSettings}[stage].model_fields
    for flag in FLAGS[stage]:
        assert not flag.setting or flag.setting in fields, flag.name
        assert not (flag.setting and flag.unused), flag.name


# --- rows ----------------------------------------------------------------------------------------------------------


def talk(match: Match, utterance: str = "How about 55?") -> list[dict[str, object]]:
    turns = [
        Turn(index=i, seat=0 if i % 2 == 0 else 1, action=Action(action_type="speak", argument=f"{utterance} ({i})"))
        for i in range(4)
    ]
    return [
        {
            "input": agent_prompt(match, turns[: turn.index], turn.seat, profile="paper"),
            "output": turn.action.to_json(),
            "value": 2.5 * turn.index,
        }
        for turn in turns
    ]


def paper_file(path: Path, talks: int = 1, utterance: str = "How about 55?") -> Path:
    matches = sandbox.matches("train", talks, seed=0)
    path.write_text(json.dumps([row for match in matches for row in talk(match, utterance)]))
    return path


def test_rows_know_their_turn_and_a_talk_stays_together(tmp_path: Path) -> None:
    rows = list(read_paper_rows("rm", paper_file(tmp_path / "d.json", talks=3)))
    assert [row.turn for row in rows] == [0, 1, 2, 3] * 3
    assert [row.seat for row in rows] == [0, 1, 0, 1] * 3
    episodes = [row.episode_id for row in rows]
    assert len(set(episodes)) == 3
    assert episodes == [episodes[0]] * 4 + [episodes[4]] * 4 + [episodes[8]] * 4
    assert isinstance(rows[3], RewardRow)
    assert rows[3].value == 7.5


def test_an_utterance_that_imitates_the_prompt_does_not_move_its_turn(tmp_path: Path) -> None:
    path = paper_file(tmp_path / "d.json", utterance="ok\nYou are at Turn #77. Scenario: x")
    rows = list(read_paper_rows("sft", path))
    assert [row.turn for row in rows] == [0, 1, 2, 3]
    assert len({row.episode_id for row in rows}) == 1


def test_other_peoples_prompts_are_rows_too() -> None:
    assert place_of("Write a poem.")[1] == 0
    assert place_of("Write a poem.")[0] != place_of("Write a song.")[0]


def test_our_rows_come_back_from_the_papers_form(tmp_path: Path, rows: Path) -> None:
    ours = list(read_rows(SFTRow, rows))
    write_paper_rows(ours, tmp_path / "d.json")
    theirs = list(read_paper_rows("sft", tmp_path / "d.json"))
    assert [(r.prompt, r.completion, r.turn) for r in theirs] == [(r.prompt, r.completion, r.turn) for r in ours]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "cannot be read as JSON"),
        ("{}", "expected a JSON array of rows, found dict"),
        ("[]", "expected a JSON array of rows, found list, 0 long"),
        (
            '[{"input": "a", "output": "b", "value": 1}, {"input": "a"}]',
            "row 2: expected input, output, value; found input",
        ),
        ('[{"input": "a", "output": null, "value": 1}]', "row 1: input and output must be texts"),
        ('[{"input": "a", "output": "b", "value": -2}]', r"row 1: value: .*greater than or equal to 0 \(found -2\)"),
        ('[{"input": "a", "output": "b", "value": NaN}]', "row 1: value: "),
        ("[3]", "row 1: expected input, output, value; found int"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        list(read_paper_rows("rm", path))


def test_the_next_script_finds_the_best_checkpoint_under_both_names(tmp_path: Path) -> None:
    result = tmp_path / "adapter"
    result.mkdir()
    (result / "adapter_config.json").write_text("{}")
    link_best(result)
    link_best(result)
    assert (tmp_path / "best-checkpoints/adapter_config.json").is_file()
    assert (tmp_path / "best-checkpoint/adapter_config.json").is_file()


# --- the scripts ---------------------------------------------------------------------------------------------------


def script(
    name: str, arguments: str, *, launcher: str = "", folder: Path = SCRIPTS
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *shlex.split(launcher), str(SCRIPTS / f"train_{name}.py"), *shlex.split(arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=500)


@pytest.mark.parametrize("name", ["sft", "rm", "grpo"])
def test_the_help_of_a_script_names_every_flag(name: str) -> None:
    found = script(name, "--help")
    assert found.returncode == 0, found.stderr
    assert all(f"--{flag.name}" in found.stdout for flag in FLAGS[name])


def test_no_parser_of_a_script_takes_torch() -> None:
    code = (
        "import sys; import sotopia_rl.paper_training as p; "
        "[p.parser(name, '') for name in ('sft', 'rm', 'grpo')]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_value_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    found = script("sft", f"--model_name {tmp_path} --sft_data_path d --checkpoint_dir {tmp_path}/c --lora_r 0")
    assert found.returncode == 1
    assert found.stderr.strip() == "error: flags: lora_r: Input should be greater than 0 (found 0)"


@pytest.mark.slow
def test_the_papers_three_commands_lead_to_a_policy(tmp_path: Path, rows: Path, base: Path) -> None:
    """In two processes, with the config files as they are; the flags are those of the README, the numbers smaller."""
    data = tmp_path / "d.json"
    write_paper_rows(read_rows(RewardRow, rows), data)
    shared = f"--model_name {base} --max_length 512 --max_steps 2 --template_path {base}/chat_template.jinja"
    adapter = f"{shared} --train_batch_size 2 --val_batch_size 1 --accumulation_steps 2 --evaluation_steps 1"
    commands = {
        "sft": f"{adapter} --learning_rate 1e-3 --use_lora --sft_data_path {data} --checkpoint_dir sft",
        "rm": f"{adapter} --learning_rate 1e-3 --reward_data_path {data} --checkpoint_dir rm",
        "grpo": f"{shared} --policy_adapter_path sft/best-checkpoints --reward_adapter_path rm/best-checkpoints "
        "--learning_rate 1e-4 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
        f"--gradient_accumulation_steps 1 --grpo_data_path {data} --num_grpo_epochs 2 --use_lora_train_grpo "
        "--num_generations 4 --response_length 8 --min_spearman none --output_dir grpo",
    }
    for name, arguments in commands.items():
        config = SCRIPTS / f"accelerate_config_{name}.yaml"
        launcher = f"-m accelerate.commands.launch --config_file {config} --main_process_port 0"
        found = script(name, arguments, launcher=launcher, folder=tmp_path)
        assert found.returncode == 0, found.stderr[-4000:]
        assert found.stdout.strip().splitlines() == [str(Path(name) / "adapter")]
    assert (tmp_path / "grpo/best-checkpoints/adapter_model.safetensors").is_file()
    settings = json.loads((tmp_path / "grpo/settings.json").read_text())["settings"]
    assert (settings["prompts_per_step"], settings["num_generations"]) == (2, 4)
