"""Parts of a run that are written outside of the package, and what else than a LoRA is trained."""

import json
import shutil

import pytest
import tiny_pipelines
import tiny_runs
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_runs import lora, rows

from chopgrad_align import UsageError, load_config, load_modules
from chopgrad_align.training.build import make_trainable
from chopgrad_align.training.models import load_pipeline
from chopgrad_align.training.modules import Modules
from chopgrad_align.training.run import train

OWN = """
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from chopgrad_align import Term


class Bias:
    \"\"\"The bias of the denoiser's last layer.\"\"\"

    def __init__(self, pipe, scale=1.0):
        self.bias = pipe.transformer.proj_out.bias
        self.parameters = [self.bias.requires_grad_()]
        self.before = self.bias.detach().clone()

    def train(self):
        pass

    def eval(self):
        pass

    @contextmanager
    def base(self):
        trained, self.bias.data = self.bias.data, self.before
        yield
        self.bias.data = trained

    def state_dict(self):
        return {"bias": self.bias.detach().clone()}

    def load_state_dict(self, state):
        self.bias.data.copy_(state["bias"])

    def export(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "bias.pt")


@dataclass(frozen=True)
class Brightness(Term):
    \"\"\"Distance of the mean brightness to a level, which no reward could be told by its latents.\"\"\"

    level: float
    weight: float = 1.0
    kind = "loss"

    def score(self, video, prompts, seeds, reference):
        return (video.mean((1, 2, 3, 4)) - self.level).abs()
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def test_trainable_and_term(model, own, tmp_path):
    terms = {"bright": {"name": f"{own}:Brightness", "weight": 0.5, "args": {"level": 0.9}}}
    config = tiny_runs.config(
        tmp_path, model, f"trainable.name={own}:Bias", "~lora", "~rewards", f"terms={json.dumps(terms)}"
    )
    train(config)
    run = tmp_path / "run"
    (first, second), exported = rows(run), torch.load(run / "lora" / "bias.pt")["bias"]
    assert first["bright/value"] == pytest.approx(-0.5 * first["bright/score"])
    assert second["bright/score"] < first["bright/score"]
    assert {tuple(lora(run, step)["bias"].shape) for step in (0, 2)} == {exported.shape}
    assert (exported - lora(run, 0)["bias"]).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainable.name={own}:Brightness", "trainable.args.level=1"],
            "Brightness': .*pipe.* Its arguments: level, weight",
        ),
        (["trainable.name=module"], "no trainable is called 'module'.*modules"),
        (["trainable.name=builtins:dict", "trainable.args={{}}"], "made a dict, which is no Trainable"),
        (
            ["trainable={{name: modules, args: {{modules: [transformer.block]}}}}"],
            "'transformer.block' matches no module",
        ),
        (["trainable={{name: modules, args: {{modules: ['*']}}}}"], "is not a regular expression"),
        (
            ["trainable={{name: modules, args: {{modules: [transformer]}}}}", "model.dtype=bfloat16"],
            "the first weight of",
        ),
    ],
    ids=["arguments", "name", "protocol", "match", "expression", "type"],
)
def test_wrong_trainables(model, own, tmp_path, overrides, message):
    config = tiny_runs.config(tmp_path, model, "~lora", *(override.format(own=own) for override in overrides))
    with pytest.raises(UsageError, match=message):
        make_trainable(config, load_pipeline(config.model))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["terms.x={name: 'builtins:dict'}"],
            "terms.x.name: builtins:dict made a dict, expected a chopgrad_align.Term",
        ),
        (["terms.colour={name: 'builtins:dict'}"], "two terms of the objective are both called 'colour'"),
        (["rewards.reference={name: colorfulness}", "reference.weight=1"], "both called 'reference'"),
        (["trainable.name=modules"], "lora has no effect with trainable.name=modules"),
        (["train.optimizer={name: torch.optim.SGD, args: {lr: 1}}"], "give train.learning_rate"),
    ],
    ids=["term", "twice", "reference", "lora", "rate"],
)
def test_wrong_settings(model, tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        train(tiny_runs.config(tmp_path, model, *overrides))


MODULES = (
    *(
        "~lora",
        "trainable={name: modules, args: {modules: ['transformer.blocks.1.(ffn|attn1)', vae.decoder.conv_out]}}",
    ),
    *("model.dtype=bfloat16", "reference.weight=0.1", "ema.decay=0.5", "train.steps=4", "checkpoint.every=2"),
    *("train.schedule.name=cosine", "train.optimizer.name=torch.optim.NAdam", "checkpoint.export=last"),
)


@pytest.fixture(scope="module")
def modules_run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    train(tiny_runs.config(folder, model, *MODULES))
    return folder / "run"


def test_modules_are_trained_averaged_and_exported(modules_run, model):
    run = modules_run
    last = lora(run, 4)
    assert {key.rsplit(".", 1)[0].partition(".blocks.1.")[0] for key in last} == {"transformer", "vae.decoder.conv_out"}
    assert {value.dtype for value in last.values()} == {torch.float32}
    assert rows(run)[0]["reference/score"] == 0 < rows(run)[-1]["reference/score"]
    rates = [row["learning_rate"] for row in rows(run)]
    assert rates == pytest.approx([0.01 * (1 + torch.tensor(k * torch.pi / 4).cos().item()) / 2 for k in range(4)])
    exported = load_file(run / "lora" / "modules.safetensors")
    assert any(not torch.equal(exported[name], last[name]) for name in last)  # the average, not the last
    plain = DiffusionPipeline.from_pretrained(model, dtype={"default": torch.bfloat16, "vae": torch.float32})
    load_modules(plain, run / "lora")
    name = "transformer.blocks.1.ffn.net.2.weight"
    assert torch.equal(plain.transformer.blocks[1].ffn.net[2].weight, exported[name].bfloat16())
    assert torch.equal(plain.vae.decoder.conv_out.bias, exported["vae.decoder.conv_out.bias"])
    # `load_modules` is what diffusers' own classes do.
    own = {k.removeprefix("transformer."): v for k, v in exported.items() if k.startswith("transformer.")}
    other = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16).transformer
    assert not other.load_state_dict(own, strict=False).unexpected_keys
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), plain.transformer.parameters(), strict=True))


def test_modules_are_resumed_exactly(modules_run, tmp_path):
    run = modules_run
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000004")
    (copy / "heldout.json").unlink()
    train(load_config(run / "config.yaml", [f"run.folder={copy}"]), resume=True)
    for path in ("lora/modules.safetensors", "checkpoints/step-000004/lora.safetensors"):
        ours, theirs = load_file(copy / path), load_file(run / path)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UsageError, match=r"--resume: train.steps differs from the run in .*: it has 4, not 6"):
        train(load_config(run / "config.yaml", [f"run.folder={copy}", "train.steps=6"]), resume=True)


def test_master_weights():
    """The gradient of a rounded weight is its master's, and the base is what the model was."""
    pipe = tiny_pipelines.wan_t2v().to(torch.bfloat16)
    layer = pipe.transformer.blocks[0].ffn.net[2]
    before, x = layer.weight.detach().clone(), torch.randn(2, layer.in_features, dtype=torch.bfloat16)
    trained = Modules(pipe, [r"transformer\.blocks\.0\.ffn\.net\.2"])
    master = trained.parameters[0]
    master.data += 1e-4 * torch.randn_like(master)  # too little for bfloat16
    layer(x).float().square().sum().backward()
    rounded = master.detach().bfloat16().requires_grad_()
    torch.nn.functional.linear(x, rounded, layer.bias.detach()).float().square().sum().backward()
    assert master.dtype == torch.float32
    assert torch.equal(master.grad, rounded.grad.float())
    with trained.base():
        assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, rounded)
