"""The networks whose features perceptual losses compare, and the weights that were learned for the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ...common.errors import UsageError
from ...common.weight_files import fill_weights, loading, read_weights

Network = Literal["vgg", "alex"]


def backbone(name: str, network: Network, checkpoint: str | None) -> nn.Sequential:
    """The convolutional layers of torchvision's VGG-16 or AlexNet, trained on ImageNet.

    Args:
        name: What messages call the loss.
        network: `"vgg"` or `"alex"`.
        checkpoint: A file of the network's weights in torchvision's format (`.pth`, read with `weights_only=True`, or
            safetensors), of which those of the classifier are not needed. None takes torchvision's file, from the cache
            of `torch.hub` or downloaded to it.

    Raises:
        UsageError: The network is unknown, or its weights are missing, unreachable, damaged or of another one.
    """
    from torchvision import models

    published = {
        "vgg": (models.vgg16, models.VGG16_Weights.IMAGENET1K_V1),
        "alex": (models.alexnet, models.AlexNet_Weights.IMAGENET1K_V1),
    }
    if network not in published:
        raise UsageError(f"{name}: network={network!r}: expected 'vgg' or 'alex'")
    make, weights = published[network]
    with torch.device("meta"):  # the classifier alone would be half a gigabyte
        features: nn.Sequential = make().features
    features = features.to_empty(device="cpu")
    with loading(
        f"{name}: checkpoint={checkpoint!r}",
        f"a file of torchvision's {make.__name__}, or None to download {weights.url}",
    ):
        if checkpoint is None:
            path = Path(weights.url)
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        else:
            path = Path(checkpoint).expanduser()
            state = read_weights(path)
        prefix = "features."
        layers = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        fill_weights(features, layers, path)
    return features.requires_grad_(False).eval()


def run(layers: nn.Sequential, x: Tensor, ends: Sequence[int]) -> list[Tensor]:
    """Activations of the layers whose numbers are in `ends`, in order."""
    found = []
    for number, layer in enumerate(layers[: max(ends) + 1]):
        x = layer(x)
        if number in ends:
            found.append(x)
    return found


def learned_weights(package: str, file: str) -> dict[str, Tensor]:
    """The tensors of a file that an installed package carries; the package is not imported, which can take seconds.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return read_weights(Path(spec.origin).parent / file)
