"""Fine-tune video diffusion models by the gradient of what is measured on their decoded pixels.

Everything that code outside the package needs is a name of this module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .common.errors import UsageError
from .decoding.backprop import Backprop, Exact, Full, Groupwise, Truncated
from .decoding.decode import decode, decode_loss
from .decoding.decoders import register_decoder
from .decoding.decoders.base import Decoder
from .objective.losses import FrameLoss, Loss, VideoLoss
from .objective.reward import (
    FrameReward,
    Frames,
    FrameSampler,
    Reduction,
    Reward,
    SampledReward,
    Samples,
    check_reward,
    frame_sampler,
    load_reward,
)
from .objective.terms import Reference, Term
from .sampling.checkpointing import Checkpointing
from .sampling.rollout import rollout
from .sampling.steps import LastSteps, LowVariance, RandomLast, RandomSteps, StepPlan, StepPolicy, Steps

if TYPE_CHECKING:
    from .evaluation.witnesses import Bounds, Witness
    from .training.config_file import load_config
    from .training.guard import Guard, Verdict
    from .training.lora import add_lora, load_lora
    from .training.modules import load_modules
    from .training.run import train

__version__ = "0.1.0"

# What is above imports torch alone; these bring accelerate, peft and the like, and load when they are asked for.
_LATER = {
    "Bounds": ".evaluation.witnesses",
    "Guard": ".training.guard",
    "Verdict": ".training.guard",
    "Witness": ".evaluation.witnesses",
    "add_lora": ".training.lora",
    "load_config": ".training.config_file",
    "load_lora": ".training.lora",
    "load_modules": ".training.modules",
    "train": ".training.run",
}

__all__ = [
    "Backprop",
    "Bounds",
    "Checkpointing",
    "Decoder",
    "Exact",
    "FrameLoss",
    "FrameReward",
    "FrameSampler",
    "Frames",
    "Full",
    "Groupwise",
    "Guard",
    "LastSteps",
    "Loss",
    "LowVariance",
    "RandomLast",
    "RandomSteps",
    "Reduction",
    "Reference",
    "Reward",
    "SampledReward",
    "Samples",
    "StepPlan",
    "StepPolicy",
    "Steps",
    "Term",
    "Truncated",
    "UsageError",
    "Verdict",
    "VideoLoss",
    "Witness",
    "__version__",
    "add_lora",
    "check_reward",
    "decode",
    "decode_loss",
    "frame_sampler",
    "load_config",
    "load_lora",
    "load_modules",
    "load_reward",
    "register_decoder",
    "rollout",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
