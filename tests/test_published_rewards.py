"""What holds for every published reward: its gradient is that of its score, and it passes the check of rewards."""

import importlib.metadata
import inspect
import re
import warnings
from pathlib import Path

import pytest
import tiny_frame_rewards
import tiny_rewards
import tiny_video_rewards
import torch
from reward_checks import check_gradient_equals_finite_differences

from chopgrad_align.evaluation.check_reward import clip, examine, known_of
from chopgrad_align.objective.reward import Samples, load_reward

NAMES = sorted(entry.name for entry in importlib.metadata.entry_points(group="chopgrad_align.rewards"))
MORE = {"warp_consistency": {"detach_flow": False}}


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """A reward by its published name, from a small checkpoint."""
    folders = [tmp_path_factory.mktemp(kind) for kind in ("images", "frames", "videos")]
    tiny_rewards.make_checkpoints(folders[0])
    tiny_frame_rewards.make_frame_checkpoints(folders[1])
    tiny_video_rewards.make_video_checkpoints(folders[2])
    modules = (tiny_rewards, tiny_frame_rewards, tiny_video_rewards)
    given = {}
    for module, folder in zip(modules, folders, strict=True):
        given |= module.arguments(folder)
    return lambda name, **more: load_reward(name, **{**given[name], **more})


def prompts_of(name):
    return (
        tiny_video_rewards
        if name in ("action", "video_clip", "video_text", "video_reward", "vlm_question")
        else tiny_rewards
    ).PROMPTS


class WithImages(torch.nn.Module):
    """A reward that reads images, told of some."""

    def __init__(self, reward, count):
        super().__init__()
        self.reward = reward
        self.sample = Samples(count, images=tiny_rewards.video_of(24, 40, batch=count, frames=1)[:, 0].flip(-1))

    def forward(self, video, prompts):
        return self.reward(video, prompts, sample=self.sample)


def told(name, reward, count):
    return WithImages(reward, count) if name == "reference_image" else reward


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(load, name):
    frames = 2 if name in ("motion", "warp_consistency") else 4
    reward = told(name, load(name, **MORE.get(name, {})), 2)
    check_gradient_equals_finite_differences(reward, prompts_of(name)[:2], frames)


def test_the_gradient_of_detached_boxes_is_another(load, monkeypatch):
    """What transformers' Grounding DINO gives by itself."""
    monkeypatch.setattr("chopgrad_rewards.detection._Attached.__torch_function__", keep_everything)
    reward = load("object_removal")
    with pytest.raises(AssertionError, match="Scalars are not close"):
        check_gradient_equals_finite_differences(reward, prompts_of("object_removal")[:2], 1)


def keep_everything(self, function, types, args=(), kwargs=None):
    return function(*args, **(kwargs or {}))


LIMITS = {"clip_score": 12, "hps_v2": 77, "pick_score": 10, "mps": 10, "image_reward": 35, "video_clip": 12}


@pytest.mark.parametrize("name", LIMITS)
@torch.no_grad()
def test_prompts_that_are_cut_are_told_once(load, name):
    reward, limit = load(name), LIMITS[name]
    video = tiny_rewards.video_of(32, 32, batch=3, frames=4)
    word = prompts_of(name)[0].split()[1]
    fits, longer, longest = (" ".join([word] * (limit + more)) for more in (-2, 0, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(video, [fits + " ", word, ""])
    with pytest.warns(UserWarning, match=f"^{name}: 2 of 3 prompts are longer than the {limit} tokens"):
        scores = reward(video, [fits, longer, longest])
    # Once: another warning would be an error. What is cut off does not count.
    torch.testing.assert_close(reward(video, [fits, longest, longer + " " + word]), scores)


FORMULAS = ("colorfulness", "compressibility", "sharpness", "temporal_flicker")
IN_FLOAT32 = ("motion", "warp_consistency")  # from the features on


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FORMULAS + IN_FLOAT32])
@torch.no_grad()
def test_scores_of_half_precision_are_not_in_steps(load, name):
    """In bfloat16 itself there would be as many scores as there are numbers with 8 bits."""
    reward = told(name, load(name, **({"label": "jogging"} if name == "action" else {})), 6).to(torch.bfloat16)
    videos = tiny_rewards.video_of(32, 32, batch=6, frames=4).bfloat16()
    scores = reward(videos, [*prompts_of(name), *prompts_of(name)])
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).sum() >= 5


def test_the_table_names_every_reward_and_the_revision_of_its_checkpoint():
    table = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    pinned = 0
    for entry in importlib.metadata.entry_points(group="chopgrad_align.rewards"):
        assert f"`{entry.name}`" in table
        defaults = " ".join(str(p.default) for p in inspect.signature(entry.load()).parameters.values())
        for repository, revision in re.findall(r"([\w-]+/[\w.-]+)(?:@|/raw/)([0-9a-f]{40})", defaults):
            assert f"{repository}@{revision[:7]}" in table
            pinned += 1
    assert pinned == 13


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_passes_its_own_check(load, name):
    # The last level of the small Grounding DINO is one number, which its GroupNorm refuses of a single frame.
    reward = load(name, **({"frames_per_chunk": 9} if name == "object_removal" else {}))
    video, _, fps = clip(None, None)
    report = dict(examine(reward, name, video, prompts_of(name)[:2], known_of(video, fps)))
    assert list(report)[-1] in ("finite differences", "ascent")
