"""What a run is: one YAML file into typed dataclasses. Only the trainer unpacks them; no algorithm sees a config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ..common.arguments import nearest
from ..common.errors import UsageError
from ..common.loading import construct, unknown_name
from ..decoding.backprop import Backprop, Exact, Full, Truncated, expect_policy
from ..evaluation.witnesses import BUILT_IN, Bounds
from ..sampling import predictions as prediction
from ..sampling.predictions.latents import Encoder
from ..sampling.steps import LastSteps, StepPolicy, expect_step_policy

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# Of losses before the decoder: what they compare, and the modes that know what it should be.
_LATENT_LOSSES = {"latent": ("latents", ("one_step", "denoise")), "diffusion": ("outputs", ("denoise",))}

_strict = pydantic_dataclass(config=ConfigDict(extra="forbid", strict=False), kw_only=True)


@_strict
class Run:
    folder: str
    """Where everything goes; must not hold a run already."""
    seed: NonNegative = 0
    threads: Positive | None = None
    """Of each process on the CPU; default: its share of the cores. `accelerate launch` alone would leave it one."""


@_strict
class FusedLora:
    name: str
    """Folder, file or hub id."""
    file: str | None = None
    """Of a folder, or of a hub repository, that holds several."""
    scale: Finite = 1.0
    second: bool = False
    """Whether it is for `transformer_2`, of Wan 2.2's pair of transformers."""


@_strict
class Model:
    name: str
    """Folder or hub id of a diffusers pipeline."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; the LoRA is always float32."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    variant: str | None = None
    """Of the weight files, such as fp16."""
    loras: dict[str, FusedLora] = field(default_factory=dict)
    """Fused into the weights as these are loaded, in order: of few-step distillation, or of an earlier run."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Replace the scheduler: its class as `name`, and settings to change; without `name`, settings alone."""
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call: height, width, num_frames, num_inference_steps, guidance_scale, …"""
    gradient_checkpointing: bool = False
    """Recompute every block of the denoiser too, not only each call of it."""
    encode_prompts_once: bool = True
    """Before training; the text encoders then leave the device. False: in every call of the pipeline."""
    fps: PositiveFloat = 8.0
    """Of the sample videos."""


@_strict
class Lora:
    rank: Positive = 16
    alpha: PositiveFloat | None = None
    """Scale is alpha / rank; default the rank."""
    targets: list[str] | str = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Names of the denoiser's linear layers, or one regular expression."""
    dropout: Fraction = 0.0
    """Of the LoRA's input. Above 0, results depend on the number of processes and on `train.micro_batch`."""


@_strict
class Clips:
    """Says that the data are clips; without it they are prompts."""

    columns: dict[str, str] = field(default_factory=dict)
    """Which column of the metadata holds what: target, caption, and any of degraded, mask, control, image. Default:
    file_name is the target, and caption the caption."""
    buckets: list[tuple[Positive, Positive, Positive]] = field(default_factory=list)
    """Frames, height and width that clips are cut to, the nearest for each file; default that of model.call."""
    stride: Positive = 1
    """Every how many frames one is taken."""
    fps: PositiveFloat | None = None
    """To which every file is resampled before the stride; default its own."""
    starts: Positive | None = None
    """Clips a file, evenly spaced; default: any frame can be the first."""
    crop: Literal["center", "random", "native"] = "center"
    degradation: Any = None
    """Makes `degraded` from the target: a name and its settings, or a list of them."""
    mask: Any = None
    """Draws `mask`; what it covers is grey in `degraded`."""
    caption: str | None = None
    """Instead of each clip's own."""
    on_bad_file: Literal["skip", "error"] = "skip"
    split: str = "train"
    """Of a Hugging Face data set."""
    held_out_split: str = "test"


@_strict
class Data:
    train: str
    """Prompt file (.txt, .csv, .jsonl) to sample from; see `read_conditions` for images and weights. With `clips`: a
    folder of videos, or a Hugging Face data set."""
    held_out: str
    """The same, to measure with."""
    clips: Clips | None = None
    cache: str | None = None
    """Folder that keeps, for this run and later ones, embeddings of prompts and latents of those clips that come again:
    with `clips.starts` and `clips.crop=center`, what is not made on the fly. Default: prompts in host memory."""


@_strict
class Reward:
    name: str
    """A published name, package.module:Class, or path/to/file.py:Class."""
    weight: Finite = 1.0
    """Negative: the score should fall."""
    cap: Finite | None = None
    """A score beyond it (below it, if the weight is negative) counts as it."""
    target: Finite | None = None
    """The score should come close to it: it counts as minus the distance."""
    normalize: bool = False
    """Divide by the running standard deviation of the scores."""
    args: dict[str, Any] = field(default_factory=dict)
    """Of its class. Those that score single frames take `frames`: a number of evenly spaced ones, all, first, last,
    first+last, {random: 4} or {stride: 4}."""

    @model_validator(mode="after")
    def _cap_or_target(self) -> Reward:
        if self.cap is not None and self.target is not None:
            raise ValueError("give a cap or a target, not both")
        return self


@_strict
class Witness:
    name: str
    """A published reward, or a reward or `evaluation.witnesses.Witness` of your own: package.module:Class, or
    path/to/file.py:Class."""
    args: dict[str, Any] = field(default_factory=dict)
    """Of its class."""


@_strict
class Guard:
    bounds: dict[str, PositiveFloat | tuple[NonNegativeFloat, PositiveFloat] | None] = field(default_factory=dict)
    """Of a witness's mean relative to the base model's: 0.8 is at least 0.8 of it, 1.4 at most 1.4 times it, [0.7, 1.4]
    both, null none. Witnesses that are not named keep their own bounds."""
    patience: Positive | None = None
    """Held-out measurements in a row without a better objective; default: any number."""
    on_breach: Literal["warn", "stop", "back"] = "warn"
    """Say it; or end the training too; or, back, export the best model within the bounds then, whatever
    `checkpoint.export` is."""
    name: str | None = None
    """Instead of all this, a `training.guard.Guard` of your own: package.module:Class, or path/to/file.py:Class."""
    args: dict[str, Any] = field(default_factory=dict)
    """Of its class."""

    @model_validator(mode="after")
    def _one_guard(self) -> Guard:
        if self.name is not None and (self.bounds or self.patience or self.on_breach != "warn"):
            raise ValueError("bounds, patience and on_breach are of the built-in guard: leave them out, or the name")
        if self.name is None and self.args:
            raise ValueError("args are of a guard of your own: give its name too")
        return self


@_strict
class Loss:
    name: str
    """A published name, latent, diffusion, package.module:Class, or path/to/file.py:Class."""
    weight: PositiveFloat = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    """Of its class."""


@_strict
class Prediction:
    mode: Literal["sample", "one_step", "denoise"] = "sample"
    """The pipeline's whole sampler; one call of the denoiser on the degraded clip; or one on the noised target."""
    columns: dict[str, str] = field(default_factory=dict)
    """Which argument of the pipeline's call is which role of the clips, such as {video: degraded, mask: mask}."""
    source: str = "degraded"
    """Of one_step: the role that it starts from."""
    time: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Of one_step: the time of the schedule that the degraded clip is taken for, 1 being pure noise."""
    times: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.02, 0.98)
    """Of denoise: lowest and highest time."""
    overlap: Positive = 5
    """Frames that windows share, when a clip is longer than `model.call.num_frames` in the evaluation."""

    @property
    def roles(self) -> dict[str, str]:
        """The roles of the clips that it reads, by the keys that name them."""
        read = {f"columns.{argument}": role for argument, role in self.columns.items()}
        return read | {"source": self.source} if self.mode == "one_step" else read

    def policy(self, encoder: Encoder = Encoder()) -> prediction.Prediction:  # noqa: B008 (frozen)
        match self.mode:
            case "one_step":
                return prediction.OneStep(self.time, self.source, self.columns, encoder)
            case "denoise":
                return prediction.Denoise(self.times, self.columns, encoder)
        return prediction.Sample(self.columns)


@_strict
class Named:
    """A class by its name, and its arguments."""

    name: str
    """A published name, package.module:Class, or path/to/file.py:Class."""
    args: dict[str, Any] = field(default_factory=dict)


_STEP_POLICIES = {
    name: f"chopgrad_align.sampling.steps:{cls}"
    for name, cls in {
        "last": "LastSteps",
        "low_variance": "LowVariance",
        "random": "RandomSteps",
        "random_last": "RandomLast",
        "steps": "Steps",
    }.items()
}


@_strict
class Gradient:
    last_steps: Positive | None = None
    """The last K denoising steps carry gradient; short for steps={name: last, args: {count: K}}. Default: 1."""
    steps: Named | None = None
    """The denoising steps that carry gradient: last, random_last, random, steps, low_variance, or a class of your own,
    with its args (count or indices; detach_input, unconditional); see chopgrad_align/sampling/steps.py."""
    decoder: str = "exact"
    """exact, truncated or full; or a class of your own, package.module:Class or path/to/file.py:Class, with args."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a decoder policy of your own."""
    distance: NonNegative = 0
    """Truncation distance D, in frame groups."""
    cache: Literal["device", "host", "recompute"] = "device"
    checkpoint: bool = True
    """Recompute blocks inside a frame group."""
    rows: Positive | None = None
    """With checkpoint: rows of a block's output that have a graph at a time; fewer take less memory."""
    saturated: Literal["zero", "pass"] = "zero"
    """Gradient of pixels clamped to [-1, 1]."""

    @model_validator(mode="after")
    def _names(self) -> Gradient:
        if self.steps is not None and self.last_steps is not None:
            raise ValueError("give steps or its short form last_steps, not both")
        if self.args and ":" not in self.decoder:
            raise ValueError(f"args are those of a class of your own; decoder={self.decoder} has keys beside it")
        self.step_policy(), self.policy()
        return self

    def step_policy(self) -> StepPolicy:
        """The denoising steps that carry gradient."""
        if self.steps is None:
            return LastSteps(self.last_steps or 1)
        name = self.steps.name
        if ":" not in name and name not in _STEP_POLICIES:
            raise unknown_name("sampling policy", name, _STEP_POLICIES)
        policy = construct("sampling policy", name, _STEP_POLICIES.get(name, name), self.steps.args)
        expect_step_policy(policy)
        return cast(StepPolicy, policy)

    def policy(self) -> Backprop:
        """The way through the decoder."""
        options: dict[str, Any] = {key: getattr(self, key) for key in ("cache", "checkpoint", "rows", "saturated")}
        match self.decoder:
            case "exact":
                return Exact(**options)
            case "truncated":
                return Truncated(self.distance, **options)
            case "full":
                return Full(saturated=self.saturated)
        if ":" not in self.decoder:
            raise unknown_name("decoder policy", self.decoder, ("exact", "truncated", "full"))
        policy = construct("decoder policy", self.decoder, self.decoder, self.args)
        expect_policy("gradient.decoder", policy)
        return cast(Backprop, policy)


@_strict
class Train:
    steps: Positive
    batch_size: Positive = 4
    """Videos for one optimizer step, over all processes."""
    micro_batch: Positive = 1
    """Videos sampled at a time by one process, if it has so many; the rest is accumulated."""
    learning_rate: PositiveFloat = 1e-4
    warmup_steps: NonNegative = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0


@_strict
class Validation:
    every: NonNegative = 0
    """Steps between held-out measurements; 0: before and after only."""
    pairs: Annotated[int, Field(ge=2)] = 64
    """Pairs of held-out prompt and seed."""
    seeds: Positive = 1
    """Pairs of a condition that come one after the other: with 2, half as many conditions, and `diversity` between
    seeds."""
    videos: NonNegative = 8
    """Of them, how many are written as mp4."""
    batch: Positive = 1


@_strict
class Checkpoint:
    every: NonNegative = 0
    """Steps between checkpoints; 0: at the end only."""
    keep: Positive = 2
    export: Literal["best", "last"] = "best"
    """What lora/ holds: the best step by the held-out objective, of those measured to be within the guard's bounds, or
    the last. The best weights so far are kept as `checkpoints/best-NNNNNN`."""


@_strict
class Config:
    run: Run
    model: Model
    data: Data
    train: Train
    rewards: dict[str, Reward] = field(default_factory=dict)
    """Terms of the objective that should rise: a name of your own for each."""
    losses: dict[str, Loss] = field(default_factory=dict)
    """Those that should fall."""
    prediction: Prediction = field(default_factory=Prediction)
    lora: Lora = field(default_factory=Lora)
    gradient: Gradient = field(default_factory=Gradient)
    validation: Validation = field(default_factory=Validation)
    witnesses: dict[str, Witness | None] = field(default_factory=dict)
    """Measured with every held-out measurement and not trained on, beside motion, flow, flicker, saturation, contrast,
    sharpness, diversity and distance; null leaves one of these out."""
    guard: Guard = field(default_factory=Guard)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)

    @model_validator(mode="after")
    def _objective(self) -> Config:
        if not (self.rewards or self.losses):
            raise ValueError("expected at least one term under rewards or losses")
        if twice := self.rewards.keys() & self.losses.keys():
            raise ValueError(f"a reward and a loss are both called {min(twice)!r}")
        for name, reward in self.rewards.items():
            if reward.weight == 0:
                raise ValueError(
                    f"rewards.{name}.weight=0 has no effect; to watch its score, leave it out and add "
                    f"witnesses.{name}.name={reward.name}"
                )
        if self.data.clips is None and (self.losses or self.prediction.mode != "sample" or self.prediction.columns):
            raise ValueError(
                "losses, prediction.columns and the modes one_step and denoise need clips: give data.clips"
            )
        for name, loss in self.losses.items():
            of, modes = _LATENT_LOSSES.get(loss.name, ("", (self.prediction.mode,)))
            if self.prediction.mode not in modes:
                raise ValueError(
                    f"losses.{name}.name={loss.name}: a loss of {of} needs prediction.mode={' or '.join(modes)}"
                )
        return self

    @model_validator(mode="after")
    def _watched(self) -> Config:
        for name, witness in self.witnesses.items():
            if witness is None and name not in BUILT_IN:
                raise ValueError(f"witnesses.{name}=null leaves out nothing{nearest(name, BUILT_IN)}")
        known = self.watched
        for name, bound in self.guard.bounds.items():
            if name not in known:
                hint = nearest(name, known) or f"; there are {', '.join(known)}"
                raise ValueError(f"guard.bounds.{name}: there is no such witness{hint}")
            try:
                _ = None if bound is None else Bounds.of(bound)
            except UsageError as error:
                raise ValueError(f"guard.bounds.{name}: {error}") from error
        return self

    @property
    def watched(self) -> list[str]:
        """The names of all witnesses."""
        names = dict.fromkeys([*BUILT_IN, *self.witnesses])
        return [name for name in names if self.witnesses.get(name, ...) is not None]


def _package_path(path: str) -> str:
    return str(files("chopgrad_align") / path)


def _configs_path(path: str) -> str:
    return str(files("chopgrad_configs") / path)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (default: the embedded one) and apply overrides.

    `key.sub=value` sets a key, `~key.sub` leaves it out.

    `${package:PATH}` and `${configs:PATH}` in a value are files of the installed package and of its configs; paths are
    otherwise relative to the current folder.

    Raises:
        UsageError: No such file, not YAML, an unknown key, a wrong type or an impossible value: one line with the key,
            what was expected and the nearest known key.
    """
    OmegaConf.register_resolver("package", _package_path, replace=True)
    OmegaConf.register_resolver("configs", _configs_path, replace=True)
    if path is None:
        path = str(files("chopgrad_configs") / "embedded.yaml")
    if not Path(path).is_file():
        known = ", ".join(sorted(p.name for p in Path(str(files("chopgrad_configs"))).glob("*.yaml")))
        raise UsageError(f"no config file {path}; in configs/ there are {known}")
    with _readable(f"config {path}"):
        tree: Any = OmegaConf.load(path)
        if not isinstance(tree, DictConfig):
            raise UsageError(f"the config {path} must be a mapping of sections, such as run, model and train")
    for override in overrides:
        if override.startswith("~"):
            _delete(tree, override[1:])
            continue
        if "=" not in override or override.startswith(("-", "=")):
            raise UsageError(f"cannot read the override {override!r}; write key.sub=value")
        with _readable(f"override {override!r}"):
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
    with _readable(f"config {path}"):
        resolved = OmegaConf.to_container(tree, resolve=True)
    try:
        return TypeAdapter(Config).validate_python(resolved)
    except ValidationError as error:
        # A string in place of a list of strings is allowed: the list's error says so for both.
        wrong = [_sentence(e) for e in error.errors() if e["loc"][-1:] != ("str",)]
        raise UsageError(f"{path}: " + "; ".join(wrong)) from error


def _delete(tree: DictConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(tree, section) if section else tree
    if not isinstance(parent, DictConfig) or name not in parent:
        raise UsageError(f"the override '~{key}' leaves out a key that the config does not have")
    del parent[name]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"cannot read the {what}: {' '.join(str(error).split())}") from error


def _sentence(error: Any) -> str:
    location = [str(part) for part in error["loc"] if part != "list[str]"]
    key = ".".join(location)
    match error["type"]:
        case "unexpected_keyword_argument":
            where = ".".join(location[:-1]) or "the top level"
            known = _known_keys(location[:-1])
            hint = nearest(location[-1], known) or f"; at {where} there are {', '.join(known)}"
            return f"unknown key {key!r}{hint}"
        case "missing" | "missing_argument":
            return f"{key!r} is missing"
        case "dataclass_type":
            expected = f"a section with the keys {', '.join(_known_keys(location))}"
        case "list_type" if error["loc"][-1] == "list[str]":
            expected = "a list of strings, or one string"
        case "value_error":
            return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
        case _:
            expected = error["msg"].removeprefix("Input should be ")
    return f"{key}: expected {expected}, got {error['input']!r}"


def _known_keys(location: Sequence[str]) -> list[str]:
    kind: Any = Config
    for part in location:
        kind = get_type_hints(kind)[part] if is_dataclass(kind) else get_args(kind)[1]  # a value of dict[str, kind]
        kind = next(filter(is_dataclass, get_args(kind)), kind) if type(None) in get_args(kind) else kind
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def header(config: Config) -> str:
    """The first line of a run's own config: the command that runs it again elsewhere."""
    return f"# accelerate launch scripts/align.py --config {Path(config.run.folder) / 'config.yaml'} run.folder=NEW\n"


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load_config` reads back to the same."""
    return OmegaConf.to_yaml(TypeAdapter(Config).dump_python(config, mode="json"))
