"""Trained models at work: prefill in parallel, then one step a token."""

from mamba2lm.inference.config import GenerateConfig
from mamba2lm.inference.decoding import Completion
from mamba2lm.inference.engine import Engine
from mamba2lm.inference.loading import LoadedRun, load_run
from mamba2lm.inference.sampling import Sampler, SamplingConfig
from mamba2lm.inference.session import Session

__all__ = [
    "Completion",
    "Engine",
    "GenerateConfig",
    "LoadedRun",
    "Sampler",
    "SamplingConfig",
    "Session",
    "load_run",
]
