"""How a micro-batch becomes a gradient of the trained weights: one method a file."""

from .direct import DirectGradient
from .protocol import Method, MicroBatch

__all__ = ["DirectGradient", "Method", "MicroBatch"]
