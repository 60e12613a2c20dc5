"""Mixers: one sub-layer a file, registered by name. Importing this package registers them all."""

from mamba2lm.layers import attention, mamba1, mamba2, mlp, s4d
from mamba2lm.layers.mixer import Mixer, MixerConfig, mixer_class, registered_mixers
from mamba2lm.layers.norm import RMSNorm
from mamba2lm.layers.state import State

__all__ = [
    "Mixer",
    "MixerConfig",
    "RMSNorm",
    "State",
    "attention",
    "mamba1",
    "mamba2",
    "mixer_class",
    "mlp",
    "registered_mixers",
    "s4d",
]
