"""Rollouts: completions for GRPO sampled by the trainer itself and by a vLLM server, in generated tokens per second.

    python benchmarks/rollouts.py                        SmolLM2, 16 prompts x 8 completions; half an hour on a core
    python benchmarks/rollouts.py --base MODEL_FOLDER    the same on a GPU, with any base

All sample from the same random LoRA adapter: transformers' generate, all completions in one batch, as TRL does it; the
trainer here, which reads each prompt once; the server by our client, prompts as token ids, the adapter loaded before.
Each engine samples a few tokens first to warm up. vLLM is looked for in .venvs/vllm (`make oracles ORACLES=vllm`), or
where --python says.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from sotopia_rl import sandbox
from sotopia_rl.episode import Action, Turn
from sotopia_rl.llm.open import resolve_model_folder
from sotopia_rl.models import Message
from sotopia_rl.observe import agent_prompt
from sotopia_rl.serve.vllm import VLLMServer
from sotopia_rl.serve.vllm_command import VLLMSettings, base_name
from sotopia_rl.train.adapters import POLICY, load_policy, write_base_note
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.data import prompt_token_ids
from sotopia_rl.train.folder import read_json
from sotopia_rl.train.loading import load_base, load_tokenizer
from sotopia_rl.train.rollout import PublishedPolicies, sample_here
from sotopia_rl.train.vllm_servers import Request, Version, VLLMServers

SETTINGS = GRPOSettings()
VLLM = Path(__file__).parents[1] / ".venvs/vllm/bin/python"


def prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Prompts in the middle of sandbox talks."""
    said = [
        Turn(index=index, seat=0 if index % 2 == 0 else 1, action=Action(action_type="speak", argument=text))
        for index, text in enumerate(("Hello! Shall we talk about it?", "Gladly. What do you have in mind?"))
    ]
    matches = sandbox.matches("train", count, seed=0)
    texts = [agent_prompt(match, said, 0, profile="compact") for match in matches]
    return [prompt_token_ids(tokenizer, [Message(role="user", content=text)]) for text in texts]


def random_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of rank 8 on all linear layers, near what SFT leaves in size."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(load_base(base, load_tokenizer(base), SETTINGS), config, adapter_name=POLICY)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    model.save_pretrained(folder)
    write_base_note(folder, base)
    return folder


def in_process(base: Path, adapter: Path, sequences: list[list[int]], length: int) -> tuple[int, float]:
    """(tokens, seconds) of a completion for each prompt, sampled as GRPO does."""
    tokenizer = load_tokenizer(base)
    model = load_policy(base, adapter, tokenizer, SETTINGS)
    stops = {tokenizer.eos_token_id}
    sample_here(model, sequences[:1], stop_tokens=stops, max_tokens=4, temperature=1.0)
    start = time.perf_counter()
    found = sample_here(model, sequences, stop_tokens=stops, max_tokens=length, temperature=1.0)
    seconds = time.perf_counter() - start
    return sum(map(len, found)), seconds


def by_generate(base: Path, adapter: Path, sequences: list[list[int]], length: int) -> tuple[int, float]:
    """(tokens, seconds) of one batch with a completion for each prompt, by transformers' `generate`."""
    tokenizer = load_tokenizer(base)
    model = load_policy(base, adapter, tokenizer, SETTINGS).eval()
    padded = tokenizer.pad({"input_ids": sequences}, padding_side="left", return_tensors="pt").to(model.device)

    @torch.no_grad()
    def generate(new: int, part: int) -> Any:
        return model.generate(
            input_ids=padded["input_ids"][:part],
            attention_mask=padded["attention_mask"][:part],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=new,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, padded["input_ids"].shape[1] :]

    generate(4, 1)
    start = time.perf_counter()
    found = generate(length, len(sequences))
    seconds = time.perf_counter() - start
    return int((found != tokenizer.pad_token_id).sum()), seconds


def served(servers: VLLMServers, version: Version, rows: Sequence[list[int]], count: int) -> tuple[int, float]:
    """(tokens, seconds) of all completions, asked for at once."""
    start = time.perf_counter()
    groups = servers.sample(version, [Request(tuple(row), count) for row in rows])
    seconds = time.perf_counter() - start
    return sum(len(completion.token_ids) for completion in itertools.chain(*groups)), seconds


def line(name: str, measure: Callable[[], tuple[int, float]], note: str = "") -> float:
    tokens, seconds = measure()
    print(f"| {name} | {tokens} | {seconds:.1f} | {tokens / seconds:.1f} | {note} |", flush=True)
    return tokens / seconds


def by_server(chosen: argparse.Namespace, base: Path, adapter: Path, rows: list[list[int]], scratch: Path) -> float:
    """Tokens/s of a server with the adapter, which is published and loaded as in training."""
    on_gpu, tokenizer = torch.cuda.is_available(), load_tokenizer(base)
    longest = max(len(row) for row in rows)
    settings = VLLMSettings(
        python=chosen.python,
        port=0,
        dtype="auto" if on_gpu else "float32",
        max_model_len=longest + chosen.max_tokens,
        max_loras=2,
        enforce_eager=not chosen.compile,
        cpu_cache_gigabytes=None if on_gpu else 4,
        logprobs="processed",
    )
    start = time.perf_counter()
    with VLLMServer(base, {}, settings, log=scratch / "vllm.log") as server:
        started = time.perf_counter() - start
        client = VLLMServers(
            (server.url,),
            tokenizer.eos_token_id,
            vocabulary=int(read_json(base / "config.json")["vocab_size"]),
            max_tokens=chosen.max_tokens,
            temperature=1.0,
            timeout_seconds=3600.0,
        )
        published = PublishedPolicies(scratch / "served", "bench-")
        start = time.perf_counter()
        version = published.publish("000000", lambda folder: shutil.move(adapter, folder))
        client.load(version)
        loaded = time.perf_counter() - start
        served(client, version, rows[:1], 1)
        note = f"start {started:.0f} s, adapter published and loaded in {loaded:.2f} s"
        theirs = line("vLLM server", lambda: served(client, version, rows, chosen.completions), note)
        plain = Version(base_name(base, settings), base)
        line("vLLM server, no adapter", lambda: served(client, plain, rows, chosen.completions), "for comparison")
    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--python", type=Path, default=VLLM, help="interpreter with vLLM")
    parser.add_argument("--only", choices=["generate", "in_process", "vllm_server"], help="one of the three")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile: slow to start, quicker afterwards")
    chosen = parser.parse_args()
    if chosen.python == VLLM and not VLLM.exists():
        print("skipped: no vLLM in .venvs/vllm (make oracles ORACLES=vllm installs it)")
        return

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    base = resolve_model_folder(chosen.base)
    tokenizer = load_tokenizer(base)
    rows = prompts(tokenizer, chosen.prompts)
    on_gpu = torch.cuda.is_available()
    lengths = [len(row) for row in rows]
    print(f"\n{base.name}, {chosen.prompts} prompts of {min(lengths)} to {max(lengths)} tokens x {chosen.completions}")
    print("\n| rollouts | tokens | seconds | tokens/s | |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = random_adapter(base, Path(scratch) / "adapter")
        sequences = [row for row in rows for _ in range(chosen.completions)]
        plainly = ours = 0.0
        if chosen.only in {None, "generate"}:
            plainly = line("transformers' generate", lambda: by_generate(base, adapter, sequences, chosen.max_tokens))
        gc.collect()
        if chosen.only in {None, "in_process"}:
            ours = line("in process", lambda: in_process(base, adapter, sequences, chosen.max_tokens))
        if chosen.only in {"generate", "in_process"}:
            return
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        theirs = by_server(chosen, base, adapter, rows, Path(scratch))
    if plainly and ours:
        print(f"\nin process against transformers' generate: {ours / plainly:.2f}")
    if ours:
        print(f"\nvLLM against in process: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
