"""Train and run state-space language models: Mamba-1, Mamba-2, attention and hybrids."""

import os

__version__ = "0.1.0"

# How long an idle OpenMP thread spins before it sleeps; read when torch is first imported. Left
# alone it spins for milliseconds: a tenth faster on an idle machine, ten times slower beside any
# other busy process (measured on two cores: 9,600 or 300 tokens/s; with this, 8,500 or 4,000).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
