"""Time generation on a GPU: per token, over contexts, prefill and offline, beside other programs.

    python -m benchmarks.generation steps --out results.json      per token, by model and batch
    python -m benchmarks.generation context --out results.json    per token, by tokens read before
    python -m benchmarks.generation offline prefill --out …       many requests; long prompts
    python -m benchmarks.generation update --out …                the state update kernel alone
    python -m benchmarks.generation peers --out …                 transformers and mamba-ssm
    python -m benchmarks.generation plot --out results.json       the context figure, beside it
    python -m benchmarks.generation states --checkpoint RUN --text FILE --out …
                                                 what bfloat16 states cost a trained model

Weights are random: the time of a token does not depend on them. A step includes its draw, and the
tokens reach the host in strides of 8, as without streaming. Several cases in one command share
their models. Results are added to what the file holds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import logging
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.autotuning import tune_briefly
from eval.report import git_commit
from mamba2lm import ops
from mamba2lm.data import Tokenizer
from mamba2lm.inference import Engine, Request, SamplingConfig, load_run
from mamba2lm.inference.batch import Batch, Slot
from mamba2lm.inference.rows import Read
from mamba2lm.models import LanguageModel, ModelState

log = logging.getLogger(__name__)

VOCAB_SIZE = 50_277
STRIDE = 8
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.95)

# (preset, rows, state dtype, sampling)
STEPS = (
    ("mamba2_2_7b", 1, "auto", GREEDY),
    ("mamba2_2_7b", 64, "auto", GREEDY),
    ("mamba2_2_7b", 64, "bfloat16", GREEDY),
    ("mamba1_2_8b", 1, "auto", GREEDY),
    ("mamba1_2_8b", 64, "auto", GREEDY),
    ("hybrid_130m", 64, "auto", GREEDY),
    ("mamba1_130m", 1, "auto", GREEDY),
    ("mamba1_130m", 64, "auto", GREEDY),
    ("mamba2_130m", 1, "auto", GREEDY),
    ("mamba2_130m", 8, "auto", GREEDY),
    ("mamba2_130m", 64, "auto", GREEDY),
    ("mamba2_130m", 64, "bfloat16", GREEDY),
    ("mamba2_130m", 64, "auto", SAMPLED),
)
CONTEXTS = {
    "mamba2_130m": (1 << 10, 1 << 13, 1 << 16, 1 << 20),
    "mamba1_130m": (1 << 10, 1 << 13, 1 << 16),
    "hybrid_130m": (1 << 10, 1 << 13, 1 << 15),
    "transformer_130m": (1 << 10, 1 << 13, 1 << 15),
}


def build(preset: str, device: str, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """Return a preset's model with random weights, on the device in the dtype."""
    config = measure.preset(preset, [f"++vocab_size={VOCAB_SIZE}"])
    with torch.device("meta"):
        model = LanguageModel(config)
    model.materialize(device).init_weights(0)
    return model.cast(dtype).eval()


def running(
    model: LanguageModel,
    rows: int,
    *,
    state_dtype: str = "auto",
    sampling: SamplingConfig = GREEDY,
    state: ModelState | None = None,
    tokens: int = 0,
    graphs: bool = True,
) -> Batch:
    """Return a batch of rows that have read something, ready to step."""
    recurrent = torch.bfloat16 if state_dtype == "bfloat16" else None
    batch = Batch(model, rows, recurrent_dtype=recurrent, graphs=graphs)
    slots = [Slot(None, tokens, 1 << 30, sampling, i, (), None) for i in range(rows)]
    state = state or model.new_state(1)
    logits_bv = torch.randn(rows, VOCAB_SIZE, device=model.embedding.weight.device)
    batch.join(slots, [Read(state)] * rows, logits_bv)
    return batch


def per_token(batch: Batch, *, repeats: int = 12) -> dict[str, float]:
    """Return milliseconds a step over strides, host included."""
    for _ in range(2):
        batch.launch(STRIDE).tokens()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        batch.launch(STRIDE).tokens()
        times.append((time.perf_counter() - began) / STRIDE * 1e3)
    times.sort()
    return {
        "ms": round(statistics.median(times), 4),
        "p10": round(times[len(times) // 10], 4),
        "p90": round(times[-1 - len(times) // 10], 4),
    }


def kernels(batch: Batch, top: int = 14) -> dict[str, Any]:
    """Return what the GPU does in a step: its own time, launches, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    batch.launch(STRIDE).tokens()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        batch.launch(STRIDE).tokens()
        torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    return {
        "kernel_ms": round(total / STRIDE / 1e3, 4),
        "kernels": round(sum(e.count for e in events) / STRIDE, 1),
        "longest": [
            [e.key[:70], round(e.self_device_time_total / STRIDE, 2), round(e.count / STRIDE, 1)]
            for e in events[:top]
        ],
    }


def floor_ms(model: LanguageModel, state_bytes: float, bandwidth: float = 3.0e12) -> float:
    """Return the least a step can take: weights read once, the state read and written."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return round((weights + 2 * state_bytes) / bandwidth * 1e3, 4)


class Models:
    """The last model built, so that cases in a row share it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._name: str | None = None
        self._model: LanguageModel | None = None

    def __call__(self, preset: str) -> LanguageModel:
        if self._name != preset or self._model is None:
            self._model = None
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self._model, self._name = build(preset, self.device), preset
        return self._model


def steps(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Time steps of every model and batch, with graphs and op by op."""
    for preset, rows, state_dtype, sampling in STEPS:
        if chosen and preset not in chosen:
            continue
        model = models(preset)
        batch = running(model, rows, state_dtype=state_dtype, sampling=sampling, tokens=1024)
        entry: dict[str, Any] = {
            "preset": preset,
            "rows": rows,
            "state": state_dtype,
            "sampling": "greedy" if sampling is GREEDY else "temperature 0.8, top-p 0.95",
            **per_token(batch),
            "floor_ms": floor_ms(model, batch.nbytes),
        }
        if models.device == "cuda":
            entry |= kernels(batch)
            if rows == 1 and preset.endswith("130m"):
                plain = running(model, rows, state_dtype=state_dtype, tokens=1024, graphs=False)
                entry["op_by_op_ms"] = per_token(plain, repeats=4)["ms"]
        yield entry
        del batch


def feed(engine: Engine, tokens: int) -> tuple[ModelState, float]:
    """Read random tokens; return the state and the seconds it took."""
    ids = torch.randint(0, VOCAB_SIZE, (tokens,)).tolist()
    job = engine.submit(Request(ids, GREEDY, 0, keep_state=True))
    began = time.perf_counter()
    engine.run([job])
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    job.completions()
    assert job.state is not None
    return job.state, time.perf_counter() - began


def context(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Time a step after ever longer contexts, really read."""
    for preset, lengths in CONTEXTS.items():
        if chosen and preset not in chosen:
            continue
        model = models(preset)
        engine = Engine(model, Tokenizer.of_bytes(), prefill_chunk=8192)
        feed(engine, 9000)  # compile
        for length in lengths:
            state, seconds = feed(engine, length)
            batch = running(model, 1, state=state, tokens=length)
            entry = {
                "preset": preset,
                "context": length,
                **per_token(batch, repeats=24),
                "state_bytes": state.nbytes,
                "prefill_tokens_per_second": round(length / seconds),
            }
            yield entry


def offline(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Run 256 requests of mixed lengths through the engine; tokens a second."""
    for preset in ("mamba2_130m", "hybrid_130m"):
        if chosen and preset not in chosen:
            continue
        engine = Engine(models(preset), Tokenizer.of_bytes(), max_rows=64)
        for count in (64, 256):  # the first warms up
            torch.manual_seed(count)
            lengths = torch.randint(16, 400, (count, 2)).tolist()
            jobs = [
                engine.submit(
                    Request(
                        torch.randint(0, VOCAB_SIZE, (prompt,)).tolist(), GREEDY, new,
                        ignore_eos=True,
                    )
                )
                for prompt, new in lengths
            ]  # fmt: skip
            began = time.perf_counter()
            engine.run(jobs)
            seconds = time.perf_counter() - began
            new_tokens = sum(len(c.token_ids) for job in jobs for c in job.completions())
        entry = {
            "preset": preset,
            "requests": count,
            "rows": 64,
            "new_tokens_per_second": round(new_tokens / seconds),
            "prompt_tokens": sum(prompt for prompt, _ in lengths),
            "seconds": round(seconds, 3),
        }
        yield entry


def update(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Time the state update of a 2.7B layer alone, beside mamba-ssm's kernel."""
    h, p, n = 80, 64, 128
    peer: Any = None
    try:
        peer = mamba_ssm_module("ops.triton.selective_state_update").selective_state_update
    except Exception as error:
        log.warning("mamba-ssm's kernel cannot be timed here", exc_info=error)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=models.device)

    A_h, D_h, bias_h = torch.nn.Parameter(randn(h)), randn(h), randn(h)
    for rows, dtype in (
        (1, torch.float32), (64, torch.float32), (64, torch.bfloat16), (128, torch.bfloat16),
    ):  # fmt: skip
        # More states than a cache holds, one after the other.
        states = [randn(rows, h, p, n).to(dtype) for _ in range(max(4, 64 // rows))]
        x_bhp, dt_bh, B_b1n, C_b1n = (
            randn(rows, *shape).bfloat16() for shape in ((h, p), (h,), (1, n), (1, n))
        )

        @torch.inference_mode()
        def mine(
            states: list[torch.Tensor] = states,
            inputs: tuple[torch.Tensor, ...] = (x_bhp, dt_bh, A_h, B_b1n, C_b1n),
        ) -> None:
            for state in states:
                ops.ssd_state_update(
                    state, *inputs, D=D_h, dt_bias=bias_h, dt_softplus=True, A_is_log=True,
                    in_place=True,
                )  # fmt: skip

        def theirs(
            states: list[torch.Tensor] = states,
            inputs: tuple[torch.Tensor, ...] = (
                x_bhp, dt_bh[:, :, None].expand(rows, h, p),
                -A_h.detach().exp()[:, None, None].expand(h, p, n), B_b1n, C_b1n,
            ),
        ) -> None:  # fmt: skip
            assert peer is not None
            for state in states:
                peer(
                    state, *inputs, D_h[:, None].expand(h, p), z=None,
                    dt_bias=bias_h[:, None].expand(h, p), dt_softplus=True,
                )  # fmt: skip

        entry = {
            "rows": rows,
            "state": str(dtype).removeprefix("torch."),
            "us": recorded_us(mine, len(states)),
            "floor_us": round(2 * states[0].numel() * states[0].element_size() / 3.0e6, 2),
        }
        if peer is not None:
            entry["mamba_ssm_us"] = recorded_us(theirs, len(states))
        yield entry


def recorded_us(once: Callable[[], None], calls: int, repeats: int = 9) -> float:
    """Return the median microseconds of one of the calls, recorded together as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        once()
        graph.capture_end()
        times = []
        for _ in range(repeats + 1):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            stream.synchronize()
            times.append(began.elapsed_time(ended) * 1e3 / calls)
    return round(statistics.median(times[1:]), 2)


def prefill(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Time reading prompts: one of 8192 tokens and eight of 2048."""
    for preset in chosen or ["mamba2_130m", "mamba2_2_7b"]:
        model = models(preset)
        for rows, length in ((1, 8192), (8, 2048)):
            ids = torch.randint(0, VOCAB_SIZE, (rows, length), device=models.device)

            @torch.inference_mode()
            def once(
                ids: torch.Tensor = ids, rows: int = rows, model: LanguageModel = model
            ) -> None:
                model(ids, state=model.new_state(rows), last_only=True)

            entry = {"preset": preset, "rows": rows, "length": length, "ms": median_ms(once)}
            yield entry


def median_ms(once: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a call, the device included, after two to warm up."""
    times = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        once()
        torch.cuda.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(times), 3)


def peers(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Time the same shapes in other programs, each with the fastest path it has here."""
    presets = [name for name in chosen if name not in PEERS]
    for name, case in PEERS.items():
        if set(chosen) & set(PEERS) and name not in chosen:
            continue
        try:
            yield from case(models, presets)
        except Exception as error:
            log.warning("%s cannot be timed here", name, exc_info=error)
            yield {"peer": name, "error": f"{type(error).__name__}: {error}"[:300]}


def transformers_steps(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Time transformers' Mamba-2 with our weights, and check that it computes the same."""
    if chosen and "mamba2_130m" not in chosen:
        return
    from transformers import Mamba2Config, Mamba2ForCausalLM

    model = models("mamba2_130m")
    config = Mamba2Config(
        hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, n_groups=1,
        state_size=128, vocab_size=model.config.padded_vocab_size, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        built: Any = Mamba2ForCausalLM(config)
    theirs: Any = built.to_empty(device=models.device).bfloat16().eval()
    weights = {
        f"backbone.{name.replace('embedding.weight', 'embeddings.weight')}": tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    ids = torch.randint(0, VOCAB_SIZE, (1, 200), device=models.device)
    with torch.inference_mode():
        mine = model(ids).logits
        assert mine is not None
        difference = (theirs(ids).logits[..., :VOCAB_SIZE].float() - mine).abs().max()
    for rows in (1, 64):
        prompt = ids[:, :64].expand(rows, -1)

        def once(new: int, prompt: torch.Tensor = prompt) -> None:
            theirs.generate(
                prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )

        once(4)
        short, long = (min(timed(lambda n=n: once(n)) for _ in range(2)) for n in (4, 20))
        yield {
            "peer": "transformers",
            "preset": "mamba2_130m",
            "rows": rows,
            "ms": round((long - short) / 16 * 1e3, 3),
            "largest_logit_difference": round(float(difference), 4),
        }


def tried(entry: dict[str, Any], measured: Callable[[], float]) -> dict[str, Any]:
    """Return an entry with its milliseconds, or with what kept them from being measured."""
    try:
        return {**entry, "ms": measured()}
    except Exception as error:
        log.warning("%s cannot be timed here", entry, exc_info=error)
        return {**entry, "error": f"{type(error).__name__}: {error}"[:300]}


def timed(once: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    once()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def installed(module: str) -> bool:
    """Return whether a module is there, and more than a stand-in of ours."""
    if module in sys.modules:
        return sys.modules[module].__spec__ is not None
    return importlib.util.find_spec(module) is not None


def mamba_ssm_module(name: str) -> Any:
    """Import a module of mamba-ssm, whose CUDA extensions may be missing."""
    if "mamba_ssm" not in sys.modules and not installed("selective_scan_cuda"):
        # Imported by every file of it and called by Mamba-1 alone.
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
        # Its __init__ imports parts that need more than Mamba-2 does.
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("mamba_ssm is not installed")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"] = package
    return importlib.import_module(f"mamba_ssm.{name}")


def mamba_ssm_steps(models: Models, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Time mamba-ssm's own generation with its CUDA graph, and its reading of prompts."""
    tune_briefly()  # its kernels for prompts
    missing = [name for name in ("selective_scan_cuda", "causal_conv1d") if not installed(name)]
    head_model: Any = mamba_ssm_module("models.mixer_seq_simple").MambaLMHeadModel
    configuration: Any = mamba_ssm_module("models.config_mamba").MambaConfig
    for preset, width, depth, batches in (
        ("mamba2_130m", 768, 24, (1, 64)),
        ("mamba2_2_7b", 2560, 64, (1, 64)),
    ):
        if chosen and preset not in chosen:
            continue
        config = configuration(
            d_model=width,
            n_layer=depth,
            vocab_size=VOCAB_SIZE,
            ssm_cfg={"layer": "Mamba2"},
            rms_norm=True,
            residual_in_fp32=True,
            fused_add_norm=True,
            pad_vocab_size_multiple=16,
        )
        theirs = head_model(config, device=models.device, dtype=torch.bfloat16).eval()
        one_kernel = "causal_conv1d" not in missing
        for layer in theirs.backbone.layers:
            # Their fused path for prompts calls causal_conv1d, there or not; the other one takes
            # nn.Conv1d where it is missing, and the same kernels from there.
            layer.mixer.use_mem_eff_path = one_kernel
        about = {"peer": "mamba-ssm", "preset": preset, "missing_extensions": missing}
        for rows in batches:
            prompt = torch.randint(0, VOCAB_SIZE, (rows, 64), device=models.device)

            def once(
                new: int, prompt: torch.Tensor = prompt, theirs: torch.nn.Module = theirs
            ) -> None:
                theirs.generate(prompt, max_length=64 + new, cg=True, top_k=1)  # type: ignore[operator]

            def a_step(once: Callable[[int], None] = once) -> float:
                once(100)
                short, long = (min(timed(lambda n=n: once(n)) for _ in range(2)) for n in (4, 100))
                return round((long - short) / 96 * 1e3, 4)

            yield tried({**about, "rows": rows, "state": "bfloat16"}, a_step)
            theirs._decoding_cache = None
        for rows, length in ((1, 8192), (8, 2048)):
            ids = torch.randint(0, VOCAB_SIZE, (rows, length), device=models.device)

            @torch.inference_mode()
            def read(ids: torch.Tensor = ids, theirs: torch.nn.Module = theirs) -> None:
                theirs(ids, num_last_tokens=1)

            path = "fused" if one_kernel else "nn.Conv1d and mamba_chunk_scan_combined"
            entry = {**about, "rows": rows, "prompt": length, "path": path}
            yield tried(entry, lambda read=read: median_ms(read))
        del theirs
        gc.collect()
        torch.cuda.empty_cache()


PEERS = {"mamba-ssm": mamba_ssm_steps, "transformers": transformers_steps}


@torch.inference_mode()
def states(checkpoint: str, text: Path, rows: int = 8, length: int = 2048) -> dict[str, Any]:
    """Return a trained model's loss on a text, read by single steps with states of each dtype."""
    run = load_run(checkpoint)
    assert run.tokenizer is not None
    device = run.model.embedding.weight.device
    ids = torch.tensor(run.tokenizer.encode(text.read_text("utf-8")), device=device)
    ids_bl = ids[: rows * length].view(rows, length)
    found: dict[str, Any] = {"checkpoint": Path(checkpoint).name, "rows": rows, "length": length}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        state = run.model.new_state(rows, recurrent_dtype=dtype)
        total = torch.zeros(rows, dtype=torch.float64, device=device)
        for t in range(length - 1):
            logits_bv, state = run.model.step(ids_bl[:, t], state)
            logprob_bv = logits_bv.double().log_softmax(dim=-1)
            total -= logprob_bv.gather(1, ids_bl[:, t + 1, None])[:, 0]
        found[f"nats_per_token_{name}"] = round(float(total.mean()) / (length - 1), 5)
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw per-token time against context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for preset in CONTEXTS:
        points = [(e["context"], e["ms"]) for e in results["context"] if e["preset"] == preset]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=preset)
    axes.set(xscale="log", xlabel="tokens read before", ylabel="ms per token, one row")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{results['device']}, bfloat16 weights", fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


CASES: dict[str, Callable[[Models, list[str]], Iterator[dict[str, Any]]]] = {
    "steps": steps,
    "context": context,
    "offline": offline,
    "update": update,
    "prefill": prefill,
    "peers": peers,
}


def chosen(entry: dict[str, Any], only: list[str]) -> bool:
    """Return whether an entry is one of those that are timed, by its peer and by its preset."""
    peers, presets = set(only) & set(PEERS), set(only) - set(PEERS)
    return (not peers or entry.get("peer") in peers) and (
        not presets or entry.get("preset") in presets
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="+", choices=[*CASES, "states", "plot"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="presets (or peers) to keep to")
    parser.add_argument("--checkpoint", help="of states: a run folder")
    parser.add_argument("--text", type=Path, help="of states: a UTF-8 text file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    results: dict[str, Any] = {}
    if options.out.exists():
        results = json.loads(options.out.read_text("utf-8"))
    models = Models(options.device)
    for case in options.cases:
        if case == "plot":
            plot(results, options.out.with_suffix(".png"))
            continue
        if case == "states":
            if not options.checkpoint or not options.text:
                parser.error("states needs --checkpoint and --text")
            entry = states(options.checkpoint, options.text)
            log.info("states %s", entry)
            results.setdefault(case, []).append(entry)
            options.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            continue
        results["device"] = (
            torch.cuda.get_device_name() if options.device == "cuda" else options.device
        )
        results["torch"], results["commit"] = torch.__version__, git_commit()
        results["date"] = time.strftime("%Y-%m-%d")
        # What is timed again replaces what was timed before.
        results[case] = [e for e in results.get(case, []) if not chosen(e, options.only)]
        for entry in CASES[case](models, options.only):
            log.info("%s %s", case, {k: v for k, v in entry.items() if k != "longest"})
            results[case].append(entry)
            options.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
