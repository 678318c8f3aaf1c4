"""Losses of single frames taken while the frames are decoded, so that a clip is never held as pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...decoding.backprop import Backprop
from ...decoding.clamp import denormalized
from ...decoding.decode import decode_loss
from ...decoding.decoders import decoder_of
from ...decoding.decoders.base import Tiled
from ...objective.objective import Objective


def can_stream(objective: Objective, backprop: Backprop) -> bool:
    """True if decoding, losses and backward are one pass over the frame groups.

    With other policies each loss would have to be evaluated twice, and other terms read more than one group's frames.
    """
    pixel_terms = [term for term in objective.terms.values() if term.reads_pixels]
    return backprop.one_pass and bool(pixel_terms) and all(term.frame_loss is not None for term in pixel_terms)


class StreamedLosses:
    """The pixel losses of one micro-batch.

    Args:
        objective: Whose pixel losses they are; see `can_stream`.
        target: `(B, F, 3, H, W)` in [0, 1].
        mask: `(B, F, 1, H, W)`.
        weights: Of each term and sample; default 1.

    Attributes:
        scores: Each loss `(B,)`, without gradient; empty until frames have been decoded by `decode`.
        value: What the losses add to the objective, summed over samples: a scalar with a gradient.
    """

    def __init__(
        self,
        objective: Objective,
        target: Tensor,
        mask: Tensor | None,
        weights: Mapping[str, Sequence[float]] | None,
    ) -> None:
        self._terms = {name: (term, term.frame_loss) for name, term in objective.terms.items() if term.frame_loss}
        self._target, self._mask, self._weights = target, mask, weights or {}
        self.scores: dict[str, Tensor] = {}
        self.value = torch.zeros(())

    def decode(
        self, whole: Callable[..., Tensor], vae: nn.Module, latents: Tensor, backprop: Backprop, **decode_kwargs: Any
    ) -> Tensor:
        """Take the losses of all frames; what is returned has one black pixel for each, which nobody reads.

        Where the decoder does not make the target's frames one group after the other, `whole` decodes them instead.
        """
        decoder = decoder_of(vae, latents, **decode_kwargs)
        frames = 0 if isinstance(decoder, Tiled) else decoder.groups(latents)[-1].frames.stop
        if latents.ndim == 4 or decoder.sliced or frames != self._target.shape[1]:
            return whole(vae, latents, backprop, **decode_kwargs)
        parts: dict[tuple[str, int], Tensor] = {}

        def value(pixels: Tensor, span: slice) -> Tensor:
            video = denormalized(pixels, backprop.clamp(0.0, 1.0)).transpose(1, 2)  # as `rollout` does
            share = video.shape[1] / frames
            mask = None if self._mask is None else self._mask[:, span]
            values = []
            for name, (term, loss) in self._terms.items():
                score = share * loss(video, self._target[:, span], mask)
                parts[name, span.start] = score.detach()
                values.append(term.value(score) * torch.tensor(self._weights.get(name, 1.0)).to(score))
            return torch.stack(values).sum()

        self.value = decode_loss(vae, latents, value, backprop, **decode_kwargs)
        for (name, _), score in parts.items():
            self.scores[name] = self.scores.get(name, 0) + score
        return latents.new_zeros(len(latents), 3, frames, 1, 1)
