"""The memory plan against the models that transformers builds, and against the documentation."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sotopia_rl.train.memory import CARDS, QWEN25_7B, SMOLLM2_135M, Shape, plan, table

ROOT = Path(__file__).parents[1]


def on_paper(shape: Shape) -> torch.nn.Module:
    """The model of that shape on the meta device: every parameter, no memory."""
    cls = Qwen2Config if shape.attention_bias else LlamaConfig
    config = cls(
        **shape.config_fields,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("shape", [QWEN25_7B, SMOLLM2_135M])
def test_parameters_are_counted_as_transformers_builds_them(shape: Shape) -> None:
    model = on_paper(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == shape.adapter_parameters(8)


def test_the_published_size_of_qwen_comes_out() -> None:
    assert QWEN25_7B.parameters == 7_615_616_512


def test_four_bits_pack_the_linear_maps_and_nothing_else() -> None:
    packed = QWEN25_7B.weight_bytes("nf4") - 2 * QWEN25_7B.other_parameters
    assert packed / QWEN25_7B.linear_parameters == pytest.approx(4.127 / 8, rel=1e-3)


@given(tokens=st.integers(1, 8192), rows=st.integers(1, 8), more=st.integers(1, 8))
def test_more_tokens_or_rows_never_take_less_and_checkpointing_never_more(tokens: int, rows: int, more: int) -> None:
    stages = ("sft", "rm", "grpo")
    for stage in stages:
        some = plan(QWEN25_7B, stage, precision="nf4", tokens=tokens, rows=rows)
        assert plan(QWEN25_7B, stage, precision="nf4", tokens=tokens + more, rows=rows).total >= some.total
        assert plan(QWEN25_7B, stage, precision="nf4", tokens=tokens, rows=rows + more).total >= some.total
        assert plan(QWEN25_7B, stage, precision="bfloat16", tokens=tokens, rows=rows).total > some.total
        kept = plan(QWEN25_7B, stage, precision="nf4", tokens=tokens, rows=rows, checkpointing=False)
        assert kept.total >= some.total


def test_qlora_grpo_at_paper_size_is_planned_under_40_gigabytes() -> None:
    assert plan(QWEN25_7B, "grpo", precision="nf4").total < 40e9 < CARDS["40 GB"]


def test_the_documented_plan_is_the_computed_one() -> None:
    assert table() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
