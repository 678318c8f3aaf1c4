"""Predictions of the clean video that a loss compares with its target.

`Sample` runs the pipeline's whole sampler, `OneStep` one call of the denoiser from the degraded clip, `Denoise` one
from the noised target. All of them are calls of the pipeline's own code: the last two hand it latents to start from
and a scheduler that takes a single step, to the clean latents.
"""

from .denoise import Denoise
from .one_step import OneStep
from .protocol import Prediction, PreparedCall
from .sample import Sample

__all__ = ["Denoise", "OneStep", "Prediction", "PreparedCall", "Sample"]
