"""Model and adapter folders: checked cheaply, without torch, before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sotopia_rl.errors import ConfigError


def check_model_folder(path: Path, *, kind: str = "") -> None:
    """Refuse what cannot be loaded.

    Args:
        kind: What stands before the folder in the model string that named it, `local/`; empty where none did.

    Raises:
        ConfigError: `path` is no folder with a transformers model and its tokenizer.
    """
    given = f"{kind}{path}"
    if not path.is_dir():
        raise ConfigError(f"{given}: no such folder; give a folder that holds a transformers model")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
        hint = f"write {kind}{base}:{path}" if kind else f"its base is {base}"
        raise ConfigError(f"{given}: this is an adapter, not a model; {hint}")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{given}: not a model folder (no config.json in it)")
    _read_json(path / "config.json")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ConfigError(f"{given}: not a model folder (no weights, *.safetensors, in it)")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{given}: not a model folder (no tokenizer, tokenizer.json, in it)")


def template_of(adapter: Path) -> Path | None:
    """The chat template saved with an adapter, if there is one."""
    file = adapter / "chat_template.jinja"
    return file if file.is_file() else None


def check_adapter(adapter: Path, base: Path, *, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM") -> str:
    """The base that `adapter` names as its own.

    Args:
        task: What it must have been made for: text (the policy) or classification (the reward model).

    Raises:
        ConfigError: It is no LoRA adapter for `task`, or one for another base than `base`.
    """
    if not adapter.is_dir():
        raise ConfigError(f"adapter {adapter}: no such folder")
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"adapter {adapter}: no adapter (it has no adapter_config.json)")
    config = _read_json(adapter / "adapter_config.json")
    if config.get("task_type") not in {task, None}:
        wanted = "text generation" if task == "CAUSAL_LM" else "scoring (it is no reward model)"
        raise ConfigError(f"adapter {adapter}: made for {config['task_type']}, not for {wanted}")
    recorded = str(config.get("base_model_name_or_path") or "")
    if recorded and not _same_base(Path(recorded), base):
        raise ConfigError(f"adapter {adapter} was trained on {recorded}, not on {base}")
    return recorded or "an unnamed base"


def _same_base(recorded: Path, base: Path) -> bool:
    """Whether two paths mean the same weights. A recorded base that is gone, or a hub name, goes by its last part."""
    if not recorded.is_dir():
        return recorded.name == base.resolve().name
    return recorded.resolve() == base.resolve() or _fingerprint(recorded) == _fingerprint(base)


def _fingerprint(folder: Path) -> str:
    """Digest of the weight files' sizes and of both ends of each, which tells two models apart in milliseconds."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(1 << 20))
            content.seek(max(0, size - (1 << 20)))
            digest.update(content.read(1 << 20))
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return data


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars: bars are the command line's to draw."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
