"""A random causal language model of a few thousand parameters, with a byte tokenizer and adapters, made in a moment."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path, *, seed: int = 0, hidden_size: int = 32, context: int = 512) -> Path:
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int, task_type: str = "CAUSAL_LM") -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type=task_type, target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def save_reward_adapter(base: Path, folder: Path, *, seed: int, outputs: int = 1) -> Path:
    """An adapter and a head, both random: it scores everything, and differently."""
    torch.manual_seed(seed)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the base has no head is known
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    logging.set_verbosity(level)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder
