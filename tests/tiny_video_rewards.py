"""Random checkpoints of the rewards of whole videos, in the official formats and small, made offline."""

import json

import torch
from safetensors.torch import save_file
from tiny_rewards import reinitialise
from torch import nn

from chopgrad_align.data.tokenizer import text_tokenizer, word_tokenizer

PROMPTS = ["a dog playing piano", "a man jogging in the park", "piano and drums"]
LABELS = {0: "jogging", 1: "playing piano", 2: "Drums", 3: "playing piano and drums"}
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

TEMPLATE = '''
raise SystemExit("this file is read, not run")
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """
rate a video {{0}} visual <|VQ_reward|>
motion <|MQ_reward|>
in the prompt {text_prompt} <|TA_reward|>
"""
'''
# The settings of the published checkpoint, but for the rank of LoRA and the statistics.
SETTINGS = {
    "data_config": {
        "max_frame_pixels": 200704,
        "num_frames": None,
        "fps": 2.0,
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
    },
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 12, "use_rslora": False},
    "inference_config": {
        "VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 0.5, "TA_mean": 1.0, "TA_std": 0.75,
    },
}  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_video_checkpoints(folder):
    """Fill a folder with `videomae/`, `vjepa/`, `vjepa_flat/` (an encoder without blocks), `raft_small.pth`, `xclip/`,
    `video_text/`, `qwen2.5/`, `dino/`, `clip/`, `qwen/` and `video_reward/` with its `prompt_template.py`."""
    torch.manual_seed(0)
    _make_videomae(folder / "videomae")
    _make_vjepa(folder / "vjepa")
    _make_vjepa(folder / "vjepa_flat", num_hidden_layers=0, pred_num_mask_tokens=1)
    _make_xclip(folder / "xclip")
    _make_video_text(folder / "video_text")
    make_qwen2_5(folder / "qwen2.5")
    make_dino(folder / "dino")
    make_clip(folder / "clip")
    (folder / "video_reward").mkdir()
    video_reward_official(folder)
    torch.save(smooth_raft("small").state_dict(), folder / "raft_small.pth")
    return folder


def arguments(folder):
    """Published name and local checkpoint of each reward."""
    flow = {"weights": str(folder / "raft_small.pth"), "model": "small", "updates": 2}
    published = folder / "video_reward"
    return {
        "action": {"checkpoint": str(folder / "videomae")},
        "temporal_consistency": {"checkpoint": str(folder / "vjepa")},
        "motion": flow,
        "warp_consistency": flow,
        "video_clip": {"checkpoint": str(folder / "xclip")},
        "video_text": {"checkpoint": str(folder / "video_text")},
        "subject_consistency": {"checkpoint": str(folder / "dino")},
        "background_consistency": {"checkpoint": str(folder / "clip")},
        "reference_image": {"checkpoint": str(folder / "dino")},
        "temporal_flicker": {},
        "vlm_question": {
            "question": "rate prompt {prompt}",
            "checkpoint": str(folder / "qwen2.5"),
            "dtype": "float32",
        },
        "video_reward": {
            "fps": 4,
            "template": str(published / "prompt_template.py"),
            "checkpoint": str(published),
            "file": "checkpoint-7/model.pth",
        },
    }


def smooth_raft(size):
    """Random, but with small steps: a flow of noise would leave no pixel that counts as visible."""
    from torchvision.models import optical_flow

    torch.manual_seed(0)
    model = getattr(optical_flow, f"raft_{size}")().eval()
    with torch.no_grad():
        model.update_block.flow_head.conv2.weight.mul_(0.05)
        model.update_block.flow_head.conv2.bias.zero_()
    return model


def _make_videomae(folder):
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor

    config = VideoMAEConfig(
        **TOWER, image_size=32, patch_size=8, num_frames=4, tubelet_size=2,
        id2label=LABELS, label2id={name: i for i, name in LABELS.items()},
    )  # fmt: skip
    reinitialise(VideoMAEForVideoClassification(config)).save_pretrained(folder)
    # The published file still calls itself a feature extractor and writes the size as a number.
    VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def _make_vjepa(folder, **changes):
    from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

    config = VJEPA2Config(
        **{
            "patch_size": 8, "crop_size": 32, "frames_per_clip": 6, "hidden_size": 48, "num_attention_heads": 2,
            "num_hidden_layers": 2, "mlp_ratio": 2.0, "pred_hidden_size": 48, "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1, "pred_mlp_ratio": 2.0, "pred_num_mask_tokens": 3, **changes,
        }
    )  # fmt: skip
    reinitialise(VJEPA2Model(config)).save_pretrained(folder)
    VJEPA2VideoProcessor(crop_size=32).save_pretrained(folder)


def _make_xclip(folder):
    from transformers import VideoMAEImageProcessor, XCLIPConfig, XCLIPModel

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *WORDS, "[EOS]"])}
    ids = {"bos_token_id": vocabulary["[BOS]"], "eos_token_id": vocabulary["[EOS]"], "pad_token_id": 0}
    text = {**TOWER, **ids, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    vision = {**TOWER, "image_size": 32, "patch_size": 8, "num_frames": 4}
    vision |= {"mit_hidden_size": 24, "mit_intermediate_size": 48, "mit_num_hidden_layers": 1}
    config = XCLIPConfig(
        text_config=text,
        vision_config={**vision, "mit_num_attention_heads": 2},
        projection_dim=24,
        prompt_layers=1,
        prompt_num_attention_heads=2,
    )
    model = reinitialise(XCLIPModel(config))
    with torch.no_grad():  # at its initial value the video would hardly change the text
        model.prompts_generator.alpha.fill_(1.0)
    model.save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    VideoMAEImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=mean, image_std=std
    ).save_pretrained(folder)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    word_tokenizer(vocabulary, "[BOS] $A [EOS]", model_max_length=12, **special).save_pretrained(folder)


def _make_video_text(folder):
    from chopgrad_rewards.video_text import VideoTextModel

    tokenizer = text_tokenizer(PROMPTS)
    config = {"size": 32, "widths": [8, 16], "points": 2, "width": 16, "vocabulary": len(tokenizer), "length": 8}
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(reinitialise(VideoTextModel(**config)).state_dict(), folder / "model.safetensors")


def make_dino(folder):
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8), add_pooling_layer=False)  # as it is published
    reinitialise(model).save_pretrained(folder)


def make_clip(folder):
    from transformers import CLIPConfig, CLIPModel

    text, vision = {**TOWER, "vocab_size": 20}, {**TOWER, "image_size": 32, "patch_size": 8}
    reinitialise(CLIPModel(CLIPConfig(projection_dim=24, vision_config=vision, text_config=text))).save_pretrained(
        folder
    )


def qwen_tokenizer(*further):
    words = ["[PAD]", "[UNK]", *WORDS, "rate", "video", "visual", "motion", "prompt", "user", "assistant", *further]
    tokenizer = word_tokenizer(
        {word: i for i, word in enumerate(words)}, "$A", pad_token="[PAD]", unk_token="[UNK]", padding_side="right"
    )
    special = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    tokenizer.add_tokens([f"<|{name}|>" for name in special], special_tokens=True)
    return tokenizer


def make_qwen2_5(folder):
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = qwen_tokenizer("yes", "no", "1", "2", "3")
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 9 * 28 * 28}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT).save_pretrained(folder)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
        "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    reinitialise(
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids))
    ).save_pretrained(folder)


def qwen_processor():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    video = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, video, chat_template=CHAT)


def video_reward_official(folder):
    """The authors' model, Qwen2-VL with LoRA and a head, and the files as they publish them, with their old names."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    processor = qwen_processor()
    tokenizer = processor.tokenizer
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    ids |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=text, **ids)
    processor.save_pretrained(folder / "qwen")
    config.save_pretrained(folder / "qwen")

    tokenizer.add_tokens(["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"], special_tokens=True)
    model = Qwen2VLForConditionalGeneration(config)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.rm_head = nn.Linear(32, 1, bias=False)
    reinitialise(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "language" in name]
    lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.05, init_lora_weights=False, target_modules=linear)
    model = inject_adapter_in_model(lora, model).eval()
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        state[f"base_model.model.{name}"] = value  # the prefix of a PeftModel
    (folder / "video_reward" / "checkpoint-7").mkdir(exist_ok=True)
    torch.save(state, folder / "video_reward" / "checkpoint-7" / "model.pth")
    settings = {**SETTINGS, "model_config": {**SETTINGS["model_config"], "model_name_or_path": str(folder / "qwen")}}
    (folder / "video_reward" / "model_config.json").write_text(json.dumps(settings))
    (folder / "video_reward" / "prompt_template.py").write_text(TEMPLATE)
    return model, processor
