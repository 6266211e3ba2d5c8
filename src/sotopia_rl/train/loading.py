"""Loading of models and tokenizers, and the translation of our settings into trainer arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from sotopia_rl.errors import ConfigError, DataError, MissingExtraError
from sotopia_rl.train import processes
from sotopia_rl.train.config import AdapterSettings, TrainerSettings
from sotopia_rl.train.folder import RunFolder

NEW_NAME = "activation_checkpointing"
CHECKPOINTING = NEW_NAME if NEW_NAME in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
"""The option's name up to transformers 5.19, which is the newest that vLLM 0.32 installs beside."""


def device_of(settings: TrainerSettings) -> torch.device:
    """Where to train.

    Raises:
        ConfigError: The settings want a GPU and there is none.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, but torch sees no GPU; use device: auto or cpu")
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", processes.number_on_machine()) if on_gpu else torch.device("cpu")


def _placement(settings: TrainerSettings) -> torch.device | None:
    """Where to load weights; FSDP and ZeRO-3 place them themselves."""
    return None if processes.weights_are_divided() else device_of(settings)


def dtype_of(settings: TrainerSettings) -> torch.dtype:
    """What frozen weights are held in."""
    if settings.dtype == "auto":
        return torch.float32 if device_of(settings).type == "cpu" else torch.bfloat16
    return torch.float32 if settings.dtype == "float32" else torch.bfloat16


def load_tokenizer(folder: Path, template: Path | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template and with a padding token of its own.

    Where padding and end of sequence share a token, pooling at the last token that is no padding would
    not see whether a reply ended; another special token that the chat template does not use takes over.

    Args:
        template: Jinja file with a chat template that takes the place of the tokenizer's own.

    Raises:
        DataError: The folder holds no tokenizer, or one without chat template or end token.
        ConfigError: The template cannot be read, or does not render a conversation.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: not a model folder (it has no config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: holds no tokenizer ({_first_line(error)})") from error
    if template is not None:
        tokenizer.chat_template = read_template(template, tokenizer)
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: the tokenizer has no chat template; give one with template_path")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": _unused_special_token(tokenizer)})
    return tokenizer


def read_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template from a Jinja file, tried on a short conversation.

    Raises:
        ConfigError: It cannot be read, it fails, or what it renders lacks the conversation.
    """
    try:
        template = path.read_text(encoding="utf-8")
        chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        text = str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template_path {path}: cannot be read ({_first_line(error)})") from error
    except TemplateError as error:
        raise ConfigError(f"template_path {path}: not a working chat template ({_first_line(error)})") from error
    if "one" not in text or "two" not in text:
        raise ConfigError(f"template_path {path}: leaves messages out (of two, it renders {text[:60]!r})")
    return template


def _unused_special_token(tokenizer: PreTrainedTokenizerBase) -> str:
    used = (tokenizer.eos_token, tokenizer.bos_token)
    free = [
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and str(token) not in used and str(token) not in str(tokenizer.chat_template)
    ]
    if not free:
        return "<|pad|>"  # a new token; `load_base` makes room for it
    return next((token for token in free if "pad" in token or "endoftext" in token), free[0])


def load_base(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainerSettings,
    *,
    model_class: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """The base model, agreed with its tokenizer on padding.

    Args:
        model_class: A transformers auto class; the causal language model by default.
        options: Handed to its `from_pretrained`.

    Raises:
        DataError: The folder is missing or holds no model.
        ConfigError: The settings want a GPU and there is none.
        MissingExtraError: They want four bits and bitsandbytes is not installed.
    """
    if getattr(settings, "quantise", "none") == "nf4":
        options["quantization_config"] = _nf4(dtype_of(settings))
    if settings.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ConfigError("attention: flash_attention_2 needs a GPU and pip install flash-attn; or use attention: sdpa")
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model folder (it has no config.json)")
    if settings.attention != "auto":
        options["attn_implementation"] = settings.attention
    loader = model_class or AutoModelForCausalLM
    try:
        model = loader.from_pretrained(
            folder, dtype=dtype_of(settings), local_files_only=True, device_map=_placement(settings), **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: the model cannot be loaded ({_first_line(error)})") from error
    _keep_four_bits_plain(model)
    _make_room(model, len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:  # classifiers have none
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _keep_four_bits_plain(model: PreTrainedModel) -> None:
    """Keep bitsandbytes 0.50 from packing four-bit weights for CPUs with AVX512-BF16.

    It does so where no gradient is asked for, as in rollouts, and has none for packed weights when it is asked later.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _make_room(model: PreTrainedModel, tokens: int) -> None:
    """Lengthen the embeddings to `tokens` rows where they are shorter.

    A new row is the mean of the old ones, the same at every loading. As an output its token is less likely than
    1 in `tokens`, whatever the context: the logarithm is concave.
    """
    old = model.get_input_embeddings().num_embeddings
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            layer.weight.data[old:] = layer.weight.data[:old].mean(dim=0)


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep transformers' warnings out where one is expected."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _nf4(compute_dtype: torch.dtype) -> Any:
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "qlora")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def lora_config(settings: AdapterSettings, task_type: str) -> LoraConfig:
    """The adapter that the settings describe."""
    return LoraConfig(
        task_type=task_type,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_targets) or "all-linear",
    )


def trainer_arguments(settings: TrainerSettings, run: RunFolder, *, evaluate: bool) -> dict[str, Any]:
    """Keyword arguments that every trainer's config takes.

    Logging, saving and progress are done by `callbacks.py`. A step is logged each time, so that nothing
    logged hangs on steps before a checkpoint.
    """
    on_cpu = device_of(settings).type == "cpu"
    evaluation = {"eval_strategy": "steps", "eval_steps": getattr(settings, "eval_every", 0)} if evaluate else {}
    return {
        "output_dir": str(run.checkpoints),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        **duration(settings),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size * (2 if evaluate else 1),
        "gradient_accumulation_steps": getattr(settings, "accumulation", 1),
        CHECKPOINTING: getattr(settings, "gradient_checkpointing", False),
        "use_cpu": on_cpu,
        "ddp_find_unused_parameters": False,  # whatever trains has a part in every loss
        "bf16": not on_cpu and dtype_of(settings) is torch.bfloat16,
        "fp16": False,
        "dataloader_pin_memory": not on_cpu,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
        **evaluation,
    }


def duration(settings: TrainerSettings) -> dict[str, float]:
    """How long to train and to warm up, as transformers takes it: by epochs where they are given, else by steps."""
    if settings.num_epochs is None:
        warmup = round(settings.warmup_share * settings.max_steps)
        return {"max_steps": settings.max_steps, "warmup_steps": warmup}
    return {"max_steps": -1, "num_train_epochs": settings.num_epochs, "warmup_steps": settings.warmup_share}


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
