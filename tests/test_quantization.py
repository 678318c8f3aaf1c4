"""Quantised weights: loading, frames, gradients, runs, and what the planner counts of them."""

import importlib
import importlib.util
import inspect
import json
import runpy

import pytest
import tiny_pipelines
import tiny_runs
import torch
from gradients import ROUNDING, relative_error
from peft import LoraConfig
from torch import nn

from chopgrad_align import LastSteps, rollout
from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.stored_tensors import stored_tensors
from chopgrad_align.training import quantization
from chopgrad_align.training.lora import add_lora
from chopgrad_align.training.models import check_model, read_pipeline
from chopgrad_align.training.quantization import KINDS, read_quantized
from chopgrad_align.training.run import train

simulate = importlib.import_module("chopgrad_align.planner.simulate")  # the package has a function of this name

KIND = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(importlib.util.find_spec(KINDS[kind].package) is None, reason=KINDS[kind].package),
    )
    for kind in KINDS
]
CALL = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "wan"
    tiny_pipelines.wan_t2v().save_pretrained(folder)
    return folder


def pipeline(folder, quantize, dtype="float32"):
    return read_pipeline(str(folder), "model", {"default": dtype, "vae": "float32"}, quantize=quantize)


def gradients(pipe, video):
    video.float().square().sum().backward()
    return {name: weight.grad for name, weight in pipe.transformer.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KIND)
def test_frames_and_gradient_are_those_of_the_quantised_model(folder, kind, dtype):
    pipe = pipeline(folder, kind, dtype)
    torch.manual_seed(0)
    add_lora(pipe, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for weight in pipe.transformer.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)

    def call():
        return {"prompt": tiny_pipelines.PROMPTS[0], "generator": torch.Generator().manual_seed(1), **CALL}

    plain = pipe(**call(), output_type="pt").frames
    video = rollout(pipe, LastSteps(2), **call())
    assert torch.equal(video, plain)
    found = gradients(pipe, video)
    pipe.transformer.zero_grad()
    for layer in pipe.transformer.modules():  # the reference: plain autograd through the library's own kernels
        if isinstance(layer, nn.Linear) and len(stored_tensors(layer.weight)) > 1:
            layer.__class__ = type(layer).__mro__[1]
    reference = inspect.unwrap(type(pipe).__call__)(pipe, **call(), output_type="pt").frames
    assert torch.equal(reference, video)
    expected = gradients(pipe, reference)
    assert len(expected) == 16
    found, expected = (torch.cat([g.flatten() for g in of.values()]) for of in (found, expected))
    assert relative_error(found, expected) < (ROUNDING if dtype == "float32" else 0.05)


@pytest.mark.parametrize("kind", KIND)
def test_the_backward_pass_keeps_no_whole_weight(folder, kind):
    model = pipeline(folder, kind).transformer
    layer, x = model.blocks[0].attn1.to_q, torch.randn(3, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pytest.fail("kept"), lambda tensor: tensor):
        y = layer(x)
    whole = KINDS[kind].dequantized(layer.weight, torch.float32)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], whole.sum(0).expand(3, 24), atol=1e-6)


@pytest.mark.parametrize("kind", KIND)
def test_stored_bytes_are_those_that_the_planner_counts(kind, tmp_path):
    tiny_pipelines.wan_t2v().transformer.save_pretrained(tmp_path)
    model = read_quantized(kind, "diffusers", "WanTransformer3DModel", str(tmp_path), torch.float32)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and len(stored_tensors(layer.weight)) > 1:
            stored = sum(tensor.untyped_storage().nbytes() for tensor in stored_tensors(layer.weight))
            assert stored == KINDS[kind].nbytes(layer.out_features, layer.in_features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KIND)
def test_the_planner_counts_a_quantised_step(folder, tmp_path, kind, dtype):
    quantize = {"transformer": kind, "text_encoder": kind}
    overrides = [f"model.quantize={json.dumps(quantize)}", f"model.dtype={dtype}"]
    config = tiny_runs.config(tmp_path, folder, *overrides)
    planned, real = simulate.simulate(config), simulate.one_step(config, simulate.load(config))
    # Tables of values that the layers of nf4 share, 1 KiB each, are counted for each of them.
    shared = 1024 * 24 if kind == "nf4" else 0
    assert 0 <= planned.resident["transformer"] - real.resident["transformer"] <= shared
    assert planned.phases.keys() == real.phases.keys()
    for name, memory in planned.phases.items():
        assert memory.device == pytest.approx(real.phases[name].device, rel=0.05, abs=shared), name
    whole = simulate.simulate(tiny_runs.config(tmp_path, folder, f"model.dtype={dtype}"))
    assert planned.resident["transformer"] < whole.resident["transformer"] or kind == "nf4"  # with its tables


@pytest.mark.parametrize("kind", KIND)
def test_a_run_trains_and_its_lora_generates(folder, tmp_path, kind):
    quantize = json.dumps({"transformer": kind, "text_encoder": kind})
    train(tiny_runs.config(tmp_path, folder, f"model.quantize={quantize}"))
    rows = tiny_runs.rows(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
    assert any(
        weight.abs().sum() > 0 for name, weight in tiny_runs.saved_lora(tmp_path / "run").items() if "lora_B" in name
    )
    generate = runpy.run_path(str(tiny_runs.ROOT / "scripts" / "generate.py"))["main"]
    generate(["--run", str(tmp_path / "run"), "--prompt", "a", "--out", str(tmp_path / "videos"), "--device", "cpu"])
    assert [*(tmp_path / "videos").glob("*.mp4")]


def test_a_package_that_is_missing_is_named_before_loading(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    config = tiny_runs.config(tmp_path, folder, "model.quantize=nf4")
    with pytest.raises(UsageError, match=r"^model.quantize: nf4 needs bitsandbytes, which is not installed: pip inst"):
        check_model(config.model)


def test_a_component_that_is_not_there_is_named(folder):
    with pytest.raises(UsageError, match=r"^model.quantize.text_encode: .* did you mean 'text_encoder'"):
        pipeline(folder, {"text_encode": "int8"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantize=nf5"], "model.quantize"),
        (["model.quantize={vae: int8}"], "model.quantize.vae: pixels and their gradient"),
        (["model.quantize=nf4", "lora.dora=true"], "lora.dora reads whole weights, which model.quantize=nf4 packs"),
        (["model.quantize=nf4", "parallel.shard=2"], "parallel.shard=2 cuts weights that model.quantize=nf4 packs"),
        (
            ["model.quantize=nf4", "model.offload=blocks", "model.gradient_checkpointing=true"],
            "model.offload=blocks moves weights that model.quantize=nf4 packs",
        ),
        (["model.quantize=nf4", "model.loras.a.name=b/c"], "model.loras changes weights that model.quantize=nf4 packs"),
        (["model.quantize=nf4", "trainable.name=modules"], "trainable changes weights that model.quantize=nf4 packs"),
    ],
    ids=["kind", "vae", "dora", "shard", "offload", "loras", "trainable"],
)
def test_what_cannot_be_quantised_is_refused(folder, tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        tiny_runs.config(tmp_path, folder, *overrides)
