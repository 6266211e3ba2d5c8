"""Training: packed against padded rows, one shared base against three models, shared against standalone rewards.

    python benchmarks/training.py             about a quarter of an hour on two CPU cores
    python benchmarks/training.py --steps 1   fewer steps per way of batching

Baseline and ours in one run. Rows have the lengths of SOTOPIA's: prompts that grow by a turn at a time, over talks of
different lengths. Tokens are counted without padding, those that rows share for each of them. SFT is measured on one
layer of Qwen2.5-7B's shape, whose other 27 are alike, and on a small model, where attention weighs more. Memory is
counted on PyTorch's meta device, so that the shape of Qwen2.5-7B costs nothing; the numbers are those of the modules
that GRPO trains with.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, Qwen2Config
from transformers.utils import logging

from sotopia_rl import sandbox
from sotopia_rl.dataset import RewardRow, SFTRow, read_rows, write_rows
from sotopia_rl.episode import Action, Turn
from sotopia_rl.models import Message
from sotopia_rl.observe import agent_prompt
from sotopia_rl.train.adapters import POLICY, REFERENCE, REWARD, RewardScorer, load_policy
from sotopia_rl.train.config import RewardModelSettings, SFTSettings, TinyModelSettings
from sotopia_rl.train.data import encode_rows, reply_text
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.reward_model import load_reward_model, predict, train_reward_model
from sotopia_rl.train.sft import train_sft
from sotopia_rl.train.tiny import tiny_model, tiny_tokenizer

SMALL = TinyModelSettings(
    vocabulary=600, hidden_size=384, layers=3, heads=6, key_value_heads=2, mlp_size=1024, context_length=8192
)
LAYER = SMALL.model_copy(
    update={"hidden_size": 3584, "layers": 1, "heads": 28, "key_value_heads": 4, "mlp_size": 18944}
)
SENTENCE = (
    "the lamp is yours if I may keep the old desk and we could share the cost of moving both of them on a day that "
    "suits you better than this one because my sister needs help with her move and I promised it"
)
BATCH = 4


def talks(count: int, rng: random.Random) -> list[RewardRow]:
    """Rows of talks that last 4 to 20 turns of 5 to 60 words, in the default prompts."""
    rows: list[RewardRow] = []
    for number, match in enumerate(sandbox.matches("train", count, seed=rng.randrange(1000))):
        said: list[Turn] = []
        for index in range(rng.randint(4, 20)):
            seat = 0 if index % 2 == 0 else 1
            text = " ".join(rng.choices(SENTENCE.split(), k=rng.randint(5, 60)))
            action = Action(action_type="speak", argument=text)
            rows.append(
                RewardRow(
                    prompt=(Message(role="user", content=agent_prompt(match, said, seat, profile="default")),),
                    completion=(Message(role="assistant", content=action.to_json()),),
                    episode_id=f"e{number}",
                    scenario_id=match.scenario.id,
                    turn=index,
                    seat=seat,
                    value=rng.uniform(0, 10),
                )
            )
            said.append(Turn(index=index, seat=seat, action=action))
    return rows


def make_base(rows: list[RewardRow], shape: TinyModelSettings, folder: Path) -> Path:
    """A random Llama, with a tokenizer that makes about three characters a token."""
    tokenizer = tiny_tokenizer([row.prompt[-1].content + row.completion[0].content for row in rows], shape.vocabulary)
    tiny_model(tokenizer, shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokens_per_second(rows: Path, base: Path, settings: SFTSettings, out: Path) -> tuple[float, float]:
    """(real tokens per second, seconds per step), the first step left out."""
    times: list[float] = []
    train_sft(rows, base, settings, out, progress=lambda _done, _total: times.append(time.perf_counter()))
    tokens = [line["num_tokens"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    seconds = times[-1] - times[0]
    return (tokens[-1] - tokens[0]) / seconds, seconds / (len(times) - 1)


def padding_factor(lengths: list[int], rng: random.Random) -> float:
    """Tokens with padding over tokens without it, in random batches."""
    mixed = rng.sample(lengths, len(lengths))
    batches = [mixed[start : start + BATCH] for start in range(0, len(mixed), BATCH)]
    return sum(len(batch) * max(batch) for batch in batches) / sum(lengths)


def packing(name: str, rows: Path, base: Path, *, steps: int, longest: int) -> None:
    """Padded as the baseline, the batch without padding, packed into rows of about the longest row, conversations."""
    shared = {"max_length": longest, "max_steps": steps + 1, "save_every": 1000, "held_out_share": 0.0}
    ways = {
        f"padded, {BATCH} rows (baseline)": {"batch_size": BATCH},
        f"padding_free, {BATCH} rows": {"batch_size": BATCH, "packing": "padding_free"},
        f"packed into {longest} tokens, 1": {"batch_size": 1, "packing": "packed"},
        "conversation, 1": {"batch_size": 1, "packing": "conversation"},
    }
    print(f"\n| SFT, {name} | tokens/s | s/step | against padded |\n|---|---|---|---|")
    baseline = 0.0
    for number, (way, chosen) in enumerate(ways.items()):
        settings = SFTSettings.model_validate({**shared, **chosen})
        speed, seconds = tokens_per_second(rows, base, settings, base.with_name(f"{base.name}-sft{number}"))
        baseline = baseline or speed
        print(f"| {way} | {speed:,.0f} | {seconds:.2f} | {speed / baseline:.2f} |", flush=True)


def adapter(task: str) -> LoraConfig:
    return LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules="all-linear")


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def memory(name: str, config: LlamaConfig | Qwen2Config, dtype: torch.dtype) -> None:
    """Bytes of parameters: policy, reference and reward model as three models, and as adapters of one base."""
    with torch.device("meta"):
        shared = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=dtype), adapter("CAUSAL_LM"), POLICY)
        shared.add_adapter(REFERENCE, adapter("CAUSAL_LM"))
        shared.add_adapter(REWARD, adapter("CAUSAL_LM"))
        alone = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=dtype), adapter("CAUSAL_LM"))
        config.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        reward = get_peft_model(classifier, adapter("SEQ_CLS"))
    head = 4 * config.hidden_size
    ours, three = parameter_bytes(shared) + head, 2 * parameter_bytes(alone) + parameter_bytes(reward)
    print(f"| {name} | {three / 1e9:.2f} | {ours / 1e9:.2f} | {three / ours:.2f} |")


def rewards(rows: Path, base: Path, scratch: Path) -> float:
    """Greatest difference between the shared base's rewards and those of the reward model on a base of its own."""
    settings = RewardModelSettings(learning_rate=3e-3, max_steps=3, batch_size=4, max_length=4096, held_out_share=0.05)
    trained = train_reward_model(rows, base, settings, scratch / "rm")
    sft = SFTSettings(learning_rate=3e-3, max_steps=1, batch_size=2, held_out_share=0.0)
    policy = train_sft(rows, base, sft, scratch / "policy")
    tokenizer = load_tokenizer(base)
    some = encode_rows(tokenizer, list(read_rows(SFTRow, rows))[:48], max_length=4096, reply=reply_text)
    scorer = RewardScorer(load_policy(base, policy, tokenizer, sft), trained, batch_size=7)
    shared = scorer.score([(row.prompt_ids, row.completion_ids) for row in some])
    model = load_reward_model(base, trained, tokenizer, settings)
    alone = torch.tensor(predict(model, some, tokenizer.pad_token_id, batch_size=4))
    return float((shared - alone).abs().max())


def hush() -> None:
    """Leave the libraries' bars and warnings out of the tables."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=2, help="measured steps per way of batching (default: %(default)s)"
    )
    parser.add_argument("--talks", type=int, default=24)
    args = parser.parse_args()
    hush()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = talks(args.talks, random.Random(0))
        rows = scratch / "rows.jsonl"
        base, layer = make_base(data, SMALL, scratch / "small"), make_base(data, LAYER, scratch / "layer")
        write_rows(data, rows)
        lengths = sorted(
            len(row.ids) for row in encode_rows(load_tokenizer(base), data, max_length=8192, reply=reply_text)
        )
        middle, most = statistics.median(lengths), padding_factor(lengths, random.Random(0))
        print(f"{len(data)} rows of {lengths[0]} to {lengths[-1]} tokens, median {middle:.0f}: ", end="")
        print(f"batches of {BATCH} are {most:.2f} times as long padded")
        print(f"{torch.get_num_threads()} threads; Python {sys.version.split()[0]}, torch {torch.__version__}")
        packing("one layer of Qwen2.5-7B", rows, layer, steps=args.steps, longest=lengths[-1])
        packing("5 million parameters", rows, base, steps=args.steps, longest=lengths[-1])
        print("\n| parameters of GRPO | three models, GB | shared base, GB | ratio |\n|---|---|---|---|")
        qwen = Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        smol = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        memory("SmolLM2-135M, float32", smol, torch.float32)
        memory("Qwen2.5-7B, bfloat16", qwen, torch.bfloat16)
        difference = rewards(rows, base, scratch)
        print(f"\nrewards, shared base against standalone, float32: greatest difference {difference:.1e}")


if __name__ == "__main__":
    main()
