"""Servers for tests: on a real socket, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from mamba2lm.inference import Engine
from mamba2lm.inference.app import Server
from mamba2lm.inference.config import ServeConfig
from mamba2lm.inference.server import http_server, listen
from mamba2lm.models import LanguageModel
from tests.inference import helpers

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Served:
    """A server that runs."""

    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60, **options
        )

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=60, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def numbers(self) -> dict[str, float]:
        """Return the metrics that have no labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        pairs = [line.split(" ") for line in lines if not line.startswith("#") and "{" not in line]
        return {name.removeprefix("mamba2lm_"): float(value) for name, value in pairs}

    def until_idle(self, seconds: float = 20.0) -> None:
        """Wait until nothing runs or waits."""
        deadline = time.monotonic() + seconds
        while any(
            self.numbers()[name] for name in ("running_rows", "reading_prompts", "waiting_prompts")
        ):
            assert time.monotonic() < deadline, self.numbers()
            time.sleep(0.02)


@contextlib.contextmanager
def serving(model: LanguageModel | None = None, **fields: Any) -> Iterator[Served]:
    """Serve a tiny model; ``fields`` are those of ``ServeConfig``."""
    config = ServeConfig(**{"checkpoint": "none", "port": 0, "drain_timeout": 1, **fields})
    config.validate()
    engine = Engine(
        model if model is not None else helpers.model("MA"),
        helpers.tokenizer(),
        prefill_chunk=config.prefill_chunk,
        max_rows=config.max_rows,
        state_cache_bytes=config.state_cache_mib << 20,
    )
    http = http_server(config, engine, "tiny")
    with listen(config) as sock:
        thread = threading.Thread(target=http.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not http.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield Served(http.server, sock.getsockname()[1])
        finally:
            http.handle_exit(signal.SIGTERM, None)
            thread.join(20)
            assert not thread.is_alive()
            assert not http.server.worker.alive
