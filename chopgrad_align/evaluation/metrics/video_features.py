"""Networks that turn a clip into one vector, for distances between sets of clips."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import UsageError
from ...common.weight_files import loading

Features = Callable[[Tensor], Tensor]
"""`(F, 3, H, W)` in [0, 1] -> `(D,)`."""

_I3D_FRAMES = 10


def load_features(network: str, device: torch.device) -> Features:
    """A feature network by name.

    Args:
        network: `videomae:CHECKPOINT`, a hub id or folder of VideoMAE (Tong et al., arXiv 2203.12602) in the format of
            transformers: the mean of the last hidden states, of as many frames as the model takes, evenly spaced over
            the clip (repeated if it is shorter), stretched to the model's square. `i3d:FILE`, I3D (Carreira and
            Zisserman, arXiv 1705.07750) as the TorchScript file that StyleGAN-V (arXiv 2112.14683) published, called
            as there: all frames in [0, 255], with `rescale`, `resize` and `return_features`.
        device: Where the network goes.

    Raises:
        UsageError: The name, the file or the checkpoint is another.
    """
    kind, _, source = network.partition(":")
    if kind not in ("videomae", "i3d") or not source:
        raise UsageError(
            "fvd must name its feature network, as fvd:videomae:CHECKPOINT (hub id or folder) or fvd:i3d:FILE, "
            f"got {network!r}"
        )
    return _videomae(source, device) if kind == "videomae" else _i3d(source, device)


def _videomae(source: str, device: torch.device) -> Features:
    from transformers import AutoConfig, VideoMAEModel
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    wanted = "a hub id or a folder of a VideoMAE model in the format of transformers"
    with loading(f"fvd:videomae:{source}", wanted):
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "videomae":
            raise ValueError(f"its model type is {kind!r}, not 'videomae'")
        loader: Any = VideoMAEModel
        model, info = loader.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} weights are missing")
    model.eval().requires_grad_(False).to(device)
    size, count = model.config.image_size, model.config.num_frames
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def features(video: Tensor) -> Tensor:
        chosen = video[torch.linspace(0, len(video) - 1, count).round().long()].to(device)
        frames = F.interpolate(chosen, (size, size), mode="bilinear", antialias=True)
        return model(((frames - mean) / std)[None]).last_hidden_state[0].mean(0)

    return features


def _i3d(source: str, device: torch.device) -> Features:
    with loading(f"fvd:i3d:{source}", "the TorchScript file of I3D"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and I3D published in no other form
        model = torch.jit.load(source, map_location=device).eval()

    def features(video: Tensor) -> Tensor:
        if len(video) < _I3D_FRAMES:
            raise UsageError(f"fvd:i3d needs {_I3D_FRAMES} or more frames, got {len(video)}; take longer clips")
        pixels = (video * 255).round().transpose(0, 1)[None].to(device)
        return model(pixels, rescale=True, resize=True, return_features=True)[0]

    return features
