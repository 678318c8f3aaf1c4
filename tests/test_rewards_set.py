"""The four rewards, loaded from small checkpoints in the official formats and compared with the official scores."""

import dataclasses
import urllib.error

import numpy as np
import open_clip
import pytest
import torch
from chopgrad_rewards.aesthetic import Aesthetic
from chopgrad_rewards.clip_score import ClipScore
from chopgrad_rewards.colorfulness import Colorfulness
from chopgrad_rewards.hps_v2 import HPSv2
from chopgrad_rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess
from open_clip.transform import PreprocessCfg, image_transform_v2
from reward_checks import (
    check_every_prompt_scores_its_own_video,
    check_frozen_and_castable,
    check_gradient_reaches_every_frame,
    check_scores_are_official,
    check_texts_are_encoded_once,
)
from tiny_rewards import ODD_SIZES, PROMPTS, assert_equal_within_rounding, laion_head, make_checkpoints, pil, video_of
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.functional import pad, resize, to_tensor

from chopgrad_align.common.errors import UsageError
from chopgrad_align.objective.reward import load_reward

# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize_mode", "target", "interpolation"),
    [
        ("shortest", (32, 32), "bicubic"),
        ("shortest", (32, 32), "bilinear"),
        ("shortest", (24, 40), "bicubic"),
        ("longest", (32, 32), "bicubic"),
        ("longest", (32, 32), "bilinear"),
        ("squash", (32, 40), "bicubic"),
        ("squash", (32, 40), "bilinear"),
    ],
)
def test_preprocessing_equals_open_clips(resize_mode, target, interpolation):
    config = PreprocessCfg(target, "RGB", resize_mode=resize_mode, interpolation=interpolation)
    transform = image_transform_v2(config, False)
    sizes = [*ODD_SIZES, (64, 64), (480, 832), (20, 30), (32, 20)]
    if resize_mode == "squash":  # where the height shrinks more than the width, Pillow 13 resizes in the other order
        sizes = [size for size in sizes if size[1] > max(48, size[0])]
    for size in sizes:
        frame = video_of(*size, batch=1, frames=1)[0]
        official = transform(pil(frame[0]))[None]
        assert_equal_within_rounding(Preprocess(target, resize_mode, interpolation), frame, official, size)


def hps_official(image, size, antialias=True):
    """What `hpsv2.score` does to an image: a tensor of floats, its longest side resized, padded with black, normalised.

    `antialias` is what torchvision does by itself, True since 0.17.
    """
    pixels = to_tensor(image)
    scale = size / float(max(pixels.shape[1:]))
    if scale != 1.0:
        height, width = (round(side * scale) for side in pixels.shape[1:])
        pixels = resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=antialias)
        rows, columns = size - height, size - width
        pixels = pad(pixels, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
    return (pixels - mean) / std


# The last but one is a tie, which open_clip rounds up. The official code fails when only the longest side fits.
@pytest.mark.parametrize("target", [32, 224])
@pytest.mark.parametrize("antialias", [True, False], ids=["today", "before"])
def test_preprocessing_equals_hpsv2s(rewards, target, antialias):
    preprocess = dataclasses.replace(rewards["hps_v2"](antialias=antialias).similarity.preprocess, size=(target,) * 2)
    for size in [*ODD_SIZES, (480, 832), (165, 320), (224, 224)]:
        frame = video_of(*size, batch=1, frames=1)[0]
        official = hps_official(pil(frame[0]), target, antialias)
        torch.testing.assert_close(preprocess(frame)[0], official, rtol=0, atol=1e-5)


def clip_official(frames, side):
    """CLIP's own preprocessing, with torchvision."""
    transform = Compose(
        [Resize(side, InterpolationMode.BICUBIC), CenterCrop(side), ToTensor(), Normalize(OPENAI_MEAN, OPENAI_STD)]
    )
    return torch.stack([transform(pil(frame)) for frame in frames])


def test_preprocessing_passes_the_gradient_of_saturated_frames():
    frames = torch.ones(1, 3, 50, 70).requires_grad_()
    (gradient,) = torch.autograd.grad(Preprocess((32, 32), "squash")(frames).sum(), frames)
    assert (gradient > 0).all()


# --- small checkpoints in the official formats ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def rewards(checkpoints):
    return {
        "clip_score": lambda **o: ClipScore(checkpoint=str(checkpoints / "clip"), **o),
        "hps_v2": lambda **o: HPSv2(checkpoint=str(checkpoints / "hps"), model="tiny-chopgrad-test", **o),
        "aesthetic": lambda **o: Aesthetic(clip=str(checkpoints / "vit"), head=str(checkpoints / "head.pth"), **o),
        "colorfulness": Colorfulness,
    }


NAMES = ["clip_score", "hps_v2", "aesthetic", "colorfulness"]

# --- the official scores ----------------------------------------------------------------------------------------------


def clip_score_official(checkpoints, images, texts):
    name = f"local-dir:{checkpoints / 'clip'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return open_clip_diagonal(model, open_clip.get_tokenizer(name), torch.stack([transform(i) for i in images]), texts)


def hps_v2_official(checkpoints, images, texts):
    model = open_clip.create_model("tiny-chopgrad-test", pretrained=str(checkpoints / "hps" / "HPS_v2.1_compressed.pt"))
    pixels = torch.stack([hps_official(image, 32) for image in images])
    return open_clip_diagonal(model, open_clip.get_tokenizer("tiny-chopgrad-test"), pixels, texts)


def open_clip_diagonal(model, tokenizer, pixels, texts):
    image, text, _ = model.eval()(pixels, tokenizer(texts))
    return (image @ text.T).diagonal()


def aesthetic_official(checkpoints, images, texts):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(checkpoints / "vit").eval()
    pixels = clip_official([to_tensor(image) for image in images], 32)
    embedding = model.get_image_features(pixel_values=pixels)
    embedding = getattr(embedding, "pooler_output", embedding)
    return laion_head()(embedding / embedding.norm(dim=-1, keepdim=True)).squeeze(1)


def colorfulness_official(checkpoints, images, texts):
    scores = []
    for image in images:
        r, g, b = np.asarray(image).astype(float).transpose(2, 0, 1)
        rg, yb = r - g, 0.5 * (r + g) - b
        scores.append(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))
    return torch.tensor(scores, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_score_is_the_official_one(rewards, checkpoints, name):
    # Where 8-bit images are resized, PIL's rounding remains, small beside the differences between the samples.
    rounded = 0.1 if name in ("clip_score", "aesthetic") else 0
    check_scores_are_official(
        rewards[name](), lambda *given: globals()[f"{name}_official"](checkpoints, *given), (32, 32), rounded
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_scores_its_own_video(rewards, name):
    check_every_prompt_scores_its_own_video(rewards[name], name in ("clip_score", "hps_v2"))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_frame(rewards, name):
    check_gradient_reaches_every_frame(rewards[name], name)


@pytest.mark.parametrize("name", NAMES[:3])
def test_frozen_and_castable(rewards, name):
    check_frozen_and_castable(rewards[name](), size=(32, 32), tolerance=0.05)


def test_colorfulness_of_grey_is_zero_with_a_finite_gradient():
    grey = torch.rand(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 3, -1, -1)
    grey = grey.clone().requires_grad_()
    scores = Colorfulness()(grey, ["", ""])
    assert (scores < 0.01).all()
    (gradient,) = torch.autograd.grad(scores.sum(), grey)
    assert gradient.isfinite().all()
    assert torch.autograd.gradcheck(lambda v: Colorfulness()(v, [""]), video_of(4, 5, 1, 1).double().requires_grad_())


def test_texts_encoded_in_inference_mode_serve_training(rewards):
    reward, video = rewards["clip_score"](), video_of(32, 32)
    with torch.inference_mode():
        expected = reward(video, PROMPTS).clone()
    scores = reward(video.requires_grad_(), PROMPTS)
    scores.sum().backward()
    torch.testing.assert_close(scores.detach(), expected)


def test_texts_are_encoded_once(rewards):
    reward = rewards["clip_score"](frames_per_chunk=2)
    check_texts_are_encoded_once(reward, reward.similarity.model.token_embedding)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_published_names_load_from_local_checkpoints(checkpoints):
    video = video_of(32, 32)
    for name, args in {
        "clip_score": {"checkpoint": str(checkpoints / "clip")},
        "hps_v2": {"checkpoint": str(checkpoints / "hps"), "model": "tiny-chopgrad-test"},
        "aesthetic": {"clip": str(checkpoints / "vit"), "head": str(checkpoints / "head.safetensors")},
        "colorfulness": {},
    }.items():
        assert load_reward(name, **args)(video, PROMPTS).shape == (3,)


def test_clip_score_of_an_architecture_with_a_weights_file(checkpoints):
    file = str(checkpoints / "hps" / "HPS_v2.1_compressed.pt")
    reward = ClipScore(checkpoint="tiny-chopgrad-test", pretrained=file)
    square = video_of(32, 32)  # where both preprocessings leave the frame alone
    torch.testing.assert_close(
        reward(square, PROMPTS), HPSv2(checkpoint=file, model="tiny-chopgrad-test")(square, PROMPTS)
    )


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub that cannot be reached and an empty cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(url, target, progress):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda c: ClipScore(checkpoint="hf-hub:no/body"),
            r"clip_score: checkpoint='hf-hub:no/body' cannot be loaded: ",
        ),
        (lambda c: ClipScore(checkpoint="laion/CLIP"), r"for a model on the hub write 'hf-hub:laion/CLIP'"),
        (lambda c: ClipScore(checkpoint="ViT-B32"), r"neither a folder nor an architecture.*did you mean 'ViT-B-32'?"),
        (
            lambda c: ClipScore(checkpoint="ViT-B-32"),
            r"pretrained=None: expected a weights file or one of its tags, such as open",
        ),
        (lambda c: ClipScore(checkpoint="ViT-B-32", pretrained="laion3b"), r"pretrained='laion3b': expected a weights"),
        (lambda c: ClipScore(checkpoint="ViT-B-32", pretrained="openai"), r"'ViT-B-32', pretrained='openai' cannot be"),
        (
            lambda c: ClipScore(checkpoint=str(c / "clip"), pretrained="x"),
            r"its own weights, so leave `pretrained` out",
        ),
        (
            lambda c: ClipScore(checkpoint=str(c / "vit")),
            r"checkpoint='.*vit' cannot be loaded: .*open_clip_config.json",
        ),
        (lambda c: ClipScore(checkpoint=str(c / "bare")), r"bare' cannot be loaded: Required pretrained weights"),
        (
            lambda c: ClipScore(checkpoint="/no/such/folder"),
            r"neither a folder nor an architecture that open_clip knows$",
        ),
        (lambda c: HPSv2(version="v3"), r"hps_v2: version='v3': expected 'v2.1' or 'v2.0'"),
        (
            lambda c: HPSv2(),
            r"hps_v2: checkpoint='xswu/HPSv2@.*' cannot be loaded: .*\. Expected hub id, folder or path",
        ),
        (lambda c: HPSv2(checkpoint="./no/HPS.pt"), r"no such file: no/HPS.pt\. Expected"),
        (lambda c: HPSv2(checkpoint=str(c / "hps"), version="v2.0"), r"no such file: .*HPS_v2_compressed.pt"),
        (
            lambda c: HPSv2(checkpoint=str(c / "head.pth"), model="tiny-chopgrad-test"),
            r"cannot be loaded: .*state_dict",
        ),
        (
            lambda c: HPSv2(checkpoint=str(c / "narrow.pt"), model="tiny-chopgrad-test"),
            r"narrow.pt' cannot be loaded: .*width.*Expected hub id, folder or path of the official HPS",
        ),
        (lambda c: HPSv2(checkpoint=str(c / "empty.pt"), model="tiny-chopgrad-test"), r"empty.pt' cannot be loaded"),
        (
            lambda c: HPSv2(checkpoint=str(c / "pickle.pt"), model="tiny-chopgrad-test"),
            r"cannot be loaded: it is damaged",
        ),
        (lambda c: Aesthetic(), r"aesthetic: clip='openai/clip-vit-large-patch14@.*' cannot be loaded: "),
        (lambda c: Aesthetic(clip=str(c / "clip")), r"aesthetic: clip='.*' cannot be loaded: "),
        (
            lambda c: Aesthetic(clip=str(c / "vit")),
            r"aesthetic: head='https://.*improved-aesthetic-predictor.*' cannot be",
        ),
        (
            lambda c: Aesthetic(clip=str(c / "vit"), head=str(c / "wide.pth")),
            r"other weights: 'layers.0.weight' is \(1024",
        ),
        (
            lambda c: Aesthetic(clip=str(c / "vit"), head=str(c / "bad.safetensors")),
            r"bad.safetensors' cannot be loaded",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded(checkpoints, offline, make, message):
    (checkpoints / "bare").mkdir(exist_ok=True)
    (checkpoints / "bare" / "open_clip_config.json").write_text(
        (checkpoints / "clip" / "open_clip_config.json").read_text()
    )
    (checkpoints / "empty.pt").touch()
    published = torch.load(checkpoints / "hps" / "HPS_v2.1_compressed.pt")["state_dict"]
    narrow = published | {"positional_embedding": published["positional_embedding"][:, :8]}
    torch.save({"state_dict": narrow}, checkpoints / "narrow.pt")
    torch.save({"state_dict": np.float32}, checkpoints / "pickle.pt")
    torch.save(laion_head(768).state_dict(), checkpoints / "wide.pth")
    (checkpoints / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(UsageError, match=message) as caught:
        make(checkpoints)
    assert "\n" not in str(caught.value)
