"""One frozen base with several adapters: the policy, its reference and the reward model.

    default   the policy, trained
    ref       the reference policy, a frozen copy of the SFT adapter that TRL makes
    reward    the reward model, frozen; its head is kept outside the model

Three separate models would need almost three times the memory and give the same numbers. Letters: B rows of
a batch, T tokens, H hidden size, D outputs of the reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sotopia_rl.errors import DataError, TrainingError
from sotopia_rl.llm.folders import template_of
from sotopia_rl.train.config import TrainerSettings
from sotopia_rl.train.folder import fingerprint, read_json, write_json
from sotopia_rl.train.loading import load_base
from sotopia_rl.train.processes import is_main, weights_are_divided
from sotopia_rl.train.prompt_once import Pair, last_states

POLICY, REFERENCE, REWARD = "default", "ref", "reward"
BASE_NOTE = "base.json"
HEAD_KEY = "base_model.model.score.weight"
COMBINED = "value"
"""Name of a reward model's output where it has one for all dimensions."""


def write_base_note(adapter: Path, base: Path) -> None:
    """Note beside an adapter which base it belongs to; the main process does."""
    if is_main():
        write_json(adapter / BASE_NOTE, {"path": str(base), "fingerprint": fingerprint(base)})


def check_base(adapter: Path, base: Path, *, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> None:
    """Make sure that an adapter belongs to this base.

    Args:
        task: What it must have been made for: text (the policy) or scores (the reward model).

    Raises:
        DataError: There is no adapter in the folder, or one for another task.
        TrainingError: It was trained on another base; both are named.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise DataError(f"{adapter}: no adapter (it has no adapter_config.json)")
    if (made_for := read_json(adapter / "adapter_config.json").get("task_type")) not in {task, None}:
        wanted = "a policy" if task == "CAUSAL_LM" else "a reward model"
        raise DataError(f"{adapter}: not {wanted}; it was made for {made_for}")
    note = adapter / BASE_NOTE
    if note.is_file():
        trained_on = read_json(note)
        same, name = trained_on["fingerprint"] == fingerprint(base), trained_on["path"]
    else:  # not one of ours: all there is to go by is the name that PEFT wrote
        name = str(read_json(adapter / "adapter_config.json")["base_model_name_or_path"])
        same = Path(name).name == base.name
    if not same:
        raise TrainingError(f"{adapter}: the adapter was trained on the base {name}, not on {base}")


def saver(model: PreTrainedModel | PeftModel, *adapters: str) -> Callable[[Path], None]:
    """Saves a model's adapters, all or those that are named, or the whole model where it has none.

    Never with them the base's embeddings, which PEFT would add where a padding token made them longer. Every process
    calls it, and the main one writes: weights that are divided among them are put together first.
    """
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    if adapters:
        options["selected_adapters"] = list(adapters)

    def save(folder: Path) -> None:
        state = whole_state(model) if weights_are_divided() else None
        if is_main():
            model.save_pretrained(folder, **options, **({} if state is None else {"state_dict": state}))

    return save


def whole_state(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """The weights that are saved, whole and on the CPU, where FSDP or ZeRO-3 have divided them among the processes.

    Every process must call it: it is a conversation between all of them.
    """
    adapted = isinstance(model, PeftModel)
    parameters = model.named_parameters(remove_duplicate=False)
    return {
        name: _whole(parameter).cpu()
        for name, parameter in parameters
        if not adapted or "lora_" in name or "modules_to_save" in name
    }


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):  # DeepSpeed's mark
        import deepspeed  # noqa: PLC0415 - optional

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def check_template(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that a reward model was trained on prompts in the policy's chat template.

    Raises:
        TrainingError: It was trained with another one.
    """
    file = template_of(adapter)
    if file is not None and file.read_text(encoding="utf-8").strip() != str(tokenizer.chat_template).strip():
        raise TrainingError(
            f"{adapter}: the reward model was trained with another chat template than the policy's; "
            "train both with the same template_path"
        )


def load_policy(base: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase, settings: TrainerSettings) -> PeftModel:
    """The base with the policy's adapter, trainable. Errors as `check_base` and `load_base`."""
    check_base(adapter, base, task="CAUSAL_LM")
    model = load_base(base, tokenizer, settings)
    return PeftModel.from_pretrained(model, adapter, adapter_name=POLICY, is_trainable=True)


class RewardScorer:
    """The reward model as one more adapter of the policy's base.

    Scores go through the model's own forward pass, so that the hooks of DDP, FSDP or ZeRO run; a hook of
    ours takes the last hidden states on the way.
    """

    def __init__(self, model: PeftModel, adapter: Path, *, batch_size: int) -> None:
        """Add the adapter to `model`, frozen.

        Raises:
            DataError: The adapter has no head.
        """
        weights = load_peft_weights(str(adapter), device=str(model.device))
        if HEAD_KEY not in weights:
            raise DataError(f"{adapter}: not a reward model (it has no score head)")
        self.model = model
        self.head_DH = weights.pop(HEAD_KEY).float()
        self.outputs = output_names(adapter, len(self.head_DH))
        self.batch_size = batch_size
        config = LoraConfig.from_pretrained(str(adapter))
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
        model.add_adapter(REWARD, config)
        set_peft_model_state_dict(model, weights, adapter_name=REWARD)
        for name, parameter in model.named_parameters():
            if f".{REWARD}." in name:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """[B, D] scores of token ids of prompt and reply, read at each reply's last token.

        The number of passes goes by the number of pairs alone, never by which of them are equal: where the weights
        are divided among processes, each pass is a conversation between all of them.
        """
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), *map(tuple, pairs[i])))
        scores: list[torch.Tensor] = [torch.empty(0)] * len(pairs)
        with only_adapter(self.model, REWARD):
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                for place, found_D in zip(part, self._score([pairs[i] for i in part]).cpu(), strict=True):
                    scores[place] = found_D
        return torch.stack(scores)

    def _score(self, pairs: Sequence[Pair]) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def read(**inputs: Any) -> torch.Tensor:
            self.model(**inputs, logits_to_keep=1)
            return seen.pop()

        decoder = self.model.get_base_model().base_model
        hook = decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
        try:
            # where there is no reply at all, its last token is the prompt's
            whole = [(prompt, reply) if reply else (prompt[:-1], prompt[-1:]) for prompt, reply in pairs]
            last_BH = last_states(read, whole, config=self.model.config, device=self.model.device)
        finally:
            hook.remove()
        scores_BD: torch.Tensor = last_BH.float() @ self.head_DH.T.to(last_BH.device)
        return scores_BD


def output_names(adapter: Path, count: int) -> tuple[str, ...]:
    """Names of a reward model's outputs, from the report beside it; numbered where there is none."""
    report = adapter / "report.json"
    if report.is_file():
        return tuple(str(output["name"]) for output in read_json(report)["outputs"])
    return (COMBINED,) if count == 1 else tuple(f"{COMBINED}_{place}" for place in range(count))


@contextmanager
def only_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Run `model` in evaluation mode with adapter `name`, then put everything back as it was."""
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    active, training = model.active_adapter, model.training
    model.eval()
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(active)  # makes `active` trainable and every other adapter not
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
        model.train(training)
