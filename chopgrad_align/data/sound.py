"""Sound of media files."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from .source import BadFile


def read_sound(path: Path, name: str) -> tuple[Tensor, int] | None:
    """Read the first sound track of a file; None if it has none.

    Returns:
        float32 `(channels, n)` in [-1, 1], and its rate in values a second.

    Raises:
        BadFile: It cannot be decoded.
    """
    try:
        with av.open(str(path), "r", metadata_errors="replace") as container:
            if not container.streams.audio:
                return None
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp")  # a plane a channel, whatever the file has
            frames = [part for frame in container.decode(stream) for part in planar.resample(frame)]
            frames += planar.resample(None)
            values = np.concatenate([frame.to_ndarray() for frame in frames], 1)
            return torch.from_numpy(values), stream.rate
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise BadFile("sound", name, f"{error}; encode it again") from None
