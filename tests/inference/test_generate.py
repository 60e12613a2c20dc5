"""``generate.py`` as a user runs it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import generate
from mamba2lm.inference import Engine, SamplingConfig, Session, load_run
from tests.inference import helpers
from tests.processes import run_program

SCRIPT = Path(generate.__file__)
PROMPT = "It is a truth, universally [acknowledged]: 'that' {a} = \"single\" man"
SPEED = r"prompt \d+ tokens, [\d,]+ tokens/s; text \d+ tokens, [\d,]+ tokens/s\n"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return helpers.write_run(folder, helpers.model("MA"), helpers.tokenizer())


def shell(
    *arguments: str, stdin: bytes = b"", cwd: Path | None = None, from_nothing: bool = False
) -> subprocess.CompletedProcess[bytes]:
    """Run the script in a process of its own, which imports what it needs or has it already."""
    if not from_nothing:
        return run_program("generate.py", *arguments, stdin=stdin, cwd=cwd, timeout=120)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
        timeout=120,
    )


def continuation(run_dir: Path, prompt: str, seed: int, **sampling: object) -> str:
    run = load_run(run_dir)
    assert run.tokenizer is not None
    (found,) = Engine(run.model, run.tokenizer).generate(
        [prompt],
        SamplingConfig(**sampling),  # type: ignore[arg-type]
        max_new_tokens=12,
        seeds=seed,
    )
    return found.text


def test_text_on_standard_output_and_speed_on_standard_error(run_dir: Path, tmp_path: Path) -> None:
    done = shell(
        f"checkpoint={run_dir}",
        f"prompt={PROMPT}",
        "max_new_tokens=12",
        "seed=5",
        cwd=tmp_path,
        from_nothing=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    expected = PROMPT + continuation(run_dir, PROMPT, 5) + "\n"
    assert done.stdout.decode() == expected
    assert re.fullmatch(SPEED, done.stderr.decode())
    assert list(tmp_path.iterdir()) == []


def test_standard_input_streamed_without_echo(run_dir: Path) -> None:
    done = shell(
        f"checkpoint={run_dir}", "max_new_tokens=12", "seed=2", "stream=true", "echo=false",
        "sampling.temperature=0", "sampling.repetition_penalty=1.5",
        stdin=b"She was \xe2\x80\x94\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    expected = continuation(run_dir, "She was —", 2, temperature=0.0, repetition_penalty=1.5)
    assert done.stdout.decode() == expected + "\n"
    assert re.fullmatch(SPEED, done.stderr.decode())


def test_a_mistake_is_one_line_and_exit_code_2(run_dir: Path) -> None:
    done = shell(f"checkpoint={run_dir}", "prompt=a", "sampling.temprature=1")
    assert done.returncode == 2
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert "sampling.temprature" in lines[0]
    assert "temperature" in lines[0].replace("temprature", "")


def test_interactive_keeps_the_state_between_turns(run_dir: Path) -> None:
    turns = "She was\n/hello\nEmma\n/reset\nShe was\n/quit\nnever read\n"
    done = shell(
        f"checkpoint={run_dir}", "interactive=true", "max_new_tokens=9", "sampling.temperature=0",
        stdin=turns.encode(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    run = load_run(run_dir)
    assert run.tokenizer is not None
    greedy = SamplingConfig(temperature=0.0)
    session = Session(Engine(run.model, run.tokenizer))
    one = session.say("She was", greedy, max_new_tokens=9).text
    two = session.say("\nEmma", greedy, max_new_tokens=9).text
    assert done.stdout.decode() == f"{one}\n{two}\n{one}\n"
    assert "no command /hello; known: /reset, /quit" in done.stderr.decode()


def run_inside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Run the script in this process, which costs no start; return code, output and errors."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(generate.quoted, arguments)])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_prompt_file_several_samples_and_stop(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = "She was — né\nEmma"
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf" + prompt.encode() + b"\r\n")
    code, out, err = run_inside(
        monkeypatch, capsys, f"checkpoint={run_dir}", f"prompt_file={tmp_path / 'prompt.txt'}",
        "max_new_tokens=12", "samples=2", "seed=8", "sampling.stop=['\\n', ', ']",
    )  # fmt: skip
    assert code == 0
    first, second = (continuation(run_dir, prompt, seed, stop=["\n", ", "]) for seed in (8, 9))
    assert out == f"{prompt}{first}\n\n{prompt}{second}\n"
    assert re.fullmatch(SPEED, err)


def test_text_that_follows_a_schema(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, null]}, "maxItems": 3}\n')
    code, out, err = run_inside(
        monkeypatch, capsys, f"checkpoint={run_dir}", "prompt=She", "echo=false", "seed=2",
        f"json_schema={schema}", "max_new_tokens=200",
    )  # fmt: skip
    assert code == 0, err
    assert set(json.loads(out)) <= {1, None}


def test_a_saved_state_continues(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        common = (f"checkpoint={run_dir}", "sampling.temperature=0", "echo=false")
        return run_inside(monkeypatch, capsys, *common, *arguments)

    state = tmp_path / "state"
    whole = run("prompt=She was", "max_new_tokens=20")[1]
    part = run("prompt=She was", "max_new_tokens=8", f"save_state={state}")[1]
    rest = run("prompt=", f"load_state={state}", "max_new_tokens=12")
    assert rest[0] == 0, rest[2]
    assert part[:-1] + rest[1] == whole
    other = helpers.write_run(tmp_path / "other", helpers.model("MA", seed=3), helpers.tokenizer())
    code, _, err = run_inside(
        monkeypatch, capsys, f"checkpoint={other}", "prompt=a", f"load_state={state}"
    )
    assert code == 2
    assert "saved from another model" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt="], "prompt='': is empty"),
        (["prompt=a", "prompt_file=b.txt"], "prompt_file='b.txt': prompt is given too"),
        (["prompt_file=none.txt"], "prompt_file='none.txt': cannot be read: No such file"),
        (["prompt_file=latin.txt"], "is not UTF-8: byte 0xe9 at offset 5; convert it"),
        (["prompt_file=empty.txt"], "prompt_file='empty.txt': is empty"),
        (["prompt=a", "max_new_tokens=-1"], "max_new_tokens=-1: must be ≥ 0"),
        (["prompt=a", "max_new_tokens=many"], "max_new_tokens='many': "),
        (["prompt=a", "sampling.temperature=-1"], "sampling.temperature=-1.0: must be"),
        (["prompt=a", "sampling.top_p=0"], "sampling.top_p=0.0: must be above 0"),
        (["prompt=a", "samples=2", "stream=true"], "stream=True: works on one text"),
        (["prompt=a", "sampling.regex='(a'"], "sampling.regex='(a': cannot be read"),
        (["prompt=a", "json_schema=none.json"], "json_schema='none.json': cannot be read: No such"),
        (["prompt=a", "json_schema=empty.txt"], "sampling.json_schema='': cannot be read: Expect"),
        (["prompt=a", "grammar=a", "sampling.regex=a"], "grammar='a': sampling.regex is given too"),
        (["prompt=a", "save_state=no/where"], "save_state='no/where': its folder does not exist"),
        (["prompt=a", "load_state=none"], "load_state='none': no such file"),
        (["prompt=a", "seed=-1"], "seed=-1: must be ≥ 0"),
        (["prompt=a", "device=toaster"], "device='toaster': cannot be used here"),
        (["prompt=a", "checkpoint=none"], "checkpoint='none': no such folder"),
        (["prompt=a", "checkpoint=recall"], "was trained without a tokenizer"),
        (["prompt=a", "checkpoint=damaged"], "checkpoint='damaged': all 1 checkpoints in it are"),
    ],
)
def test_mistakes_name_key_value_and_remedy(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"fianc\xe9e")
    (tmp_path / "empty.txt").write_bytes(b"")
    helpers.write_run(tmp_path / "recall", helpers.model("MM"), None)
    damaged = helpers.write_run(tmp_path / "damaged", helpers.model("MM"), None)
    with (damaged / "checkpoints" / "step_00000007" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.chdir(tmp_path)
    if not any(argument.startswith("checkpoint=") for argument in arguments):
        arguments = [f"checkpoint={run_dir}", *arguments]
    code, out, err = run_inside(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    errors = [line for line in err.splitlines() if "passing over a damaged" not in line]
    assert len(errors) == 1, err
    assert message in errors[0]


def test_no_checkpoint_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_inside(monkeypatch, capsys, "prompt=a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "checkpoint" in err


def test_any_prompt_survives_hydras_grammar() -> None:
    rng = random.Random(0)
    fixed = ["", "null", "1", "a, b", "'quoted'", "\\", "${x}", "\\${x}", "a\\'b", "é\n\t[=]{"]
    made = ["".join(rng.choices("ab'\"\\${},[]= \n:", k=rng.randint(0, 12))) for _ in range(500)]
    for prompt in fixed + made:
        override = OverridesParser.create().parse_override(generate.quoted(f"prompt={prompt}"))
        assert OmegaConf.create({"prompt": override.value()}).prompt == prompt
    assert generate.quoted("seed=1") == "seed=1"
    assert generate.quoted("prompt_file=a") == "prompt_file=a"


def test_escapes_in_stop_strings() -> None:
    assert generate.unescape(r"a\n\tb\\n\q") == "a\n\tb\\n\\q"
