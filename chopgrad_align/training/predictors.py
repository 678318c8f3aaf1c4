"""Predict clips as a run's config says: what the evaluation compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import UsageError
from ..data.clips import Clip
from ..sampling.call_shape import as_taken, frames_asked
from ..sampling.predictions import Denoise
from ..sampling.predictions.windows import predict_long
from .batches import clip_batch, held_out_clip, held_out_seed
from .config import Config
from .data import held_out_clips
from .measurement import predict
from .models import check_model, load_pipeline
from .trained_models import TrainedModels, trained_file


class HeldOutClips:
    """The held-out clips of a config, in the order of its held-out pairs; read when they are asked for.

    Args:
        config: With a section `data.clips`.
        count: How many; beyond the number of files, each time another clip of them. Default: one a file.

    Raises:
        UsageError: The data are not clips, or none can be read.
    """

    def __init__(self, config: Config, count: int | None = None) -> None:
        self._clips = held_out_clips(config)
        self._count = len(self._clips) if count is None else count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Clip]:
        return (held_out_clip(self._clips, place) for place in range(self._count))


def restorers(
    config: Config, trained: Mapping[str, Path | None], partial: bool = False
) -> dict[str, Callable[[Clip], Tensor]]:
    """A predictor of clips for each trained model, on one pipeline that is loaded once.

    Args:
        config: Its model and prediction are used, and the captions of its data.
        trained: Folder or file of each LoRA or trained modules; None is the model as it is.
        partial: Whether to leave out what of a LoRA does not fit.

    Returns:
        For each name a function from a clip to a video `(F, 3, H, W)` in [0, 1], float32 on the CPU; of a clip that is
        longer than `model.call.num_frames`, window by window. What it draws is a function of the place of the call, so
        that all methods start from the same noise.

    Raises:
        UsageError: Files that are not there or do not fit the pipeline, or a prediction from the target.
    """
    prediction, call = config.prediction.policy(noise=config.model.initial_noise()), dict(config.model.call)
    if isinstance(prediction, Denoise):
        raise UsageError(
            "prediction.mode=denoise starts from the target, and would be given what it is to find; add "
            "prediction.mode=one_step or prediction.mode=sample"
        )
    check_model(config.model)
    files = {name: None if path is None else trained_file(path) for name, path in trained.items()}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    pipe = load_pipeline(config.model).to(device)
    models = TrainedModels(pipe, files, partial)
    caption, told = config.data.clips.caption if config.data.clips else None, config.data.captions().told

    def restorer(name: str) -> Callable[[Clip], Tensor]:
        place = 0

        def restore(clip: Clip) -> Tensor:
            nonlocal place
            models.use(name)
            seeds, texts = [held_out_seed(place)], [told(clip.caption if caption is None else caption)]
            place += 1

            def run(videos: Mapping[str, Tensor]) -> Tensor:
                part = dataclasses.replace(clip, videos={role: video[0] for role, video in videos.items()})
                with torch.no_grad():
                    video, _ = predict(pipe, as_taken(pipe, call), prediction, clip_batch(pipe, [part], texts, seeds))
                return video.float().cpu().clamp(0, 1)

            whole = {role: video[None] for role, video in clip.videos.items()}
            window = frames_asked(call) or len(clip.videos["target"])
            if len(clip.videos["target"]) <= window:
                return run(whole)[0]
            stride = pipe.vae_scale_factor_temporal
            return predict_long(run, whole, window, config.prediction.overlap, stride)[0]

        return restore

    return {name: restorer(name) for name in files}
