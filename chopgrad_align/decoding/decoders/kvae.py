"""AutoencoderKLKVAEVideo: groups of up to 16 frames (17 in the first), with a nested dict of caches that is written to.

Every block owns a branch of that dict, and works on a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import silu
from torch.utils._pytree import tree_map

from . import expect_latents
from .base import Block, Cache, Clamp, Decoder, Group, Hidden

_SEGMENT = 16  # frames; the default of the model's `_decode`, which `decode` does not change


class KVAEVideoDecoder(Decoder):
    def __init__(self, vae: Any, latents: Tensor) -> None:
        super().__init__(vae)
        expect_latents(vae, latents, "BCFHW")
        self.sliced = vae.use_slicing

    def groups(self, latents: Tensor) -> list[Group]:
        stride, count = self.vae.config.temporal_compress_times, latents.shape[2]
        size = _SEGMENT // stride
        starts = [0, *range(1 + size, count, size)]
        groups: list[Group] = []
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            # The model repeats no frame of a group that has one only, even if it is not the first.
            made = 1 if stop - start == 1 else stride * (stop - start) - (stride - 1) * (start == 0)
            shown = groups[-1].frames.stop if groups else 0
            groups.append(Group(slice(start, stop), slice(shown, shown + made)))
        return groups

    def independent_frames(self, group: Group) -> list[Group]:
        return [group]

    def prologue(self, latents: Tensor) -> Tensor:
        return latents

    def blocks(self, index: int) -> Sequence[Block]:
        decoder, empty = self.vae.decoder, self.vae._make_decoder_cache()

        # Beside the hidden state every block reads the group's latents (spatial norm), which travel along.
        def owning(branch: Any, call: Callable[[Tensor, Tensor, Any], Tensor]) -> Block:
            def block(hidden: Hidden, cache: Cache) -> tuple[Hidden, Cache]:
                x, latents = hidden
                cache = tree_map(lambda leaf: leaf, branch if cache is None else cache)
                return (call(x, latents, cache), latents), cache

            return block

        def resnet(layer: Any) -> Callable[[Tensor, Tensor, Any], Tensor]:
            return lambda x, latents, cache: layer(x, None, layer_cache=cache, zq=latents)

        def upsample(layer: Any) -> Callable[[Tensor, Tensor, Any], Tensor]:
            return lambda x, latents, cache: layer(x, cache)

        def leave(x: Tensor, latents: Tensor, cache: Any) -> Tensor:
            return decoder.conv_out(silu(decoder.norm_out(x, latents, cache["norm"])), cache["conv"])

        blocks = [
            lambda hidden, cache: ((hidden[0], hidden[0]), None),
            owning(empty["conv_in"], lambda x, latents, cache: decoder.conv_in(x, cache)),
            owning(empty["mid_1"], resnet(decoder.mid.block_1)),
            owning(empty["mid_2"], resnet(decoder.mid.block_2)),
        ]
        for level in reversed(range(decoder.num_resolutions)):
            stage, branch = decoder.up[level], empty[level]
            blocks += [owning(branch[i], resnet(layer)) for i, layer in enumerate(stage.block)]
            if level > 0:
                blocks.append(owning(branch["up"], upsample(stage.upsample)))
        return [*blocks, owning({"norm": empty["norm_out"], "conv": empty["conv_out"]}, leave)]

    def epilogue(self, output: Tensor, clamp: Clamp) -> Tensor:
        return output
