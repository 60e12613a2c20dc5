"""Whole models: embedding → blocks → norm → head."""

from mamba2lm.models.config import ModelConfig
from mamba2lm.models.language_model import LanguageModel, LanguageModelOutput
from mamba2lm.models.state import ModelState

__all__ = ["LanguageModel", "LanguageModelOutput", "ModelConfig", "ModelState"]
