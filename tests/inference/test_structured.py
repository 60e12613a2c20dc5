from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mamba2lm.data import Tokenizer
from mamba2lm.inference import Engine, Request, SamplingConfig
from mamba2lm.inference import structured as module
from mamba2lm.inference.structured import Constraints
from mamba2lm.schema import ConfigError
from tests.inference import helpers
from tests.inference.serving import serving

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dög"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "legs", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
CONSTRAINED = (
    {"json_schema": json.dumps(SCHEMA)},
    {"regex": r"[A-Z][a-z]{2,5}( é[0-9]{2}){2}"},
    {"grammar": 'start: "(" start ")" | WORD\nWORD: /[ab]{1,9}/'},
)


def follows(given: dict[str, str], text: str) -> bool:
    if "regex" in given:
        return re.fullmatch(given["regex"], text) is not None
    if "grammar" in given:
        inner = text.strip("()")
        depth = text.count("(")
        return text == "(" * depth + inner + ")" * depth and bool(re.fullmatch("[ab]{1,9}", inner))
    value: Any = json.loads(text)
    return (
        set(value) == {"kind", "legs", "tags"}
        and value["kind"] in ("cat", "dög")
        and 0 <= value["legs"] <= 99
        and len(value["tags"]) <= 3
        and all(isinstance(tag, bool) for tag in value["tags"])
    )


def engine(pattern: str = "MA", **options: Any) -> Engine:
    return Engine(helpers.model(pattern), helpers.tokenizer(), prefill_chunk=32, **options)


@pytest.mark.parametrize("given", CONSTRAINED, ids=lambda given: next(iter(given)))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_follow_what_they_must(given: dict[str, str], temperature: float) -> None:
    built = engine()
    sampling = SamplingConfig(temperature=temperature, top_p=0.95, **given)
    found = built.generate(["It was", "She"] * 6, sampling, max_new_tokens=160)
    complete = [c for c in found if c.finish_reason in ("stop", "eos")]
    assert len(complete) > 6
    for completion in complete:
        assert follows(given, completion.text), completion.text


def test_a_constraint_changes_nothing_for_others_and_no_company_changes_its_text() -> None:
    free = [
        Request(helpers.tokenizer().encode(text), SamplingConfig(top_k=20), 40, seeds=[i, i + 9])
        for i, text in enumerate(("It was", "He said", "A truth"))
    ]
    bound = [
        Request(
            helpers.tokenizer().encode("Her answer"),
            SamplingConfig(temperature=1.2, repetition_penalty=1.3, **given),
            60,
            seeds=[3, 4],
            logprobs=2,
        )
        for given in CONSTRAINED
    ]
    alone = []
    for request in (*free, *bound):
        built = engine(sync_every=4)
        job = built.submit(request)
        built.run([job])
        alone.append(job.completions())
    built = engine(sync_every=4)
    jobs = [built.submit(request) for request in (*bound, *free)]
    built.run(jobs)
    together = [job.completions() for job in (*jobs[3:], *jobs[:3])]
    for mine, theirs in zip(together, alone, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one.text, one.token_ids, one.finish_reason) == (
                other.text, other.token_ids, other.finish_reason
            )  # fmt: skip
    # Log-probabilities are the model's own: not all of the likeliest tokens were allowed.
    tokens = [token for job in jobs[:3] for c in job.completions() for token in c.logprobs]
    assert any(token.token_id not in [i for i, _ in token.top] for token in tokens)
    assert not built.batch.slots


def test_a_free_batch_goes_back_to_whole_strides() -> None:
    built = engine(sync_every=8, max_rows=4)
    regex = SamplingConfig(regex="[a-z]{4}")
    job = built.submit(Request([5, 6], regex, 40))
    other = built.submit(Request([5, 7], SamplingConfig(), 60, ignore_eos=True))
    while not job.done:
        built.advance()
        assert built.batch.constrained != job.done
    steps = built.stats.steps
    built.advance()
    assert built.stats.steps == steps + 8
    built.run([other])


def test_a_constraint_that_cannot_go_on_fails_its_request_alone() -> None:
    built = engine(max_rows=4)
    job = built.submit(Request([5, 6], SamplingConfig(regex="[a-z]{40}"), 60))
    other = built.submit(Request([5, 7], SamplingConfig(), 30, ignore_eos=True))
    built.advance()
    built.advance()
    (constraint,) = job.constraints
    assert constraint is not None
    constraint.matcher.consume_token(helpers.tokenizer().encode("9")[0])
    built.run([job, other])
    assert isinstance(job.error, ConfigError)
    assert "cannot be followed" in str(job.error)
    assert len(other.completions()[0].token_ids) == 30
    assert not built.batch.slots


@pytest.mark.parametrize("tokenizer", [Tokenizer.of_bytes(), helpers.tokenizer()])
def test_masks_allow_exactly_what_may_follow(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size + 7
    constraints = Constraints(tokenizer, size)
    first, second = (constraints.begin(SamplingConfig(regex=r)) for r in ("[ab]+", "é"))
    assert first is not None
    assert second is not None
    assert not first.take(tokenizer.encode("a")[0])
    masks = constraints.masks([first, second])
    for mask_w, pattern, end in zip(masks, ("[ab]+", "é"), (True, False), strict=True):
        for token in range(size):
            bit = bool(mask_w[token // 32].item() >> (token % 32) & 1)
            data = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
            if token == tokenizer.eos_id:
                assert bit == end
            elif pattern == "é":
                assert bit == (bool(data) and "é".encode().startswith(data))
            else:
                assert bit == (re.fullmatch(b"[ab]+", data) is not None)


def test_a_constraint_of_any_size_is_followed() -> None:
    tokenizer = helpers.tokenizer()
    constraints = Constraints(tokenizer, tokenizer.vocab_size)
    for given in (
        {"regex": "(a{500}){500}"},
        {"json_schema": json.dumps({"enum": [*range(3000)]})},
    ):
        constraint = constraints.begin(SamplingConfig(**given))  # type: ignore[arg-type]
        assert constraint is not None
        (mask_w,) = constraints.masks([constraint])
        allowed = [i for i in range(tokenizer.vocab_size) if mask_w[i // 32].item() >> (i % 32) & 1]
        texts = {tokenizer.token_bytes(i).decode() for i in allowed}
        assert texts == {"a"} if "regex" in given else texts >= set("0123456789")


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"json_schema": "{"}, "Expecting"),
        ({"json_schema": '{"type": "animal"}'}, "animal"),
        ({"grammar": 'start: "a" end'}, "end"),
        ({"grammar": "x", "regex": "x"}, "regex is given too"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(given: dict[str, str], part: str) -> None:
    built = engine()
    with pytest.raises(ConfigError, match=part) as caught:
        built.submit(Request([1], SamplingConfig(**given), 5))
    assert caught.value.key == f"sampling.{next(iter(given))}"
    assert built.idle


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"mamba2lm\[structured\]"):
        engine().submit(Request([1], SamplingConfig(regex="a"), 5))


def test_the_server_answers_in_the_format_asked_for() -> None:
    with serving(max_rows=8, chat_template=None) as served:
        client = served.client()
        formats: tuple[dict[str, Any], ...] = (
            {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}},
            {"type": "regex", "regex": CONSTRAINED[1]["regex"]},
            {"type": "grammar", "grammar": CONSTRAINED[2]["grammar"]},
        )
        for asked, given in zip(formats, CONSTRAINED, strict=True):
            answer = client.completions.create(
                model="tiny", prompt="It was", max_tokens=200, seed=5, n=4,
                extra_body={"response_format": asked},
            )  # fmt: skip
            ended = [choice.text for choice in answer.choices if choice.finish_reason == "stop"]
            assert ended
            assert all(follows(given, text) for text in ended)
        streamed = client.completions.create(
            model="tiny", prompt="It was", max_tokens=200, seed=5, stream=True,
            extra_body={"response_format": formats[1]},
        )  # fmt: skip
        assert follows(CONSTRAINED[1], "".join(chunk.choices[0].text for chunk in streamed))
        for wrong, part in (
            ({"type": "regex", "regex": "(a"}, "unclosed"),
            ({"type": "json_schema", "json_schema": {"schema": {"type": 3}}}, "response_format"),
            ({"type": "regex", "regex": "a" * 20_001}, "at most 20000"),
            ({"type": "json_schema"}, "response_format"),
            ({"type": "xml"}, "response_format"),
        ):
            reply = served.post(
                "/v1/completions",
                content=json.dumps({"prompt": "x", "response_format": wrong}),
            )
            assert reply.status_code == 400, wrong
            assert part in reply.json()["error"]["message"]
            assert reply.json()["error"]["param"].startswith("response_format")
        served.until_idle()


def test_json_mode_of_a_chat(tmp_path: Any) -> None:
    from tests.inference.serving import TEMPLATE

    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    with serving(max_rows=8, chat_template=str(template)) as served:
        answer = served.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "One object."}], n=6, seed=1,
            max_tokens=300, temperature=0.7, response_format={"type": "json_object"},
        )  # fmt: skip
        texts = [c.message.content for c in answer.choices if c.finish_reason == "stop"]
        assert texts
        for text in texts:
            assert isinstance(json.loads(text or ""), dict)
