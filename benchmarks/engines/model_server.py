"""A local OpenAI-compatible model server that costs next to nothing, in a process of its own.

    python model_server.py PORT_FILE [--delay SECONDS] [--port PORT] [--replies COUNT]

Agents always speak, so that every episode takes its 20 turns, and `n` gets so many actions, each the next of the list;
judges get valid scores in the form that they asked for. The bodies are made once; the protocol is read by hand, because
a web framework would take more of the machine than the engines under test. `GET /calls` tells how many calls were
answered since the last time it was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from functools import cache, partial
from pathlib import Path

UTTERANCE = (
    "I see what you mean, and I would like us both to leave this room content. Could you live with it if we split "
    "the difference, and I take care of the delivery next week?"
)
DIMENSIONS = (
    "believability",
    "relationship",
    "knowledge",
    "secret",
    "social_rules",
    "financial_and_material_benefits",
    "goal",
)


def response(*replies: object) -> bytes:
    choices = [
        {"index": index, "message": {"role": "assistant", "content": json.dumps(reply)}, "finish_reason": "stop"}
        for index, reply in enumerate(replies)
    ]
    completion = 50 * len(choices)
    body = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "bench",
        "choices": choices,
        "usage": {"prompt_tokens": 1000, "completion_tokens": completion, "total_tokens": 1000 + completion},
    }
    return _http(json.dumps(body).encode())


def _http(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


REASON = "The agent keeps to its character, says why it wants what it wants, and listens."
PAIRS = {name: [REASON, 0] for name in DIMENSIONS}
OURS = {name: {"reasoning": REASON, "score": 0} for name in DIMENSIONS}
ACTIONS = [{"action_type": "speak", "argument": UTTERANCE}]
"""Given in turn."""
# By a word that only that judge's prompt holds; ours is what is left.
JUDGES = {
    b"agent_1_evaluation": response({"agent_1_evaluation": PAIRS, "agent_2_evaluation": PAIRS}),
    b"'evaluations' field": response({"evaluations": {"agent_1": PAIRS, "agent_2": PAIRS}}),
    b"": response({"agent_1": OURS, "agent_2": OURS}),
}


def different_action(number: int) -> dict[str, str]:
    """An action whose utterance no other number has."""
    return {"action_type": "speak", "argument": f"{UTTERANCE} Say {number}?"}


@cache
def actions(first: int, count: int) -> bytes:
    """The response that holds so many actions of the list, the first one again after the last."""
    return response(*(ACTIONS[(first + index) % len(ACTIONS)] for index in range(count)))


_N = re.compile(rb'"n": ?(\d+)')  # in a text its quotation marks have backslashes


class Connection(asyncio.Protocol):
    calls = 0
    given = 0
    """Actions."""

    def __init__(self, delay_seconds: float) -> None:
        self.delay_seconds = delay_seconds
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (head_end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:head_end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            end = head_end + 4 + length
            if len(self.buffer) < end:
                return
            body = bytes(self.buffer[head_end + 4 : end])
            del self.buffer[:end]
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /calls"):
            self.transport.write(_http(str(Connection.calls).encode()))
            Connection.calls = 0
            return
        Connection.calls += 1
        if b"You are at Turn #" in body:
            asked = _N.search(body)
            count = int(asked[1]) if asked else 1
            reply = actions(Connection.given % len(ACTIONS), count)
            Connection.given += count
        else:
            reply = next(reply for word, reply in JUDGES.items() if word in body)
        if self.delay_seconds:
            asyncio.get_running_loop().call_later(self.delay_seconds, self.write, reply)
        else:
            self.write(reply)

    def write(self, reply: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(reply)


async def serve(port_file: Path, delay_seconds: float, port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(Connection, delay_seconds), "127.0.0.1", port, backlog=4096)
    part = port_file.with_suffix(".part")
    part.write_text(str(server.sockets[0].getsockname()[1]))
    part.rename(port_file)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port_file", type=Path, help="where to write the port, once it listens")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--port", type=int, default=0, help="0 takes any")
    parser.add_argument("--replies", type=int, default=1, help="different utterances")
    arguments = parser.parse_args()
    ACTIONS.extend(different_action(number) for number in range(1, arguments.replies))
    asyncio.run(serve(arguments.port_file, arguments.delay, arguments.port))


if __name__ == "__main__":
    main()
