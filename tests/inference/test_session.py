from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mamba2lm.inference import Engine, SamplingConfig, Session, load_run
from mamba2lm.schema import ConfigError
from tests.inference import helpers
from tests.processes import run_program

GREEDY = SamplingConfig(temperature=0.0)
FIRST, SECOND = "It is a truth", "\nEmma Woodhouse, handsome, clever, and rich,"


def engine(pattern: str = "MA", *, seed: int = 0) -> Engine:
    return Engine(helpers.model(pattern, seed=seed), helpers.tokenizer(), prefill_chunk=9)


@pytest.mark.parametrize("pattern", helpers.PATTERNS)
def test_a_conversation_is_one_text(pattern: str) -> None:
    built = engine(pattern)
    session = Session(built)
    one = session.say(FIRST, GREEDY, max_new_tokens=15)
    two = session.say(SECOND, GREEDY, max_new_tokens=15)
    assert one.finish_reason == two.finish_reason == "length"
    before = built.prompt_ids(FIRST) + one.token_ids + built.tokenizer.encode(SECOND)
    with torch.inference_mode():
        logits = built.model(torch.tensor([before + two.token_ids])).logits
    assert logits is not None
    best = logits[0].argmax(dim=-1).tolist()
    assert best[len(before) - 1 : -1] == two.token_ids
    assert best[len(built.prompt_ids(FIRST)) - 1 :][:15] == one.token_ids


def test_nothing_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine("MM")
    read: list[int] = []
    forward = type(built.model).forward

    def counted(self: torch.nn.Module, input_ids: torch.Tensor, *args: object, **kw: object):
        read.extend(input_ids[0].tolist())
        return forward(self, input_ids, *args, **kw)

    monkeypatch.setattr(type(built.model), "forward", counted)
    session = Session(built)
    one = session.say(FIRST, GREEDY, max_new_tokens=6)
    session.say(SECOND, GREEDY, max_new_tokens=6)
    # Of the first reply only the token that no step has fed.
    expected = built.prompt_ids(FIRST) + one.token_ids[-1:] + built.tokenizer.encode(SECOND)
    assert read == expected


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(repetition_penalty=1.4)])
def test_a_reply_cut_by_its_length_goes_on_as_if_it_had_not_been(sampling: SamplingConfig) -> None:
    sampling.temperature = 0.0
    whole = Session(engine()).say(FIRST, sampling, max_new_tokens=30)
    session = Session(engine())
    parts = [session.say(FIRST, sampling, max_new_tokens=12)]
    parts += [session.say("", sampling, max_new_tokens=size) for size in (0, 1, 17)]
    assert [token for part in parts for token in part.token_ids] == whole.token_ids


def test_reading_without_drawing() -> None:
    session = Session(engine())
    assert session.say(FIRST, GREEDY, max_new_tokens=0).token_ids == []
    found = session.say("", GREEDY, max_new_tokens=10)
    assert found.token_ids == Session(engine()).say(FIRST, GREEDY, max_new_tokens=10).token_ids


def test_a_reader_may_leave_in_the_middle() -> None:
    built = engine("MA")
    session = Session(built)
    pieces = session.stream(FIRST, GREEDY, max_new_tokens=30)
    shown = "".join(next(pieces) for _ in range(5))
    pieces.close()  # type: ignore[attr-defined]
    rest = session.say("", GREEDY, max_new_tokens=10)
    whole = Session(built).say(FIRST, GREEDY, max_new_tokens=40)
    assert whole.text.startswith(shown + rest.text)
    assert rest.text


def test_a_stopped_reply_ends_whole() -> None:
    session = Session(engine("MM"))
    shown = ""
    for i, piece in enumerate(session.stream(FIRST, GREEDY, max_new_tokens=1000)):
        shown += piece
        if i == 3:
            session.stop()
    assert session.last is not None
    assert session.last.finish_reason == "interrupted"
    assert session.last.text == shown
    assert 4 <= len(session.last.token_ids) < 20
    assert session.say("", GREEDY, max_new_tokens=5).finish_reason == "length"


def test_reset_forgets_everything() -> None:
    session = Session(engine("MA"))
    first = session.say(FIRST, GREEDY, max_new_tokens=10)
    session.reset()
    assert session.say(FIRST, GREEDY, max_new_tokens=10).token_ids == first.token_ids


CONTINUE = """
import sys
from mamba2lm.inference import Engine, SamplingConfig, Session, load_run
run = load_run(sys.argv[1])
session = Session(Engine(run.model, run.tokenizer))
session.load(sys.argv[2], run.fingerprint)
sampling = SamplingConfig(temperature=1.0, repetition_penalty=1.3)
found = session.say(sys.argv[3], sampling, max_new_tokens=25, seed=4)
sys.stdout.buffer.write(found.text.encode())
"""


def test_a_saved_conversation_continues_in_a_new_process(tmp_path: Path) -> None:
    folder = helpers.write_run(tmp_path / "run", helpers.model("MSWA"), helpers.tokenizer())
    run = load_run(folder)
    assert run.tokenizer is not None
    session = Session(Engine(run.model, run.tokenizer))
    sampling = SamplingConfig(temperature=1.0, repetition_penalty=1.3)
    session.say(FIRST, sampling, max_new_tokens=10, seed=1)
    session.save(tmp_path / "talk.state", run.fingerprint)
    expected = session.say(SECOND, sampling, max_new_tokens=25, seed=4).text
    found = run_program("-c", CONTINUE, str(folder), str(tmp_path / "talk.state"), SECOND)
    assert found.returncode == 0, found.stderr.decode()
    assert found.stdout.decode() == expected


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    mine, other = Session(engine()), Session(engine(seed=1))
    mine.say(FIRST, max_new_tokens=2)
    mine.save(tmp_path / "state", mine.engine.model.fingerprint())
    with pytest.raises(ConfigError, match="saved from another model"):
        other.load(tmp_path / "state", other.engine.model.fingerprint())
    with pytest.raises(ConfigError, match=r"^load_state=.*no such file"):
        mine.load(tmp_path / "none", mine.engine.model.fingerprint())


def test_a_state_that_is_no_conversation_is_refused(tmp_path: Path) -> None:
    session = Session(engine())
    fingerprint = session.engine.model.fingerprint()
    session.state.save(tmp_path / "state", fingerprint=fingerprint)
    with pytest.raises(ConfigError, match="holds a state but no conversation"):
        session.load(tmp_path / "state", fingerprint)


def test_nothing_to_read_is_refused() -> None:
    session = Session(engine("MM"))
    session.say(FIRST, GREEDY, max_new_tokens=3)
    session._pending = []  # as after a reply that ended with the separator
    with pytest.raises(ConfigError, match=r"^prompt='': is empty"):
        session.say("", GREEDY, max_new_tokens=3)
