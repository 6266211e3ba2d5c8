"""A reward model in this process, loaded on its own: an adapter with its base, or a whole classifier.

An adapter is merged into its base: a forward pass then costs what the base's does. Letters: B rows, T tokens,
D outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.llm.folders import quiet_loading, template_of
from sotopia_rl.serve.scoring import Asked, ChatEncoder, Encoded, Scores
from sotopia_rl.serve.vllm_command import reward_outputs
from sotopia_rl.train.adapters import check_base
from sotopia_rl.train.config import TrainerSettings
from sotopia_rl.train.folder import read_json
from sotopia_rl.train.loading import load_base, load_tokenizer
from sotopia_rl.train.prompt_once import last_states, whole_states
from sotopia_rl.train.reward_model import load_classifier


@dataclass(eq=False)
class LocalRewardModel:
    """A `RewardModel` on this machine's CPU or GPU."""

    model: Any
    encoder: ChatEncoder
    outputs: tuple[str, ...]
    max_batch_tokens: int

    @property
    def max_length(self) -> int:
        return self.encoder.max_length

    def encode(self, requests: Sequence[Asked]) -> list[list[Encoded]]:
        return self.encoder(requests)

    @torch.inference_mode()
    def score(self, pairs: Sequence[Encoded]) -> list[Scores]:
        scores: dict[Encoded, Scores] = {}
        for part in _parts(pairs, self.max_batch_tokens):
            scores.update(zip(part, map(tuple, self._score(part).tolist()), strict=True))
        return [scores[pair] for pair in pairs]

    def _score(self, pairs: Sequence[Encoded]) -> torch.Tensor:
        """[B, D] scores; a prompt is read once for all of its replies."""

        def read(**inputs: Any) -> torch.Tensor:
            states: torch.Tensor = self.model.base_model(**inputs).last_hidden_state
            return states

        device = self.model.device
        if len({prompt for prompt, _ in pairs}) == len(pairs):
            last_BH = whole_states(read, pairs, device=device)
        else:
            last_BH = last_states(read, pairs, config=self.model.config, device=device)
        scores_BD: torch.Tensor = self.model.score(last_BH).float()
        return scores_BD


def _parts(pairs: Sequence[Encoded], max_tokens: int) -> Iterator[list[Encoded]]:
    """Pairs by length, replies to one prompt together, in parts of at most `max_tokens` with their padding."""
    part: list[Encoded] = []
    widest = (0, 0)
    for pair in sorted(pairs, key=lambda pair: (len(pair[0]), pair[0], len(pair[1]))):
        wider = (max(widest[0], len(pair[0])), max(widest[1], len(pair[1])))
        if part and (len(part) + 1) * sum(wider) > max_tokens:
            yield part
            part, wider = [], (len(pair[0]), len(pair[1]))
        part.append(pair)
        widest = wider
    if part:
        yield part


def load_reward_model(
    path: Path,
    *,
    base: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_length: int = 4096,
    max_batch_tokens: int = 32_768,
) -> LocalRewardModel:
    """A reward model ready to score.

    Args:
        path: The adapter that `rm` wrote, or the folder of a sequence classifier.
        base: Of the adapter; the one that is noted beside it by default.
        max_length: Longest prompt and reply in tokens; less where the model's context is shorter.

    Raises:
        DataError: A folder is missing or holds something else.
        ConfigError: Its base is unknown, or there is no GPU where one is asked for.
        TrainingError: The adapter belongs to another base.
    """
    settings = TrainerSettings(device=device, dtype=dtype)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give the adapter that `sotopia-rl rm` wrote")
    with quiet_loading():
        if (path / "adapter_config.json").is_file():
            model, tokenizer = _load_adapter(path, base or adapter_base(path), settings)
        else:
            model, tokenizer = _load_whole(path, settings)
    context = getattr(model.config, "max_position_embeddings", None) or max_length
    return LocalRewardModel(
        model=model,
        encoder=ChatEncoder(tokenizer, min(max_length, context)),
        outputs=output_names(path, model.config.num_labels),
        max_batch_tokens=max_batch_tokens,
    )


def _load_adapter(path: Path, base: Path, settings: TrainerSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    outputs = reward_outputs(path)
    tokenizer = load_tokenizer(base, template_of(path))
    check_base(path, base, task="SEQ_CLS")
    classifier = load_classifier(base, tokenizer, settings, outputs=outputs)
    return PeftModel.from_pretrained(classifier, path).merge_and_unload().eval(), tokenizer


def _load_whole(path: Path, settings: TrainerSettings) -> tuple[Any, PreTrainedTokenizerBase]:
    if not (path / "config.json").is_file():
        raise DataError(f"{path}: neither an adapter (adapter_config.json) nor a model (config.json)")
    kinds = read_json(path / "config.json").get("architectures") or []
    if not any("SequenceClassification" in kind for kind in kinds):
        raise DataError(f"{path}: a {', '.join(kinds) or 'model of no known kind'}, not a reward model (no score head)")
    tokenizer = load_tokenizer(path)
    return load_base(path, tokenizer, settings, model_class=AutoModelForSequenceClassification).eval(), tokenizer


def adapter_base(path: Path) -> Path:
    """The base that is noted beside an adapter.

    Raises:
        ConfigError: None is, or it is not there any more.
    """
    note = path / "base.json"
    recorded = read_json(note)["path"] if note.is_file() else None
    name = recorded or read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not name or not Path(name).is_dir():
        raise ConfigError(f"{path}: its base {name or 'is not noted and'} is not there; name the folder with --base")
    return Path(name)


def output_names(path: Path, count: int) -> tuple[str, ...]:
    """Names of the outputs, from the report beside the reward model if there is one."""
    report = path / "report.json"
    names = tuple(str(output["name"]) for output in read_json(report)["outputs"]) if report.is_file() else ()
    if len(names) == count:
        return names
    return ("value",) if count == 1 else tuple(f"output_{index}" for index in range(count))
