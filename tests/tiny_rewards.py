"""Random checkpoints of the published rewards, in the official formats and small, made offline."""

import json

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from chopgrad_align.data.tokenizer import text_tokenizer

PROMPTS = ["a red circle on the grass", "the blue square", "green"]
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
# With the shortest side at 32, in which all small models see them, half of them leave an odd number of pixels to crop,
# a third one that libraries split differently. The last are tall.
ODD_SIZES = [
    (33, 37), (35, 43), (41, 56), (34, 50), (36, 58), (37, 64), (43, 75), (46, 80), (53, 92), (45, 83),
    (33, 35), (33, 47), (34, 57), (45, 81), (70, 125), (96, 171), (31, 55), (48, 85), (66, 117), (88, 160),
    (43, 35), (75, 43), (81, 45), (113, 64),
]  # fmt: skip
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
ARCHITECTURE = "tiny-chopgrad-test"


def video_of(height, width, batch=3, frames=2):
    """8-bit values, as images have them: smooth colours, hard edges and noise."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(batch * frames, 3, 4, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    blocks = F.interpolate(coarse.flip(0).round(), size=(height, width))
    noise = 0.2 * torch.rand(smooth.shape, generator=generator)
    frames_ = (torch.where(blocks[:, :1] > 0.5, smooth, blocks) * 0.8 + noise).clamp(0, 1)
    return ((frames_ * 255).round() / 255).view(batch, frames, 3, height, width)


def pil(frame):
    return Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy())


def assert_equal_within_rounding(preprocess, frames, official, size=None):
    """PIL rounds to 8 bits after each of its two passes: together at most about one level."""
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    levels = ((preprocess(frames) - official) * std * 255).abs()
    assert levels.mean() < 0.4, size
    assert (levels > 1.001).float().mean() < 0.01, size
    assert levels.max() < 1.5, size


def reinitialise(module):
    """Weights large enough that what a frame or a prompt shows moves the score."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5, generator=generator)
    return module.eval()


def make_checkpoints(folder):
    """Fill a folder with `clip/` (open_clip), HPS files of the architecture `ARCHITECTURE`, which open_clip knows from
    now on, `vit/` (transformers) and aesthetic heads."""
    torch.manual_seed(0)

    # open_clip's own folder format, with a word tokenizer of its own in the folder, weights in half precision
    tokenizer = text_tokenizer(PROMPTS)
    tokenizer.save_pretrained(folder / "clip")
    text = {"context_length": 12, "vocab_size": len(tokenizer), "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": {**text, "hf_tokenizer_name": "own"}}
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "resize_mode": "squash"}
    both = {"model_cfg": config, "preprocess_cfg": {**preprocess, "interpolation": "bilinear"}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(both))
    weights = reinitialise(open_clip.model.CLIP(**config)).state_dict()
    save_file({k: v.half().contiguous() for k, v in weights.items()}, folder / "clip" / "open_clip_model.safetensors")

    # a registered architecture with CLIP's own vocabulary, its weights as the HPS authors publish theirs
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    architecture = folder / f"{ARCHITECTURE}.json"
    architecture.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}))
    open_clip.add_model_config(architecture)
    model = reinitialise(open_clip.model.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=text))
    (folder / "hps").mkdir()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "hps" / "HPS_v2.1_compressed.pt")

    # transformers' CLIP and the LAION head
    from transformers import CLIPConfig, CLIPModel

    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    towers = {"vision_config": vision, "text_config": text}
    config = CLIPConfig(projection_dim=24, **{k: {**v, "num_attention_heads": 2} for k, v in towers.items()})
    reinitialise(CLIPModel(config)).save_pretrained(folder / "vit")
    torch.save(laion_head().state_dict(), folder / "head.pth")
    save_file(laion_head().state_dict(), folder / "head.safetensors")
    return folder


def arguments(folder):
    """Published name and local checkpoint of each reward."""
    return {
        "clip_score": {"checkpoint": str(folder / "clip")},
        "hps_v2": {"checkpoint": str(folder / "hps"), "model": ARCHITECTURE},
        "aesthetic": {"clip": str(folder / "vit"), "head": str(folder / "head.pth")},
        "colorfulness": {},
    }


def laion_head(width=24):
    class MLP(nn.Module):  # as the authors define it
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
                nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
            )  # fmt: skip

        def forward(self, x):
            return self.layers(x)

    torch.manual_seed(0)
    return reinitialise(MLP())
