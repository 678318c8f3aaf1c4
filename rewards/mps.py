"""Multi-dimensional Preference Score: which of two images of a prompt would people choose, and in what respect."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from chopgrad_align import FrameReward, Frames, UsageError

from .checkpoints import at, fill_weights, loading, locate, read_weights
from .precision import wide
from .preprocess import Preprocess
from .prompt_cache import PromptCache
from .prompt_length import CuttingTokenizer

_OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
_RELATED = 0.01  # a word's similarity to the condition, relative to the prompt's most similar one, from which it counts


class MPS(FrameReward):
    """Zhang et al., "Learning Multi-dimensional Human Preference for Text-to-Image Generation" (arXiv 2405.14705).

    CLIP ViT-H/14 gives features of the frame's patches and of the prompt's words. Words that have nothing to do with
    the condition are masked; the patches attend to the others; the first of them is compared with the prompt. The score
    is the cosine similarity times the model's `exp(logit_scale)`, about 100, as in the authors' example. Preprocessing
    is CLIP's: shortest side to the model's size (bicubic), centre crop, OpenAI's mean and deviation.

    The authors' mask divides by the largest similarity in the batch; here, as when they score one image, by that of the
    prompt, so that a score does not depend on its neighbours. Their example's threshold, 0.01, is taken (one of their
    evaluation scripts has 0.3).

    Args:
        checkpoint: Hub id or local folder with `model.safetensors`, or the path of a file with the tensors by name (a
            torch file is read with `weights_only=True`). The authors publish a pickled module, which is not read; the
            default is a copy of its tensors by the package imscore.
        processor: Hub id or local folder of the CLIP model's `config.json` and tokenizer.
        condition: The words that the score is about; the default, the authors' for the overall preference, belongs to
            the published checkpoint.
        frames, frames_per_chunk: As for `FrameReward`.

    Raises:
        UsageError: The checkpoint or the processor is missing, unreachable or of another model; no condition.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "RE-N-Y/mpsv1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        condition: str = _OVERALL,
        frames: Frames = None,
        frames_per_chunk: int = 8,
    ) -> None:
        super().__init__(frames=frames, frames_per_chunk=frames_per_chunk)
        if not condition.strip():
            raise UsageError(f"mps: condition={condition!r}: expected words, e.g. 'light, color, tone, style'")
        with loading(f"mps: processor={processor!r}", "hub id or folder of a CLIPModel's config.json and tokenizer"):
            config = CLIPConfig.from_pretrained(**at(processor))
            tokenizer = AutoTokenizer.from_pretrained(**at(processor))
        self.tokenizer = CuttingTokenizer(tokenizer, "mps", config.text_config.max_position_embeddings)
        with loading(f"mps: checkpoint={checkpoint!r}", "hub id, folder or path of MPS's tensors (model.safetensors)"):
            path = locate(checkpoint, "model.safetensors")
            state = {_name(key): value for key, value in read_weights(path).items()}
            for key in [key for key in state if key.endswith((".position_ids", ".inv_freq"))]:
                del state[key]  # constants
            self.model, self.cross_model = CLIPModel(config), _cross_model(state)
            fill_weights(self, state, path)
        side = config.vision_config.image_size
        self.preprocess = Preprocess(size=(side, side), odd="down")
        self.condition = condition
        self._texts = PromptCache(self._encode_texts, capacity=256)  # every word has features: 0.3 MB a prompt
        self.requires_grad_(False).eval()

    def prepare_prompts(self, prompts: list[str]) -> None:
        self._texts(prompts)

    def score_frames(self, frames: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.preprocess(frames).to(self.model.logit_scale.dtype)
        patches = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).last_hidden_state)
        prompt, words = self._texts(prompts).to(patches).tensor_split([1], dim=1)  # (N, 1, D), (N, T, D)
        with torch.no_grad():  # of texts alone
            condition = self._texts([self.condition]).to(patches)[0, 1:]
            related = (words @ condition.T).amax(-1)  # (N, T)
            mask = (related / related.amax(-1, keepdim=True) > _RELATED)[:, None, None]  # (N, 1, 1, T)
        patches = self.cross_model(patches, words, mask)
        similarity = F.cosine_similarity(wide(patches[:, 0]), wide(prompt[:, 0]), dim=-1)
        return wide(self.model.logit_scale).exp() * similarity

    def _encode_texts(self, texts: list[str]) -> Tensor:
        """The feature of the whole text, then those of its words and padding `(n, 1 + T, D)`."""
        tokens = self.tokenizer(texts, padding="max_length")
        output = self.model.text_model(input_ids=tokens["input_ids"].to(self.model.logit_scale.device))
        return self.model.text_projection(torch.cat([output.pooler_output[:, None], output.last_hidden_state], 1))


def _name(key: str) -> str:
    """Names of the published files without the wrappers around the model and around each layer."""
    return re.sub(r"^mps\.", "", key).replace(".fn.", ".")


def _cross_model(state: dict[str, Tensor]) -> _CrossModel:
    """The modules for the tensors `cross_model.layers.…`, with the names that they have there."""
    key_value = state["cross_model.layers.0.0.to_kv.weight"]
    width, head_width = key_value.shape[1], key_value.shape[0] // 2
    heads = state["cross_model.layers.0.0.to_q.weight"].shape[0] // head_width
    hidden = state["cross_model.layers.0.0.ff.2.weight"].shape[1]
    depth = sum(key.endswith(".to_kv.weight") for key in state)
    return _CrossModel(
        _Layer([_Attend(width, heads, head_width, hidden), _Mix(width, heads, head_width, hidden)])
        for _ in range(depth)
    )


class _CrossModel(nn.Module):
    """Patches `(N, P, D)` attend to words `(N, T, D)`, and to each other, in turn."""

    def __init__(self, layers: Iterable[_Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            patches = layer(patches, words, mask)
        return patches


class _Layer(nn.ModuleList):
    def forward(self, patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        attend, mix = self
        patches = patches + attend(patches, words, mask)
        return patches + mix(patches)


class _Attend(nn.Module):
    """Patches attend to words, one key and value for all heads, beside a feed-forward layer."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * hidden, bias=False), _SwiGLU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        patches = self.norm(patches)
        query = self.to_q(patches).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_kv(words).chunk(2, -1)
        return self.to_out(_attention(query, key, value, mask)) + self.ff(patches)


class _Mix(nn.Module):
    """Patches attend to patches, with rotary positions (arXiv 2104.09864), beside a feed-forward layer."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.sizes = (heads * head_width, head_width, head_width, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(hidden, width, bias=False))

    def forward(self, patches: Tensor) -> Tensor:
        query, key, value, hidden = self.fused_attn_ff_proj(self.norm(patches)).split(self.sizes, -1)
        query = _rotate(query.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return self.attn_out(_attention(query, _rotate(key), value)) + self.ff_out(hidden)


class _SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, -1)
        return F.silu(gate) * x


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`(N, heads, P, d)`, twice `(N, T, d)` for all heads, a mask of what is seen -> `(N, P, heads d)`."""
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions along the last but one dimension of `(…, P, d)`."""
    positions, width = x.shape[-2:]
    frequency = 10000 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angle = torch.outer(torch.arange(positions, device=x.device), frequency).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat([-second, first], -1) * angle.sin().to(x.dtype)
