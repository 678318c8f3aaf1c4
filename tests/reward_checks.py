"""What holds for every reward on frames. `make` constructs one, with small weights, from arguments of `FrameReward`."""

import torch
from tiny_rewards import ODD_SIZES, PROMPTS, pil, video_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from chopgrad_align.objective.reward import check_reward


def check_scores_are_official(reward, official, exact_size, rounded, rtol=1e-5):
    """Compare scores of frames of many sizes with `official(images, texts)`.

    They are equal at `exact_size`, where nothing is resized; elsewhere within `rounded` times the deviation of the
    official scores.
    """
    videos = [video_of(*size, frames=1) for size in (exact_size, *ODD_SIZES)]
    images = [pil(frame) for video in videos for frame in video[:, 0]]
    expected = official(images, PROMPTS * len(videos)).view(len(videos), -1)
    scores = torch.stack([reward(video, PROMPTS) for video in videos])
    torch.testing.assert_close(scores[0], expected[0], rtol=rtol, atol=1e-5)
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, rtol=rtol, atol=1e-5 + rounded * float(expected.std()))


def check_every_prompt_scores_its_own_video(make, reads_prompts):
    video, reward = video_of(40, 56), make(frames_per_chunk=4)
    together = reward(video, PROMPTS)
    alone = [make()(video[b : b + 1], [prompt])[0] for b, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    # The prompt in the middle stays, and so does its score: none is scored against the prompt of another.
    changed = (reward(video, PROMPTS[::-1]) - together).abs() > 1e-5
    assert changed.tolist() == [reads_prompts, False, reads_prompts]


def check_gradient_reaches_every_frame(make, name):
    video = video_of(40, 56, frames=3).requires_grad_()
    reward = make(frames_per_chunk=2)
    (gradient,) = torch.autograd.grad(reward(video, PROMPTS).sum(), video)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((2, 3, 4)) > 0).all()
    # A step along the gradient raises every score.
    step = 1e-3 * gradient / gradient.abs().amax((1, 2, 3, 4), keepdim=True)
    assert (reward(video + step, PROMPTS) > reward(video, PROMPTS)).all()
    check_reward(reward, name, prompts=PROMPTS[:2])


class Float64(TorchDispatchMode):
    """A context in which float32 is float64: what models compute in float32, whatever the type of their weights."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def check_gradient_equals_finite_differences(reward, prompts, frames, size=(24, 40)):
    """Compare the gradient with central differences along random directions, all in float64."""
    generator = torch.Generator().manual_seed(0)
    # Inside [0, 1]: bicubic edges that overshoot are cut, where the score has kinks.
    video = 0.1 + 0.8 * video_of(*size, batch=len(prompts), frames=frames).double()
    reward = reward.double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # also of tensors made from nothing
    try:
        with Float64():
            leaf = video.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(reward(leaf, prompts).sum(), leaf)
            for _ in range(3):
                direction = torch.randn(video.shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    above, below = (reward(video + sign * 1e-8 * direction, prompts).sum() for sign in (1, -1))
                torch.testing.assert_close((gradient * direction).sum(), (above - below) / 2e-8, rtol=1e-4, atol=1e-7)
    finally:
        torch.set_default_dtype(before)


def check_frozen_and_castable(reward, size, tolerance):
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())
    video = video_of(*size)
    scores, half = reward(video, PROMPTS), reward.to(torch.bfloat16)(video.bfloat16(), PROMPTS)
    assert scores.dtype == half.dtype == torch.float32
    torch.testing.assert_close(half, scores, rtol=tolerance, atol=tolerance)


def check_texts_are_encoded_once(reward, token_embedding, others=0):
    """By what its embedding of tokens is given; besides the prompts, `others` that the reward needs for itself."""
    encoded = []
    token_embedding.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    video = video_of(32, 32).requires_grad_()
    reward(video, PROMPTS).sum().backward()
    reward(video, [*PROMPTS[1:], "new"])
    assert sum(encoded) == 4 + others
