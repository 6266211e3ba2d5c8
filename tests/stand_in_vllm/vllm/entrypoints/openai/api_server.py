"""A program that is started, watched and spoken to as vLLM is, in milliseconds: what `serve/vllm.py` is tested with.

It takes vLLM's command line, knows adapters only by name, and does what STAND_IN says: `dies` while it starts,
`hangs` without answering, or serves. Before it dies with STAND_IN_STATUS (negative: of a signal) it writes
STAND_IN_LOG. The real vLLM is in the slow test.
"""

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--lora-modules", nargs="*", default=[])
arguments, _ = parser.parse_known_args()
adapters = dict(text.split("=", 1) for text in arguments.lora_modules)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, json.dumps(adapters).encode() if self.path == "/adapters" else b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("VLLM_API_KEY") not in {None, self.headers.get("Authorization", "").removeprefix("Bearer ")}:
            self.answer(401, b'{"error": "Unauthorized"}')
        elif self.path == "/v1/chat/completions":
            said = {"action_type": "speak", "argument": adapters.get(body["model"], body["model"])}
            choice = {"message": {"role": "assistant", "content": json.dumps(said)}, "finish_reason": "stop"}
            self.answer(
                200, json.dumps({"choices": [choice] * body.get("n", 1), "usage": {"prompt_tokens": 3}}).encode()
            )
        elif self.path == "/v1/load_lora_adapter":
            adapters[body["lora_name"]] = body["lora_path"]
            self.answer(200, b"Success: added.")
        elif adapters.pop(body["lora_name"], None) is None:
            self.answer(404, b'{"error": {"message": "The lora adapter cannot be found.", "code": 404}}')
        else:
            self.answer(200, b"Success: removed.")


sys.stderr.write("loading weights\nValueError: not enough memory for the cache\n")
if os.environ["STAND_IN"] == "dies":
    sys.stderr.write(os.environ.get("STAND_IN_LOG", ""))
    sys.stderr.flush()
    status = int(os.environ.get("STAND_IN_STATUS", "3"))
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)
if os.environ["STAND_IN"] == "hangs":
    time.sleep(60)
ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
