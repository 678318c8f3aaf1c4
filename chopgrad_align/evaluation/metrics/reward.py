"""The score of a reward as a figure of a clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...data.clips import Clip
from ...objective.reward import Reward, Samples, check_scores, load_reward
from ...objective.reward.loading import to_device
from ...objective.reward.protocol import at_fps, score
from .base import Metric


class RewardMetric(Metric):
    """The score of the predicted video by a reward, which knows the clip's caption, frames a second and other videos.

    Args:
        device: Where its network goes.
        name: As `load_reward` takes it.

    Raises:
        UsageError: As `load_reward`, or there is no name.
    """

    higher_is_better = True

    def __init__(self, device: torch.device, name: str = "") -> None:
        if not name:
            raise UsageError("metric 'reward': expected a reward's name behind it, as reward:aesthetic")
        self.name, self.reward = name, to_device(load_reward(name), device)

    def __call__(self, video: Tensor, target: Tensor) -> float:
        return self._score(self.reward, video, "", Samples(1, videos={"target": [target]}))

    def of_clip(self, video: Tensor, clip: Clip) -> float:
        """See `Metric`."""
        videos = {role: [of] for role, of in clip.videos.items()}
        images = [of[0] for of in videos.pop("image", [])]
        sample = Samples(1, [clip.fps], images, videos, rows=[{"name": clip.name, "caption": clip.caption}])
        return self._score(at_fps(self.reward, clip.fps), video, clip.caption, sample)

    @torch.no_grad()
    def _score(self, reward: Reward, video: Tensor, prompt: str, sample: Samples) -> float:
        return check_scores(f"reward {self.name!r}", score(reward, video[None], [prompt], [0], sample), 1).item()
