"""The server as clients meet it: the real openai client and raw sockets, over TCP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mamba2lm.inference import Engine, Request, SamplingConfig, Session
from mamba2lm.schema import ConfigError
from tests.inference import helpers
from tests.inference.serving import TEMPLATE, Served, serving
from tests.inference.test_engine import alone

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def served(template: Path) -> Iterator[Served]:
    with serving(chat_template=str(template), max_rows=8, prefill_chunk=32) as running:
        yield running


@pytest.fixture(scope="module")
def offline() -> Engine:
    return Engine(helpers.model("MA"), helpers.tokenizer(), prefill_chunk=32, max_rows=8)


def error_of(caught: pytest.ExceptionInfo[openai.APIStatusError]) -> dict[str, Any]:
    body = caught.value.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "param", "code"}
    return body


def test_models_are_listed(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("huge")
    assert error_of(caught)["code"] == "model_not_found"


def test_a_completion_is_what_the_engine_gives(served: Served, offline: Engine) -> None:
    found = served.client().completions.create(
        model="tiny", prompt="It is a truth", max_tokens=14, temperature=0.9, top_p=0.9, seed=5,
        frequency_penalty=0.5, presence_penalty=-0.2, stop=["zz", "qq"],
        extra_body={"top_k": 50, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.1},
    )  # fmt: skip
    sampling = SamplingConfig(
        temperature=0.9, top_p=0.9, frequency_penalty=0.5, presence_penalty=-0.2,
        stop=["zz", "qq"], top_k=50, min_p=0.01, typical_p=0.95, repetition_penalty=1.1,
    )  # fmt: skip
    (expected,) = offline.generate(["It is a truth"], sampling, max_new_tokens=14, seeds=[5])
    (choice,) = found.choices
    assert choice.text == expected.text
    assert choice.finish_reason == {"length": "length"}.get(expected.finish_reason, "stop")
    assert choice.logprobs is None
    assert found.object == "text_completion"
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.token_ids)
    assert found.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)


def test_prompts_as_texts_and_as_tokens(served: Served) -> None:
    client, ids = served.client(), helpers.tokenizer().encode("She was")
    eos = helpers.tokenizer().eos_id

    def texts(prompt: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, seed=3)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    (one,) = texts("She was")
    assert texts([eos, *ids]) == [one]
    assert texts(["She was", "Emma", "She was"]) == [one, texts("Emma")[0], one]
    assert texts([[eos, *ids], [7, 8]])[0] == one


@pytest.mark.parametrize("stops", [None, [" th", "e"]])
def test_streamed_pieces_are_the_whole_text(served: Served, stops: list[str] | None) -> None:
    client = served.client()
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": ["She was", "Emma"], "max_tokens": 20, "seed": 11, "n": 2,
        "stop": stops, "logprobs": 2, "echo": True,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    texts, reasons, logprobs, usage = [""] * 4, [""] * 4, [[] for _ in range(4)], None
    chunks = 0
    for chunk in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            chunks += 1
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs is not None:
                assert choice.logprobs.token_logprobs is not None
                logprobs[choice.index] += choice.logprobs.token_logprobs
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert choice.text.startswith(["She was", "She was", "Emma", "Emma"][choice.index])
        assert reasons[choice.index] == choice.finish_reason
        assert choice.logprobs is not None
        assert logprobs[choice.index] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    assert chunks > 8
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_log_probabilities_of_echoed_prompts(served: Served, offline: Engine) -> None:
    ids = helpers.tokenizer().encode("It is a truth universally acknowledged")
    found = served.client().completions.create(
        model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = found.choices
    logprobs = choice.logprobs
    assert choice.text == "It is a truth universally acknowledged"
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    expected = alone(offline, Request(ids, max_new_tokens=0, prompt_logprobs=True))
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(
        [token.logprob for token in expected.prompt_logprobs], abs=1e-4
    )
    assert "".join(logprobs.tokens) == choice.text
    starts = [
        choice.text[o:].startswith(t)
        for o, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)
    ]
    assert all(starts)


def test_best_of_returns_the_likeliest(served: Served, offline: Engine) -> None:
    found = served.client().completions.create(
        model="tiny", prompt="She was", max_tokens=8, n=2, best_of=6, seed=20
    )
    request = Request(
        offline.prompt_ids("She was"),
        SamplingConfig(temperature=1.0),
        8,
        seeds=range(20, 26),
        logprobs=0,
    )
    candidates = alone(offline, request).completions()
    candidates.sort(key=lambda c: -sum(t.logprob for t in c.logprobs) / max(len(c.logprobs), 1))
    assert [choice.text for choice in found.choices] == [c.text for c in candidates[:2]]
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(len(c.token_ids) for c in candidates)


def test_a_chat_follows_the_template(served: Served, offline: Engine) -> None:
    messages: Any = [
        {"role": "system", "content": "Write as she did."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Of "}, {"type": "text", "text": "Emma."}],
        },
    ]
    client = served.client()
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=12, seed=4, n=2, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    text = "system: Write as she did.\nuser: Of Emma.\nassistant:"
    ids = helpers.tokenizer().encode(text)
    expected = alone(
        offline, Request(ids, SamplingConfig(temperature=1.0), 12, seeds=[4, 5], logprobs=2)
    ).completions()
    for choice, completion in zip(found.choices, expected, strict=True):
        assert choice.message.role == "assistant"
        assert choice.message.content == completion.text
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for mine, theirs in zip(choice.logprobs.content, completion.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert mine.bytes == list(helpers.tokenizer().token_bytes(theirs.token_id))
            assert len(mine.top_logprobs) == 2
    streamed, roles = "", []
    for chunk in client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, seed=4, stream=True
    ):
        (choice_chunk,) = chunk.choices
        streamed += choice_chunk.delta.content or ""
        roles.append(choice_chunk.delta.role)
    assert streamed == expected[0].text
    assert roles[0] == "assistant"
    with pytest.raises(openai.BadRequestError, match="no role wizard"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "wizard", "content": "hm"}],  # type: ignore[list-item]
        )


def test_a_conversations_past_is_not_read_again(served: Served) -> None:
    client = served.client()
    messages: Any = [{"role": "user", "content": "Something long enough to be worth keeping."}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, seed=1)
    reply = first.choices[0].message.content
    assert reply
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, seed=1)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached >= first.usage.prompt_tokens
    assert second.usage.prompt_tokens > cached


def test_a_model_without_a_template_says_so() -> None:
    with serving() as running, pytest.raises(openai.BadRequestError) as caught:
        running.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Good day"}]
        )
    assert error_of(caught)["code"] == "no_chat_template"


def test_sessions_keep_their_state(served: Served, offline: Engine) -> None:
    client, session = served.client(), Session(offline)
    for turn, text in enumerate(("It is a truth", " that she", "")):
        found = client.completions.create(
            model="tiny", prompt=text, max_tokens=7, seed=turn, extra_body={"session": "one"}
        )
        expected = session.say(text, SamplingConfig(temperature=1.0), max_new_tokens=7, seed=turn)
        assert found.choices[0].text == expected.text
    assert httpx.delete(f"{served.url}/v1/sessions/one").json()["deleted"] is True
    assert httpx.delete(f"{served.url}/v1/sessions/one").status_code == 404


def test_a_session_has_one_turn_at_a_time_and_may_have_to_leave() -> None:
    with serving(helpers.model("MM"), max_rows=4, max_new_tokens=100_000) as running:
        running.server.worker.session_bytes = budget = 6 * helpers.model("MM").new_state(1).nbytes
        client = running.client()

        def say(name: str, **options: Any) -> Any:
            asked = {"prompt": "It was", "max_tokens": 3, "extra_body": {"session": name}}
            return client.completions.create(model="tiny", **{**asked, **options})

        stream = say("busy", max_tokens=90_000, stream=True)
        next(iter(stream))
        with pytest.raises(openai.ConflictError):
            say("busy")
        assert httpx.delete(f"{running.url}/v1/sessions/busy").status_code == 409
        for i in range(12):
            say(f"s{i}")
        with pytest.raises(openai.APIStatusError) as caught:
            say("s0")
        assert caught.value.status_code == 410
        assert error_of(caught)["code"] == "session_gone"
        assert running.numbers()["session_bytes"] <= budget
        stream.close()
        running.until_idle()
        assert say("busy").choices
        assert httpx.delete(f"{running.url}/v1/sessions/s0").status_code == 200
        assert say("s0").choices


def test_many_clients_at_once_each_get_their_own(served: Served, offline: Engine) -> None:
    client = served.client()

    def ask(i: int) -> str:
        asked: dict[str, Any] = {
            "model": "tiny", "prompt": f"Chapter {i * 7}", "max_tokens": 5 + i % 20, "seed": i,
        }  # fmt: skip
        if i % 2:
            chunks = client.completions.create(**asked, stream=True)
            return "".join(choice.text for chunk in chunks for choice in chunk.choices)
        return client.completions.create(**asked).choices[0].text

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(32)))
    for i, text in enumerate(found):
        (expected,) = offline.generate(
            [f"Chapter {i * 7}"],
            SamplingConfig(temperature=1.0),
            max_new_tokens=5 + i % 20,
            seeds=[i],
        )
        assert text == expected.text
    served.until_idle()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_row(streamed: bool) -> None:
    with serving(max_rows=2, max_new_tokens=10**6) as running:
        body = json.dumps(
            {"prompt": "She", "max_tokens": 10**6, "stream": streamed, "ignore_eos": True}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with running.connect() as connection:
            connection.sendall(head.encode() + body)
            while running.numbers()["running_rows"] != 1:
                time.sleep(0.01)
            beside = running.client().completions.create(model="tiny", prompt="It", max_tokens=5)
            assert beside.usage is not None
        running.until_idle()
        assert running.numbers()["generated_tokens_total"] < 10**5


def test_what_does_not_fit_the_queue_is_refused() -> None:
    with serving(max_rows=1, max_waiting=2, max_new_tokens=10**6, max_choices=1) as running:
        client = running.client()
        streams = []
        endless: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 10**6}
        for _ in range(3):
            streams.append(
                client.completions.create(**endless, stream=True, extra_body={"ignore_eos": True})
            )
            while not (numbers := running.numbers())["running_rows"] + numbers[
                "waiting_prompts"
            ] >= len(streams):
                time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**endless)
        assert error_of(caught)["code"] == "server_busy"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        running.until_idle()
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def test_keys_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBA2LM_API_KEY", "a secret")
    with serving() as running:
        for key in ("wrong", "a secre", "a secret "):
            if key.strip() != "a secret":
                with pytest.raises(openai.AuthenticationError) as caught:
                    running.client(key).models.list()
                assert error_of(caught)["code"] == "invalid_api_key"
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert running.client("a secret").completions.create(model="tiny", prompt="a").choices


def test_limits_are_kept() -> None:
    with serving(
        max_body_bytes=2000, body_timeout=1.5, max_prompt_tokens=50, max_new_tokens=200_000,
        request_timeout=1.0, max_choices=3,
    ) as running:  # fmt: skip
        big = {"prompt": "a" * 3000}
        refused = running.post("/v1/completions", json=big)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        parts = (b'{"prompt": "' + b"a" * 500 for _ in range(10))
        assert running.post("/v1/completions", content=parts).status_code == 413
        with running.connect() as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{"
            )
            answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
        client = running.client()
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=[5] * 51)
        assert error_of(caught)["code"] == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="at most 200000"):
            client.completions.create(model="tiny", prompt="a", max_tokens=200_001)
        with pytest.raises(openai.BadRequestError, match="at most 3 choices"):
            client.completions.create(model="tiny", prompt="a", n=4)
        long: dict[str, Any] = {
            "model": "tiny", "prompt": "a", "max_tokens": 200_000,
            "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        with pytest.raises(openai.InternalServerError) as late:
            client.completions.create(**long)
        assert (late.value.status_code, error_of(late)["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="took too long"):
            for _ in client.completions.create(**long, stream=True):
                pass
        running.until_idle()


def test_a_request_that_fails_disturbs_nobody() -> None:
    import torch

    model = helpers.model("MA")
    with torch.no_grad():
        model.embedding.weight[499] = torch.nan
        model.lm_head.weight[499] = 0.0
    with serving(model, max_rows=4) as running:
        client = running.client()
        stream = client.completions.create(
            model="tiny", prompt="It is", max_tokens=40, seed=1, stream=True
        )
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt=[5, 499, 6], max_tokens=4)
        assert error_of(caught)["message"] == "The server made a mistake."
        text = "".join(choice.text for chunk in stream for choice in chunk.choices)
        again = client.completions.create(model="tiny", prompt="It is", max_tokens=40, seed=1)
        assert again.choices[0].text == text


def test_only_streams_have_gaps_between_deliveries(served: Served) -> None:
    gaps, firsts = "inter_token_seconds_count", "time_to_first_token_seconds_count"
    counts = []
    for stream in (None, False, True):
        if stream is not None:
            body = {"prompt": "She was", "max_tokens": 30, "ignore_eos": True, "stream": stream}
            assert served.post("/v1/completions", json=body).status_code == 200
        numbers = served.numbers()
        counts.append((numbers[gaps], numbers[firsts]))
    (before, first), (whole, second), (streamed, third) = counts
    assert whole == before
    assert streamed > before
    assert [second - first, third - second] == [1, 1]


def test_metrics_are_what_prometheus_reads(served: Served) -> None:
    served.client().completions.create(model="tiny", prompt="a", max_tokens=3)
    response = httpx.get(f"{served.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'[a-z_0-9]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? -?[0-9.e+]+')
    typed: set[str] = set()
    for line in response.text.splitlines():
        if line.startswith("# TYPE "):
            typed.add(line.split()[2])
        elif not line.startswith("# HELP "):
            assert sample.fullmatch(line), line
            name = re.split(r"[ {]", line)[0]
            assert name in typed or re.sub("_(bucket|sum|count)$", "", name) in typed
    assert 'mamba2lm_requests_total{endpoint="/v1/completions",status="200"}' in response.text
    assert "mamba2lm_time_to_first_token_seconds_count" in response.text


def test_the_documented_programs_run(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client, form, engine = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S
    )
    client = client.replace("http://127.0.0.1:8000", served.url).replace("quickstart", "tiny")
    names: dict[str, Any] = {}
    exec(compile(client, "serving.md", "exec"), names)
    half = len(names["text"]) // 2
    assert names["text"][:half] == names["text"][half:] != ""
    exec(compile(form.replace("quickstart", "tiny"), "serving.md", "exec"), names)
    choice = names["answer"].choices[0]
    assert choice.text.lstrip().startswith("{")
    assert choice.finish_reason == "length" or set(json.loads(choice.text)) == {"who", "age"}
    helpers.write_run(tmp_path / "runs" / "quickstart", helpers.model("MA"), helpers.tokenizer())
    monkeypatch.chdir(tmp_path)
    exec(compile(engine, "serving.md", "exec"), names)
    (completion,) = names["job"].completions()
    assert "".join(names["pieces"]) == completion.text != ""
    assert len(names["texts"]) == 2


def test_an_address_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"^port={port}: cannot be listened on"),
            serving(port=port),
        ):
            pass


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the server as a user does; give the process and its port."""
    folder = tmp_path_factory.mktemp("runs") / "austen"
    helpers.write_run(folder, helpers.model("MA"), helpers.tokenizer())
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mamba2lm.inference.server", f"checkpoint={folder}", "port=0",
            "max_new_tokens=100000",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    assert re.search(r"the model is on cpu \(\d+\.\d s\)$", line.strip()), line
    line = process.stderr.readline()
    found = re.search(r"serving austen on http://127\.0\.0\.1:(\d+)$", line.strip())
    assert found, line
    yield process, int(found[1])
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_sigterm_lets_what_runs_end(command: tuple[subprocess.Popen[str], int]) -> None:
    process, port = command
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60
    )
    whole = client.completions.create(model="austen", prompt="It is", max_tokens=400, seed=2)
    stream = client.completions.create(
        model="austen", prompt="It is", max_tokens=400, seed=2, stream=True
    )
    pieces = [next(iter(stream)).choices[0].text]
    process.send_signal(signal.SIGTERM)
    refused = False
    for chunk in stream:
        pieces += [choice.text for choice in chunk.choices]
        if not refused:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except ConnectionError:
                refused = True
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 100
    assert refused
    assert process.wait(30) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_threads_do_not_outlive_their_servers() -> None:
    with serving():
        assert any(thread.name == "engine" for thread in threading.enumerate())
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("engine") <= 1  # that of the module's own server
