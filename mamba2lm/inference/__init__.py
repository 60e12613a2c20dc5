"""Trained models at work: prefill in parallel, then one step a token, for many at once."""

from mamba2lm.inference.config import GenerateConfig
from mamba2lm.inference.decoding import Completion, TokenLogprob
from mamba2lm.inference.engine import Engine
from mamba2lm.inference.loading import LoadedRun, find_model, load_run
from mamba2lm.inference.request import Event, Job, Request
from mamba2lm.inference.sampling import SamplingConfig
from mamba2lm.inference.session import Session

__all__ = [
    "Completion",
    "Engine",
    "Event",
    "GenerateConfig",
    "Job",
    "LoadedRun",
    "Request",
    "SamplingConfig",
    "Session",
    "TokenLogprob",
    "find_model",
    "load_run",
]
