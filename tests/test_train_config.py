import pytest

from sotopia_rl.config import parse_config
from sotopia_rl.errors import ConfigError
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings, TinyModelSettings


@pytest.mark.parametrize(
    ("cls", "data", "words"),
    [
        (GRPOSettings, {"batch_size": 7}, "batch_size 7 must divide"),
        (GRPOSettings, {"invalid_reward": 0}, "less than 0"),
        (GRPOSettings, {"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        (SFTSettings, {"tuning": "full", "quantise": "nf4"}, "cannot train quantised weights"),
        (RewardModelSettings, {"held_out_share": 1.0}, "less than 1"),
        (TinyModelSettings, {"hidden_size": 130}, "divisible by heads"),
        (TinyModelSettings, {"max_length": 4096}, "above context_length"),
    ],
)
def test_impossible_settings_are_named(cls: type, data: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(cls, data, where="test")


def test_every_setting_is_explained_or_speaks_for_itself() -> None:
    plain = {"learning_rate", "weight_decay", "hidden_size", "layers", "heads", "key_value_heads", "mlp_size"}
    plain |= {"lora_dropout", "schedule", "max_steps", "batch_size", "save_every", "prompts_per_step"}
    plain |= {"temperature", "min_validity"}
    for cls in (TinyModelSettings, SFTSettings, RewardModelSettings, GRPOSettings):
        silent = {name for name, field in cls.model_fields.items() if not field.description}
        assert silent <= plain
