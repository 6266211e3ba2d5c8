from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from sotopia_rl.config import Config, load_config, parse_config
from sotopia_rl.errors import ConfigError


class Inner(Config):
    learning_rate: float = Field(default=1e-5, gt=0)
    max_steps: int = Field(default=10, gt=0)


class Outer(Config):
    inner: Inner = Field(default=Inner())
    name: str = Field(default="x")


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_merged_over_the_defaults(tmp_path: Path) -> None:
    config = load_config(Outer, written(tmp_path, "inner: {max_steps: 3}\n"))
    assert config == Outer(inner=Inner(max_steps=3))


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    assert load_config(Outer, written(tmp_path, "inner: {learning_rate: 1e-4}\n")).inner.learning_rate == 1e-4


def test_an_unknown_key_is_refused_with_the_near_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: inner\.max_step: unknown key, did you mean 'max_steps'\?"):
        load_config(Outer, written(tmp_path, "inner: {max_step: 3}\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inner: {max_steps: 0}\n", "inner.max_steps: Input should be greater than 0"),
        ("inner: {max_steps: many}\n", "inner.max_steps: Input should be a valid integer"),
        ("- a list\n", "expected a mapping of settings, found list"),
        ("inner: {max_steps\n", "not YAML"),
        ("name: x\ninner: {max_steps: 3}\nname: y\n", "not YAML (line 3: name stands there twice, first in line 1)"),
        ("inner:\n  max_steps: 3\n  max_steps: 3\n", "line 3: max_steps stands there twice, first in line 2"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Outer, written(tmp_path, text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_merged_into_a_mapping_may_stand_there_again(tmp_path: Path) -> None:
    mixed = "{<<: {max_steps: 3, learning_rate: 1}, max_steps: 4}"
    assert load_config(Outer, written(tmp_path, f"inner: {mixed}\n")).inner == Inner(max_steps=4, learning_rate=1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        load_config(Outer, tmp_path / "nowhere.yaml")


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"here: inner\.max_steps: .*; nam: unknown key, did you mean 'name'"):
        parse_config(Outer, {"inner": {"max_steps": -1}, "nam": "y"}, where="here")


def test_a_list_is_not_blamed_for_its_items() -> None:
    class Many(Config):
        inners: Annotated[tuple[Inner, ...], Field(min_length=1)]

    with pytest.raises(ConfigError) as error:
        parse_config(Many, {"inners": [{"max_step": 1}]}, where="here")
    assert str(error.value) == "here: inners.0.max_step: unknown key"


def test_equal_settings_have_equal_keys_and_others_do_not() -> None:
    assert Outer().key() == Outer(inner=Inner()).key()
    assert Outer().key() != Outer(name="y").key()
