"""Serve streaming clients of mixed lengths and compare with the same requests offline.

    python -m benchmarks.serving --preset mamba2_130m --out results.json     on a GPU
    python -m benchmarks.serving --step-ms 0.93 --out results.json           anywhere

One engine runs the requests offline and then for each number of clients, each time for about
``--seconds``; every figure is written as soon as it is known, with the microseconds a token that
the parts of the engine took, and the log tells where the seconds before it went.
With ``--step-ms`` a stand-in for the model draws tokens at that pace and leaves the processor
alone, as a GPU does: what is then measured is the server. Clients are processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from benchmarks import measure
from benchmarks.generation import build
from benchmarks.serving_parts import Parts
from eval.report import git_commit
from mamba2lm.data import Tokenizer
from mamba2lm.data.tokenizer import END_OF_TEXT, byte_characters
from mamba2lm.inference import Engine, Request, SamplingConfig
from mamba2lm.inference.batch import Batch, Flight, Slot
from mamba2lm.inference.config import ServeConfig
from mamba2lm.inference.prefill import Prefill
from mamba2lm.inference.request import Job
from mamba2lm.inference.rows import Read
from mamba2lm.inference.sampling import Drawn
from mamba2lm.inference.server import http_server, listen, settle
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.schema import from_mapping

log = logging.getLogger(__name__)

VOCAB_SIZE = 50_277
GREEDY = SamplingConfig(temperature=0.0)
_SHOWN = ("first_token_p50", "first_token_p99", "delivery_gap_p50", "delivery_gap_p99")


def wordy_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Return a byte-level tokenizer of so many ids, each of which has text: a blank and letters."""
    characters = byte_characters()
    tokens = [characters[value] for value in range(256)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    blank = characters[ord(" ")]
    tokens += [blank + a + b + c + d for a in "aeio" for b in letters for c in letters
               for d in letters][: vocab_size - 257]  # fmt: skip
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner, END_OF_TEXT)


class PacedFlight(Flight):
    """Tokens that arrive at a set time."""

    due: float
    seconds: float

    def wait(self) -> None:
        """Wait until they would have come from a GPU."""
        if (left := self.due - time.perf_counter()) > 0:
            time.sleep(left)

    def step_seconds(self) -> float:
        """Return the set time."""
        return self.seconds


class PacedBatch(Batch):
    """A batch whose steps take a set time and nothing of the processor."""

    seconds = 0.0
    _free_at = 0.0

    def join(
        self, slots: Sequence[Slot], states: Sequence[Read], logits_bv: torch.Tensor
    ) -> Flight:
        """Add rows and draw their first tokens in the time of a step."""
        self.slots += slots
        return self._flight(1, slots)

    def launch(self, count: int = 1) -> Flight:
        """Draw random tokens, as many as the rows' steps would."""
        return self._flight(count, self.slots)

    def leave(self, indices: Collection[int]) -> None:
        """Remove rows."""
        for index in sorted(indices, reverse=True):
            last = self.slots.pop()
            if index < len(self.slots):
                self.slots[index] = last

    def _flight(self, count: int, slots: Sequence[Slot]) -> Flight:
        # A text's ids are few of all there are.
        token_tb = torch.randint(300, 5000, (count, len(slots)))
        drawn = [Drawn(token_b.clone(), None, None, None) for token_b in token_tb]
        flight = PacedFlight(drawn, slots)
        flight.seconds = self.seconds
        flight.due = max(time.perf_counter(), self._free_at) + count * self.seconds
        self._free_at = flight.due
        for slot in slots:
            slot.tokens += count
            slot.left -= count
        return flight


class PacedPrefill(Prefill):
    """Prompts that are read in no time."""

    def advance(self) -> list[Job]:
        """Read all there are."""
        jobs, self.jobs = list(self.jobs), deque()
        for job in jobs:
            job.read, job.logits_v = Read(self._model.new_state(0)), torch.zeros(1)
        return jobs


class PacedEngine(Engine):
    """An engine on such a batch, whose prompts take next to no time."""

    def __init__(self, step_ms: float, rows: int) -> None:
        values = {
            "vocab_size": VOCAB_SIZE, "d_model": 8, "pattern": "M",
            "mixers": {"M": {"type": "mamba2", "d_state": 8, "headdim": 8}},
        }  # fmt: skip
        model = LanguageModel(from_mapping(ModelConfig, values, "model")).eval()
        super().__init__(model, wordy_tokenizer(), max_rows=rows, sync_every=16)
        self.batch = PacedBatch(model, rows)
        self.batch.seconds = step_ms / 1e3
        self._overlap = True  # as on a GPU
        self._prefill = PacedPrefill(
            model, self.cache, self.stats, chunk=2048, graphs=False, fail=self._fail
        )


def asked_for(count: int, longest: int) -> list[dict[str, Any]]:
    """Return requests of 16 to 400 prompt tokens and 16 to ``longest`` new, always the same."""
    torch.manual_seed(0)
    return [
        {
            "prompt": torch.randint(0, VOCAB_SIZE, (prompt,)).tolist(),
            "max_tokens": new, "temperature": 0, "ignore_eos": True,
        }
        for prompt, new in zip(
            torch.randint(16, 400, (count,)).tolist(),
            torch.randint(16, longest, (count,)).tolist(),
            strict=True,
        )
    ]  # fmt: skip


def offline(engine: Engine, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the tokens a second that the engine makes of all requests, nothing streamed."""
    jobs = [
        engine.submit(Request(one["prompt"], GREEDY, one["max_tokens"], ignore_eos=True))
        for one in requests
    ]
    with Parts(engine, flights(engine)) as parts:
        began = time.perf_counter()
        engine.run(jobs)
        seconds = time.perf_counter() - began
    tokens = sum(one["max_tokens"] for one in requests)
    return {
        "seconds": round(seconds, 3),
        "new_tokens": tokens,
        "new_tokens_per_second": round(tokens / seconds),
        **parts.figures(tokens, seconds),
    }


def flights(engine: Engine) -> type[Flight]:
    """Return what an engine's batch fetches tokens with."""
    return PacedFlight if isinstance(engine, PacedEngine) else Flight


def used_by(thread: threading.Thread) -> float:
    """Return the seconds of a processor that a running thread has taken."""
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


@contextlib.contextmanager
def served(engine: Engine) -> Iterator[tuple[int, dict[str, threading.Thread]]]:
    """Serve an engine; gives the port, and the threads that serve by what they do."""
    config = ServeConfig(checkpoint="none", port=0, state_cache_mib=0, max_waiting=1000)
    http = http_server(config, engine, "benchmark")
    switch = sys.getswitchinterval()
    settle()  # as the server's command does
    with listen(config) as sock:
        thread = threading.Thread(target=http.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not http.started:
                time.sleep(0.01)
            worker = next(t for t in threading.enumerate() if t.name == "engine")
            yield sock.getsockname()[1], {"engine": worker, "answers": thread}
        finally:
            http.handle_exit(signal.SIGTERM, None)
            thread.join()
            sys.setswitchinterval(switch)
            gc.unfreeze()


def streamed(
    engine: Engine, requests: Sequence[dict[str, Any]], clients: int, processes: int
) -> dict[str, Any]:
    """Return what the clients report, and the processor's time that the server took a token."""
    with served(engine) as (port, serving), Parts(engine, flights(engine)) as parts:
        command = [sys.executable, str(Path(__file__).with_name("clients.py"))]
        running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True) for _ in range(processes)]  # fmt: skip
        used = {name: -used_by(thread) for name, thread in serving.items()}
        outputs: list[str] = [""] * processes

        def ask(i: int) -> None:
            mine = {"port": port, "clients": clients // processes,
                    "requests": requests[i::processes]}  # fmt: skip
            outputs[i], _ = running[i].communicate(json.dumps(mine))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, thread in serving.items():
            used[name] += used_by(thread)
    if any(process.returncode for process in running):
        raise RuntimeError("a process of clients has failed")
    found = [json.loads(output) for output in outputs]
    tokens, seconds = sum(f["new_tokens"] for f in found), max(f["seconds"] for f in found)
    deliveries = sum(f["deliveries"] for f in found)
    return {
        "seconds": round(seconds, 3),
        "new_tokens": tokens,
        "new_tokens_per_second": round(tokens / seconds),
        **{name: round(max(f[name] for f in found), 5) for name in _SHOWN},
        "tokens_per_delivery": round(tokens / deliveries, 2),
        # A thread that waits for its GPU takes the processor meanwhile.
        "processor_us_per_token": {n: round(t / tokens * 1e6, 3) for n, t in used.items()},
        **parts.figures(tokens, seconds),
    }


def compare(
    engine: Engine,
    *,
    clients: Sequence[int],
    requests: int,
    seconds: float,
    processes: int,
    longest: int,
) -> Iterator[dict[str, Any]]:
    """Run requests offline, then streamed to each number of clients; fewer ask for less.

    As many as offline take about so many seconds, at most ``requests``.
    """
    asked = asked_for(requests, longest)
    first = offline(engine, asked[: engine.max_rows])  # what is left to compile
    log.info("a first run: %s", first)
    enough = first["new_tokens_per_second"] * seconds / (first["new_tokens"] / engine.max_rows)
    asked = asked[: max(2 * engine.max_rows, round(enough))]
    about = {"longest": longest, "rows": engine.max_rows}
    alone = offline(engine, asked)
    yield {"clients": 0, **about, "requests": len(asked), **alone}
    for count in clients:
        share = min(1.0, count / engine.max_rows)
        some = asked[: max(count, round(len(asked) * share))]
        found = streamed(engine, some, count, min(processes, count))
        rate = found["new_tokens_per_second"] / alone["new_tokens_per_second"]
        yield {
            "clients": count, **about, "requests": len(some), **found,
            "share_of_offline": round(rate, 3),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", nargs="*", help="models with random weights, on the GPU")
    parser.add_argument("--state-dtype", default="auto")
    parser.add_argument("--step-ms", type=float, help="a stand-in that takes so long a step")
    parser.add_argument("--clients", nargs="*", type=int, default=[64], help="at once")
    parser.add_argument("--requests", type=int, default=2048, help="at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="of requests, about")
    parser.add_argument("--longest", type=int, default=400, help="most new tokens of a request")
    parser.add_argument("--processes", type=int, default=2, help="that the clients run in")
    options = parser.parse_args()
    if (options.preset is None) == (options.step_ms is None):
        parser.error("give one of --preset and --step-ms")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.info("imports took %.1f s of processor time", time.process_time())
    rows = max(options.clients)
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    results = json.loads(options.out.read_text("utf-8")) if options.out.exists() else []

    def report(engine: Engine, about: dict[str, Any]) -> None:
        figures = compare(
            engine,
            clients=options.clients,
            requests=options.requests,
            seconds=options.seconds,
            processes=options.processes,
            longest=options.longest,
        )
        for figure in figures:
            log.info("%s", about | figure)
            results.append(about | figure)
            options.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")

    if options.preset is None:
        report(PacedEngine(options.step_ms, rows), about | {"step_ms": options.step_ms})
        return
    measure.need_gpu(parser)
    for preset in options.preset:
        began = time.perf_counter()
        model = build(preset, "cuda")
        torch.cuda.synchronize()
        log.info("%s is on the GPU (%.1f s)", preset, time.perf_counter() - began)
        engine = Engine(model, wordy_tokenizer(), max_rows=rows, state_dtype=options.state_dtype)
        engine.warm_up()
        ready = round(time.perf_counter() - began, 1)
        more = {"preset": preset, "state": options.state_dtype, "commit": git_commit(),
                "device": torch.cuda.get_device_name(), "seconds_to_ready": ready}  # fmt: skip
        report(engine, about | more)
        del engine, model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
