"""Push and pull, by the real client over real sockets, against a stand-in of the hub."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from eval.__main__ import main as evaluate
from mamba2lm.hub.export import ExportConfig, export
from mamba2lm.hub.load import LoadConfig, load
from mamba2lm.hub.push import check_login, push
from mamba2lm.inference import load_run
from mamba2lm.schema import ConfigError
from tests.hub.models import config_of, model_of, tokenizer, write_run
from tests.hub.stand_in import TOKEN, StandIn, stand_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """Serve a hub, and make it the one that the client in this process knows."""
    with stand_in() as server:
        point_client_at(server.address, monkeypatch, tmp_path)
        yield server


def point_client_at(address: str, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Do to the client in this process what HF_ENDPOINT, HF_HOME and HF_TOKEN do to a new one."""
    patch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    # Xet is a service of its own beside the hub; without it files go over plain HTTP.
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("NO_PROXY", "127.0.0.1")


def tiny_export(tmp_path: Path) -> Path:
    """Return a folder exported to several files."""
    run = write_run(tmp_path / "run", model_of(config_of("MAM")), tokenizer())
    output = str(tmp_path / "out")
    return export(ExportConfig(checkpoint=str(run), output=output, max_shard_gb=4e-5))


def test_push_break_off_push_again_and_load_by_name(tmp_path: Path, hub: StandIn) -> None:
    folder = tiny_export(tmp_path)
    api = check_login("team/tiny")
    hub.fail_uploads_after = 1
    broke_off = r"^push_to='team/tiny': the upload to http.* broke off .*the same command sends"
    with pytest.raises(ConfigError, match=broke_off):
        push(api, folder, "team/tiny", private=True)
    assert hub.repositories["team/tiny"] == {}  # one commit, or none
    assert hub.private["team/tiny"]
    assert len(hub.uploads) == 1

    hub.fail_uploads_after = None
    # The same export again finds the folder done; the rest is sent, nothing twice.
    again = ExportConfig(checkpoint=str(tmp_path / "run"), output=str(folder), push_to="team/tiny")
    assert export(again) == folder
    address = push(api, folder, "team/tiny", private=True)
    assert address == f"{hub.address}/team/tiny"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repositories["team/tiny"] == files
    assert len(hub.uploads) == len(set(hub.uploads)) == len(list(folder.glob("*.safetensors")))

    # And down again, by name, into a run that is the one pushed.
    load(LoadConfig(source="team/tiny", output=str(tmp_path / "again")))
    assert load_run(tmp_path / "again").fingerprint == load_run(tmp_path / "run").fingerprint
    assert load_run("team/tiny").fingerprint == load_run(tmp_path / "run").fingerprint


def test_a_model_of_the_hub_or_of_transformers_is_evaluated(
    tmp_path: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_export(tmp_path)
    hub.repositories["team/tiny"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.private["team/tiny"] = False
    (tmp_path / "text.txt").write_text("It was then disclosed in the following manner.")
    monkeypatch.chdir(tmp_path)
    arguments = ["perplexity.sources=[text.txt]", "device=cpu", "dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["eval", "checkpoints=[team/tiny,out,run]", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate()
    assert ended.value.code in (None, 0)
    written = [tmp_path / "eval-team--tiny.json", tmp_path / "eval-out.json"]
    written.append(next((tmp_path / "run").rglob("eval-*.json"), tmp_path / "eval-run.json"))
    losses = [json.loads(path.read_text())["results"]["perplexity"] for path in written]
    assert losses[0] == losses[1] == losses[2]
    assert "team/tiny" in (tmp_path / "eval-report" / "report.md").read_text()


def test_a_bin_is_fetched_only_where_there_are_no_safetensors(tmp_path: Path, hub: StandIn) -> None:
    folder = tiny_export(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["pytorch_model.bin"] = b"not to be fetched"
    hub.repositories["user/both"], hub.private["user/both"] = files, False
    load_run("user/both")
    assert not [request for request in hub.requests if "pytorch_model" in request]


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("user/tiny", None, r"nobody is logged in: run `hf auth login`, or set HF_TOKEN"),
        ("user/tiny", "hf_wrong", r"the hub refuses the token"),
        ("other/tiny", TOKEN, r"the token belongs to user, who is not in other"),
        ("tiny", TOKEN, r"write it as user/model"),
        ("user/ti ny", TOKEN, r"is no hub name"),
    ],
)
def test_who_may_not_push_is_told(
    monkeypatch: pytest.MonkeyPatch, hub: StandIn, name: str, token: str | None, message: str
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=rf"^push_to='{name}': .*{message}"):
        check_login(name)
    assert not [request for request in hub.requests if request.startswith("POST")]


def nobody() -> str:
    """Return an address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_without_a_network_both_ways_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_client_at(nobody(), monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be reached .*Leave out push_to to write the"):
        check_login("user/tiny")
    with pytest.raises(ConfigError, match=r"^source='user/tiny': no such folder, and the hub did"):
        load(LoadConfig(source="user/tiny", output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_name_that_the_hub_does_not_have(tmp_path: Path, hub: StandIn) -> None:
    with pytest.raises(ConfigError, match=r"^source='user/none': no such folder, and the hub did"):
        load(LoadConfig(source="user/none", output=str(tmp_path / "run")))


def test_a_mistyped_run_does_not_ask_the_hub(tmp_path: Path, hub: StandIn) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=r"^checkpoint='runs/mien': no such folder; give"):
            load_run("runs/mien")
    assert hub.requests == []


@pytest.mark.slow
def test_the_commands_do_it_all(tmp_path: Path, hub: StandIn) -> None:
    write_run(tmp_path / "run", model_of(config_of("MM")), tokenizer())
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    pushed = command(
        *("-m", "mamba2lm.hub.export", f"checkpoint={tmp_path / 'run'}"),
        *(f"output={tmp_path / 'out'}", "push_to=team/tiny", "license=apache-2.0"),
    )
    assert pushed.returncode == 0, pushed.stderr
    assert "read back by transformers: largest difference of logits" in pushed.stderr
    assert b"license: apache-2.0" in hub.repositories["team/tiny"]["README.md"]
    for arguments in (
        ("generate.py", "checkpoint=team/tiny", "prompt=It was", "max_new_tokens=8"),
        ("-m", "eval", "checkpoint=team/tiny", "perplexity.max_tokens=300",
         f"output={tmp_path / 'eval.json'}"),
        ("-m", "mamba2lm.hub.load", "source=team/tiny", f"output={tmp_path / 'again'}"),
    ):  # fmt: skip
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
    assert load_run(tmp_path / "again").fingerprint == load_run(tmp_path / "run").fingerprint
    refused = command("-m", "mamba2lm.hub.load", "source=nowhere", f"output={tmp_path / 'x'}")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: source='nowhere': is no folder")
