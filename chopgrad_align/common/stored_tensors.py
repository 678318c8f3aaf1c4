"""The tensors that a weight is stored in."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def stored_tensors(weight: Any) -> list[Tensor]:
    """A weight itself, or what a quantised one, of torchao or bitsandbytes, is stored in."""
    if hasattr(weight, "__tensor_flatten__"):  # of torchao
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    state = getattr(weight, "quant_state", None)  # of bitsandbytes
    scales = [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return [weight, *scales]
