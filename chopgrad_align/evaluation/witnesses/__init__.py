"""Witnesses: measures that are taken with every held-out measurement and never trained on; one a file."""

from .bounds import Bounds
from .loading import BUILT_IN, check_witnesses, load_witness
from .protocol import Witness, observe, on_device

__all__ = ["BUILT_IN", "Bounds", "Witness", "check_witnesses", "load_witness", "observe", "on_device"]
