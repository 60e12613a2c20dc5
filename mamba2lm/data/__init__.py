"""Documents to tokens to packed batches, tokenizers, the sampler and the synthetic tasks."""

from mamba2lm.data.batches import (
    TrainingSamples,
    ValidationSamples,
    training_batches,
    validation_batches,
)
from mamba2lm.data.induction import InductionConfig
from mamba2lm.data.loader import (
    Corpus,
    DataConfig,
    DataKind,
    prepare_data,
)
from mamba2lm.data.packing import IGNORED
from mamba2lm.data.recall import RecallConfig, generate_recall
from mamba2lm.data.selective_copying import SelectiveCopyingConfig
from mamba2lm.data.sources import SourceConfig
from mamba2lm.data.synthetic import SyntheticConfig, generate, questions_of
from mamba2lm.data.tokenizer import TextStream, Tokenizer, TokenizerConfig, TokenizerKind

__all__ = [
    "IGNORED",
    "Corpus",
    "DataConfig",
    "DataKind",
    "InductionConfig",
    "RecallConfig",
    "SelectiveCopyingConfig",
    "SourceConfig",
    "SyntheticConfig",
    "TextStream",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerKind",
    "TrainingSamples",
    "ValidationSamples",
    "generate",
    "generate_recall",
    "prepare_data",
    "questions_of",
    "training_batches",
    "validation_batches",
]
