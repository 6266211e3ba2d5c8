import json
from pathlib import Path

import pytest
import yaml

from sotopia_rl.train.card import hub_id
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.folder import fingerprint
from sotopia_rl.train.grpo import train_grpo
from sotopia_rl.train.reward_model import train_reward_model
from training_rows import rows_file
from training_settings import GRPO, RM


def head_and_body(card: str) -> tuple[dict[str, object], str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_policy_says_what_it_comes_from(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    settings = GRPO.model_copy(update={"max_steps": 1})
    adapter = train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path / "my|run")
    head, body = head_and_body((adapter / "README.md").read_text())
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["sotopia-rl", "grpo", "lora"]}
    for origin in (base, sft_adapter, reward_adapter, rows):
        assert f"{origin} (" in body
        assert fingerprint(origin) in body
    assert "- rows: 96" in body
    assert "- episodes: 24" in body
    assert "| judge | not recorded |" in body
    assert "The gate was switched off." in body
    assert "| kl | 0 | 0 |" in body
    assert "my\\|run (grpo)" in body
    settings_block = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert GRPOSettings.model_validate(settings_block) == settings
    assert "transformers " in body


def test_a_reward_model_shows_its_report_and_who_judged(base: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "data")
    people = {"judge": "openai/gpt-4o", "annotator": "openai/gpt-4o-mini", "method": "direct"}
    (rows.parent / "provenance.json").write_text(json.dumps(people))
    adapter = train_reward_model(rows, base, RM.model_copy(update={"max_steps": 2}), tmp_path / "rm")
    head, body = head_and_body((adapter / "README.md").read_text())
    assert head["pipeline_tag"] == "text-classification"
    assert "| judge | openai/gpt-4o |" in body
    assert "| annotator | openai/gpt-4o-mini |" in body
    assert "| method | direct |" in body
    report = json.loads((adapter / "report.json").read_text())["outputs"][0]
    assert f"| value | {report['rows']} | {report['mse']:.4g} |" in body
    assert "rows held out, by whole episodes: " in body
    assert "the weights are those of step 2" in body


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/c/models--Qwen--Qwen2.5-7B-Instruct/snapshots/abc", "Qwen/Qwen2.5-7B-Instruct"),
        ("/models/Qwen2.5-7B-Instruct", None),
    ],
)
def test_a_base_from_the_hubs_cache_is_linked(path: str, name: str | None) -> None:
    assert hub_id(Path(path)) == name
