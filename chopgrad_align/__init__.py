"""Fine-tune video diffusion models by the gradient of what is measured on their decoded pixels."""

# Imported here and now, because some are named like the module that they live in: once a submodule has been loaded, its
# name in the package would be the module. These modules import torch alone; heavy libraries load when they are used.
from .backprop import Exact, Full, Truncated
from .decode import decode, decode_loss
from .errors import UsageError
from .reward import load_reward
from .rollout import rollout
from .steps import LastSteps

__all__ = [
    "Exact",
    "Full",
    "LastSteps",
    "Truncated",
    "UsageError",
    "decode",
    "decode_loss",
    "load_reward",
    "rollout",
]
