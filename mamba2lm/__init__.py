"""Train and run state-space language models: Mamba-1, Mamba-2, attention and hybrids."""

__version__ = "0.1.0"
