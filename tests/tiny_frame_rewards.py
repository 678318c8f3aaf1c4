"""More random checkpoints: of the frame rewards with formats of their own, small, made offline."""

import json

import torch
from safetensors.torch import save_file
from tiny_rewards import WORDS, laion_head, reinitialise
from torch import nn

from chopgrad_align.data.tokenizer import word_tokenizer

# As BERT's, whose numbers Grounding DINO knows; the last is also the largest, by which CLIP finds a text's end.
BERT_VOCABULARY = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012} | {
    word: 1030 + i for i, word in enumerate(WORDS)
}
CLIP_VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *WORDS, "[EOS]"])}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
CONDITION = "red green"
LABELS = {0: "N/A", 1: "cat", 2: "stop sign", 3: "book"}


def make_frame_checkpoints(folder):
    """Fill a folder with `siglip/`, `pick/`, `image_reward/`, `mps/`, `yolos/` and `dino/`."""
    torch.manual_seed(0)
    _make_siglip(folder / "siglip")
    _make_clip(folder / "pick")
    _make_image_reward(folder / "image_reward")
    _make_mps(folder / "mps")
    _make_yolos(folder / "yolos")
    _make_dino(folder / "dino")
    return folder


def arguments(folder):
    """Published name and local checkpoint of each reward; the detectors once for each family."""
    path_of = {path.name: str(path) for path in folder.iterdir()}
    return {
        "aesthetic_v2_5": {"siglip": path_of["siglip"], "head": path_of["siglip"]},
        "pick_score": {"checkpoint": path_of["pick"], "processor": path_of["pick"]},
        "image_reward": {"checkpoint": path_of["image_reward"], "tokenizer": path_of["image_reward"]},
        "mps": {"checkpoint": path_of["mps"], "processor": path_of["mps"], "condition": CONDITION},
        "object_presence": {"target": "stop sign", "checkpoint": path_of["yolos"]},
        "object_removal": {"target": "a red Circle", "checkpoint": path_of["dino"]},
        "compressibility": {},
        "sharpness": {},
    }


def _make_siglip(folder):
    from transformers import SiglipConfig, SiglipModel

    text = {**TOWER, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = SiglipConfig(vision_config=VISION, text_config=text)
    reinitialise(SiglipModel(config)).save_pretrained(folder)
    torch.save(siglip_head().state_dict(), folder / "aesthetic_predictor_v2_5.pth")
    save_file(siglip_head().state_dict(), folder / "head.safetensors")


def siglip_head():
    class PredictorHead(nn.Module):  # as its author defines it
        def __init__(self):
            super().__init__()
            self.scoring_head = nn.Sequential(
                nn.Linear(32, 1024), nn.Dropout(0.5), nn.Linear(1024, 128), nn.Dropout(0.5), nn.Linear(128, 64),
                nn.Dropout(0.5), nn.Linear(64, 16), nn.Dropout(0.2), nn.Linear(16, 1),
            )  # fmt: skip

        def forward(self, x):
            return self.scoring_head(x)

    torch.manual_seed(0)
    return reinitialise(PredictorHead())


def _clip_config(width=24):
    from transformers import CLIPConfig

    text = {**TOWER, "vocab_size": len(CLIP_VOCABULARY), "max_position_embeddings": 10}
    text |= {"bos_token_id": CLIP_VOCABULARY["[BOS]"], "eos_token_id": CLIP_VOCABULARY["[EOS]"], "pad_token_id": 0}
    return CLIPConfig(projection_dim=width, vision_config=VISION, text_config=text)


def _make_clip(folder):
    from transformers import CLIPModel

    reinitialise(CLIPModel(_clip_config())).save_pretrained(folder)
    _clip_tokenizer().save_pretrained(folder)


def _clip_tokenizer():
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return word_tokenizer(CLIP_VOCABULARY, "[BOS] $A [EOS]", model_max_length=10, **special)


def _bert_tokenizer():
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return word_tokenizer(BERT_VOCABULARY, "[CLS] $A [SEP]", **special)


def _random_weights(shapes):
    """Matrices that keep a signal's size, biases and norms that are not at their initial values."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) >= 2:
            weights[name] = noise * 1.5 * (noise[0].numel() ** -0.5)
        else:
            weights[name] = 0.1 * noise + (1 if name.lower().endswith("norm.weight") else 0)
    return weights


def _make_image_reward(folder):
    """The names of the published `ImageReward.pt`: BLIP's own ViT, its BERT with cross-attention, and the head."""
    from timm.models.vision_transformer import VisionTransformer

    vision = reinitialise(image_reward_vision(VisionTransformer))
    state = {f"blip.visual_encoder.{name}": value for name, value in vision.state_dict().items()}
    width, text_width = 128, 32
    shapes = {"embeddings.word_embeddings.weight": (1100, text_width)}
    shapes["embeddings.position_embeddings.weight"] = (40, text_width)
    norms = ["embeddings.LayerNorm"]
    linears = {}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for kind, source in (("attention", text_width), ("crossattention", width)):
            linears[f"{layer}.{kind}.self.query"] = (text_width, text_width)
            linears[f"{layer}.{kind}.self.key"] = linears[f"{layer}.{kind}.self.value"] = (text_width, source)
            linears[f"{layer}.{kind}.output.dense"] = (text_width, text_width)
            norms.append(f"{layer}.{kind}.output.LayerNorm")
        linears[f"{layer}.intermediate.dense"] = (64, text_width)
        linears[f"{layer}.output.dense"] = (text_width, 64)
        norms.append(f"{layer}.output.LayerNorm")
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (text_width,), f"{name}.bias": (text_width,)}
    state |= {f"blip.text_encoder.{name}": value for name, value in _random_weights(shapes).items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for name, source in (("vision_proj", width), ("text_proj", text_width)):  # in the file, read by nothing
        state |= {f"blip.{name}.weight": torch.zeros(8, source), f"blip.{name}.bias": torch.zeros(8)}
    state |= {f"mlp.{name}": value for name, value in laion_head(text_width).state_dict().items()}
    folder.mkdir()
    torch.save(state, folder / "ImageReward.pt")
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": text_width,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12, "pad_token_id": 0, "vocab_size": 1100, "type_vocab_size": 2, "encoder_width": 768,
        "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "add_cross_attention": True,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(config))
    _bert_tokenizer().save_pretrained(folder)


def image_reward_vision(transformer):
    """timm's ViT, from which BLIP's was taken."""
    return transformer(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0)


def _make_mps(folder):
    """The names of imscore's copy of the authors' module: CLIP, and the layers around which a residual is wrapped."""
    from transformers import CLIPModel

    config = _clip_config(width=32)
    state = {f"mps.model.{k}": v for k, v in reinitialise(CLIPModel(config)).state_dict().items()}
    width, heads, head_width, hidden = 32, 3, 8, 128
    shapes, constants = {}, {}
    for i in range(2):
        attend, mix = (f"mps.cross_model.layers.{i}.{j}.fn" for j in (0, 1))
        shapes |= {
            f"{attend}.norm.weight": (width,),
            f"{attend}.to_q.weight": (heads * head_width, width),
            f"{attend}.to_kv.weight": (2 * head_width, width),
            f"{attend}.to_out.weight": (width, heads * head_width),
            f"{attend}.ff.0.weight": (2 * hidden, width),
            f"{attend}.ff.2.weight": (width, hidden),
            f"{mix}.norm.weight": (width,),
            f"{mix}.fused_attn_ff_proj.weight": ((heads + 2) * head_width + 2 * hidden, width),
            f"{mix}.attn_out.weight": (width, heads * head_width),
            f"{mix}.ff_out.1.weight": (width, hidden),
        }
        constants |= {f"{attend}.norm.bias": torch.zeros(width), f"{mix}.norm.bias": torch.zeros(width)}
        constants[f"{mix}.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, head_width, 2) / head_width)
    config.save_pretrained(folder)
    state |= _random_weights(shapes) | constants
    save_file(state, folder / "model.safetensors")
    # The authors' own names, without the copy's wrapper, in a torch file.
    torch.save({k.removeprefix("mps."): v for k, v in state.items()}, folder / "authors.pth")
    _clip_tokenizer().save_pretrained(folder)


def _make_yolos(folder):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        **TOWER, image_size=[32, 64], patch_size=16, num_detection_tokens=5,
        id2label=LABELS, label2id={name: i for i, name in LABELS.items()},
    )  # fmt: skip
    model = reinitialise(YolosForObjectDetection(config))
    model.save_pretrained(folder)
    YolosImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}).save_pretrained(folder)


def _make_dino(folder):
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=BertConfig(**TOWER, vocab_size=1100), d_model=32, num_queries=6,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_text_len=16,
    )  # fmt: skip
    model = reinitialise(GroundingDinoForObjectDetection(config))
    model.model.decoder.layer_norm.weight.data *= 0.1  # probabilities that are neither 0 nor 1
    model.save_pretrained(folder)
    GroundingDinoImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}).save_pretrained(folder)
    _bert_tokenizer().save_pretrained(folder)
