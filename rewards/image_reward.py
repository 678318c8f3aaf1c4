"""ImageReward: how well an image follows its prompt and pleases, by people's rankings."""

from __future__ import annotations

import json
import re

from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from chopgrad_align import FrameReward, Frames

from .aesthetic import Head
from .checkpoints import at, fill_weights, loading, locate, read_weights
from .precision import InFloat32
from .preprocess import Preprocess
from .prompt_length import CuttingTokenizer

_WEIGHTS, _TEXT_CONFIG = "ImageReward.pt", "med_config.json"
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores in the authors' data
_TOKENS = 35
# What the files call a module, and what transformers' BLIP does.
_RENAMED = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"blocks\.(\d+)\.norm(\d)": r"encoder.layers.\1.layer_norm\2",
    r"blocks\.(\d+)\.attn\.qkv": r"encoder.layers.\1.self_attn.qkv",
    r"blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.projection",
    r"blocks\.(\d+)\.mlp": r"encoder.layers.\1.mlp",
    r"norm": "post_layernorm",
}


class ImageReward(FrameReward):
    """Xu et al., "ImageReward" (arXiv 2304.05977): BLIP's text encoder, which attends to the frame, and a linear head.

    The score is standardised as the authors do: about 0 on average over their data, with a deviation of about 1 (in
    practice about -2.3 to 2); unbounded when optimised. The prompt is cut at 35 tokens. Preprocessing is the official
    one: shortest side to 224 (bicubic), centre crop, OpenAI's mean and deviation.

    Args:
        checkpoint: Hub id or local folder with `ImageReward.pt`, tensors by name, read with `weights_only=True`, and
            `med_config.json`, the shape of the text encoder. The shape of the image encoder follows from the tensors,
            with 64 channels an attention head as in every ViT of BLIP.
        tokenizer: Hub id or local folder of the text encoder's tokenizer.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: The checkpoint or the tokenizer is missing, unreachable or of another model.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "THUDM/ImageReward@5736be03b2652728fb87788c9797b0570450ab72",
        tokenizer: str = "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594",
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        expected = f"hub id or folder with {_WEIGHTS} and {_TEXT_CONFIG}"
        with loading(f"image_reward: checkpoint={checkpoint!r}", expected):
            path = locate(checkpoint, _WEIGHTS)
            state = read_weights(path)
            vision = {_vision_name(key): value for key, value in _part(state, "blip.visual_encoder.").items()}
            text = _part(state, "blip.text_encoder.")
            text.pop("embeddings.position_ids", None)  # 0, 1, 2, …
            vision_config = _vision_config(vision)
            text_config = json.loads(locate(checkpoint, _TEXT_CONFIG).read_text())
            self.vision = BlipVisionModel(vision_config)
            self.text = BlipTextModel(_text_config(text_config, vision_config.hidden_size), add_pooling_layer=False)
            head = Head(self.text.config.hidden_size)
            for module, weights in ((self.vision, vision), (self.text, text), (head, _part(state, "mlp."))):
                fill_weights(module, weights, path)
        self.head = InFloat32(head)
        with loading(f"image_reward: tokenizer={tokenizer!r}", "hub id or folder of a BERT tokenizer"):
            self.tokenizer = CuttingTokenizer(AutoTokenizer.from_pretrained(**at(tokenizer)), "image_reward", _TOKENS)
        side = self.vision.config.image_size
        self.preprocess = Preprocess(size=(side, side))
        self.requires_grad_(False).eval()

    def prepare_prompts(self, prompts: list[str]) -> None:
        self.tokenizer.tell(prompts)

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        weight = self.vision.embeddings.class_embedding
        image = self.vision(pixel_values=self.preprocess(frames).to(weight.dtype)).last_hidden_state
        tokens = self.tokenizer(prompts, padding=True).to(weight.device)
        output = self.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=image
        )
        return (self.head(output.last_hidden_state[:, 0]).squeeze(-1) - _MEAN) / _STD


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _vision_name(name: str) -> str:
    for old, new in _RENAMED.items():
        name, found = re.subn(rf"^{old}(?=\.|$)", new, name)
        if found:
            break
    return name


def _vision_config(state: dict[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    patches = state["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(key.endswith(".self_attn.qkv.weight") for key in state),
        num_attention_heads=width // 64,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(config: dict, vision_width: int) -> BlipTextConfig:
    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    # As a decoder it has the layers that attend to the image; it is called as an encoder, without a causal mask.
    return BlipTextConfig(encoder_hidden_size=vision_width, is_decoder=True, **{key: config[key] for key in shared})
