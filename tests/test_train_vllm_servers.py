import time
from pathlib import Path

import pytest

from fake_vllm import EOS, WRONG, FakeVLLM
from sotopia_rl.errors import RolloutError
from sotopia_rl.train.vllm_servers import Completion, Request, Version, VLLMServers

GOOD = Completion([7, EOS], [-0.5, -0.25])


def servers(*fakes: FakeVLLM, **changes: float) -> VLLMServers:
    options = {"max_tokens": 8, "temperature": 1.0, "timeout_seconds": 5.0, "retries": 2, "backoff_seconds": 0.01}
    urls = tuple(fake.url for fake in fakes)
    return VLLMServers(urls=urls, eos_token_id=EOS, vocabulary=100, **{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture
def version(tmp_path: Path) -> Version:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1/adapter_model.safetensors").touch()
    return Version("run-000001-abc", tmp_path / "v1")


def requests(count: int, *, completions: int = 2) -> list[Request]:
    return [Request((10 + number, 11), completions) for number in range(count)]


def test_servers_share_the_prompts_and_the_answers_keep_their_order(version: Version) -> None:
    def sample(adapter: Path, prompt: list[int], request: dict[str, object]) -> tuple[list[int], list[float]]:
        return [prompt[0], EOS], [-1.0, -2.0]

    with FakeVLLM(sample=sample) as one, FakeVLLM(sample=sample) as other:
        both = servers(one, other)
        both.load(version)
        found = both.sample(version, requests(5), first=1)
    assert [[c.token_ids for c in group] for group in found] == [[[10 + n, EOS]] * 2 for n in range(5)]
    assert [request["prompt"][0] for request in other.requests] == [10, 12, 14]
    assert [request["prompt"][0] for request in one.requests] == [11, 13]


def test_sampling_leaves_no_default_to_the_server(version: Version) -> None:
    with FakeVLLM() as fake:
        servers(fake).load(version)
        servers(fake).sample(version, requests(1))
    sent = fake.requests[0]
    assert sent["model"] == version.name
    assert {name: sent[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty", "temperature")} == {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
    }
    assert "seed" not in sent, "vLLM 0.32 on CPUs dies of one"


@pytest.mark.parametrize(
    "fault", [name for name in WRONG if name != "no-ids"] + ["500", "503", "429", "closed", "html"]
)
def test_a_fault_that_passes_is_only_a_further_attempt(version: Version, fault: str) -> None:
    with FakeVLLM(faults=[fault, fault]) as fake:
        servers(fake).load(version)
        assert servers(fake).sample(version, requests(1)) == [[GOOD, GOOD]]
    assert len(fake.requests) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", r"HTTP 500: .*EngineCore encountered an issue.* \(after 3 attempts\)"),
        ("closed", "no connection"),
        ("html", "not JSON"),
        ("fewer", "gave 1 of 2 completions"),
        ("none", "gave 0 of 2 completions"),
        ("no-choices", "no completions in the answer"),
        ("other-model", "answered as 'base', asked for 'run-000001-abc'"),
        ("other-prompt", "answered another prompt"),
        ("empty", "sampled no tokens"),
        ("unknown-ids", "none of the vocabulary"),
        ("text-ids", "none of the vocabulary"),
        ("few-logprobs", "no log-probability for each of 2 tokens"),
        ("no-logprobs", "no log-probability for each of 2 tokens"),
        ("null-logprobs", "no log-probability for each of 2 tokens"),
        ("broken-off", r"broke off after 2 of 8 tokens \(length\)"),
        ("aborted", r"broke off after 2 of 8 tokens \(abort\)"),
    ],
)
def test_a_fault_that_stays_is_an_error_that_names_the_server(version: Version, fault: str, words: str) -> None:
    with FakeVLLM() as fine, FakeVLLM(faults=[fault] * 9) as broken:
        both = servers(fine, broken)
        both.load(version)
        with pytest.raises(RolloutError, match=words) as raised:
            both.sample(version, requests(2))
        assert broken.url in str(raised.value)


def test_a_server_that_gives_no_token_ids_is_not_asked_twice(version: Version) -> None:
    with FakeVLLM(faults=["no-ids"]) as fake:
        servers(fake).load(version)
        with pytest.raises(RolloutError, match=r"gives no token ids .*needs vLLM"):
            servers(fake).sample(version, requests(1))
    assert len(fake.requests) == 1


def test_a_refused_key_is_not_sent_again_and_its_variable_is_named(version: Version) -> None:
    with FakeVLLM(faults=["401"]) as fake:
        servers(fake).load(version)
        with pytest.raises(
            RolloutError, match=r"HTTP 401: .* \(key from SOTOPIA_RL_KEY_127_0_0_1_\d+, which is not set"
        ):
            servers(fake).sample(version, requests(1))
    assert len(fake.requests) == 1


def test_a_server_that_hangs_is_given_up_after_its_time(version: Version) -> None:
    with FakeVLLM(faults=["hang", "hang"]) as fake:
        patient = servers(fake, timeout_seconds=0.2, retries=1)
        patient.load(version)
        start = time.monotonic()
        with pytest.raises(RolloutError, match=r"no answer within 0.2 seconds \(after 2 attempts\)"):
            patient.sample(version, requests(1))
    assert time.monotonic() - start < 3


def test_a_dead_server_is_named(version: Version) -> None:
    with FakeVLLM() as fake:
        lone = servers(fake)
        lone.load(version)
    for call in (lambda: lone.sample(version, requests(3)), lambda: lone.load(version), lambda: lone.check(10)):
        with pytest.raises(RolloutError, match=fake.url):
            call()


def test_a_restarted_server_is_given_the_policy_again(version: Version) -> None:
    with FakeVLLM(faults=["restarted"]) as fake:
        servers(fake).load(version)
        assert servers(fake).sample(version, requests(1)) == [[GOOD, GOOD]]
    assert fake.loaded == [version.name] * 2


def test_versions_of_other_runs_are_left_alone(version: Version) -> None:
    with FakeVLLM() as fake:
        lone = servers(fake)
        for name in ("run-000000-old", "run-000001-abc", "other-000000-old", "partner"):
            lone.load(Version(name, version.path))
        lone.unload_others("run-", version)
        assert list(fake.adapters) == ["run-000001-abc", "other-000000-old", "partner"]
        lone.unload_others("run-", None)
        assert list(fake.adapters) == ["other-000000-old", "partner"]


def test_a_server_that_takes_no_adapters_is_refused_with_what_to_do(version: Version) -> None:
    with FakeVLLM(takes_adapters=False) as fake, pytest.raises(RolloutError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        servers(fake).load(version)


def test_a_folder_that_the_server_cannot_see_is_named(tmp_path: Path) -> None:
    with FakeVLLM() as fake, pytest.raises(RolloutError, match=f"cannot be found at .*can read {tmp_path}/nowhere"):
        servers(fake).load(Version("v", tmp_path / "nowhere"))


def test_a_context_too_short_is_found_before_the_first_prompt() -> None:
    with FakeVLLM(max_model_len=512) as fake:
        servers(fake).check(512)
        with pytest.raises(RolloutError, match=r"takes sequences of 512 tokens, .* is 513; start it with"):
            servers(fake).check(513)


def test_probabilities_from_before_the_temperature_are_found_out(version: Version) -> None:
    with FakeVLLM(raw_logprobs=True) as raw, FakeVLLM() as processed:
        for fake in (raw, processed):
            servers(fake).load(version)
        servers(processed, temperature=0.7).check_logprobs(version)
        servers(raw, temperature=1.0).check_logprobs(version)
        with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
            servers(raw, temperature=0.7).check_logprobs(version)
