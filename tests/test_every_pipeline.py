"""Every video pipeline of diffusers: its rollout against its own call (bits) and plain autograd, and a step of a run.

The reference counts no steps of schedulers: gradient begins where the pipeline's own progress bar says.
"""

import dataclasses
import functools
import inspect
import json
import sys
from pathlib import Path

import diffusers
import every_pipeline
import numpy
import pytest
import torch
import torch.nn.attention.flex_attention
from every_pipeline import ENTRIES
from every_pipeline.entry import TOLERANCE, Entry
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from chopgrad_align.data.video import write_video
from chopgrad_align.sampling.rollout import rollout
from chopgrad_align.sampling.steps import LastSteps
from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.run import train

pytestmark = [
    pytest.mark.slow,
    # Of diffusers' code, about itself.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


def classes(reason):
    """Names of the entries, as cases of a test, of which those with a reason are expected to fail."""
    return [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=why)] if why else [])
        for name, entry in ENTRIES.items()
        for why in [reason(entry)]
    ]


@pytest.fixture(autouse=True)
def flex_attention_on_a_cpu(monkeypatch):
    """torch refuses its backward pass there, though the dense kernel that it falls back to has one."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)


def test_every_class_is_listed():
    listed = {name.partition("/")[0] for name in ENTRIES} | every_pipeline.NOT_SAMPLERS.keys()
    assert every_pipeline.video_classes().keys() == listed
    table = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text(encoding="utf-8")
    assert not [name for name in listed if f"`{name}`" not in table]


def denoisers(pipe) -> list[torch.nn.Module]:
    found = (pipe.components.get(name) for name in ("transformer", "transformer_2", "unet"))
    return [module for module in found if module is not None]


def call_of(entry: Entry):
    torch.manual_seed(4)  # some pipelines draw from the global generator
    return {**entry.call, **entry.row, "generator": torch.Generator().manual_seed(3)}


def frames_of(pipe, output) -> Tensor:
    """Frames of a pipeline's own output, `(B, F, C, H, W)` also where it has other axes, and not in [-1, 1]."""
    frames = output.frames if hasattr(output, "frames") else output.video
    if isinstance(pipe, diffusers.LTXI2VLongMultiPromptPipeline):
        frames = pipe.video_processor.postprocess_video(frames, "pt")
    if isinstance(pipe, diffusers.LTX2HDRPipeline):
        frames = frames.movedim(-1, 2)
    return frames if frames.ndim == 5 else frames[None]


class Loops:
    """The loops of a call, each with its last iterations chosen, in place of its progress bars."""

    def __init__(self, last: int):
        self.last, self.left, self.bar_is_open = last, 0, False

    @property
    def chosen(self) -> bool:
        return self.left <= self.last

    def begin(self, iterations: int):
        self.left = iterations
        self.update(0)

    def update(self, count=1):
        self.left -= count
        if self.chosen:
            torch.set_grad_enabled(True)

    def bar(self, iterable=None, total=None, **settings):
        self.begin(len(iterable) if total is None else total)
        return self if iterable is None else self.go_through(iterable)

    def go_through(self, iterable):
        for item in iterable:
            yield item
            self.update()

    def __enter__(self):
        self.bar_is_open = True
        return self

    def __exit__(self, *error):
        self.bar_is_open = False

    def close(self):
        pass


def straight_through(processor):
    """Frames that are made of what a safety checker returned, with the gradient of those that it was given."""
    given = []

    def postprocess_video(video, output_type="np", **kwargs):
        if output_type == "np":
            given.append(type(processor).postprocess_video(processor, video, "pt"))
            video = Tensor.detach(video)
        made = type(processor).postprocess_video(processor, video, output_type, **kwargs)
        return made + (given[0] - given[0].detach()) if output_type == "pt" and given else made

    return postprocess_video


def never_detached(decode):
    """A decoder of pixels that keep their graph, since Cosmos Transfer detaches them section by section."""

    def decode_and_keep(*args, **kwargs):
        made = decode(*args, **kwargs)
        pixels = made[0]
        pixels.detach = lambda: pixels
        return made

    return decode_and_keep


def reference(pipe, entry: Entry, last: int) -> Tensor:
    """The pipeline's own call in grad mode, with every activation kept, in the last iterations of each of its loops.

    A loop is what a progress bar shows, or a part of it that begins where timesteps are set. What is handed on from one
    to the next is a constant only where it goes through an encoder of pixels or a cache of keys and values.
    """
    loops, scheduler, cls = Loops(last), pipe.scheduler, type(pipe.scheduler)
    step, set_timesteps = cls.step, cls.set_timesteps

    def stepped(self, output, timestep, sample, **kwargs):
        # A copy, since SkyReels writes into latents of which the scheduler keeps views.
        return step(self, output, timestep, sample.clone(), **kwargs)

    def begun(self, *args, **kwargs):
        set_timesteps(self, *args, **kwargs)
        if self is scheduler and loops.bar_is_open:
            loops.begin(len(self.timesteps))

    def constant_unless_chosen(forward):
        @functools.wraps(forward)
        def predict(*args, **kwargs):
            with torch.set_grad_enabled(torch.is_grad_enabled() and loops.chosen):
                return forward(*args, **kwargs)

        return predict

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cls, "step", functools.wraps(step)(stepped))
        patch.setattr(cls, "set_timesteps", functools.wraps(set_timesteps)(begun))
        patch.setattr(pipe, "progress_bar", loops.bar)
        if hasattr(module := sys.modules[type(pipe).__module__], "tqdm"):
            patch.setattr(module, "tqdm", loops.bar)
        for denoiser in denoisers(pipe):
            patch.setattr(denoiser, "forward", constant_unless_chosen(denoiser.forward))
        for owner, name in ((pipe.vae, "encode"), (pipe, "encode_kv_cache")):
            if hasattr(owner, name):
                patch.setattr(owner, name, torch.no_grad()(getattr(owner, name)))
        patch.setattr(pipe.vae, "decode", never_detached(pipe.vae.decode))
        if hasattr(pipe, "video_processor"):
            patch.setattr(pipe.video_processor, "postprocess_video", straight_through(pipe.video_processor))
        if hasattr(pipe, "vae_decode_tiled"):  # without its own `no_grad`
            patch.setattr(pipe, "vae_decode_tiled", inspect.unwrap(type(pipe).vae_decode_tiled).__get__(pipe))
        if hasattr(pipe, "adaptive_mean_std_normalization"):  # of views of what Kandinsky 5 writes into afterwards
            normalize = pipe.adaptive_mean_std_normalization
            patch.setattr(
                pipe, "adaptive_mean_std_normalization", lambda *latents: normalize(*map(torch.clone, latents))
            )
        return frames_of(pipe, inspect.unwrap(type(pipe).__call__)(pipe, **call_of(entry), output_type="pt"))


def gradient(frames: Tensor, weights: list[Tensor]) -> Tensor:
    torch.manual_seed(2)
    score = (frames.double() * torch.randn(frames.shape, dtype=torch.float64)).mean()
    found = torch.autograd.grad(score, weights, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(w).flatten() if g is None else g.flatten() for g, w in zip(found, weights, strict=True)]
    )


@pytest.mark.parametrize("name", classes(lambda entry: entry.fault))
def test_rollout(name):
    entry = ENTRIES[name]
    pipe = entry.make()
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=entry.targets, init_lora_weights=False)  # both factors random
    for denoiser in denoisers(pipe):
        inject_adapter_in_model(config, denoiser)
    weights = [w for denoiser in denoisers(pipe) for w in denoiser.parameters() if w.requires_grad]

    expected = frames_of(pipe, pipe(**call_of(entry), output_type="pt"))
    assert expected.std() > 0.01
    seen = []
    for last in (entry.idle + 1, entry.idle + 2):
        frames = rollout(pipe, LastSteps(last), **call_of(entry))
        assert torch.equal(frames, expected)
        kept = reference(pipe, entry, last)
        assert torch.equal(kept, expected)
        seen.append(gradient(frames, weights))
        plain = gradient(kept, weights)
        assert plain.isfinite().all()
        assert plain.any()
        assert (seen[-1] - plain).norm() <= TOLERANCE * plain.norm()
    assert not torch.equal(*seen)


@pytest.mark.parametrize("name", classes(lambda entry: entry.fault or entry.untrained))
def test_run(name, tmp_path):
    entry = ENTRIES[name]
    entry.make().save_pretrained(tmp_path / "model")
    row = {key: as_cell(key, value, tmp_path) for key, value in entry.row.items()}
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    settings = {
        "run": {"folder": str(tmp_path / "run")},
        "model": {"name": str(tmp_path / "model"), "call": {**entry.call}},
        "data": {"train": str(tmp_path / "row.jsonl"), "held_out": str(tmp_path / "row.jsonl")},
        "rewards": {"colour": {"name": "colorfulness"}},
        "lora": {"rank": 2, "targets": entry.targets if isinstance(entry.targets, str) else [*entry.targets]},
        "gradient": {"last_steps": entry.idle + 1},
        "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
        "validation": {"pairs": 2, "videos": 1},
        "witnesses": dict.fromkeys(("motion", "flow", "flicker", "saturation", "contrast", "sharpness", "distance")),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    train(load_config(tmp_path / "config.yaml"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    assert len(norms) == 1
    assert norms[0] > 0
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def as_cell(name: str, value, folder):
    """An argument as a row of a data file has it: pictures, videos and arrays as paths, relative to the file."""
    path = folder / name
    if isinstance(value, Image.Image):
        value.save(path.with_suffix(".png"))
        return f"{name}.png"
    if isinstance(value, list) and isinstance(value[0], Image.Image) and not name.endswith("images"):
        video = torch.stack([pil_to_tensor(frame) / 255 for frame in value])
        write_video(path.with_suffix(".mp4"), video, 8)
        return f"{name}.mp4"
    if isinstance(value, list):
        return [as_cell(f"{name}_{i}", part, folder) for i, part in enumerate(value)]
    if isinstance(value, Tensor | numpy.ndarray):
        numpy.save(path.with_suffix(".npy"), numpy.asarray(value))
        return f"{name}.npy"
    if dataclasses.is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {key: as_cell(f"{name}_{key}", part, folder) for key, part in given.items() if part is not None}
    return value
