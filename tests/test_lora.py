"""LoRAs that a model comes with: fused as it is loaded, or added with a weight of their own."""

import json

import pytest
import tiny_pipelines
import tiny_runs
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from chopgrad_align import LastSteps, rollout
from chopgrad_align.common.errors import UsageError
from chopgrad_align.training import lora
from chopgrad_align.training.batches import call_inputs
from chopgrad_align.training.lora import add_lora, load_lora, lora_config, lora_parameters, read_lora
from chopgrad_align.training.models import check_model, load_pipeline
from chopgrad_align.training.run import train
from chopgrad_align.training.trainable import LoraOnDenoisers

SMALL = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
CALL = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, the same with Wan 2.2's pair of transformers, and a LoRA of its transformer."""
    folder = tmp_path_factory.mktemp("loras")
    tiny_pipelines.wan_t2v().save_pretrained(folder / "wan")
    tiny_pipelines.wan_t2v(two_stage=True).save_pretrained(folder / "pair")
    transformer = tiny_pipelines.wan_t2v().transformer
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=1, target_modules=tiny_pipelines.TARGETS, init_lora_weights=False)
    transformer.add_adapter(config)
    weights = {
        "transformer_lora_layers": get_peft_model_state_dict(transformer),
        "transformer_lora_adapter_metadata": config.to_dict(),
    }
    tiny_pipelines.wan_t2v().save_lora_weights(folder / "lora", **weights)
    tiny_pipelines.wan_t2v().save_lora_weights(folder / "several", weight_name="four_steps.safetensors", **weights)
    return folder


def model(folder, name, *overrides):
    return tiny_runs.config(folder, folder / name, *overrides).model


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), **CALL).frames


def by_diffusers(folder, name, scale=1.0):
    """The pipeline with the LoRA as an adapter beside its weights, of either transformer."""
    pipe = DiffusionPipeline.from_pretrained(folder / name)
    pipe.load_lora_weights(folder / "lora", adapter_name="own")
    if name == "pair":
        pipe.load_lora_weights(folder / "lora", adapter_name="own", load_into_transformer_2=True)
    pipe.set_adapters("own", scale)
    return latents(pipe)


@pytest.mark.parametrize(
    ("source", "scale"),
    [
        ("name: {}/lora", 1.0),
        ("name: {}/lora, scale: 0.5", 0.5),
        ("name: {}/several, file: four_steps.safetensors", 1.0),
    ],
)
def test_a_fused_lora_is_the_lora_and_leaves_plain_weights(folder, source, scale):
    settings = model(folder, "wan", f"model.loras={{own: {{{source.format(folder)}}}}}")
    check_model(settings)
    pipe = load_pipeline(settings)
    assert not any(isinstance(module, BaseTunerLayer) for module in pipe.transformer.modules())
    expected, base = by_diffusers(folder, "wan", scale), latents(load_pipeline(model(folder, "wan")))
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 0.01


def test_several_are_fused_one_after_the_other(folder):
    one = f"{{name: {folder}/lora, scale: 0.5}}"
    twice = latents(load_pipeline(model(folder, "wan", f"model.loras={{a: {one}, b: {one}}}")))
    torch.testing.assert_close(twice, by_diffusers(folder, "wan"), rtol=1e-4, atol=1e-4)


def test_the_second_transformer_has_loras_of_its_own(folder):
    first, second = f"{{name: {folder}/lora}}", f"{{name: {folder}/lora, second: true}}"
    found = latents(load_pipeline(model(folder, "pair", f"model.loras={{a: {first}, b: {second}}}")))
    torch.testing.assert_close(found, by_diffusers(folder, "pair"), rtol=1e-4, atol=1e-4)
    alone = latents(load_pipeline(model(folder, "pair", f"model.loras={{a: {first}}}")))
    assert (found - alone).abs().max() > 0.01


def test_a_run_on_top_of_another_starts_where_that_one_ended(folder, tmp_path):
    first = tiny_runs.config(tmp_path, folder / "wan", "run.folder=" + str(tmp_path / "first"))
    train(first)
    second = tiny_runs.config(tmp_path, folder / "wan", f"model.loras.first.name={tmp_path}/first/lora")
    train(second)
    ended, began = (json.loads((tmp_path / name / "heldout.json").read_text()) for name in ("first", "run"))
    assert began["before"] == pytest.approx(ended["after"], abs=1e-5)
    assert began["before"] != pytest.approx(ended["before"], abs=1e-5)


@pytest.mark.parametrize("make", ["wan_t2v", "svd"])
def test_the_scale_of_a_lora_interpolates(make, folder, tmp_path):
    """At 0 it is the base model; of a run of the trainer, also where diffusers has no loader."""
    getattr(tiny_pipelines, make)().save_pretrained(tmp_path / "model")
    own = []
    if make == "svd":
        tiny_pipelines.picture().save(tmp_path / "a.png")
        (tmp_path / "images.csv").write_text("image\na.png\n")
        images = tmp_path / "images.csv"
        own = ["~model.call.guidance_scale", f"data.train={images}", f"data.held_out={images}"]
    config = tiny_runs.config(tmp_path, tmp_path / "model", "train.learning_rate=0.1", *own, frames=4 + (make != "svd"))
    train(config)

    def sampled(scale=None):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
        if scale is not None:
            load_lora(pipe, tmp_path / "run" / "lora", scale=scale)
        pipe.set_progress_bar_config(disable=True)
        inputs = call_inputs(pipe, ["a star"], [0])
        if make == "svd":
            inputs["image"] = tiny_pipelines.picture()
        return pipe(**config.model.call, **inputs, output_type="latent").frames

    base, whole, half = sampled(), sampled(1.0), sampled(0.5)
    torch.testing.assert_close(sampled(0.0), base)
    assert 0 < (half - base).norm() < (whole - base).norm()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{name: nowhere}", r"model\.loras\.own\.name: there is no folder or file nowhere; give one, or a hub id"),
        ("{name: FOLDER/wan}", "there are no LoRA weights FOLDER/wan/pytorch_lora_weights.safetensors"),
        ("{name: FOLDER/lora, file: a.safetensors}", "there are no LoRA weights FOLDER/lora/a.safetensors"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(folder, source, message):
    settings = model(folder, "wan", f"model.loras.own={source.replace('FOLDER', str(folder))}")
    with pytest.raises(UsageError, match=message.replace("FOLDER", str(folder))):
        check_model(settings)


def test_the_second_transformers_lora_of_a_run_is_in_its_folder(folder, tmp_path):
    config = tiny_runs.config(tmp_path, folder / "pair", "gradient.last_steps=3", "train.learning_rate=0.1")
    train(config)
    name = f"name: {tmp_path}/run/lora"
    both = latents(load_pipeline(model(folder, "pair", f"model.loras.own={{{name}}}")))
    second = load_pipeline(model(folder, "pair", f"model.loras.own={{{name}, second: true}}"))
    assert (latents(second) - both).abs().max() > 1e-4
    base = DiffusionPipeline.from_pretrained(folder / "pair")
    loaded = load_pipeline(model(folder, "pair", f"model.loras.own={{{name}}}"))
    for key, weight in second.transformer_2.state_dict().items():
        assert torch.equal(weight, loaded.transformer_2.state_dict()[key])
    for key, weight in second.transformer.state_dict().items():
        assert torch.equal(weight, base.transformer.state_dict()[key])


def test_one_of_the_two_transformers(folder, tmp_path):
    """Its LoRA is all that a run leaves, and is loaded and gone on from as any other."""
    options = ["lora.denoisers=[transformer_2]", "train.learning_rate=0.1", "lora.rank=2"]
    train(tiny_runs.config(tmp_path, folder / "pair", *options))
    state = tiny_runs.lora(tmp_path / "run", 2)
    assert {key.partition(".")[0] for key in state} == {"transformer_2"}
    fused = load_pipeline(model(folder, "pair", f"model.loras.own.name={tmp_path}/run/lora"))
    beside = DiffusionPipeline.from_pretrained(folder / "pair")
    load_lora(beside, tmp_path / "run" / "lora")
    torch.testing.assert_close(latents(fused), latents(beside), rtol=1e-4, atol=1e-4)
    assert (latents(fused) - latents(DiffusionPipeline.from_pretrained(folder / "pair"))).abs().max() > 1e-3
    config = lora_config(2, None, tiny_pipelines.TARGETS, 0.0)
    for key, value in read_lora(beside, tmp_path / "run" / "lora", config).items():
        assert torch.equal(value, state[key])
    with pytest.raises(UsageError, match=r"lora\.denoisers: WanPipeline has no transformer_2; it has transformer"):
        train(tiny_runs.config(tmp_path, folder / "wan", "lora.denoisers=[transformer_2]", "run.folder=other"))


def test_a_lora_of_another_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from safetensors.torch import save_file

    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"other\.safetensors cannot be loaded into WanPipeline"):
        load_pipeline(model(folder, "wan", f"model.loras.own.name={tmp_path}/other.safetensors"))
    with pytest.raises(UsageError, match="cannot be loaded into WanPipeline"):
        load_pipeline(model(folder, "wan", f"model.loras.own={{name: {folder}/lora, second: true}}"))
    with pytest.raises(UsageError, match=r"the LoRA a/b cannot be loaded into WanPipeline.*\(") as raised:
        load_pipeline(model(folder, "wan", "model.loras.own.name=a/b"))
    assert str(raised.value).count("cannot be loaded") == 1
    tiny_pipelines.svd().save_pretrained(tmp_path / "svd")
    with pytest.raises(UsageError, match=r"cannot be loaded into StableVideoDiffusionPipeline.*nothing of it fits"):
        load_pipeline(model(tmp_path, "svd", f"model.loras.own.name={folder}/lora"))


# --- float32 on a denoiser of lower precision ---


def with_lora(kept, dropout=0.0, **variant):
    """A tiny transformer in bfloat16 with a float32 LoRA whose two factors are random."""
    pipe = tiny_pipelines.wan_t2v()
    pipe.transformer.bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        if kept:
            patch.setattr(lora, "save_low_precision_inputs", lambda denoiser: None)
        parameters = lora_parameters(add_lora(pipe, lora_config(2, None, tiny_pipelines.TARGETS, dropout, **variant)))
    torch.manual_seed(1)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    return pipe, parameters


@pytest.mark.parametrize(
    ("autocast", "variant"), [(False, {}), (True, {}), (False, {"dora": True})], ids=["plain", "autocast", "dora"]
)
def test_inputs_that_are_kept_as_they_are_change_no_bit(autocast, variant):
    found = []
    for kept in (True, False):
        pipe, parameters = with_lora(kept, **variant)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            video = rollout(pipe, LastSteps(2), prompt="a star", generator=torch.Generator().manual_seed(0), **SMALL)
        found.append([video.detach(), *torch.autograd.grad(video.square().sum(), parameters)])
    for copied, own in zip(*found, strict=True):
        assert torch.equal(copied, own)


def test_layers_of_one_input_keep_it_once():
    x = torch.randn(1, 64, 24).bfloat16()

    def kept(copied):
        pipe, _ = with_lora(copied)
        attention = pipe.transformer.blocks[0].attn1
        sizes = {}

        def save(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            outputs = [layer(x) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        assert all(output.requires_grad for output in outputs)
        weights = {p.untyped_storage()._cdata for p in pipe.transformer.parameters()}
        return sum(size for key, size in sizes.items() if key not in weights)

    whole = x.untyped_storage().nbytes()
    assert kept(copied=True) > 6 * whole  # three float32 copies
    assert kept(copied=False) < 2 * whole


def test_dropout_is_left_to_peft():
    pipe, _ = with_lora(kept=False, dropout=0.5)
    assert pipe.transformer.blocks[0].attn1.to_q.cast_input_dtype_enabled


# --- variants ---

VARIANTS = {"plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "kaiming": {"init": "kaiming"}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_start_as_the_base_model_and_load_by_diffusers(folder, tmp_path, variant):
    config = lora_config(4, 2.0, tiny_pipelines.TARGETS, 0.0, **VARIANTS[variant])
    low = DiffusionPipeline.from_pretrained(folder / "wan", dtype={"default": torch.bfloat16, "vae": torch.float32})
    base = latents(low)
    LoraOnDenoisers(low, config)
    assert torch.equal(latents(low), base)
    pipe = DiffusionPipeline.from_pretrained(folder / "wan")
    base, trained = latents(pipe), LoraOnDenoisers(pipe, config)
    for parameter in trained.parameters:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    changed = latents(pipe)
    assert (changed - base).abs().max() > 0.01
    with trained.base():
        assert torch.equal(latents(pipe), base)
    assert torch.equal(latents(pipe), changed)
    trained.export(tmp_path)
    plain = DiffusionPipeline.from_pretrained(folder / "wan")
    plain.load_lora_weights(tmp_path)
    assert torch.equal(latents(plain), changed)


def test_scale_of_rslora_and_formula_of_dora():
    """The papers' own: W x + alpha/√r B A x; and m (W + s B A) x / ‖W + s B A‖ with a norm for each output."""
    x = torch.randn(3, 24, dtype=torch.float64)
    for variant in ("rslora", "dora"):
        pipe = tiny_pipelines.wan_t2v().to(torch.float64)
        add_lora(pipe, lora_config(4, 2.0, ["to_q"], 0.0, **VARIANTS[variant]))
        layer = pipe.transformer.blocks[0].attn1.to_q.double()
        b = torch.nn.init.normal_(layer.lora_B["default"].weight)
        scaled = (2 / 4**0.5 if variant == "rslora" else 2 / 4) * b @ layer.lora_A["default"].weight
        weight = layer.base_layer.weight + scaled
        if variant == "dora":
            magnitude = torch.nn.init.uniform_(layer.lora_magnitude_vector["default"].weight)
            weight = (magnitude / weight.norm(dim=1))[:, None] * weight
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.base_layer.bias))


def test_start_from_a_saved_lora(folder, tmp_path):
    config = lora_config(2, 1.0, tiny_pipelines.TARGETS, 0.0)
    state = read_lora(tiny_pipelines.wan_t2v(), folder / "lora", config)
    pipe = DiffusionPipeline.from_pretrained(folder / "wan")
    LoraOnDenoisers(pipe, config).load_state_dict(state)
    assert torch.equal(latents(pipe), by_diffusers(folder, "wan"))
    pair = DiffusionPipeline.from_pretrained(folder / "pair")
    trained = LoraOnDenoisers(pair, config)
    for parameter in trained.parameters:
        torch.nn.init.normal_(parameter)
    trained.export(tmp_path)
    for name, value in read_lora(pair, tmp_path, config).items():
        assert torch.equal(value, trained.state_dict()[name])
    with pytest.raises(UsageError, match="the LoRA has other weights than these layers"):
        trained.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((4, 1.0), "was trained with lora.rank=2; set that"),
        ((2, 2.0), "was trained with lora.alpha=1; set that"),
        ((2, 1.0, True), "was trained with lora.rslora=False; set that"),
        ((2, 1.0, False, True), "was trained with lora.dora=False; set that"),
    ],
    ids=["rank", "alpha", "rslora", "dora"],
)
def test_start_from_a_lora_of_another_kind(folder, settings, message):
    rank, alpha, *variant = settings
    asked = lora_config(rank, alpha, tiny_pipelines.TARGETS, 0.0, *variant)
    with pytest.raises(UsageError, match=message):
        read_lora(tiny_pipelines.wan_t2v(), folder / "lora", asked)


def test_a_run_starts_from_a_lora(folder, tmp_path):
    options = [f"lora.start_from={folder}/lora", "lora.rank=2", "lora.alpha=1"]
    train(tiny_runs.config(tmp_path, folder / "wan", *options, "checkpoint.every=1", "checkpoint.keep=3"))
    first = tiny_runs.lora(tmp_path / "run", 0)
    expected = read_lora(tiny_pipelines.wan_t2v(), folder / "lora", lora_config(2, 1.0, tiny_pipelines.TARGETS, 0.0))
    assert all(torch.equal(first[name], value) for name, value in expected.items())
    with pytest.raises(UsageError, match="there are no LoRA weights"):
        train(tiny_runs.config(tmp_path, folder / "wan", "lora.start_from=absent", "run.folder=other"))
