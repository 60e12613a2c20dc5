"""The mathematics: one folder per operator, each with a reference to test against.

The functions below are the public ones. They share the names of their folders; a folder's own
modules are imported as ``from mamba2lm.ops.ssd.reference import ssd_chunked``.
"""

from mamba2lm.ops.causal_conv1d.op import causal_conv1d, causal_conv1d_update
from mamba2lm.ops.gated_rms_norm.divided import gated_rms_norm_divided
from mamba2lm.ops.gated_rms_norm.op import gated_rms_norm, rms_norm, rms_norm_residual
from mamba2lm.ops.linear_cross_entropy.op import linear_cross_entropy
from mamba2lm.ops.linear_step.op import linear_step, takes_scale
from mamba2lm.ops.linear_step.reference import Convolution, Norm, Scale
from mamba2lm.ops.rotary.op import rotary_heads
from mamba2lm.ops.selective_scan.op import selective_scan
from mamba2lm.ops.ssd.carry import add_carried_outputs
from mamba2lm.ops.ssd.op import ssd
from mamba2lm.ops.state_update.op import (
    selective_state_update,
    ssd_state_update,
    ssd_state_update_normed,
)
from mamba2lm.ops.swiglu.op import swiglu

__all__ = [
    "Convolution",
    "Norm",
    "Scale",
    "add_carried_outputs",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "gated_rms_norm_divided",
    "linear_cross_entropy",
    "linear_step",
    "rms_norm",
    "rms_norm_residual",
    "rotary_heads",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
    "ssd_state_update_normed",
    "swiglu",
    "takes_scale",
]
