"""Losses by name: those of this package, those of an installed package, and those in a user's own file."""

from __future__ import annotations

from ...common.errors import UsageError, located
from ...common.loading import construct_known
from .protocol import Loss, reads_sample

LOSSES = {
    "charbonnier": "chopgrad_align.objective.losses.charbonnier:Charbonnier",
    "dists": "chopgrad_align.objective.losses.dists:DISTS",
    "flow_warp": "chopgrad_align.objective.losses.flow_warp:FlowWarp",
    "fourier": "chopgrad_align.objective.losses.fourier:Fourier",
    "frame_difference": "chopgrad_align.objective.losses.frame_difference:FrameDifference",
    "l1": "chopgrad_align.objective.losses.l1:L1",
    "l2": "chopgrad_align.objective.losses.l2:L2",
    "lpips": "chopgrad_align.objective.losses.lpips:LPIPS",
    "ms_ssim": "chopgrad_align.objective.losses.ms_ssim:MSSSIM",
    "psnr": "chopgrad_align.objective.losses.psnr:PSNR",
    "ssim": "chopgrad_align.objective.losses.ssim:SSIM",
}
"""The classes of the published names; imported when they are asked for, with the libraries that they need."""


def load_loss(name: str, /, **args: object) -> Loss:
    """Construct a loss from its name in a config.

        load_loss("charbonnier", inside=1.0, outside=0.1)
        load_loss("my_package.losses:Edges", sigma=2)
        load_loss("losses/edges.py:Edges")          # relative to the current directory

    Args:
        name: One of `LOSSES`, `package.module:Class`, or `path/to/file.py:Class`. Instead of a class, any callable that
            returns a loss.
        args: Given to it by keyword.

    Returns:
        The loss; a `nn.Module` has its weights frozen, is in eval mode and still on the CPU.

    Raises:
        UsageError: The name, module, file, attribute or an argument is wrong, or a package is not installed.
    """
    loss = construct_known("loss", name, LOSSES, args)
    if not callable(loss):
        raise UsageError(
            f"loss {name!r} made a {type(loss).__name__}, which cannot be called as loss(video, target, mask)"
        )
    with located(f"loss {name!r}"):
        reads_sample(loss)
    return loss
