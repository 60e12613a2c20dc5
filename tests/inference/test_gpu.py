"""The engine on a GPU: recorded steps, and draws that are the CPU's."""

from __future__ import annotations

import random
import re

import pytest
import torch

from mamba2lm.inference import Engine, Request, SamplingConfig
from mamba2lm.inference.rows import Read
from mamba2lm.inference.sampling import Features, SamplingRows, draw
from mamba2lm.inference.whole_prompts import WholePrompts
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.schema import from_mapping
from tests.inference import helpers
from tests.inference.test_engine import GREEDY, alone, random_ids, tokens_of
from tests.inference.test_sampling import SETTINGS

pytestmark = pytest.mark.gpu


def engine(pattern: str, *, dtype: torch.dtype = torch.float32, **options: int | bool) -> Engine:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = helpers.model(pattern, dtype=dtype).to("cuda")
    return Engine(model, helpers.tokenizer(), **options)  # type: ignore[arg-type]


def test_draws_are_the_cpus() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, len(SETTINGS), 3000, dtype=torch.float64) * 4

    def drawn(device: str) -> list[list[int]]:
        rows = SamplingRows.new(len(SETTINGS), device)
        rows.track(3000)
        for i, config in enumerate(SETTINGS):
            rows.put(i, [(config, i, [1, 2, 3])])
        features = Features.of(SETTINGS, [None], 3000)
        return [draw(l_bv.to(device), rows, features).token_b.tolist() for l_bv in logits]

    assert drawn("cuda") == drawn("cpu")


def test_warming_up_records_every_number_of_rows() -> None:
    built = engine("MM", max_rows=20)
    built.warm_up()
    assert built.batch.step_rows == [1, 2, 4, 8, 16, 20]
    graphs = built.batch._graphs
    assert graphs is not None
    recorded = set(graphs._by_shape)
    assert {rows for rows, _, _ in recorded} == set(built.batch.step_rows)  # type: ignore[misc]
    built.generate(["Emma"] * 7, GREEDY, max_new_tokens=5)
    assert set(graphs._by_shape) == recorded
    assert built.batch._graphs is graphs


@pytest.mark.parametrize("pattern", helpers.PATTERNS)
def test_recorded_steps_draw_what_plain_ones_do(pattern: str) -> None:
    recorded = engine(pattern, max_rows=20, prefill_chunk=32)
    plain = engine(pattern, max_rows=20, prefill_chunk=32, cuda_graphs=False, sync_every=1)
    rng = random.Random(1)
    requests = [
        Request(
            ids,
            SamplingConfig(
                temperature=rng.choice([0.0, 1.0]),
                top_p=rng.choice([1.0, 0.9]),
                frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
            ),
            rng.randint(1, 150),
            seeds=[i],
            logprobs=rng.choice([None, 0, 3]),
            ignore_eos=True,
        )
        for i, ids in enumerate(random_ids(*(rng.randint(1, 100) for _ in range(40))))
    ]
    jobs = {}
    for built in (recorded, plain):
        jobs[built] = [built.submit(request) for request in requests]
        built.run(jobs[built])
    graphs = recorded.batch._graphs
    assert graphs is not None
    assert graphs._by_shape
    # Recorded for real: what could not be is kept as the plain step.
    assert all(step.__name__ == "replay" for step in graphs._by_shape.values())
    same = [
        a == b
        for mine, theirs in zip(jobs[recorded], jobs[plain], strict=True)
        for a, b in zip(tokens_of(mine)[0], tokens_of(theirs)[0], strict=True)
    ]
    # Products of other numbers of rows round differently, and a text that parts stays apart.
    assert sum(same) / len(same) > 0.9


WIDE = {
    "pattern": "MMS", "d_model": 128, "vocab_size": 500,
    "mixers": {
        "M": {"type": "mamba2", "d_state": 64, "headdim": 64},
        "S": {"type": "mamba1", "d_state": 16},
    },
}  # fmt: skip


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in norm."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ("MSF", torch.float64, 1e-9),
        ("MM", torch.float32, 1e-3),
        ("wide", torch.float32, 1e-4),
        ("wide", torch.bfloat16, 3e-2),
    ],
)
def test_whole_prompts_are_recorded_and_read_as_if_alone(
    shape: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    if shape == "wide":  # enough for the kernels
        model = LanguageModel(from_mapping(ModelConfig, WIDE, "model"))
        model.init_weights(0)
        model = model.cast(dtype).eval().to("cuda")
    else:
        model = helpers.model(shape, dtype=dtype).to("cuda")
    whole = WholePrompts(model, most=512, record=True)
    whole.record()
    graphs = whole._graphs
    assert graphs is not None
    recorded = dict(graphs._by_shape)
    assert set(recorded) == set(whole.shapes)
    assert all(step.__name__ == "replay" for step in recorded.values())
    for lengths in ([5, 64, 33], [100, 70, 128, 99], [300], [1, 2]):
        prompts = random_ids(*lengths)
        states, logits_bv = whole.read(prompts)
        for i, ids in enumerate(prompts):
            with torch.inference_mode():
                ids_bl = torch.tensor([ids], device="cuda")
                alone = model(ids_bl, state=model.new_state(1))
            assert error(logits_bv[i], alone.logits[0, -1]) < tolerance
            read = Read(states, i).alone()
            for mine, theirs in zip(read.layers, alone.state.layers, strict=True):
                for name in mine:
                    assert error(mine[name], theirs[name]) < tolerance
    assert graphs._by_shape == recorded


def test_a_shape_met_twice_is_recorded() -> None:
    built = engine("MM", max_rows=16)
    whole = built._prefill._whole
    assert whole is not None
    assert whole._graphs is not None
    requests = [Request(ids, GREEDY, 5, ignore_eos=True) for ids in random_ids(50, 50, 50)]
    found = [tokens_of(alone(built, request)) for request in (*requests, *requests)]
    assert set(whole._graphs._by_shape) == {(1, 64)}
    assert found[:3] == found[3:]


def test_nothing_waits_for_the_gpu_but_the_fetch_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = engine("MM", max_rows=16)
    requests = [
        Request(ids, GREEDY, 10 + 7 * i, ignore_eos=True)
        for i, ids in enumerate(random_ids(*range(20, 60, 2)))
    ]

    def run() -> None:
        jobs = [built.submit(request) for request in requests]
        built.run(jobs)

    built.warm_up()
    run()
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: wait(event))

    def wait(event: torch.cuda.Event) -> None:
        while not event.query():
            pass

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_a_batch_gives_what_single_runs_give(pattern: str) -> None:
    built = engine(pattern, dtype=torch.float64, max_rows=16)
    requests = [Request(ids, GREEDY, 60) for ids in random_ids(*range(3, 120, 7))]
    jobs = [built.submit(request) for request in requests]
    built.run(jobs)
    for request, job in zip(requests, jobs, strict=True):
        assert tokens_of(alone(built, request)) == tokens_of(job)


def test_bfloat16_weights_and_states_generate() -> None:
    built = engine("MSWF", dtype=torch.bfloat16)
    halved = Engine(built.model, built.tokenizer, state_dtype="bfloat16")
    ids = random_ids(50)[0]
    request = Request(ids, GREEDY, 40, ignore_eos=True, logprobs=0)
    first = [alone(e, request).rows[0].logprobs[1].logprob for e in (built, halved)]
    assert first[0] == pytest.approx(first[1], abs=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constraints_hold_in_recorded_steps(dtype: torch.dtype) -> None:
    pytest.importorskip("llguidance")
    built = engine("MM", dtype=dtype, max_rows=16)
    expression = "([a-z]{2,4} ){3}[0-9]"
    bound = [
        Request(ids, SamplingConfig(temperature=t, regex=expression), 60)
        for ids, t in zip(random_ids(5, 30, 40), (0.0, 1.0, 2.0), strict=True)
    ]
    free = [Request(ids, GREEDY, 60) for ids in random_ids(9, 50)]
    jobs = [built.submit(request) for request in (*bound, *free)]
    built.run(jobs)
    for job in jobs[:3]:
        assert re.fullmatch(expression, job.completions()[0].text)
    if dtype == torch.float64:
        for request, job in zip((*bound, *free), jobs, strict=True):
            assert tokens_of(alone(built, request)) == tokens_of(job)
