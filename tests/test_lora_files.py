"""LoRAs in every layout that people have: the change of the weights is s B A, computed by hand; or it is refused."""

import json

import diffusers
import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file as save_tensors

from chopgrad_align.common.errors import UsageError
from chopgrad_align.training.lora import fuse_lora, load_lora, lora_config, read_lora
from chopgrad_align.training.lora_files import download_lora, lora_file
from chopgrad_align.training.trainable import LoraOnDenoisers

RANK, ALPHA = 4, 1.0


def factors(layer, seed=0, rank=RANK):
    """A and B for a layer, which is the same as ΔW = B A of its weight."""
    generator = torch.Generator().manual_seed(seed)
    out, *into = layer.weight.shape
    return torch.randn(rank, *into, generator=generator), torch.randn(out, rank, generator=generator)


def save_file(weights, path, metadata=None):
    save_tensors({key: value.clone() for key, value in weights.items()}, path, metadata)


def wan():
    return tiny_pipelines.wan_t2v()


def ltx():
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
    )
    return diffusers.LTXPipeline(None, None, None, None, transformer)


def hunyuan():
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return diffusers.HunyuanVideoPipeline(None, None, transformer, None, None, None, None)


def ltx2():
    torch.manual_seed(0)
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=8,
    )
    return diffusers.LTX2Pipeline(None, None, None, None, None, None, transformer, None)


def kohya(name, a, b, alpha=True):
    name = name.replace(".", "_")
    weights = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    return weights | ({f"{name}.alpha": torch.tensor(ALPHA)} if alpha else {})


def dotted(name, a, b, down="lora_A", up="lora_B", **others):
    weights = {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
    return weights | {f"{name}.{key}": value for key, value in others.items()}


Q = "transformer.blocks.1.attn1.to_q"
SCALED = ALPHA / RANK
CASES = {
    # layout: pipeline, layer of diffusers, file of its factors, s
    "diffusers": (wan, Q, lambda a, b: dotted(Q, a, b), 1.0),
    "former": (wan, Q, lambda a, b: dotted("transformer.blocks.1.attn1.processor.to_q_lora", a, b, "down", "up"), 1.0),
    "musubi": (wan, Q, lambda a, b: kohya("lora_unet_blocks.1.self_attn.q", a, b), SCALED),
    "musubi_image": (
        tiny_pipelines.wan_i2v,
        "transformer.blocks.1.attn2.add_k_proj",
        lambda a, b: kohya("lora_unet_blocks.1.cross_attn.k_img", a, b) | twin(a, b),
        SCALED,
    ),
    "musubi_ffn": (
        wan,
        "transformer.blocks.0.ffn.net.0.proj",
        lambda a, b: kohya("lora_unet_blocks.0.ffn.0", a, b),
        SCALED,
    ),
    "comfy": (wan, Q, lambda a, b: dotted("diffusion_model.blocks.1.self_attn.q", a, b, "lora_down", "lora_up"), 1.0),
    "comfy_alpha": (
        wan,
        Q,
        lambda a, b: dotted("diffusion_model.blocks.1.self_attn.q", a, b, alpha=torch.tensor(ALPHA)),
        SCALED,
    ),
    "diffsynth": (
        wan,
        Q,
        lambda a, b: dotted("pipe.dit.blocks.1.self_attn.q", a, b, "lora_A.default", "lora_B.default"),
        1.0,
    ),
    "original": (wan, Q, lambda a, b: dotted("blocks.1.self_attn.q", a, b), 1.0),
    "prefixed": (wan, Q, lambda a, b: dotted("transformer.blocks.1.self_attn.q", a, b), 1.0),
    "low_precision": (wan, Q, lambda a, b: dotted(Q, a.bfloat16(), b.bfloat16()), 1.0),
    "cogvideox_kohya": (
        tiny_pipelines.cogvideox,
        "transformer.transformer_blocks.1.attn1.to_out.0",
        lambda a, b: kohya("lora_transformer_transformer_blocks.1.attn1.to_out.0", a, b),
        SCALED,
    ),
    "ltx_comfy": (
        ltx,
        "transformer.transformer_blocks.1.attn1.to_k",
        lambda a, b: dotted("diffusion_model.transformer_blocks.1.attn1.to_k", a, b),
        1.0,
    ),
    "ltx2_comfy": (
        ltx2,
        "transformer.time_embed.linear",
        lambda a, b: dotted("diffusion_model.adaln_single.linear", a, b),
        1.0,
    ),
    "hunyuan_comfy": (
        hunyuan,
        "transformer.transformer_blocks.1.attn.to_add_out",
        lambda a, b: dotted("diffusion_model.double_blocks.1.txt_attn_proj", a, b) | fused("diffusion_model."),
        1.0,
    ),
    "hunyuan_musubi": (
        hunyuan,
        "transformer.transformer_blocks.0.ff.net.0.proj",
        lambda a, b: kohya("lora_unet_double_blocks.0.img_mlp.fc1", a, b) | fused("module."),
        SCALED,
    ),
    "sd_kohya": (
        tiny_pipelines.animatediff,
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        lambda a, b: kohya("lora_unet_down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", a, b),
        SCALED,
    ),
    "sd_text": (
        tiny_pipelines.animatediff,
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        lambda a, b: kohya("lora_te_text_model.encoder.layers.0.self_attn.q_proj", a, b),
        SCALED,
    ),
    "convolution": (
        tiny_pipelines.animatediff,
        "unet.down_blocks.0.resnets.0.conv1",
        lambda a, b: kohya("lora_unet_down_blocks.0.resnets.0.conv1", a, b[:, :, None, None]),
        SCALED,
    ),
    "svd": (
        tiny_pipelines.svd,
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        lambda a, b: dotted("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", a, b),
        1.0,
    ),
}


def fused(prefix):
    """A layer of zeros by which diffusers knows HunyuanVideo's own layout."""
    return dotted(f"{prefix}double_blocks.0.img_attn_qkv", torch.zeros(RANK, 20), torch.zeros(60, RANK))


def twin(a, b):
    """The layer of values beside that of keys, without which diffusers takes a LoRA for one of text-to-video."""
    return kohya("lora_unet_blocks.1.cross_attn.v_img", torch.zeros_like(a), torch.zeros_like(b))


def weights_of(pipe):
    return {
        f"{name}.{key}": value.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


@pytest.mark.parametrize("case", CASES)
def test_the_weights_change_by_hand(case, tmp_path):
    make, layer, layout, scale = CASES[case]
    pipe = make()
    before = weights_of(pipe)
    component, _, name = layer.partition(".")
    a, b = factors(pipe.components[component].get_submodule(name))
    save_file(layout(a, b), tmp_path / "lora.safetensors")
    fuse_lora(pipe, str(tmp_path / "lora.safetensors"), scale=0.5)
    after = weights_of(pipe)
    assert before.keys() == after.keys()
    a, b = (value.bfloat16().double() if case == "low_precision" else value.double() for value in (a, b))
    by_hand = 0.5 * scale * torch.einsum("or,r...->o...", b, a)
    for key, value in after.items():
        change = value.double() - before[key].double()
        expected = by_hand if key == f"{layer}.weight" else torch.zeros((), dtype=torch.float64)
        tolerance = 1e-2 if case == "low_precision" else 1e-5
        torch.testing.assert_close(change, expected.expand_as(change), rtol=tolerance, atol=tolerance)


def test_a_fused_projection_changes_each_of_its_parts(tmp_path):
    """HunyuanVideo's queries, keys and values are one layer in the original model."""
    pipe, name = hunyuan(), "transformer_blocks.0.attn"
    before = weights_of(pipe)
    a, b = torch.randn(RANK, 20), torch.randn(60, RANK)
    save_file(kohya("lora_unet_double_blocks.0.img_attn_qkv", a, b), tmp_path / "lora.safetensors")
    fuse_lora(pipe, str(tmp_path / "lora.safetensors"))
    for part, rows in zip(("to_q", "to_k", "to_v"), (SCALED * b @ a).chunk(3), strict=True):
        key = f"transformer.{name}.{part}.weight"
        torch.testing.assert_close(weights_of(pipe)[key] - before[key], rows, rtol=1e-5, atol=1e-5)


def test_a_bias_and_zeros_of_distilled_loras(tmp_path):
    """ComfyUI's `.diff_b` is added to the bias; a `.diff` of a norm that is zero is nothing."""
    pipe, name = wan(), "diffusion_model.blocks.0.self_attn.q"
    before = weights_of(pipe)
    layer = pipe.transformer.blocks[0].attn1.to_q
    a, b = factors(layer)
    bias = torch.randn(layer.bias.shape)
    others = {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(24)}
    others |= dotted("diffusion_model.blocks.0.self_attn.k", *factors(layer, 1))  # without one
    save_file(dotted(name, a, b, diff_b=bias) | others, tmp_path / "lora.safetensors")
    fuse_lora(pipe, str(tmp_path / "lora.safetensors"))
    after = weights_of(pipe)
    for key, change in {"to_q.weight": b @ a, "to_q.bias": bias, "to_k.bias": torch.zeros(24)}.items():
        key = f"transformer.blocks.0.attn1.{key}"
        torch.testing.assert_close(after[key] - before[key], change, rtol=1e-5, atol=1e-5)


def test_ranks_and_alphas_of_each_layer(tmp_path):
    pipe = wan()
    before, file, expected = weights_of(pipe), {}, {}
    for place, (name, rank) in enumerate({"q": 2, "k": 4, "v": 4}.items()):
        a, b = factors(pipe.transformer.blocks[0].attn1.to_q, place, rank)
        file |= dotted(f"diffusion_model.blocks.0.self_attn.{name}", a, b, alpha=torch.tensor(1.0 + place))
        expected[f"transformer.blocks.0.attn1.to_{name}.weight"] = (1.0 + place) / rank * b @ a
    save_file(file, tmp_path / "lora.safetensors")
    fuse_lora(pipe, str(tmp_path / "lora.safetensors"))
    for key, change in expected.items():
        torch.testing.assert_close(weights_of(pipe)[key] - before[key], change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["header", "beside"])
def test_settings_of_peft(where, tmp_path):
    """In the header that diffusers writes, or in peft's adapter_config.json; one layer has an alpha of its own."""
    pipe = wan()
    before = weights_of(pipe)
    settings = {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"blocks.1.attn1.to_q": 2}, "use_rslora": False}
    file, expected = {}, {}
    for place, scale in ((0, 8 / RANK), (1, 2 / RANK)):
        a, b = factors(pipe.transformer.blocks[0].attn1.to_q, place)
        layer = f"blocks.{place}.attn1.to_q"
        file |= dotted(f"transformer.{layer}" if where == "header" else f"base_model.model.{layer}", a, b)
        expected[f"transformer.{layer}.weight"] = scale * b @ a
    if where == "header":
        header = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        save_file(file, tmp_path / "own.safetensors", metadata={"lora_adapter_metadata": header})
    else:
        save_file(file, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LORA"}))
    fuse_lora(pipe, str(tmp_path))
    for key, change in expected.items():
        torch.testing.assert_close(weights_of(pipe)[key] - before[key], change, rtol=1e-5, atol=1e-5)


def test_beside_the_weights_it_is_what_it_is_fused(tmp_path):
    a, b = factors(wan().transformer.blocks[1].attn1.to_q)
    torch.save(kohya("lora_unet_blocks.1.self_attn.q", a, b), tmp_path / "lora.pt")
    x, found = torch.randn(2, 24), []
    for load in (load_lora, lambda pipe, path: fuse_lora(pipe, str(path))):
        pipe = wan()
        load(pipe, tmp_path / "lora.pt")
        found.append(pipe.transformer.blocks[1].attn1.to_q(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# --- part of it, or nothing ---


def a_part(folder):
    """Four layers for a model of two blocks, in ComfyUI's layout."""
    a, b = factors(wan().transformer.blocks[0].attn1.to_q)
    weights = {}
    for block in range(4):
        weights |= dotted(f"diffusion_model.blocks.{block}.self_attn.q", a, b)
    save_file(weights, folder / "part.safetensors")
    return folder / "part.safetensors", b @ a


def test_a_part_is_an_error_that_lists_the_rest_unless_it_is_allowed(tmp_path):
    path, change = a_part(tmp_path)
    pipe = wan()
    before = weights_of(pipe)
    rest = r"fits in 2 layers only; left over: transformer\.blocks\.2-3\.attn1\.to_q \(no such layer\); .*`partial`"
    for load in (fuse_lora, lambda pipe, path: load_lora(pipe, path)):
        with pytest.raises(UsageError, match=rest):
            load(pipe, str(path) if load is fuse_lora else path)
    assert weights_of(pipe).keys() == before.keys()  # nothing was begun
    fuse_lora(pipe, str(path), partial=True)
    for block in (0, 1):
        key = f"transformer.blocks.{block}.attn1.to_q.weight"
        torch.testing.assert_close(weights_of(pipe)[key] - before[key], change, rtol=1e-5, atol=1e-5)


LEFT_OVER = {
    "other_size": (
        {"diffusion_model.blocks.0.self_attn.q": (48, 24)},
        r"\(4, 48\) and \(24, 4\) for a weight of \(24, 24\)",
    ),
    "no_layer": ({"transformer.layers.0.attention.query_key_value": (24, 24)}, "nothing of it fits"),
    "no_text": (
        {"text_encoder.layers.0.q": (24, 24), "transformer.blocks.0.attn1.to_q": (24, 24)},
        r"text_encoder\.layers",
    ),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_what_does_not_fit_is_named(case, tmp_path):
    layers, message = LEFT_OVER[case]
    weights = {}
    for name, (into, out) in layers.items():
        weights |= dotted(name, torch.ones(RANK, into), torch.ones(out, RANK))
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match=message):
        fuse_lora(wan(), str(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lora_unet_blocks_1_self_attn_q.dora_scale": torch.ones(24, 1)}, "DoRA of kohya's kind"),
        ({"lora_unet_blocks_1_self_attn_k.hada_w1_a": torch.ones(24, 2)}, "a LyCORIS LoHa or LoKr"),
        ({"diffusion_model.blocks.1.self_attn.norm_q.diff": torch.ones(24)}, r"norm_q\.diff \(no factor of a LoRA\)"),
        ({"lora_unet_blocks_1_self_attn_k.lora_up.weight": torch.ones(24, 4)}, "one of the two factors is missing"),
        ({"lora_te_text_model_encoder_layers_0_fc1.lora_up.weight": torch.ones(24, 4)}, "text_encoder.*no such layer"),
    ],
    ids=["dora", "loha", "norm", "half", "text"],
)
def test_what_cannot_be_loaded_beside_what_can(extra, message, tmp_path):
    a, b = factors(wan().transformer.blocks[1].attn1.to_q)
    save_file(kohya("lora_unet_blocks.1.self_attn.q", a, b) | extra, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match=message):
        fuse_lora(wan(), str(tmp_path / "lora.safetensors"))
    fuse_lora(wan(), str(tmp_path / "lora.safetensors"), partial=True)


def test_projections_that_diffusers_would_convert_wrongly_are_refused(tmp_path):
    """Its converter cuts the factor A of the text's fused projection as if it were B."""
    a, b = torch.ones(6, 20), torch.ones(60, 6)
    name = "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv"
    known = dotted("diffusion_model.double_blocks.0.img_attn_qkv", a, b)
    save_file(dotted(name, a, b) | known, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match=r"fits in 3 layers only; left over: .*token_refiner"):
        fuse_lora(hunyuan(), str(tmp_path / "lora.safetensors"))


# --- files ---


def test_files_that_are_no_lora(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    save_file({"blocks.0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 4)
    torch.save({"a": object()}, tmp_path / "objects.bin")
    for name, message in {
        "empty": "holds no weights",
        "model": r"is no LoRA: it holds weights such as 'blocks\.0\.weight'",
        "cut": "cannot be loaded",
    }.items():
        with pytest.raises(UsageError, match=message):
            fuse_lora(wan(), str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(UsageError, match="holds Python objects besides tensors"):
        fuse_lora(wan(), str(tmp_path / "objects.bin"))


def test_the_file_of_a_folder(tmp_path):
    for name in ("b.safetensors", "a.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UsageError, match=r"holds several files of weights: a\.safetensors, b\.safetensors; name one"):
        lora_file(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "b.bin").touch()
    assert lora_file(tmp_path).name == "a.safetensors"
    save_file({"x": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert lora_file(tmp_path).name == "pytorch_lora_weights.safetensors"


def test_the_file_of_a_repository(tmp_path, monkeypatch):
    asked = []
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "other/x.safetensors"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: asked.append(file) or tmp_path / file)
    assert download_lora("a/b", None) == tmp_path / "adapter_model.safetensors"
    assert download_lora("a/b", "other/x.safetensors") == tmp_path / "other/x.safetensors"
    assert asked == ["adapter_config.json", "adapter_model.safetensors", "other/x.safetensors"]
    files[:] = ["other/x.safetensors"]
    with pytest.raises(UsageError, match="holds no LoRA weights at its top level"):
        download_lora("a/b", None)


# --- to go on from ---


def test_start_from_another_makers(tmp_path):
    """Its scale goes into the factor A, so that the model starts with the LoRA's own change."""
    a, b = factors(wan().transformer.blocks[0].attn1.to_q)
    weights = {}
    for block in (0, 1):
        weights |= kohya(f"lora_unet_blocks.{block}.self_attn.q", a, b)
    save_file(weights, tmp_path / "lora.safetensors")
    pipe, config = wan(), lora_config(RANK, 8.0, r"blocks\.\d\.attn1\.to_q", 0.0)
    trainable = LoraOnDenoisers(pipe, config)
    trainable.load_state_dict(read_lora(pipe, tmp_path / "lora.safetensors", config))
    layer = pipe.transformer.blocks[1].attn1.to_q
    torch.testing.assert_close(layer.get_delta_weight("default"), SCALED * b @ a, rtol=1e-5, atol=1e-5)


def test_start_from_a_part(tmp_path):
    from chopgrad_align.training.lora import with_what_fits

    path, _ = a_part(tmp_path)
    pipe, config = wan(), lora_config(RANK, None, ["to_q"], 0.0)
    trainable = LoraOnDenoisers(pipe, config)
    with pytest.raises(UsageError, match="fits in 2 layers only"):
        read_lora(pipe, path, config)
    found = read_lora(pipe, path, config, partial=True)
    with pytest.raises(UsageError, match=r"transformer\.blocks\.0-1\.attn2\.to_q\.lora_A\.weight.*\(not in it\)"):
        trainable.load_state_dict(found)
    own = trainable.state_dict()
    trainable.load_state_dict(with_what_fits(own, found))
    for key, value in trainable.state_dict().items():
        assert torch.equal(value, found.get(key, own[key]))
    with pytest.raises(UsageError, match="nothing in common"):
        with_what_fits(own, {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 24)})
