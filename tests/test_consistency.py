"""VBench's consistencies and flicker, and faithfulness to an image, against their definitions and official features."""

import pytest
import torch
import torch.nn.functional as F
from chopgrad_rewards.background_consistency import BackgroundConsistency
from chopgrad_rewards.image_features import consistency
from chopgrad_rewards.reference_image import ReferenceImage
from chopgrad_rewards.subject_consistency import SubjectConsistency
from chopgrad_rewards.temporal_flicker import TemporalFlicker
from tiny_rewards import ODD_SIZES, pil, video_of
from tiny_video_rewards import make_clip, make_dino
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from chopgrad_align import Samples, UsageError
from chopgrad_align.objective.reward.protocol import score
from chopgrad_align.objective.reward.reduction import Min

PROMPTS = ["", ""]
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    make_dino(folder / "dino")
    make_clip(folder / "clip")
    return folder


def dino_features(folder, images):
    from transformers import ViTModel

    model = ViTModel.from_pretrained(folder / "dino", add_pooling_layer=False).eval()
    transform = Compose([Resize(32), ToTensor(), IMAGENET])
    tokens = [model(transform(i)[None], interpolate_pos_encoding=True).last_hidden_state[0, 0] for i in images]
    return torch.stack(tokens)


def clip_features(folder, images):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder / "clip").eval()
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), CLIP])
    return model.get_image_features(torch.stack([transform(i) for i in images])).pooler_output


def vbench(features):
    """Frame by frame: to the one before and to the first one."""
    found = []
    for i in range(1, len(features)):
        to = [F.cosine_similarity(features[i], features[j], dim=0).item() for j in (i - 1, 0)]
        found.append(sum(max(0.0, similarity) for similarity in to) / 2)
    return sum(found) / len(found)


REWARDS = {
    "subject": (lambda f: SubjectConsistency(checkpoint=str(f / "dino")), dino_features),
    "background": (lambda f: BackgroundConsistency(checkpoint=str(f / "clip")), clip_features),
}


@pytest.mark.parametrize("name", REWARDS)
@torch.no_grad()
def test_consistency_is_vbenchs(folder, name):
    make, features = REWARDS[name]
    reward, found, expected = make(folder), [], []
    for size in ((32, 32), *ODD_SIZES[:-4]):
        video = video_of(*size, batch=1, frames=4)
        found.append(reward(video, [""])[0])
        expected.append(torch.tensor(vbench(features(folder, [pil(frame) for frame in video[0]]))))
    found, expected = torch.stack(found), torch.stack(expected)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)  # nothing is resized
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * float(expected.std()))
    video = video_of(40, 32, batch=2, frames=3)
    alone = torch.cat([reward(video[b : b + 1], [""]) for b in (0, 1)])
    torch.testing.assert_close(reward(video, PROMPTS), alone)
    torch.testing.assert_close(reward(video[:, :1].expand(-1, 3, -1, -1, -1), PROMPTS), torch.ones(2))
    with pytest.raises(UsageError, match=rf"^{name}_consistency: expected a video of which 2 frames or more are read"):
        reward(video[:, :1], PROMPTS)


def test_negative_similarities_count_as_none():
    features = F.normalize(torch.tensor([[[1.0, 0], [-1, 0.1], [1, 1]]], dtype=torch.float64), dim=-1).requires_grad_()
    torch.testing.assert_close(consistency(features).item(), vbench(features[0].detach()), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(consistency, features)


@torch.no_grad()
def test_faithfulness_is_the_similarity_to_the_image(folder):
    reward = ReferenceImage(checkpoint=str(folder / "dino"), frames_per_chunk=2)
    video, images = video_of(32, 32, batch=2, frames=3), video_of(40, 56, batch=2, frames=1)[:, 0]
    sample = Samples(2, images=images)
    shown = dino_features(folder, [pil(image) for image in images])
    frames = torch.stack([dino_features(folder, [pil(frame) for frame in clip]) for clip in video])
    expected = F.cosine_similarity(frames, shown[:, None], dim=-1)
    found = reward(video, PROMPTS, sample=sample)
    torch.testing.assert_close(found, expected.mean(1), rtol=0, atol=0.01)  # Pillow rounds the resized images
    worst = score(reward, video, PROMPTS, [0, 0], sample, Min())
    torch.testing.assert_close(worst, expected.amin(1), rtol=0, atol=0.01)
    same = Samples(2, images=video[:, 0])
    torch.testing.assert_close(reward(video[:, :1], PROMPTS, sample=same), torch.ones(2))
    for unknown in (None, Samples(2), Samples(2, images=[images[0], None])):
        with pytest.raises(UsageError, match=r"^reference_image compares with the image that a video is made from"):
            reward(video, PROMPTS, sample=unknown)


def test_flicker_is_vbenchs():
    video = video_of(24, 40, batch=2, frames=4)
    eight_bit = (video * 255).round().numpy()
    expected = [(255 - abs(clip[1:] - clip[:-1]).mean()) / 255 for clip in eight_bit]
    assert TemporalFlicker()(video, PROMPTS).tolist() == pytest.approx(expected, rel=1e-5)
    assert TemporalFlicker()(video[:, :1].expand(-1, 4, -1, -1, -1), PROMPTS).tolist() == [1, 1]
    with pytest.raises(UsageError, match=r"^temporal_flicker: expected a video of which 2 frames"):
        TemporalFlicker()(video[:, :1], PROMPTS)
