"""Where GRPO's completions come from: the model itself, or vLLM, beside the trainer or in its process.

Servers get the policy's adapter, not merged weights: a folder that appears by one rename, loaded by HTTP under a name
that holds the step and a hash of the weights. A name therefore never means two policies: not after a resume, not when
two runs share a server, and not in vLLM's prefix cache, which goes by name and path.

The trainer treats both kinds of vLLM alike: `sync_weights`, then `generate` (TRL's own seam, see `trl_grpo.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from sotopia_rl.errors import ConfigError, MissingExtraError, RolloutError
from sotopia_rl.llm.decode import Row, decode
from sotopia_rl.llm.prefill import PrefixStore
from sotopia_rl.train.adapters import POLICY, whole_state
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.folder import RunFolder, read_json
from sotopia_rl.train.loading import device_of
from sotopia_rl.train.processes import is_main
from sotopia_rl.train.vllm_servers import Request, Version, VLLMServers

logger = logging.getLogger(__name__)

KEPT_VERSIONS = 2
"""Published folders that are kept: a server that restarts during a step loads the present one again."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

Report = Callable[[str, float], None]
"""Takes a metric of the present step."""


def rollout_arguments(settings: GRPOSettings) -> dict[str, Any]:
    """Keyword arguments of TRL's config that say how completions are sampled and corrected for."""
    if settings.rollouts == "in_process":
        return {}
    correction: dict[str, Any] = {
        "vllm_importance_sampling_correction": settings.vllm_importance != "none",
        "vllm_importance_sampling_clip_max": settings.vllm_importance_cap,
    }
    if settings.vllm_importance != "none":
        correction["vllm_importance_sampling_mode"] = settings.vllm_importance
    if settings.rollouts == "vllm_server":
        return correction
    return correction | {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": settings.vllm_memory_share,
        "vllm_tensor_parallel_size": settings.vllm_tensor_parallel,
        "vllm_enable_sleep_mode": settings.vllm_sleep,
        "vllm_max_model_length": settings.max_prompt_length + settings.max_completion_length,
    }


def prepare_rollouts(
    settings: GRPOSettings, base: Path, sft_adapter: Path, tokenizer: PreTrainedTokenizerBase, run: RunFolder
) -> VLLMServers | None:
    """Find out, before a model is loaded, whether completions can be had as the settings say.

    The servers are given the SFT adapter for a moment: whether they take adapters of its rank, see the folder and
    answer with token ids shows only so.

    Returns:
        The servers; None where there are none to be asked.

    Raises:
        MissingExtraError: vLLM is to run in this process and is not installed.
        ConfigError: It would have to merge an adapter into quantised weights.
        RolloutError: A server does not answer, or not as it should; it is named.
    """
    if settings.rollouts == "vllm_colocate":
        _check_colocate(settings, base, tokenizer)
    if settings.rollouts != "vllm_server":
        return None
    servers = VLLMServers(
        urls=tuple(server_url(url) for url in settings.vllm_urls),
        eos_token_id=tokenizer.eos_token_id,
        vocabulary=max(len(tokenizer), int(read_json(base / "config.json").get("vocab_size", 0))),
        max_tokens=settings.max_completion_length,
        temperature=settings.temperature,
        timeout_seconds=settings.vllm_timeout_seconds,
        retries=settings.vllm_retries,
    )
    if is_main():
        _try_out(servers, settings, sft_adapter, PublishedPolicies.of(settings, run))
    return servers


def _try_out(servers: VLLMServers, settings: GRPOSettings, adapter: Path, published: PublishedPolicies) -> None:
    servers.check(settings.max_prompt_length + settings.max_completion_length)
    servers.unload_others(published.prefix, None)  # left by a run that was killed
    version = published.publish("start", lambda folder: _copy_adapter(adapter, folder))
    servers.load(version)
    if settings.vllm_importance != "none":
        servers.check_logprobs(version)
    probe = Request((servers.eos_token_id,), 1)
    replace(servers, max_tokens=1).sample(version, [probe] * len(servers.urls))
    servers.unload_others(published.prefix, None)


def _check_colocate(settings: GRPOSettings, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if settings.quantise != "none":
        raise ConfigError(
            "rollouts: vllm_colocate merges the adapter into the weights, which four-bit weights do not survive; "
            "use rollouts: vllm_server or in_process, or quantise: none"
        )
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    if len(tokenizer) > (rows := int(read_json(base / "config.json").get("vocab_size", len(tokenizer)))):
        raise ConfigError(
            f"{base}: a padding token was added ({len(tokenizer)} tokens, {rows} rows of embeddings), and vLLM's copy "
            "of the base has no room for it; use rollouts: vllm_server or in_process"
        )
    if device_of(settings).type == "cpu":
        _keep_weights_plain()


def _keep_weights_plain() -> None:
    """Have vLLM on a CPU calculate with weights as they are: those that it packs for oneDNN take no update.

    It packs them on CPUs with AVX-512. `_supports_onednn` is vLLM 0.32's own flag.
    """
    from vllm import _custom_ops  # noqa: PLC0415 - vLLM is optional

    _custom_ops._supports_onednn = False  # noqa: SLF001


def server_url(url: str) -> str:
    """The address with `/v1`, which the settings may leave out."""
    plain = url.rstrip("/")
    return plain if plain.endswith("/v1") else f"{plain}/v1"


def _copy_adapter(adapter: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)


@dataclass(frozen=True)
class PublishedPolicies:
    """A folder of policies that servers can read."""

    folder: Path
    prefix: str
    """Begins the name of each; no other run has it."""

    @classmethod
    def of(cls, settings: GRPOSettings, run: RunFolder) -> PublishedPolicies:
        """Those of a run: in its own folder, if the settings name no other."""
        own = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:8]
        return cls(settings.vllm_adapter_folder or run.path / "served", f"grpo-{own}-")

    def publish(self, label: str, save: Callable[[Path], object]) -> Version:
        """Write a policy; its folder is either whole or absent, and older ones go.

        Args:
            save: Writes an adapter into a folder that does not exist yet.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{self.prefix}part"
        shutil.rmtree(part, ignore_errors=True)
        save(part)
        digest = hashlib.sha256()
        for name in ADAPTER_FILES:
            digest.update((part / name).read_bytes())
        name = f"{self.prefix}{label}-{digest.hexdigest()[:12]}"
        target = (self.folder / name).resolve()
        if target.is_dir():  # the same weights: a resumed run, or no step since
            shutil.rmtree(part)
            target.touch()
        else:
            part.rename(target)
        for old in sorted(self.folder.glob(f"{self.prefix}*"), key=_age)[:-KEPT_VERSIONS]:
            shutil.rmtree(old, ignore_errors=True)
        return Version(name, target)

    def clear(self) -> None:
        """Remove them all."""
        for old in self.folder.glob(f"{self.prefix}*"):
            shutil.rmtree(old, ignore_errors=True)


def _age(folder: Path) -> int:
    return folder.stat().st_mtime_ns


@dataclass
class ServerRollouts:
    """Samples from vLLM servers, in the place of TRL's own vLLM backend.

    Every process samples completions for its own prompts; the first one publishes. What fails for one of them fails
    for all, so that none is left waiting for the others.
    """

    model: PeftModel
    accelerator: Accelerator
    servers: VLLMServers
    published: PublishedPolicies
    step: Callable[[], int]
    """Optimizer steps so far."""
    sync_every: int
    report: Report
    version: Version | None = None
    _published_at: int = field(default=0, repr=False)

    def sync_weights(self) -> None:
        """Publish the policy as it stands and have every server load it, if it is time to.

        Raises:
            RolloutError: A server does not take it; it is named.
        """
        step = self.step()
        if self.version is not None and step - self._published_at < self.sync_every:
            return
        with self._timed("sync_seconds"):
            weights = whole_state(self.model)  # a conversation between all processes
            self.version = self._on_first(lambda: self._publish(weights, step))
        self._published_at = step

    def generate(
        self, prompts: Sequence[Sequence[int]], images: object, num_generations: int, profiler: object
    ) -> tuple[Any, list[list[int]], list[list[list[float]]], None]:
        """Completions of `prompts`, one each, as TRL wants them: prompts, ids, probabilities [B][T][1], nothing.

        Raises:
            RolloutError: A server, here or of another process, gave no whole answer; it is named.
        """
        assert self.version is not None, "sync_weights comes first"
        requests = [Request(ids, len(list(same))) for ids, same in itertools.groupby(tuple(p) for p in prompts)]
        with self._timed("rollout_seconds"):
            failure = None
            try:
                groups = self.servers.sample(self.version, requests, first=self.accelerator.process_index)
            except RolloutError as error:
                failure = str(error)
            self._share([failure])
        sampled = [completion for group in groups for completion in group]
        return prompts, [c.token_ids for c in sampled], [[[value] for value in c.logprobs] for c in sampled], None

    def close(self) -> None:
        """Have the servers forget this run's policies, and remove their folders."""
        if self.accelerator.is_main_process:
            try:
                self.servers.unload_others(self.published.prefix, None)
            except RolloutError as error:  # the result stands; a server that is gone has forgotten them
                logger.info("%s", error)
            self.published.clear()

    def _publish(self, weights: dict[str, torch.Tensor], step: int) -> Version:
        def save(folder: Path) -> None:
            self.model.save_pretrained(
                folder, selected_adapters=[POLICY], state_dict=weights, save_embedding_layers=False
            )

        version = self.published.publish(f"{step:06d}", save)
        self.servers.load(version)
        self.servers.unload_others(self.published.prefix, version)
        return version

    def _on_first(self, action: Callable[[], Version]) -> Version:
        """What the first process makes, for all of them."""
        made: list[Any] = [None]
        failure = None
        if self.accelerator.is_main_process:
            try:
                made = [action()]
            except RolloutError as error:
                failure = str(error)
        self._share([failure])
        broadcast_object_list(made)
        version: Version = made[0]
        return version

    def _share(self, failure: list[str | None]) -> None:
        """Raise in every process what went wrong in one."""
        if found := [words for words in gather_object(failure) if words is not None]:
            raise RolloutError(found[0])

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.report(name, time.monotonic() - start)


@dataclass
class ColocatedRollouts:
    """TRL's vLLM in this process, with the frozen base left as it was.

    TRL merges the adapter into the base, copies the weights over and takes the adapter out again, which rounds: the
    base, and with it the reference and the reward model, would drift a little at every step. So the weights are kept
    in the machine's memory and put back, to the bit.
    """

    inner: Any
    """TRL's VLLMGeneration."""
    model: PeftModel
    report: Report
    _kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)

    def sync_weights(self) -> None:
        """Give vLLM the policy as it stands."""
        start = time.monotonic()
        if not self._kept:
            self._kept = [(weight, weight.to("cpu", copy=True)) for weight in _adapted(self.model)]
        self.inner.sync_weights()
        for weight, kept in self._kept:
            weight.copy_(kept)
        self.report("sync_seconds", time.monotonic() - start)

    def generate(self, **given: Any) -> Any:
        """As TRL's."""
        start = time.monotonic()
        found = self.inner.generate(**given)
        self.report("rollout_seconds", time.monotonic() - start)
        return found


def sample_here(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_tokens: Collection[int],
    max_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Token ids of one completion per prompt, each with the stop token that ended it, sampled by the model itself.

    By the loop that also plays matches (`llm/decode.py`): a prompt that stands there several times is read once,
    finished rows leave the batch, and nothing of a model's own generation settings (Qwen's top-k, say) comes in
    between. The random streams come from torch's global generator, whose state is kept in checkpoints.

    Args:
        model: A causal LM whose layers are plain attention.
    """
    seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
    rows = [
        Row(prompt, max_tokens, temperature, top_p=1.0, stream=random.Random(seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        decode(model, rows, pad_token=0, stop_tokens=stop_tokens, done=lambda _: None, store=PrefixStore(0))
    finally:
        model.train(training)
    return [row.tokens + ([] if row.stop_token is None else [row.stop_token]) for row in rows]


def _adapted(model: PeftModel) -> list[torch.Tensor]:
    """This process's part of the frozen weights that have an adapter."""
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    weights = [layer.weight.data for layer in layers]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
