"""Fine-tune video diffusion models by the gradient of what is measured on their decoded pixels."""

# Imported here and now, because each is named like the module that it lives in: once a submodule has been loaded, its
# name in the package would be the module. These modules import torch alone; heavy libraries load when they are used.
from .backprop import Exact, Full, Truncated
from .decode import decode, decode_loss
from .errors import UsageError

__all__ = ["Exact", "Full", "Truncated", "UsageError", "decode", "decode_loss"]
