"""Whatever comes over the socket, the answer is well formed and the server goes on."""

from __future__ import annotations

import gc
import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mamba2lm.inference.request import Job
from mamba2lm.inference.worker import Ticket
from tests.inference.serving import TEMPLATE, Served, serving

PATHS = ("/v1/completions", "/v1/chat/completions")
GOOD: dict[str, dict[str, Any]] = {
    PATHS[0]: {"prompt": "It is", "max_tokens": 2, "seed": 1},
    PATHS[1]: {"messages": [{"role": "user", "content": "It is"}], "max_tokens": 2, "seed": 1},
}
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stream", "stop",
    "stream_options", "presence_penalty", "frequency_penalty", "seed", "logprobs", "top_logprobs",
    "best_of", "echo", "suffix", "logit_bias", "user", "session", "top_k", "min_p", "typical_p",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "max_completion_tokens", "tools",
    "response_format", "nonsense",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**18, 10**40, -(10**40), 0.5, -0.5, 1e308, 1e-320, "", "a",
    "\x00", "é\u2028😀", "x" * 5000, [], [[]], [1], [-1], [10**30], ["a", 1], ["a"] * 40,
    [[1, 2], [3]], [499], [500], {}, {"a": {"b": [1]}}, {"type": "text"}, {"include_usage": 1},
    [{"role": "user"}], [{"role": 1, "content": "a"}], [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": "a", "x": 1}], [{"role": "system", "content": ""}] * 30,
)  # fmt: skip
BODIES = (
    b"", b"{", b"nul", b"[]", b"0", b'"a"', b"\xff\xfe", b"{}" * 2, b"[" * 100_000, b'{"a":' * 5000,
    b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a",}',
    b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "prompt": 5}', b"\x00" * 1000, b'{"prompt": "a", "stop": ["\\udfff"]}',
    b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    template = tmp_path_factory.mktemp("fuzz") / "chat.jinja"
    template.write_text(TEMPLATE)
    with serving(
        chat_template=str(template), max_rows=4, max_new_tokens=8, max_prompt_tokens=2000,
        body_timeout=1.0, session_mib=1, state_cache_mib=1,
    ) as running:  # fmt: skip
        yield running


def check(response: httpx.Response) -> None:
    """Assert an answer in the API's shape: a result, or an error that is the client's."""
    assert response.status_code in (200, 400, 404, 410, 413), response.text
    assert "Traceback" not in response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = response.text.strip().split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]" or "error" in json.loads(lines[-1][6:])
        return
    body = response.json()
    if response.status_code == 200:
        assert body["choices"]
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"]


def still_serves(served: Served) -> None:
    served.until_idle()
    for path in PATHS if served.server.template else PATHS[:1]:
        response = served.post(path, json=GOOD[path])
        assert response.status_code == 200
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert not served.server.worker._tickets


@pytest.mark.parametrize("path", PATHS)
def test_bodies_that_are_no_requests(served: Served, path: str) -> None:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for body in BODIES:
            response = client.post(path, content=body)
            check(response)
            assert response.status_code == 400
    still_serves(served)


def random_body(rng: random.Random, path: str) -> dict[str, Any]:
    body = dict(GOOD[path])
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    return body


def test_wrong_types_and_huge_values(served: Served) -> None:
    rng = random.Random(0)
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for _ in range(300):
            path = rng.choice(PATHS)
            response = client.post(path, content=json.dumps(random_body(rng, path)))
            check(response)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
    assert statuses[200] > 5
    assert statuses[400] > 100
    still_serves(served)


def test_every_field_with_every_value(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for field in ("max_tokens", "temperature", "n", "stop", "seed", "logprobs", "prompt"):
            for value in VALUES:
                check(client.post(PATHS[0], json={**GOOD[PATHS[0]], field: value}))
    still_serves(served)


def test_other_paths_and_methods(served: Served) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/" + "x" * 3000, 404),
        ("POST", "/v1/embeddings", 404),
        ("DELETE", "/v1/sessions/%00", 404),
    ):
        response = httpx.request(method, served.url + path)
        assert response.status_code == status, (method, path)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def raw(served: Served, data: bytes, *, wait: float = 5.0) -> bytes:
    """Send bytes; return what comes back until the server closes or is silent."""
    with served.connect() as connection:
        connection.settimeout(wait)
        received = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65_536):
                received += piece
        except (TimeoutError, ConnectionError):
            pass
    return received


def test_bytes_that_are_no_http(served: Served) -> None:
    rng = random.Random(1)
    for _ in range(10):
        answer = raw(served, rng.randbytes(200) + b"\r\n\r\n", wait=1.0)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    for header in (
        b"content-length: -5\r\n\r\n",
        b"content-length: " + b"9" * 30 + b"\r\n\r\n{}",
        b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"x: " + b"y" * 200_000 + b"\r\n\r\n",
    ):
        answer = raw(served, head + header, wait=2.0)
        assert answer == b"" or answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 431")
    still_serves(served)


def request_bytes(body: dict[str, Any], path: str = PATHS[0]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def test_clients_that_vanish(served: Served) -> None:
    rng = random.Random(2)
    data = request_bytes({**GOOD[PATHS[0]], "max_tokens": 8, "stream": True, "ignore_eos": True})
    for _ in range(40):
        connection = served.connect()
        connection.sendall(data[: rng.randint(1, len(data))])
        time.sleep(rng.choice([0.0, 0.005, 0.02]))
        if rng.random() < 0.5:
            # A reset, not a farewell.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    still_serves(served)


def test_slow_clients(served: Served) -> None:
    data = request_bytes(GOOD[PATHS[0]])
    with served.connect() as slow, served.connect() as late:
        late.sendall(data[:-5])
        for part in (data[:20], data[20:90], data[90:]):
            slow.sendall(part)
            time.sleep(0.1)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        answer = late.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 20
    still_serves(served)


def test_a_reader_that_never_reads_is_given_up() -> None:
    with serving(max_rows=2, max_new_tokens=10**6, request_timeout=1.5, max_choices=2) as running:
        body = {
            "prompt": "It", "max_tokens": 10**6, "stream": True, "ignore_eos": True, "n": 2,
            "logprobs": 20,
        }  # fmt: skip
        with running.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request_bytes(body))
            time.sleep(0.3)
            running.until_idle(30)
        still_serves(running)


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="reads Linux's /proc")
def test_nothing_grows(served: Served) -> None:
    def storm(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=served.url, timeout=30) as client:
            for _ in range(60):
                path = rng.choice(PATHS)
                check(client.post(path, content=json.dumps(random_body(rng, path))))
        data = request_bytes({**GOOD[PATHS[0]], "stream": True})
        for _ in range(15):
            with served.connect() as connection:
                connection.sendall(data[: rng.randint(1, len(data))])
        served.until_idle()

    storm(10)
    time.sleep(1.2)  # bodies that never came are given up
    before, tickets = resident(), alive(Ticket)
    for seed in range(3):
        storm(seed)
    deadline = time.monotonic() + 20
    while alive(Ticket) > tickets + 2 or alive(Job) > 4:
        assert time.monotonic() < deadline, (alive(Ticket), tickets, alive(Job))
        time.sleep(0.2)
    assert resident() - before < 30 << 20
    still_serves(served)
