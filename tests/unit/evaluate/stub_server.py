"""A local HTTP server in a thread that answers as a test tells it to and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(slots=True)
class Reply:
    """What the server sends: a JSON value or raw bytes, after `delay` seconds; `drop` closes without a word."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False


def chat(text: str) -> Reply:
    return Reply(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    )


def echo(prompt: list[int], *, logprob: float) -> Reply:
    logprobs = {"token_logprobs": [None, *[logprob] * (len(prompt) - 1)]}
    return Reply({"choices": [{"index": 0, "text": "", "logprobs": logprobs, "finish_reason": "length"}]})


class StubServer:
    """`behave(body, attempt)` gives the reply to a POST; `attempt` counts the tries of the same request from 1."""

    def __init__(self, behave: Callable[[dict[str, Any], int], Reply], models: tuple[str, ...]):
        self.behave = behave
        self.models = models
        self.asked: list[dict[str, Any]] = []
        self.attempts: Counter[str] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0
        self.lock = threading.Lock()
        self.base_url = ""

    def reply(self, body: dict[str, Any]) -> Reply:
        key = json.dumps(body, sort_keys=True)
        with self.lock:
            self.asked.append(body)
            self.attempts[key] += 1
            attempt = self.attempts[key]
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.behave(body, attempt)
            time.sleep(reply.delay)
            return reply
        finally:
            with self.lock:
                self.in_flight -= 1


@contextmanager
def stub_server(
    behave: Callable[[dict[str, Any], int], Reply], *, models: tuple[str, ...] = ("base", "aligned")
) -> Iterator[StubServer]:
    stub = StubServer(behave, models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            self.send({"data": [{"id": name} for name in stub.models]}, 200 if known else 404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = stub.reply(body | {"path": self.path, "headers": dict(self.headers)})
            if reply.drop:
                self.close_connection = True
                return
            self.send(reply.body, reply.status, reply.headers)

        def send(self, body: Any, status: int, headers: dict[str, str]) -> None:
            payload = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(payload))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class QuietServer(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that gave up waiting

    server = QuietServer(("127.0.0.1", 0), Handler)
    stub.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
