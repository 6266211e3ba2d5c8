"""The best-of-N server against its own OpenAPI schema: what schemathesis thinks of, right and wrong requests alike."""

import itertools

import pytest
from hypothesis import HealthCheck, assume, given, settings

from faulty_server import FaultyServer, reply
from running_servers import BestOfNServer, ByLength
from sotopia_rl.episode import Action

QUESTIONS = ["POST /v1/chat/completions", "POST /v1/score"]
OPERATIONS = [*QUESTIONS, "GET /v1/models", "GET /healthz", "GET /metrics"]
RIGHT, WRONG = "positive", "negative"


@pytest.fixture(scope="module")
def schema():
    # takes seconds to import: not while tests are collected
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev)")
    numbers = itertools.count()
    with (
        FaultyServer([lambda _: reply(Action(action_type="speak", argument=str(next(numbers))).to_json())]) as policy,
        BestOfNServer(f"custom/p@{policy.url}", ByLength(), candidates=2, max_candidates=8) as server,
    ):
        yield schemathesis.openapi.from_url(server.url.removesuffix("/v1") + "/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "mode"), [(o, RIGHT) for o in OPERATIONS] + [(o, WRONG) for o in QUESTIONS])
def test_the_server_keeps_to_its_own_schema(schema, operation, mode):
    from schemathesis import GenerationMode

    method, path = operation.split()

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy(generation_mode=GenerationMode(mode)))
    def check(case):
        response = case.call()
        # contradictions that a schema cannot forbid
        assume("is above best_of" not in response.text and "at temperature 0" not in response.text)
        assume(response.status_code != 413)  # a refusal that schemathesis does not know
        case.validate_response(response)

    check()


def test_every_operation_is_fuzzed(schema):
    found = [result.ok() for result in schema.get_all_operations()]
    assert sorted(f"{operation.method.upper()} {operation.path}" for operation in found) == sorted(OPERATIONS)
