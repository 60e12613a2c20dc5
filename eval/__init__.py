"""How good a trained model is: perplexity on text, associative recall on a synthetic task."""

from eval.config import EvalConfig, PerplexityConfig, RecallEvalConfig, Window
from eval.perplexity import PerplexityResult, evaluate_perplexity, held_out_documents
from eval.recall import RecallResult, evaluate_recall

__all__ = [
    "EvalConfig",
    "PerplexityConfig",
    "PerplexityResult",
    "RecallEvalConfig",
    "RecallResult",
    "Window",
    "evaluate_perplexity",
    "evaluate_recall",
    "held_out_documents",
]
