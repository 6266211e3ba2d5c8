"""Every file for `accelerate launch` against accelerate's own loader and its own list of options."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[1]
FILES = {
    "configs/accelerate/one_gpu.yaml": "NO",
    "configs/accelerate/ddp.yaml": "MULTI_GPU",
    "configs/accelerate/fsdp2.yaml": "FSDP",
    "configs/accelerate/zero2.yaml": "DEEPSPEED",
    "configs/accelerate/zero3.yaml": "DEEPSPEED",
    "scripts/accelerate_config_sft.yaml": "MULTI_GPU",
    "scripts/accelerate_config_rm.yaml": "MULTI_GPU",
    "scripts/accelerate_config_grpo.yaml": "MULTI_GPU",
}


def test_every_file_is_listed_here() -> None:
    found = [*(ROOT / "configs/accelerate").glob("*.yaml"), *(ROOT / "scripts").glob("*.yaml")]
    assert {str(path.relative_to(ROOT)) for path in found} == set(FILES)


@pytest.mark.parametrize(("name", "kind"), FILES.items())
def test_accelerate_reads_the_file_and_knows_every_option(name: str, kind: str) -> None:
    config = load_config_from_file(str(ROOT / name))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type.value == kind
    options = {option.removeprefix("--") for a in launch_command_parser()._actions for option in a.option_strings}
    assert set(config.fsdp_config or {}) <= options
    assert set(config.deepspeed_config or {}) <= options


def test_fsdp_is_the_second_version_and_zero_has_its_stages() -> None:
    folder = ROOT / "configs/accelerate"
    assert load_config_from_file(str(folder / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    stages = [load_config_from_file(str(folder / f"zero{n}.yaml")).deepspeed_config["zero_stage"] for n in (2, 3)]
    assert stages == [2, 3]
