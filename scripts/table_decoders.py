"""Write docs/decoders.md: how every known decoder is decoded, and what its exact gradient costs in memory.

    python scripts/table_decoders.py [--size 480x832] [--frames 17 33]

Everything in the table is asked of the real classes, at the sizes of the published models, in bfloat16. The memory is
that of the engine's own run under fake tensors: no weights, no GPU, minutes on one core.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chopgrad_align import Exact, Full, UsageError, decode
from chopgrad_align.common import command_line as cli
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.decoding.backprop import Backprop
from chopgrad_align.decoding.decoders import decoder_of, known_names
from chopgrad_align.decoding.decoders.base import Decoder, Tiled
from chopgrad_align.decoding.decoders.tiles import TemporalTiles

# Where a class's defaults are not those of a published model.
STABLE_DIFFUSION = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **STABLE_DIFFUSION,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "AutoencoderKLLTX2Video": {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
    "AutoencoderKLTemporalDecoder": {**STABLE_DIFFUSION, "down_block_types": ("DownEncoderBlock2D",) * 4},
}

ABOUT = """# Decoders

`decode` gives the pixels of the VAE's own `decode`, bit for bit, and the gradient of plain autograd
(`tests/test_decoders.py` asserts both for every class). What differs is how much must be alive at once:

- **recurrence**: groups of frames with causal caches. One group's graph at a time; the caches wait on the device, on
  the host, or are made again (`Exact(cache=...)`).
- **tiles**: each tile is decoded alone, and its graph alone is alive; blending is linear and left to autograd.
- **whole**: the decoder sees all frames at once. Its blocks are recomputed one at a time, so that memory grows with the
  frames by what one block hands to the next and by the largest block.
- **single frames**, **chunk**: frames, or clips of one call, that do not depend on each other.

*Pieces* are what the backward pass runs one after the other. The memory law can be read off the last columns: what
one more latent frame adds at the peak. With a recurrence that is mostly its caches, which can wait on the host; with
`AutoencoderKL` it is the forward pass without a graph, which is one call, so that the bits are those of one call.

Slicing (`vae.enable_slicing()`) decodes the samples of a batch one by one, here too, where the VAE has it.
"""


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--size", type=cli.size, default=(480, 832), metavar="HxW", help="in pixels (default: 480x832)")
    parser.add_argument("--frames", type=int, nargs=2, default=(17, 33), help="two lengths; the growth is between them")
    parser.add_argument("--only", nargs="*", help="classes; default all known")
    parser.add_argument("--output", type=cli.path, default=Path("docs/decoders.md"))
    args = parser.parse_args()
    height, width = args.size

    torch.set_default_dtype(torch.bfloat16)  # fake modules cannot be converted
    rows = []
    for name in args.only or known_names():
        print(name, file=sys.stderr, flush=True)
        vae_class = getattr(diffusers, name)  # imported now: a module may hold tensors, which must not be fake
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(row_of(vae_class, (height, width), args.frames))
    short, long = args.frames
    head = [
        "decoder",
        "decodes by",
        f"pieces of {long} frames",
        "`enable_tiling()`",
        f"`Exact` {short} frames",
        f"{long}",
        "each more latent",
        f"`Full` {short}",
        f"{long}",
        "each more latent",
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    note = (
        f"One video of {height}x{width}, bfloat16, GiB of device memory at the peak of decoding and backward, besides "
        "the weights;\na decoder whose lengths do not meet the number of frames decodes the next longer one. Made by "
        "`python scripts/table_decoders.py`."
    )
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(f"{ABOUT}\n{note}\n\n{table}\n")


def row_of(vae_class: Any, size: tuple[int, int], lengths: tuple[int, int]) -> list[str]:
    name = vae_class.__name__
    vae: Any = vae_class(**CONFIGS.get(name, {})).requires_grad_(False).eval()
    always_tiled = name == "AutoencoderKLAllegro"
    if always_tiled:
        vae.enable_tiling()
    latents = [shortest_latents(vae, frames, size) for frames in lengths]
    decoder = decoder_of(vae, latents[1], **arguments(vae, latents[1]))
    exact = [peak_gib(vae, z, Exact()) for z in latents]
    full = [peak_gib(vae, z, Full()) for z in latents]
    more = max(1, frame_axis_length(latents[1]) - frame_axis_length(latents[0]))
    memory = [[f"{a:.1f}", f"{b:.1f}", f"+{(b - a) / more:.2f}"] for a, b in (exact, full)]
    tiling = "needed" if always_tiled else tiling_of(vae, decoder, latents[1])
    return [name, kind_of(decoder), str(pieces_of(decoder, latents[1])), tiling, *memory[0], *memory[1]]


def arguments(vae: Any, latents: Tensor) -> dict[str, Any]:
    """Arguments of the class's `decode` beside latents."""
    return {"num_frames": latents.shape[0]} if type(vae).__name__ == "AutoencoderKLTemporalDecoder" else {}


def frame_axis_length(latents: Tensor) -> int:
    return latents.shape[0 if latents.dim() == 4 else 2]


def shortest_latents(vae: Any, frames: int, size: tuple[int, int]) -> Tensor:
    """Latents of the fewest frames that give so many."""
    config = vae.config
    channels = next(config[key] for key in ("latent_channels", "z_dim", "z_channels") if key in config)
    ratio = getattr(vae, "spatial_compression_ratio", 8)
    height, width = (side // ratio for side in size)
    for count in range(1, frames + 32):
        images = isinstance(vae, diffusers.AutoencoderKL | diffusers.AutoencoderKLTemporalDecoder)
        shape = (count, channels, height, width) if images else (1, channels, count, height, width)
        latents = torch.randn(shape, requires_grad=True)
        try:
            decoder = decoder_of(vae, latents, **arguments(vae, latents))
        except UsageError:  # shorter than one tile
            continue
        if frames_of(decoder, latents) >= frames:
            return latents
    raise AssertionError("a decoder makes at least one frame of each latent")


def frames_of(decoder: Decoder | Tiled, latents: Tensor) -> int:
    return decoder.spans(latents)[-1].stop


def kind_of(decoder: Decoder | Tiled) -> str:
    if isinstance(decoder, Tiled):
        over = "tiles over time" if isinstance(decoder, TemporalTiles) else "tiles"
        return f"{over}, each {kind_of(decoder.inner)}"
    if decoder.recurrent:
        return "recurrence"
    return {"ImageDecoder": "single frames", "TemporalDecoder": "chunk"}.get(type(decoder).__name__, "whole")


def pieces_of(decoder: Decoder | Tiled, latents: Tensor) -> int:
    """How many pieces the backward pass runs, one after the other."""
    if isinstance(decoder, Tiled):
        return sum(pieces_of(decoder.inner, tile) for tile in decoder.tiles(latents))
    return len(decoder.spans(latents))


def tiling_of(vae: Any, decoder: Decoder | Tiled, latents: Tensor) -> str:
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError):
        return "none"
    tiled = decoder_of(vae, latents, **arguments(vae, latents))
    if kind_of(tiled) == kind_of(decoder):
        return "no effect"
    return f"followed: {pieces_of(tiled, latents)} pieces"


def peak_gib(vae: nn.Module, latents: Tensor, backprop: Backprop) -> float:
    with StorageCount() as storage:
        decode(vae, latents, backprop, **arguments(vae, latents)).sum().backward()
    latents.grad = None
    return storage.peak / 2**30


if __name__ == "__main__":
    main()
