"""Metrics by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...common.arguments import nearest
from ...common.errors import UsageError
from .base import Metric, SetMetric
from .dists import DISTS
from .flicker import Flicker
from .fvd import FVD
from .lpips import LPIPS
from .psnr import PSNR
from .relative_warping_error import RelativeWarpingError
from .reward import RewardMetric
from .seams import Seams
from .ssim import SSIM
from .warping_error import WarpingError

METRICS: dict[str, Callable[..., Metric | SetMetric]] = {
    "psnr": PSNR,
    "ssim": SSIM,
    "lpips": LPIPS,
    "dists": DISTS,
    "warping_error": WarpingError,
    "relative_warping_error": RelativeWarpingError,
    "flicker": Flicker,
    "seams": Seams,
    "fvd": FVD,
    "reward": RewardMetric,
}
_PLAIN = {"psnr", "ssim", "flicker"}  # formulas, which have no network and no choices


def load_metrics(names: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Metric | SetMetric]:
    """Construct metrics.

    Args:
        names: Each `name` or `name:choice`: psnr, ssim, flicker, lpips (`lpips:vgg`), dists, warping_error and
            relative_warping_error (`warping_error:raft`), `seams:WINDOW:OVERLAP`, and `fvd:videomae:CHECKPOINT` or
            `fvd:i3d:FILE`; `reward:NAME` is the score of a reward.
        device: Where networks go; clips are to be on it too.

    Returns:
        The metrics under their names as given, which say the choice.

    Raises:
        UsageError: A name, a choice, weights or a package that is not there.
    """
    return {name: _load(name, torch.device(device)) for name in names}


def _load(full_name: str, device: torch.device) -> Metric | SetMetric:
    name, colon, choice = full_name.partition(":")
    if name not in METRICS:
        raise UsageError(f"no metric is called {name!r}{nearest(name, METRICS)}; known are {', '.join(METRICS)}")
    if colon and name in _PLAIN | {"dists"}:
        raise UsageError(f"metric {full_name!r}: {name} has no choices; write {name!r}")
    try:
        if name in _PLAIN:
            return METRICS[name]()
        return METRICS[name](device, *([choice] if colon else []))
    except ModuleNotFoundError as error:
        raise UsageError(
            f"metric {name!r} needs the module {error.name!r}, which is not installed: "
            "pip install 'chopgrad-align[metrics]'"
        ) from error
