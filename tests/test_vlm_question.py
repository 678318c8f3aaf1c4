"""The answer of a vision-language model, from a small checkpoint in the published format, against its own processor."""

import pytest
import torch
from chopgrad_rewards.vlm_question import VLMQuestion
from tiny_rewards import ODD_SIZES, pil, video_of
from tiny_video_rewards import PROMPTS, make_qwen2_5

from chopgrad_align import UsageError
from chopgrad_align.objective.reward.protocol import score
from chopgrad_align.objective.reward.reduction import Min

QUESTION = "rate prompt {prompt}"
RATING = {"1": 1, "2": 2, "3": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    make_qwen2_5(folder)
    return str(folder)


@pytest.fixture
def make(checkpoint):
    return lambda **options: VLMQuestion(
        **{"question": QUESTION, "checkpoint": checkpoint, "dtype": "float32", "frames": None, **options}
    )


@torch.no_grad()
def official(checkpoint, kind, shown, prompt, answers):
    """By transformers' own processor and model, whose last logits are those of the answer."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    processor = Qwen2_5_VLProcessor.from_pretrained(checkpoint)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    content = [{"type": kind}, {"type": "text", "text": QUESTION.format(prompt=prompt)}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = {"images": [shown]} if kind == "image" else {"videos": [shown], "do_sample_frames": False}
    inputs = processor(text=[text], return_tensors="pt", **given)
    if kind == "video":
        inputs["second_per_grid_ts"] = torch.tensor([1.0])  # two frames, half a second apart
    logits = model(**inputs).logits[0, -1]
    ids = [processor.tokenizer.encode(answer)[0] for answer in answers]
    values = torch.tensor([float(value) for value in answers.values()])
    return (logits[ids].softmax(-1) * values).sum()


@pytest.mark.parametrize("answers", [None, RATING], ids=["yes", "rating"])
def test_answers_about_frames_are_the_official_ones(make, checkpoint, answers):
    reward, read = make(answers=answers), answers or {"Yes": 1, "No": 0}
    exact, rounded = [], []
    for size in ((56, 84), *ODD_SIZES[::5]):
        video = video_of(*size, batch=1, frames=2)
        expected = [official(checkpoint, "image", pil(frame), PROMPTS[0], read) for frame in video[0]]
        found = reward.score_video(video, PROMPTS[:1])
        (exact if size == (56, 84) else rounded).append((found[0], torch.stack(expected)))
    torch.testing.assert_close(*exact[0], rtol=1e-4, atol=1e-5)  # nothing is resized
    found, expected = (torch.cat(of) for of in zip(*rounded, strict=True))
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15 * float(expected.std()))


@pytest.mark.parametrize("frames", [4, 3], ids=["even", "odd"])
def test_answers_about_clips_are_the_official_ones(make, checkpoint, frames):
    video = video_of(56, 84, batch=2, frames=frames)
    expected = [
        official(checkpoint, "video", (clip * 255).round().byte(), prompt, RATING)
        for clip, prompt in zip(video, PROMPTS, strict=False)
    ]
    found = make(answers=RATING, of="clip")(video, PROMPTS[:2])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_frames_have_scores_of_their_own_and_clips_one(make):
    video = video_of(56, 56, batch=2, frames=3).requires_grad_()
    reward = make()
    each = reward.score_video(video, PROMPTS[:2])
    assert each.shape == (2, 3)
    assert ((each > 0) & (each < 1)).all()
    torch.testing.assert_close(reward(video, PROMPTS[:2]), each.mean(1))
    worst = score(reward, video, PROMPTS[:2], [0, 0], None, Min())
    torch.testing.assert_close(worst, each.amin(1))
    (gradient,) = torch.autograd.grad(each[0, 1], video)
    assert gradient.abs().amax((2, 3, 4)).nonzero().tolist() == [[0, 1]]
    assert make(of="clip")(video, PROMPTS[:2]).shape == (2,)
    assert not torch.allclose(reward(video, PROMPTS[:2]), reward(video, PROMPTS[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": {"Yes": 1}}, r"answers=\{'Yes': 1\}: expected two answers or more, each with a number"),
        ({"answers": {"Yes": 1, "No": "bad"}}, r"expected two answers or more, each with a number"),
        ({"answers": {"Yes": 1, "perhaps not": 0}}, r"'perhaps not' is 2 tokens of the model, expected one"),
        ({"answers": {"Yes": 1, "perhaps": 0}}, r"'perhaps' is 1 tokens of the model, expected one that it knows"),
        ({"answers": {"Yes": 1, "yes": 0}}, r"two of them begin alike for the model"),
        ({"of": "video"}, r"of='video': expected 'frames' or 'clip'"),
        ({"dtype": "int8"}, r"dtype='int8': expected bfloat16"),
        ({"max_pixels": 100}, r"max_pixels=100: expected 3136 or more"),
        (
            {"checkpoint": "no/such/folder"},
            r"checkpoint='no/such/folder' cannot be loaded: .*Expected hub id or folder",
        ),
    ],
)
def test_what_can_be_wrong(make, options, message):
    with pytest.raises(UsageError, match=f"^vlm_question: .*{message}"):
        make(**options)


def test_a_prompt_may_hold_braces_but_no_special_tokens(make):
    video = video_of(56, 56, batch=1, frames=1)
    assert make()(video, ["{a} dog {0}"]).isfinite().all()
    with pytest.raises(UsageError, match="contains one of the model's special tokens"):
        make()(video, ["<|im_end|>"])
