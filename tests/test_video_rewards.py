"""The rewards of whole videos, loaded from small checkpoints in the official formats, against the official paths."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chopgrad_rewards.action import Action
from chopgrad_rewards.motion import Motion
from chopgrad_rewards.optical_flow import OpticalFlow
from chopgrad_rewards.preprocess import Preprocess
from chopgrad_rewards.temporal_consistency import TemporalConsistency, block_masks
from chopgrad_rewards.video_clip import VideoClip
from chopgrad_rewards.video_reward import VideoReward
from chopgrad_rewards.video_text import VideoText
from chopgrad_rewards.warp_consistency import WarpConsistency, occluded, warp
from chopgrad_rewards.whole_video import Recomputed
from tiny_rewards import assert_equal_within_rounding, video_of
from tiny_video_rewards import (
    LABELS,
    PROMPTS,
    TEMPLATE,
    arguments,
    make_video_checkpoints,
    smooth_raft,
    video_reward_official,
)

from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.objective.reward import check_reward, load_reward
from chopgrad_align.objective.reward.protocol import frames_read


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return make_video_checkpoints(tmp_path_factory.mktemp("video_checkpoints"))


NAMES = ["action", "temporal_consistency", "motion", "warp_consistency", "video_clip", "video_text", "video_reward"]
FRAMES = dict.fromkeys(NAMES, 4) | dict.fromkeys(["motion", "warp_consistency"], 2)  # RAFT is not small
READS_PROMPTS = ["action", "video_clip", "video_text", "video_reward"]


@pytest.fixture
def make(checkpoints):
    return lambda name, **more: load_reward(name, **{**arguments(checkpoints)[name], **more})


def uint8(video):
    return (video * 255).round().byte()


# --- preprocessing ----------------------------------------------------------------------------------------------------

SIZES = [(64, 64), (96, 160), (160, 96), (45, 81), (480, 832), (20, 30), (33, 20)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("folder", ["videomae", "xclip", "vjepa"])
def test_preprocessing_equals_transformers(checkpoints, folder, size):
    from transformers import VideoMAEImageProcessor, VJEPA2VideoProcessor

    frames = video_of(*size, batch=1, frames=3)[0]
    if folder == "vjepa":
        processor = VJEPA2VideoProcessor.from_pretrained(checkpoints / folder)
        official = processor(uint8(frames), return_tensors="pt")["pixel_values_videos"][0]
    else:
        processor = VideoMAEImageProcessor.from_pretrained(checkpoints / folder)
        official = processor(list(uint8(frames)), return_tensors="pt")["pixel_values"][0]
    assert_equal_within_rounding(Preprocess.of(processor), frames, official)


def test_preprocessing_of_the_published_processor_settings(tmp_path):
    """As `MCG-NJU/videomae-base-finetuned-kinetics` and `microsoft/xclip-base-patch32` write them."""
    from transformers import VideoMAEImageProcessor

    settings = {
        "do_resize": True,
        "size": 224,
        "do_center_crop": True,
        "feature_extractor_type": "VideoMAE",
        "resample": 2,
    }
    settings |= {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    preprocess = Preprocess.of(VideoMAEImageProcessor.from_pretrained(tmp_path))
    assert (preprocess.shortest, preprocess.size, preprocess.interpolation) == (224, (224, 224), "bilinear")
    assert preprocess.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("size", [*SIZES, (300, 1000)])
def test_patches_equal_qwen2_vls(make, size):
    from transformers import Qwen2VLVideoProcessor

    frames = video_of(*size, batch=1, frames=4)[0]
    bounds = {"shortest_edge": 128 * 28 * 28, "longest_edge": 200704}
    official = Qwen2VLVideoProcessor(size=bounds, cap_pixels_per_frame=False)(uint8(frames), return_tensors="pt")
    patches, grid = make("video_reward").patchify(frames)
    assert grid.tolist() == official["video_grid_thw"][0].tolist()
    std = torch.tensor(official_std()).view(1, 3, 1)
    difference = (patches - official["pixel_values_videos"]).view(len(patches), 3, -1)
    levels = (difference * std * 255).abs()
    assert levels.mean() < 0.4
    assert levels.max() < 1.5


def official_std():
    from transformers.image_utils import OPENAI_CLIP_STD

    return OPENAI_CLIP_STD


@pytest.mark.parametrize("name", ["action", "video_reward"])
def test_preprocessing_is_differentiable(make, name):
    reward = make(name)
    frames = torch.ones(4, 3, 40, 70).requires_grad_()
    pixels = reward.preprocess(frames) if name == "action" else reward.patchify(frames)[0]
    (gradient,) = torch.autograd.grad(pixels.sum(), frames)
    assert gradient.isfinite().all()
    assert (gradient[..., 35] > 0).all()  # the middle column, which no crop leaves out


# --- which frames are read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "read"),
    [
        ("action", 4, [0, 1, 2, 3]),
        ("action", 13, [0, 4, 8, 12]),
        ("action", 2, [0, 1]),
        ("temporal_consistency", 16, [0, 3, 6, 9, 12, 15]),
        ("temporal_consistency", 3, [0, 1, 2]),
        ("motion", 3, [0, 1, 2]),
        ("video_clip", 8, [1, 3, 5, 7]),
        ("video_clip", 81, [10, 30, 50, 70]),
        ("video_clip", 3, [0, 1, 2]),
        ("video_reward", 17, [0, 2, 5, 7, 9, 11, 14, 16]),  # 17 frames at 4 a second, 2 of them read: 8.5, even
        ("video_reward", 5, [0, 1, 3, 4]),
        ("video_reward", 3, [0, 2]),
    ],
)
def test_frames_read(make, name, total, read):
    reward = make(name)
    assert frames_read(reward, total, [0]) == [read]
    video = video_of(24, 40, batch=1, frames=total).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(video, PROMPTS[:1]).sum(), video)
    assert gradient.abs().amax((0, 2, 3, 4)).nonzero().flatten().tolist() == read


@pytest.mark.parametrize(
    ("name", "total", "repeated"),
    [("action", 2, [0, 0, 1, 1]), ("video_clip", 3, [0, 1, 1, 2]), ("temporal_consistency", 3, [0, 1, 2, 2])],
)
def test_short_videos_repeat_frames(make, name, total, repeated):
    reward, video = make(name), video_of(32, 32, frames=total)
    torch.testing.assert_close(reward(video, PROMPTS), reward(video[:, repeated], PROMPTS))


# --- the official scores ----------------------------------------------------------------------------------------------


def action_official(folder, video, prompts):
    from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor

    model = VideoMAEForVideoClassification.from_pretrained(folder / "videomae").eval()
    processor = VideoMAEImageProcessor.from_pretrained(folder / "videomae")
    labels = {PROMPTS[0]: "playing piano", PROMPTS[1]: "jogging", PROMPTS[2]: "Drums"}
    losses = []
    for sample, prompt in zip(video, prompts, strict=True):
        pixels = processor(list(uint8(sample)), return_tensors="pt")
        label = torch.tensor([model.config.label2id[labels[prompt]]])
        losses.append(model(**pixels, labels=label).loss)  # VADER's
    return -torch.stack(losses)


def temporal_consistency_official(folder, video, prompts):
    """V-JEPA's loss, with transformers' forward, which is right for an encoder in which patches do not meet."""
    from transformers import VJEPA2Model, VJEPA2VideoProcessor

    model = VJEPA2Model.from_pretrained(folder / "vjepa_flat").eval()
    processor = VJEPA2VideoProcessor.from_pretrained(folder / "vjepa_flat")
    scores = []
    for sample in video:
        pixels = processor(uint8(sample), return_tensors="pt")["pixel_values_videos"]
        errors = []
        for mask in block_masks(side=4, seed=0):
            patches = torch.arange(len(sample) // 2 * 16).view(-1, 4, 4)
            output = model(
                pixels, context_mask=[patches[:, ~mask].view(1, -1)], target_mask=[patches[:, mask].view(1, -1)]
            )
            prediction = output.predictor_output
            target = prediction.target_hidden_state
            target = (target - target.mean(-1, keepdim=True)) / (
                target.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            errors.append(F.l1_loss(prediction.last_hidden_state, target))
        scores.append(-(errors[0] + errors[1]) / 2)
    return torch.stack(scores)


def motion_official(folder, video, prompts):
    """torchvision's model and transforms, with the padding of the official evaluation."""
    from torchvision.models.optical_flow import Raft_Small_Weights, raft_small

    model = raft_small().eval()
    model.load_state_dict(torch.load(folder / "raft_small.pth", weights_only=True))
    scores = []
    for sample in video:
        first, second = Raft_Small_Weights.DEFAULT.transforms()(uint8(sample[:-1]), uint8(sample[1:]))
        height, width = first.shape[-2:]
        rows, columns = (max(128, -(-side // 8) * 8) - side for side in (height, width))
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        first, second = (F.pad(frames, padding, mode="replicate") for frames in (first, second))
        flow = model(first, second, num_flow_updates=2)[-1]
        flow = flow[:, :, rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]
        scores.append((flow[:, 0] ** 2 + flow[:, 1] ** 2).sqrt().mean())
    return torch.stack(scores)


def video_clip_official(folder, video, prompts):
    from transformers import AutoTokenizer, VideoMAEImageProcessor, XCLIPModel, XCLIPProcessor

    model = XCLIPModel.from_pretrained(folder / "xclip").eval()
    processor = XCLIPProcessor(
        VideoMAEImageProcessor.from_pretrained(folder / "xclip"), AutoTokenizer.from_pretrained(folder / "xclip")
    )
    # All videos with all texts; the diagonal has each video with its own.
    inputs = processor(
        text=prompts, videos=[list(uint8(sample)) for sample in video], return_tensors="pt", padding=True
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    return model(**inputs).logits_per_video.diagonal() / model.logit_scale.exp()


def video_reward_reference(folder, video, prompts):
    """The authors' steps: frames to the size for which the processor has nothing left to resize, one padded batch,
    LoRA beside the weights, positions counted along the text, the head at the special tokens."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    folder.mkdir()
    (folder / "video_reward").mkdir()
    model, processor = video_reward_official(folder)
    height, width = video.shape[-2:]
    scale = math.sqrt(100352 / (height * width))  # the frames of this test are all below the smallest size
    size = [math.ceil(side * scale / 28) * 28 for side in (height, width)]
    videos = [resize(uint8(sample), size, InterpolationMode.BICUBIC, antialias=True).float() for sample in video]
    namespace = {}
    exec(TEMPLATE.replace("raise SystemExit", "str"), namespace)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "video"},
                    {
                        "type": "text",
                        "text": namespace["DETAILED_PROMPT_WITH_SPECIAL_TOKEN"].format(text_prompt=prompt),
                    },
                ],
            }
        ]
        for prompt in prompts
    ]
    texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = processor(text=texts, videos=videos, padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    hidden = model.model(
        input_ids=ids,
        attention_mask=batch["attention_mask"],
        position_ids=torch.arange(ids.shape[1]).expand(3, len(ids), -1),
        pixel_values_videos=batch["pixel_values_videos"],
        video_grid_thw=batch["video_grid_thw"],
    ).last_hidden_state
    special = processor.tokenizer.convert_tokens_to_ids(["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"])
    logits = model.rm_head(hidden)[torch.isin(ids, torch.tensor(special))].view(len(ids), 3)
    return (logits - torch.tensor([0.5, -0.25, 1.0])) / torch.tensor([2.0, 0.5, 0.75])


# Squares of the models' own size, where nothing is resized, and other shapes, where PIL's rounding remains.
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (90, 51)])
@pytest.mark.parametrize("name", ["action", "temporal_consistency", "motion", "video_clip"])
@torch.no_grad()
def test_score_is_the_official_one(make, checkpoints, name, size):
    more = {"checkpoint": str(checkpoints / "vjepa_flat")} if name == "temporal_consistency" else {}
    video = video_of(*size, frames=4)
    official = globals()[f"{name}_official"](checkpoints, video, PROMPTS)
    assert official.std() > 1e-3
    exact = name == "motion" or (size == (32, 32) and name != "temporal_consistency")  # which resizes to 36, then crops
    torch.testing.assert_close(
        make(name, **more)(video, PROMPTS), official, rtol=1e-5, atol=1e-5 if exact else 0.1 * float(official.std())
    )


@torch.no_grad()
def test_video_reward_is_the_official_one(make, tmp_path):
    video = video_of(48, 80, frames=4)
    official = video_reward_reference(tmp_path / "official", video, PROMPTS)
    assert (official.std(0) > 0.01).all()
    for i, dimension in enumerate(["VQ", "MQ", "TA"]):
        scores = make("video_reward", dimensions=[dimension])(video, PROMPTS)
        torch.testing.assert_close(scores, official[:, i], rtol=0, atol=0.05 * float(official[:, i].std()))
    overall = make("video_reward")(video, PROMPTS)
    torch.testing.assert_close(overall, official.sum(1), rtol=0, atol=0.05 * float(official.sum(1).std()))


@torch.no_grad()
def test_video_reward_without_resizing_is_official_to_rounding(make, tmp_path):
    video = video_of(308, 336, batch=2, frames=4)  # multiples of 28, and enough pixels
    official = video_reward_reference(tmp_path / "official", video, PROMPTS[:2])
    torch.testing.assert_close(make("video_reward")(video, PROMPTS[:2]), official.sum(1), rtol=1e-4, atol=1e-4)


# --- every sample by itself, gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_prompt_scores_its_own_video(make, name):
    reward, video = make(name), video_of(40, 56, frames=FRAMES[name])
    together = reward(video, PROMPTS)
    assert together.shape == (3,)
    alone = [reward(video[b : b + 1], [prompt])[0] for b, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    shuffled = reward(video, PROMPTS[::-1])
    assert torch.allclose(together, shuffled, rtol=0, atol=1e-6) != (name in READS_PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_leads_upwards(make, name):
    reward, video = make(name), video_of(40, 56, frames=FRAMES[name]).requires_grad_()
    scores = reward(video, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), video)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((2, 3, 4)) > 0).all()
    step = 1e-3 * gradient / gradient.abs().amax((1, 2, 3, 4), keepdim=True)
    assert (reward(video + step, PROMPTS) > scores).all()
    check_reward(reward, name, prompts=PROMPTS[:2], frames=FRAMES[name], size=(40, 40))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_and_castable(make, name):
    reward, video = make(name), video_of(32, 32, frames=FRAMES[name])
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())
    with torch.no_grad():
        scores, half = reward(video, PROMPTS), reward.to(torch.bfloat16)(video.bfloat16(), PROMPTS)
    assert scores.dtype == half.dtype == torch.float32
    torch.testing.assert_close(half, scores, rtol=0.1, atol=0.3 if name == "video_reward" else 0.1)


@pytest.mark.parametrize("name", ["action", "video_reward"])
def test_wrong_calls_are_told(make, name):
    reward, video = make(name), video_of(32, 32, frames=4)
    with pytest.raises(
        UsageError, match=r"expected a video \(B, F, 3, H, W\) and a list of B prompts, got .* 1 prompts"
    ):
        reward(video, PROMPTS[:1])


@pytest.mark.parametrize("name", ["motion", "warp_consistency", "video_reward"])
def test_one_frame_has_no_motion(make, name):
    with pytest.raises(UsageError, match="expected a video of 2 frames or more, got 1"):
        make(name)(video_of(32, 32, frames=1), PROMPTS)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(reward, frames):
    video = video_of(32, 32, batch=1, frames=frames).requires_grad_()
    with StorageCount() as storage:
        reward(video, PROMPTS[:1]).sum().backward()
    return storage.peak


@pytest.mark.parametrize("name", ["motion", "warp_consistency"])
def test_memory_of_pairs_does_not_grow_with_the_frames(make, name):
    reward = make(name, pairs_per_chunk=1, updates=1, **({"detach_flow": False} if name == "warp_consistency" else {}))
    short, long = peak(reward, 2), peak(reward, 5)
    video = 3 * 3 * 32 * 32 * 4  # bytes of the further frames: their gradient, and a few copies of it
    assert long - short <= 4 * video
    assert short > 100 * video
    reward.pairs_per_chunk = 4
    assert peak(reward, 5) > 2 * long


@pytest.mark.parametrize("name", ["action", "temporal_consistency", "video_clip", "video_reward"])
def test_blocks_run_again_in_the_backward_pass(make, name):
    reward = make(name)
    video = video_of(32, 32, frames=4).requires_grad_()

    def saved():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            score = reward(video, PROMPTS).sum()
        return sum(storages.values()), torch.autograd.grad(score, video)[0]

    recomputed, gradient = saved()
    for stack in [module for module in reward.modules() if isinstance(module, torch.nn.ModuleList)]:
        for i, block in enumerate(stack):
            if isinstance(block, Recomputed):
                stack[i] = block.block
    kept, expected = saved()
    assert recomputed < 0.8 * kept
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


# --- action -----------------------------------------------------------------------------------------------------------


def test_action_of_a_label_and_as_probability(make):
    video = video_of(32, 32, frames=4)
    with torch.no_grad():
        probabilities = torch.stack(
            [make("action", label=name.upper(), score="probability")(video, ["", "x", ""]) for name in LABELS.values()]
        )
        torch.testing.assert_close(probabilities.sum(0), torch.ones(3))
        torch.testing.assert_close(make("action", label="jogging")(video, PROMPTS), probabilities[0].log())
        # The longest label that occurs, as whole words and in any case.
        found = make("action")(video, ["Playing Piano and drums", "jogging", "eardrums or DRUMS"])
    expected = probabilities[[3, 0, 2], [0, 1, 2]].log()
    torch.testing.assert_close(found, expected)


def test_action_without_a_label(make):
    with pytest.raises(
        UsageError, match=r"none of the model's labels occurs in the prompt 'a cat'; .*label=…: drums, jog"
    ):
        make("action")(video_of(32, 32, batch=1), ["a cat"])
    with pytest.raises(UsageError, match=r"action: label='swimming' is none of the model's labels: drums, jogging"):
        make("action", label="swimming")
    with pytest.raises(UsageError, match=r"action: score='logit': expected 'log_probability' or 'probability'"):
        make("action", score="logit")


# --- temporal consistency ---------------------------------------------------------------------------------------------


def test_masks_are_v_jepas():
    for seed in range(20):
        short, long = block_masks(16, seed)
        # 8 blocks of about 15 % and 2 of about 70 %, which overlap: what V-JEPA hides is mostly 50 to 95 %.
        assert 0.3 < short.float().mean() < 0.95
        assert 0.6 < long.float().mean() < 1
        # Two rectangles of one shape: the rows of the mask have at most a few different patterns.
        assert len({tuple(row.tolist()) for row in long}) <= 4
    assert all(torch.equal(a, b) for a, b in zip(block_masks(16, 3), block_masks(16, 3), strict=True))
    assert not torch.equal(block_masks(16, 3)[0], block_masks(16, 4)[0])


@torch.no_grad()
def test_hidden_patches_stay_hidden(make):
    reward = make("temporal_consistency")
    predictions = []
    reward.model.predictor.register_forward_hook(lambda module, args, output: predictions.append(output[0]))
    video = video_of(36, 36, batch=1, frames=4)  # resized by nothing, cropped by 2 on every side
    hidden = reward.hidden[0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    changed = video.clone()
    changed[..., 2:34, 2:34] = torch.where(hidden, 1 - video[..., 2:34, 2:34], video[..., 2:34, 2:34])
    first, second = reward(video, [""]), reward(changed, [""])
    torch.testing.assert_close(predictions[0], predictions[2])  # of the short mask, whose patches changed
    assert not torch.allclose(predictions[1], predictions[3], atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-3)


@torch.no_grad()
def test_temporal_consistency_takes_the_first_mask_token_and_the_seed(make, checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    video = video_of(32, 32, frames=4)
    scores = make("temporal_consistency")(video, PROMPTS)
    torch.testing.assert_close(make("temporal_consistency")(video, PROMPTS), scores)
    assert not torch.allclose(make("temporal_consistency", seed=1)(video, PROMPTS), scores, atol=1e-4)
    for token, same in ((0, False), (1, True), (2, True)):
        folder = shutil.copytree(checkpoints / "vjepa", tmp_path / str(token))
        weights = load_file(folder / "model.safetensors")
        weights["predictor.embeddings.mask_tokens"][token].mul_(-1)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        other = make("temporal_consistency", checkpoint=str(folder))(video, PROMPTS)
        assert torch.allclose(other, scores, rtol=0, atol=1e-6) == same


# --- optical flow -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["small", "large"])
def test_flow_is_torchvisions(tmp_path, model):
    raft = smooth_raft(model)
    torch.save(raft.state_dict(), tmp_path / "raft.pth")
    flow = OpticalFlow("Motion", str(tmp_path / "raft.pth"), model, updates=2).eval()
    first, second = video_of(136, 128, batch=1)[0].unsqueeze(1)
    with torch.no_grad():
        torch.testing.assert_close(flow(first, second), raft(first * 2 - 1, second * 2 - 1, num_flow_updates=2)[-1])


def test_the_gradient_of_one_update_is_torchvisions(make):
    """Of more, torchvision cuts it; the finite differences above have two."""
    raft, flow = smooth_raft("small"), make("motion", updates=1).flow
    first, second = video_of(128, 128, batch=1)[0].unsqueeze(1)
    first.requires_grad_()
    (gradient,) = torch.autograd.grad(flow(first, second).square().sum(), first)
    official = raft(first * 2 - 1, second * 2 - 1, num_flow_updates=1)[-1]
    (expected,) = torch.autograd.grad(official.square().sum(), first)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def bilinear(image, x, y):
    """One sample of `(C, H, W)`; neighbours outside are those at the border, as FlowNet2's resampling takes them."""
    height, width = image.shape[1:]
    left, top = math.floor(x), math.floor(y)
    value = 0
    for column, row in [(left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)]:
        weight = (1 - abs(x - column)) * (1 - abs(y - row))
        value = value + weight * image[:, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
    return value


def warp_error_official(first, second, forward, backward):
    """The error of a pair, and the pixels that count, pixel by pixel as the authors' evaluation has them."""
    height, width = first.shape[1:]
    total, visible = 0.0, np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            u, v = forward[:, y, x]
            back = bilinear(backward, x + u, y + v)
            round_trip = (u + back[0]) ** 2 + (v + back[1]) ** 2
            lost = round_trip > 0.01 * (u**2 + v**2 + back[0] ** 2 + back[1] ** 2) + 0.5
            slope = 0.0
            if x + 1 < width:
                slope += ((forward[:, y, x] - forward[:, y, x + 1]) ** 2).sum()
            if y + 1 < height:
                slope += ((forward[:, y, x] - forward[:, y + 1, x]) ** 2).sum()
            if not (lost or slope > 0.01 * (u**2 + v**2) + 0.002):
                visible[y, x] = True
                total += ((bilinear(second, x + u, y + v) - first[:, y, x]) ** 2).sum()
    return total / max(1, 3 * visible.sum()), visible


def smooth_flow(size, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64)
    return 0.3 * F.interpolate(coarse, size=size, mode="bicubic", align_corners=True) + 0.8


def test_warp_error_is_the_official_one(make, monkeypatch):
    reward, size = make("warp_consistency"), (19, 26)
    video = video_of(*size, batch=1, frames=3).double()
    flows = {}
    for t in (0, 1):
        flows[t, t + 1] = smooth_flow(size, t)
        # Mostly the way back; wrong in a corner, where pixels then count as lost.
        flows[t + 1, t] = -warp(flows[t, t + 1], -flows[t, t + 1])
        flows[t + 1, t][..., 12:, 15:] += 2.0
    calls = {frame.sum().item(): t for t, frame in enumerate(video[0])}

    def flow(first, second):
        pairs = [(calls[a.sum().item()], calls[b.sum().item()]) for a, b in zip(first, second, strict=True)]
        return torch.cat([flows[pair] for pair in pairs])

    monkeypatch.setattr(reward.flow, "forward", flow)
    errors = []
    for t in (0, 1):
        forward, backward = flows[t, t + 1], flows[t + 1, t]
        error, visible = warp_error_official(
            *(a.numpy() for a in (video[0, t], video[0, t + 1], forward[0], backward[0]))
        )
        assert 0.2 < visible.mean() < 0.9
        assert np.array_equal(~occluded(forward, backward)[0].numpy(), visible)
        errors.append(error)
    torch.testing.assert_close(reward(video, [""]), -torch.tensor([sum(errors) / 2]).double())


def test_warp_consistency_of_a_moving_picture(make, monkeypatch):
    """A picture that moves by two pixels a frame has no error under its own flow, and one under no flow."""
    reward = make("warp_consistency")
    picture = video_of(20, 40, batch=1, frames=1)[0, 0]
    video = torch.stack([picture[:, :, 2 * t : 2 * t + 24] for t in range(4)])[None]
    speed = torch.tensor([-2.0])
    calls = []

    def flow(first, second):
        calls.append(len(first))
        direction = speed if len(calls) % 2 else -speed
        return torch.stack([direction, torch.zeros(1)], 1).view(1, 2, 1, 1).expand(len(first), -1, 20, 24)

    monkeypatch.setattr(reward.flow, "forward", flow)
    with torch.no_grad():
        right = reward(video, [""])
        speed.zero_()
        wrong = reward(video, [""])
    assert wrong < -1e-3
    assert -0.2 * wrong.abs() < right <= 0  # but for the border, where pixels come in that were not there


def test_a_detached_flow_is_a_given(make):
    video = video_of(32, 40, batch=1, frames=2).requires_grad_()
    free, given = (make("warp_consistency", detach_flow=detach) for detach in (False, True))
    torch.testing.assert_close(free(video, [""]), given(video, [""]))
    (through,) = torch.autograd.grad(free(video, [""]).sum(), video)
    (gradient,) = torch.autograd.grad(given(video, [""]).sum(), video)
    assert not torch.allclose(gradient, through)
    with torch.no_grad():
        first, second = video[0, :-1], video[0, 1:]
        flow = given.flow(first, second)
        visible = ~occluded(flow, given.flow(second, first))[:, None]
    leaf = video.detach().requires_grad_()
    error = ((warp(leaf[0, 1:], flow) - leaf[0, :-1]) ** 2 * visible).sum((1, 2, 3)) / (3 * visible.sum((1, 2, 3)))
    (expected,) = torch.autograd.grad(-error.mean(), leaf)
    torch.testing.assert_close(gradient, expected)


@torch.no_grad()
def test_video_reward_has_its_instructions_and_takes_the_rate_of_a_file(make):
    """The official text, whose spaces at the ends of lines an editor could lose."""
    reward = make("video_reward", fps=None, template=None)
    assert hashlib.sha256(reward.template.encode()).hexdigest().startswith("fdb6309bac618dd0c8b1b589d3a0970a")
    assert reward.template.format(text_prompt="x").count("_reward|>") == 3
    video = video_of(24, 40, batch=1, frames=9)
    with pytest.raises(UsageError, match="how many frames a second have the videos"):
        reward(video, PROMPTS[:1])
    told = make("video_reward", fps=4)
    assert reward.at_fps(4).frames == told.frames
    assert reward.at_fps(4).at_fps(8).frames == told.at_fps(8).frames == told.frames  # who was told believes no file
    torch.testing.assert_close(make("video_reward", fps=None).at_fps(4)(video, PROMPTS[:1]), told(video, PROMPTS[:1]))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_video_clip_encodes_a_prompt_once(make):
    reward, encoded = make("video_clip"), []
    reward.model.text_model.register_forward_hook(lambda module, args, output: encoded.extend(output[0]))
    video = video_of(32, 32, frames=4)
    with torch.inference_mode():
        expected = reward(video, PROMPTS).clone()
    scores = reward(video.requires_grad_(), PROMPTS)
    scores.sum().backward()
    reward(video, [*PROMPTS[1:], "drums"])
    assert len(encoded) == len({*PROMPTS, "drums"})
    torch.testing.assert_close(scores.detach(), expected)


def test_video_reward_prompts_may_hold_braces_but_no_special_tokens(make):
    reward, video = make("video_reward"), video_of(32, 32, batch=1, frames=2)
    assert reward(video, ["a {dog} {0}"]).isfinite().all()
    with pytest.raises(UsageError, match=r"the prompt 'x <\|MQ_reward\|>' contains one of the special tokens"):
        reward(video, ["x <|MQ_reward|>"])


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub that cannot be reached and an empty cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def changed_settings(folder, target, section, key, value):
    shutil.copytree(folder / "video_reward", target)
    settings = json.loads((target / "model_config.json").read_text())
    settings[section][key] = value
    (target / "model_config.json").write_text(json.dumps(settings))
    return str(target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, t: Action(), r"action: checkpoint='MCG-NJU/videomae-base-finetuned-kinetics@.*' cannot be loaded: "),
        (lambda c, t: Action(checkpoint=str(c / "vjepa")), r"action: checkpoint='.*vjepa' cannot be loaded: "),
        (
            lambda c, t: TemporalConsistency(),
            r"temporal_consistency: checkpoint='facebook/vjepa2.*' cannot be loaded: ",
        ),
        (
            lambda c, t: TemporalConsistency(checkpoint=str(c / "vjepa"), frames=0),
            r"frames=0: expected a whole number, 1",
        ),
        (lambda c, t: VideoClip(), r"video_clip: checkpoint='microsoft/xclip-base-patch32' cannot be loaded: "),
        (
            lambda c, t: VideoText(checkpoint="nowhere"),
            r"video_text: checkpoint='nowhere' cannot be loaded: .*config.js",
        ),
        (lambda c, t: VideoText(checkpoint=str(c / "xclip")), r"video_text: checkpoint='.*xclip' cannot be loaded: "),
        (lambda c, t: Motion(weights="no.pth"), r"Motion: weights='no.pth' cannot be loaded: .*no.pth.*C_T_SKHT_V2"),
        (lambda c, t: Motion(weights=str(c / "raft_small.pth")), r"raft_small.pth holds other weights: "),
        (lambda c, t: Motion(model="huge"), r"Motion: model='huge': expected 'large' or 'small'"),
        (lambda c, t: WarpConsistency(updates=0), r"WarpConsistency: updates=0: expected a whole number, 1 or more"),
        (lambda c, t: WarpConsistency(pairs_per_chunk=2.5), r"WarpConsistency: pairs_per_chunk=2.5: expected a whole"),
        (lambda c, t: VideoReward(fps=0, template=""), r"video_reward: fps=0: expected the frames a second"),
        (lambda c, t: VideoReward(fps=8, template="", dimensions=["VQ", "IQ"]), r"expected some of VQ, MQ, TA"),
        (
            lambda c, t: VideoReward(fps=8, template="no.py"),
            r"video_reward: template='no.py' cannot be loaded: .*no.py",
        ),
        (lambda c, t: VideoReward(fps=8, template=__file__), r"it has no text DETAILED_PROMPT_WITH_SPECIAL_TOKEN with"),
        (
            lambda c, t: VideoReward(fps=8, template=str(c / "video_reward" / "prompt_template.py")),
            r"video_reward: checkpoint='KlingTeam/VideoReward@.*' cannot be loaded: .*Expected hub id or folder wi",
        ),
        (
            lambda c, t: VideoReward(
                **{
                    **arguments(c)["video_reward"],
                    "checkpoint": changed_settings(c, t / "v", "model_config", "reward_token", "last"),
                }
            ),
            r"model_config.reward_token is 'last', not 'special'",
        ),
        (
            lambda c, t: VideoReward(**{**arguments(c)["video_reward"], "base": str(c / "vjepa")}),
            r"video_reward: base='.*vjepa' cannot be loaded: ",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded(checkpoints, tmp_path, offline, make, message):
    with pytest.raises(UsageError, match=message) as caught:
        make(checkpoints, tmp_path)
    assert "\n" not in str(caught.value)


def test_video_reward_reads_weights_as_data(checkpoints, tmp_path, offline):
    folder = shutil.copytree(checkpoints / "video_reward", tmp_path / "v")
    for content, message in (({"rm_head.weight": np.float32}, "damaged, or holds Python"), ({}, "rm_head.weight")):
        torch.save(content, folder / "checkpoint-7" / "model.pth")
        with pytest.raises(UsageError, match=message):
            VideoReward(**{**arguments(checkpoints)["video_reward"], "checkpoint": str(folder)})
    state = torch.load(checkpoints / "video_reward" / "checkpoint-7" / "model.pth", weights_only=True)
    del state["base_model.model.visual.blocks.1.attn.proj.weight"]
    torch.save(state, folder / "checkpoint-7" / "model.pth")
    with pytest.raises(UsageError, match=r"weights do not fit: .*visual\.blocks\.1\.attn\.proj\.weight"):
        VideoReward(**{**arguments(checkpoints)["video_reward"], "checkpoint": str(folder)})
