"""Components that tiny pipelines share: text and image encoders, tokenizers; pictures and clips for them."""

from __future__ import annotations

import torch
from PIL import Image
from torch import nn

TEXT = "a red circle moving left"


def frozen(pipe):
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without_zeros(module: nn.Module) -> nn.Module:
    """The module with random weights where its class begins with zeros, which would hide most of it."""
    for weight in module.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.1)
    return module


def tokenizer(max_length: int = 16, words: str = TEXT):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(words.split()))])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def clip_text(projection: bool = False, width: int = 8):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def clip_vision(size: int = 32, projection: bool = True):
    """An image encoder and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return (CLIPVisionModelWithProjection if projection else CLIPVisionModel)(config), processor


def t5(multilingual: bool = False, width: int = 8):
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    model, config = (UMT5EncoderModel, UMT5Config) if multilingual else (T5EncoderModel, T5Config)
    return model(config(vocab_size=32, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def chat_tokenizer(max_length: int = 1024):
    """A tokenizer of whole words that knows the tokens of chat templates."""
    made = tokenizer(max_length)
    made.add_special_tokens({"additional_special_tokens": _SPECIAL})
    # Pipelines drop the first hundred or so tokens, which real templates have.
    made.chat_template = (
        "{{ 'a ' * 140 }}{% for message in messages %}<|im_start|> {{ message['content'] }} <|im_end|>{% endfor %}"
    )
    return made


def qwen_processor():
    """Qwen-VL's processor, of texts, images and videos."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=chat_tokenizer(), video_processor=Qwen2VLVideoProcessor()
    )


def gemma2(width: int = 8):
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
        )
    )


def gemma3(width: int = 8, layers: int = 2):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    return Gemma3ForConditionalGeneration(config)


def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0
    )


def llama():
    from transformers import LlamaModel

    return LlamaModel(llama_config())


def qwen_text(width: int):
    return {
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 4,
        "num_key_value_heads": width // 4,
        "vocab_size": 64,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
        "pad_token_id": 0,
    }


def qwen_vl(width: int = 8):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=qwen_text(width), vision_config=vision, vocab_size=64)
    )


def image(seed: int = 0, size: int = 16) -> Image.Image:
    """A random image of coarse squares."""
    pixels = torch.randint(256, (4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy()).resize((size, size), Image.Resampling.BILINEAR)


def clip(frames: int, size: int = 16, seed: int = 0) -> list[Image.Image]:
    """A random video, a list of its frames."""
    return [image(seed + i, size) for i in range(frames)]


def tensor(video: list[Image.Image]) -> torch.Tensor:
    """A video as a tensor `(1, 3, F, H, W)` in [0, 1]."""
    from torchvision.transforms.functional import pil_to_tensor

    return torch.stack([pil_to_tensor(frame) / 255 for frame in video], 1)[None]
