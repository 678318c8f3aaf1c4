"""The schema of a run's config, as typed dataclasses. Only the trainer unpacks them; no algorithm sees a config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, fields
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ..common.arguments import nearest
from ..common.errors import UsageError
from ..common.loading import construct, construct_known, unknown_name
from ..decoding.backprop import Backprop, Exact, Full, Truncated, expect_policy
from ..evaluation.witnesses import BUILT_IN, Bounds
from ..objective.reward import Reduction, reduction
from ..sampling import predictions as prediction
from ..sampling.checkpointing import Checkpointing
from ..sampling.initial_noise import Noise
from ..sampling.predictions.latents import Encoder
from ..sampling.steps import LastSteps, StepPolicy, expect_step_policy
from .captions import Captions
from .config_values import (
    Batch,
    Bound,
    Caption,
    Dtype,
    EachOnce,
    Finite,
    Fraction,
    FramesPerSecond,
    Name,
    NonNegative,
    NonNegativeFloat,
    Pairs,
    Pixels,
    Positive,
    PositiveFloat,
    Quantized,
    Seed,
    Targets,
    TermName,
    Threads,
    Time,
)


def _expect_effect(section: Any, keys: Iterable[str], choice: str) -> None:
    """Raise a ValueError for a key that is set, to another value than its default, and that a choice does not read."""
    for key in sorted(keys):
        default = next(f for f in fields(section) if f.name == key)
        unset = default.default_factory() if callable(default.default_factory) else default.default
        if getattr(section, key) != unset:
            raise ValueError(f"{key} has no effect with {choice}={getattr(section, choice)}: leave it out")


# Of losses before the decoder: what they compare, and the modes that know what it should be.
_LATENT_LOSSES = {"latent": ("latents", ("one_step", "denoise")), "diffusion": ("outputs", ("denoise",))}

_strict = pydantic_dataclass(config=ConfigDict(extra="forbid", strict=False), kw_only=True)


@_strict
class Run:
    folder: Name
    """The folder of all that the run writes; must not hold a run already."""
    seed: Seed = 0
    threads: Threads | None = None
    """Threads of each process on the CPU; default: OMP_NUM_THREADS, or its share of the cores. A 1 there counts as not
    set under a launcher, since `accelerate launch` and torchrun set it to 1 themselves: write threads=1 if it is
    meant."""


@_strict
class Named:
    """A class by its name, and its arguments."""

    name: Name
    """A published name, package.module:Class, or path/to/file.py:Class."""
    args: dict[str, Any] = field(default_factory=dict)


_NOISES = {"offset": "chopgrad_align.sampling.initial_noise:OffsetNoise"}


@_strict
class FusedLora:
    name: Name
    """Folder, file or hub id."""
    file: Name | None = None
    """Name of the file in a folder or hub repository that holds several."""
    scale: Finite = 1.0
    second: bool = False
    """True for the LoRA of `transformer_2`, of Wan 2.2's pair of transformers."""
    partial: bool = False
    """True to leave out what of it does not fit the model; otherwise that is an error."""


@_strict
class Model:
    name: Name
    """Folder or hub id of a diffusers pipeline."""
    dtype: Dtype = "float32"
    """Precision of the frozen weights; the LoRA is always float32."""
    vae_dtype: Dtype = "float32"
    quantize: Quantized | dict[Name, Quantized] = field(default_factory=dict)
    """Store frozen weights in fewer bits, as they are loaded: nf4 (bitsandbytes), int8 or fp8 (torchao), of the
    denoisers; or of each component by its name, such as {transformer: nf4, text_encoder: int8}. See docs/scale.md."""
    variant: Name | None = None
    """Variant of the weight files, such as fp16."""
    revision: Name | None = None
    """Branch, tag or commit of the hub repository, if not its main branch."""
    pipeline: Name | None = None
    """Class of diffusers to load it as, such as AnimateDiffPipeline; default: that which it names itself."""
    components: dict[Name, Name] = field(default_factory=dict)
    """Models of diffusers in the place of its own, or beside them: folder or hub id by name, such as motion_adapter."""
    loras: dict[TermName, FusedLora] = field(default_factory=dict)
    """Fused into the weights as these are loaded, in order: of few-step distillation, or of an earlier run."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Replace the scheduler: its class as `name`, and settings to change; without `name`, settings alone. What the
    model was trained as, and the shift of its times, are carried over to another class."""
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call: height, width, num_frames, num_inference_steps, guidance_scale, …"""
    noise: Named | None = None
    """Noise that the sampler starts from: offset, with args.scale, or a class of your own that is a `Noise`, see
    chopgrad_align/sampling/initial_noise.py. Default: the pipeline's standard normal noise."""
    gradient_checkpointing: bool = False
    """Recompute every block of the denoiser too, not only each call of it: another default of
    gradient.denoiser.checkpoint, which has further choices."""
    offload: Literal["blocks"] | None = None
    """blocks: the frozen weights of the denoiser's blocks wait in host memory, and come to the device for their block's
    turn. Needs gradient.denoiser.checkpoint=block, or nested."""
    encode_prompts_once: bool = True
    """Before training; the text encoders then leave the device. False: in every call of the pipeline."""
    fps: FramesPerSecond = 8.0
    """Frame rate of the sample videos."""

    def initial_noise(self) -> Noise | None:
        """The noise that the sampler starts from; None for the pipeline's own."""
        if self.noise is None:
            return None
        name = self.noise.name
        made = construct_known("noise", name, _NOISES, self.noise.args)
        if not isinstance(made, Noise):
            raise UsageError(f"model.noise.name: {name} made a {type(made).__name__}, which cannot be called")
        return made


@_strict
class Lora:
    rank: Positive = 16
    alpha: PositiveFloat | None = None
    """Scale is alpha / rank; default the rank."""
    targets: Targets = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Names of the denoiser's linear layers, or one regular expression of whole names, which can choose blocks:
    blocks\\.(2[0-9])\\..*to_[qkv] are those of the blocks 20 to 29."""
    denoisers: Annotated[list[Literal["transformer", "transformer_2", "unet"]], EachOnce] | None = None
    """Denoisers that have one; default: all. Of Wan 2.2's pair the last steps, which are of low noise, are those of
    `transformer_2`: with `gradient.last_steps` a LoRA on the other has no gradient."""
    rslora: bool = False
    """Scale by alpha / √rank (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitude of each output beside the direction (DoRA, arXiv 2402.09353); the norm by which it divides is
    taken for a constant in the gradient, as there."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Initial values of the factor A; B is zero, so that the model starts as the base model, exactly. Those that change
    the base weights, as PiSSA and OLoRA, are left out: such a LoRA could not be loaded into the model that it was made
    for."""
    start_from: Name | None = None
    """Folder or file of a LoRA of the same rank and layers, to go on from, such as that of an earlier run."""
    partial: bool = False
    """True to take what fits of `start_from`, and start the other layers as new ones; otherwise that is an error."""
    dropout: Fraction = 0.0
    """Share of the LoRA's input that is set to zero. Above 0, results depend on the number of processes and on
    `train.micro_batch`."""


@_strict
class Clips:
    """Settings of clips; without them the data are prompts."""

    columns: dict[Name, Name] = field(default_factory=dict)
    """Which column of the metadata holds what: target, caption, and any of degraded, mask, control, image. Without a
    target there is none, and no loss. Default: target and caption by their usual names, such as file_name and text."""
    buckets: list[tuple[Positive, Pixels, Pixels]] = field(default_factory=list)
    """Frames, height and width that clips are cut to, the nearest for each file; default that of model.call."""
    stride: Positive = 1
    """Every how many frames one is taken."""
    fps: FramesPerSecond | None = None
    """To which every file is resampled before the stride; default its own."""
    starts: Positive | Literal["all"] | None = None
    """Clips a file, evenly spaced, of which one is drawn each time; all: as many as fit without overlapping, each of
    which is a clip of its own; default: any frame can be the first."""
    crop: Literal["center", "random", "native"] = "center"
    degradation: Any = None
    """Makes `degraded` from the target: a name and its settings, or a list of them."""
    mask: Any = None
    """Draws `mask`; what it covers is grey in `degraded`."""
    caption: Caption | None = None
    """Instead of each clip's own."""
    on_bad_file: Literal["skip", "error"] = "skip"
    split: Name = "train"
    """Split of a Hugging Face data set."""
    held_out_split: Name = "test"


@_strict
class Data:
    train: Name
    """Prompts to sample from: .txt, a table (.csv, .jsonl, .json, .parquet) whose columns are arguments of the
    pipeline's call, or a folder of first images. With `clips`: a folder of videos, a table of them, WebDataset shards
    (.tar), or a Hugging Face data set. See docs/data.md."""
    held_out: Name
    """The same, to measure with."""
    buckets: list[tuple[Positive, Pixels, Pixels]] = field(default_factory=list)
    """Frames, height and width of the videos that are made of prompts: the nearest for each image or video of a row,
    and all for a row without; default that of model.call."""
    ignore: list[Name] = field(default_factory=list)
    """Columns of prompt tables that are not read, though they are called as an argument of the call, or nearly."""
    clips: Clips | None = None
    cache: Name | None = None
    """Folder that keeps, for this run and later ones, embeddings of prompts and latents of those clips that come again:
    with `clips.starts` and `clips.crop=center`, what is not made on the fly. Default: prompts in host memory."""
    trigger: Caption = ""
    """Words before every prompt that the model is told, but not the rewards."""
    caption_dropout: Fraction = 0.0
    """Share of the videos of training that are made without their prompt; rewards are told it all the same."""

    def captions(self) -> Captions:
        return Captions(self.trigger.strip(), self.caption_dropout)


@_strict
class Reward:
    name: Name
    """A published name, package.module:Class, or path/to/file.py:Class."""
    weight: Finite = 1.0
    """Negative: the score should fall."""
    cap: Finite | None = None
    """A score beyond it (below it, if the weight is negative) counts as it."""
    target: Finite | None = None
    """The score should come close to it: it counts as minus the distance."""
    normalize: bool = False
    """Divide by the running standard deviation of the scores."""
    reduce: str | dict[str, float] | None = None
    """How the scores of frames, where it has some, become that of a video: mean (the default), min, worst (the mean of
    the worst quarter), {worst: 0.1}, or {softmin: 0.05}, a smooth minimum with its temperature in the reward's unit."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of its class. Those that score single frames take `frames`: a number of evenly spaced ones, all, first,
    last, first+last, {random: 4} or {stride: 4}."""

    @model_validator(mode="after")
    def _cap_or_target(self) -> Reward:
        if self.cap is not None and self.target is not None:
            raise ValueError("give a cap or a target, not both")
        self.reduction()
        return self

    def reduction(self) -> Reduction | None:
        """How scores of frames become one; None leaves it to the mean."""
        return None if self.reduce is None else reduction(self.reduce)


@_strict
class Witness:
    name: Name
    """A published reward, or a reward or `chopgrad_align.Witness` of your own: package.module:Class, or
    path/to/file.py:Class."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of its class."""


@_strict
class Guard:
    bounds: dict[TermName, Bound] = field(default_factory=dict)
    """Bounds on a witness's mean, relative to the base model's: 0.8 is at least 0.8 of it, 1.4 at most 1.4 times it,
    [0.7, 1.4] both, null none. Witnesses that are not named keep their own bounds."""
    patience: Positive | None = None
    """Held-out measurements in a row without a better objective; default: any number."""
    on_breach: Literal["warn", "stop", "back"] = "warn"
    """Say it; or end the training too; or, back, export the best model within the bounds then, whatever
    `checkpoint.export` is."""
    name: Name | None = None
    """Instead of all this, a `chopgrad_align.Guard` of your own: package.module:Class, or path/to/file.py:Class."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of its class."""

    @model_validator(mode="after")
    def _one_guard(self) -> Guard:
        if self.name is not None and (self.bounds or self.patience or self.on_breach != "warn"):
            raise ValueError("bounds, patience and on_breach are of the built-in guard: leave them out, or the name")
        if self.name is None and self.args:
            raise ValueError("args are of a guard of your own: give its name too")
        return self


@_strict
class Loss:
    name: Name
    """A published name, latent, diffusion, package.module:Class, or path/to/file.py:Class."""
    weight: PositiveFloat = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of its class."""


@_strict
class Term:
    name: Name
    """package.module:Class or path/to/file.py:Class, of a `chopgrad_align.Term`."""
    weight: Finite = 1.0
    """Given to the class, beside the args."""
    args: dict[str, Any] = field(default_factory=dict)


@_strict
class Reference:
    weight: NonNegativeFloat = 0.0
    """Weight of the mean squared distance of the denoiser's predictions to those of the untrained model, in the steps
    that carry gradient: a KL penalty, which takes one more forward for each. 0: none."""


@_strict
class Prediction:
    mode: Literal["sample", "one_step", "denoise"] = "sample"
    """The pipeline's whole sampler; one call of the denoiser on the degraded clip; or one on the noised target."""
    columns: dict[Name, Name] = field(default_factory=dict)
    """Which argument of the pipeline's call is which role of the clips, such as {video: degraded, mask: mask}."""
    source: Name = "degraded"
    """Role that one_step starts from."""
    time: Time = 0.4
    """Time of the schedule that one_step takes the degraded clip for, 1 being pure noise."""
    times: tuple[Time, Time] = (0.02, 0.98)
    """Lowest and highest time of denoise."""
    overlap: Positive = 5
    """Frames that windows share, when a clip is longer than `model.call.num_frames` in the evaluation."""

    @model_validator(mode="after")
    def _of_the_mode(self) -> Prediction:
        reads = {"sample": (), "one_step": ("source", "time"), "denoise": ("times",)}[self.mode]
        _expect_effect(self, {"source", "time", "times"} - {*reads}, "mode")
        if self.times[0] > self.times[1]:
            raise ValueError(f"times: expected the lowest before the highest, got {list(self.times)}")
        return self

    @property
    def roles(self) -> dict[str, str]:
        """The roles of the clips that it reads, by the keys that name them."""
        read = {f"columns.{argument}": role for argument, role in self.columns.items()}
        return read | {"source": self.source} if self.mode == "one_step" else read

    def policy(self, encoder: Encoder = Encoder(), noise: Noise | None = None) -> prediction.Prediction:  # noqa: B008 (frozen)
        match self.mode:
            case "one_step":
                return prediction.OneStep(self.time, self.source, self.columns, encoder)
            case "denoise":
                return prediction.Denoise(self.times, self.columns, encoder)
        return prediction.Sample(self.columns, noise)


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


_BLOCKS = ("cache", "cache_sets", "rows", "saturated")
# What each policy reads of the section; one of the user's own has its args.
_DECODER_KEYS = {"exact": _BLOCKS, "truncated": ("distance", *_BLOCKS), "full": ("saturated",)}


@_strict
class DenoiserGraph:
    checkpoint: Positive | Literal["call", "block", "nested", "none"] | None = None
    """Recomputation in the backward pass: call, each call of the denoiser; block, each block, faster than nested, but
    the block inputs of all calls are kept; nested, each call, and each block in it; none; or a number n, one of n
    blocks. Default: call, or nested with model.gradient_checkpointing. See sampling/checkpointing.py in the package."""
    inputs: Literal["device", "host"] = "device"
    """Place of the inputs of blocks, with block or a number; from host memory they are fetched a block ahead."""


@_strict
class Gradient:
    last_steps: Positive | None = None
    """The last K denoising steps carry gradient; short for steps={name: last, args: {count: K}}. Default: 1."""
    steps: Named | None = None
    """The denoising steps that carry gradient: last, random_last, random, steps, low_variance, or a class of your own,
    with its args (count or indices; detach_input, unconditional); see chopgrad_align/sampling/steps.py."""
    decoder: Name = "exact"
    """exact, truncated or full; or a class of your own, package.module:Class or path/to/file.py:Class, with args."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a decoder policy of your own."""
    distance: NonNegative = 0
    """Truncation distance D, in frame groups."""
    cache: Literal["device", "host", "recompute"] = "device"
    cache_sets: Positive | None = None
    """The most sets of caches between frame groups that are there at a time; the others are made again, by an optimal
    schedule. Default: all."""
    checkpoint: bool = True
    """Recompute blocks inside a frame group."""
    rows: Positive | None = None
    """With checkpoint: rows of a block's output that have a graph at a time; fewer take less memory."""
    saturated: Literal["zero", "pass"] = "zero"
    """Gradient of pixels clamped to [-1, 1]."""
    denoiser: DenoiserGraph = field(default_factory=DenoiserGraph)
    """The denoiser's activations: what is kept of them, and where."""

    @model_validator(mode="after")
    def _names(self) -> Gradient:
        if self.steps is not None and self.last_steps is not None:
            raise ValueError("give steps or its short form last_steps, not both")
        reads = _DECODER_KEYS.get(self.decoder, ("args",))
        _expect_effect(self, {"args", "distance", "cache", "cache_sets", "rows", "saturated"} - {*reads}, "decoder")
        self.step_policy(), self.policy()
        return self

    def step_policy(self) -> StepPolicy:
        """The denoising steps that carry gradient."""
        if self.steps is None:
            return LastSteps(self.last_steps or 1)
        policy = construct_known("sampling policy", self.steps.name, _STEP_POLICIES, self.steps.args)
        expect_step_policy(policy)
        return cast(StepPolicy, policy)

    def policy(self) -> Backprop:
        """The way through the decoder."""
        keys = ("cache", "cache_sets", "checkpoint", "rows", "saturated")
        options: dict[str, Any] = {key: getattr(self, key) for key in keys}
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
    batch_size: Batch = 4
    """Videos for one optimizer step, over all processes."""
    micro_batch: Batch = 1
    """Videos sampled at a time by one process, if it has so many; the rest is accumulated."""
    seeds: Literal["fresh", "fixed"] = "fresh"
    """Noise of each video: new each time, or for a prompt or clip always the same."""
    learning_rate: PositiveFloat = 1e-4
    warmup_steps: NonNegative = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """First and second beta of AdamW, an argument as weight_decay is; with an optimizer by name they belong into its
    args."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    optimizer: Named | None = None
    """Default: AdamW. Any of torch.optim by its dotted name, such as torch.optim.Muon, of an installed package, such as
    bitsandbytes.optim.AdamW8bit, prodigyopt.Prodigy or schedulefree.AdamWScheduleFree, or path/to/file.py:Class."""
    schedule: Named | None = None
    """Default: constant after `warmup_steps`, whose first step has lr / warmup_steps. Or one of transformers'
    get_scheduler (linear, cosine, polynomial, inverse_sqrt, …), which begin at 0 if there is a warmup; or a
    class of torch.optim.lr_scheduler by its dotted name."""

    @model_validator(mode="after")
    def _optimizer(self) -> Train:
        if self.optimizer is not None and "lr" in self.optimizer.args:
            raise ValueError("optimizer.args.lr: give train.learning_rate instead")
        if self.optimizer is not None and (self.betas, self.weight_decay) != ((0.9, 0.999), 0.0):
            raise ValueError(
                f"betas and weight_decay are those of the default AdamW; give them in train.optimizer.args of "
                f"{self.optimizer.name}"
            )
        return self

    @property
    def schedule_reads_steps(self) -> bool:
        """True if the learning rate of a step depends on how many there will be."""
        return (
            self.schedule is not None
            and self.schedule.name not in ("constant", "constant_with_warmup", "inverse_sqrt")
            and "." not in self.schedule.name
        )


@_strict
class Ema:
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Average the trained weights over the steps, a ← decay a + (1 - decay) θ; it is measured and exported."""


@_strict
class Validation:
    every: NonNegative = 0
    """Steps between held-out measurements; 0: before and after only."""
    pairs: Pairs = 64
    """Pairs of held-out prompt and seed."""
    seeds: Positive = 1
    """Pairs of a condition that come one after the other: with 2, half as many conditions, and `diversity` between
    seeds."""
    videos: NonNegative = 8
    """Number of them that are written as mp4, the first ones. The report shows those of them that gained most and
    least, and those about the median; more are better, where the disk has room for as many at each measurement."""
    batch: Batch = 1


@_strict
class Checkpoint:
    every: NonNegative = 0
    """Steps between checkpoints; 0: at the end only."""
    keep: Positive = 2
    export: Literal["best", "last"] = "best"
    """Step that lora/ holds: the best step by the held-out objective, of those measured to be within the guard's
    bounds, or the last. The best weights so far are kept as `checkpoints/best-NNNNNN`."""


@_strict
class Parallel:
    shard: Positive = 1
    """Processes that share one copy of the frozen denoisers, by FSDP2: each keeps a part of every block, and gathers
    the others when the block runs. The number of processes is a multiple of it."""
    context: Positive = 1
    """Processes that work on the tokens of one clip together, in the denoiser, each on an equal share: for clips that
    are too large, or too slow, for one. The number of processes is a multiple of it, and batch and held-out pairs are
    shared out among groups of so many. Goes with any `shard`; see docs/scale.md."""
    timeout: PositiveFloat = 1800.0
    """Seconds that processes wait for each other; then the run ends with an error, since one of them hangs."""


@_strict
class Config:
    run: Run
    model: Model
    data: Data
    train: Train
    rewards: dict[TermName, Reward] = field(default_factory=dict)
    """Terms of the objective that should rise: a name of your own for each."""
    losses: dict[TermName, Loss] = field(default_factory=dict)
    """Those that should fall."""
    terms: dict[TermName, Term] = field(default_factory=dict)
    """Terms of your own kind."""
    reference: Reference = field(default_factory=Reference)
    prediction: Prediction = field(default_factory=Prediction)
    lora: Lora = field(default_factory=Lora)
    trainable: Named | None = None
    """Part that is trained instead of a LoRA: `modules`, with args.modules a list of regular expressions of whole names
    such as transformer.blocks.0.ffn or vae.decoder.conv_out; or a class of your own, which is called with the pipeline
    and the args, see chopgrad_align/training/trainable.py."""
    ema: Ema = field(default_factory=Ema)
    gradient: Gradient = field(default_factory=Gradient)
    validation: Validation = field(default_factory=Validation)
    witnesses: dict[TermName, Witness | None] = field(default_factory=dict)
    """Measured with every held-out measurement and not trained on, beside motion, flow, flicker, saturation, contrast,
    sharpness, diversity and distance; null leaves one of these out."""
    guard: Guard = field(default_factory=Guard)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    parallel: Parallel = field(default_factory=Parallel)
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], EachOnce] = field(default_factory=list)

    @model_validator(mode="after")
    def _objective(self) -> Config:
        if not (self.rewards or self.losses or self.terms):
            raise ValueError("expected at least one term under rewards or losses")
        names = [*self.rewards, *self.losses, *self.terms, *["reference"] * bool(self.reference.weight)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two terms of the objective are both called {twice[0]!r}; rename one")
        if self.trainable is not None and self.lora != Lora():
            raise ValueError(f"lora has no effect with trainable.name={self.trainable.name}; leave it out")
        if self.parallel.shard > 1:
            for key, asked in (("trainable", self.trainable), ("model.loras", self.model.loras)):
                if asked:
                    raise ValueError(
                        f"{key} changes weights that parallel.shard={self.parallel.shard} shards: leave it out"
                    )
            if self.lora.dora:
                raise ValueError(f"lora.dora reads whole weights, which parallel.shard={self.parallel.shard} shards")
        if self.parallel.context > 1 and self.trainable is not None:
            raise ValueError(
                f"trainable: parallel.context={self.parallel.context} adds up gradients of which each process has a "
                "part, as those of a LoRA on the denoiser: leave one of them out"
            )
        if self.model.quantize:
            packed = f"model.quantize={self.model.quantize} packs"
            if "vae" in self.model.quantize:
                raise ValueError("model.quantize.vae: pixels and their gradient are the decoder's own: leave it out")
            for key, asked in (("trainable", self.trainable), ("model.loras", self.model.loras)):
                if asked:
                    raise ValueError(f"{key} changes weights that {packed}: leave one of the two out")
            if self.lora.dora:
                raise ValueError(f"lora.dora reads whole weights, which {packed}: leave one of the two out")
            if self.parallel.shard > 1:
                raise ValueError(f"parallel.shard={self.parallel.shard} cuts weights that {packed}: choose one")
            if self.model.offload:
                raise ValueError(f"model.offload={self.model.offload} moves weights that {packed}: choose one")
        for name, reward in self.rewards.items():
            if reward.weight == 0:
                raise ValueError(
                    f"rewards.{name}.weight=0 has no effect; to watch its score, leave it out and add "
                    f"witnesses.{name}.name={reward.name}"
                )
        if self.prediction.mode != "sample" and self.model.noise is not None:
            raise ValueError("model.noise has no effect: it is of the sampler, prediction.mode=sample")
        if self.prediction.mode != "sample" and (self.gradient.last_steps or self.gradient.steps):
            raise ValueError(
                "gradient.last_steps and gradient.steps have no effect with "
                f"prediction.mode={self.prediction.mode}, which is one call of the denoiser: leave them out"
            )
        if self.data.cache is not None and self.data.clips is None and not self.model.encode_prompts_once:
            raise ValueError("data.cache has nothing to keep with model.encode_prompts_once=false: leave it out")
        if self.data.clips is not None and (self.data.buckets or self.data.ignore):
            raise ValueError("data.buckets and data.ignore are of prompts: give data.clips.buckets and columns")
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
    def _memory(self) -> Config:
        stride = self.checkpointing().block_stride
        if self.model.offload and stride != 1:
            raise ValueError(
                f"model.offload={self.model.offload}: the backward pass would have all blocks on the device; "
                "set gradient.denoiser.checkpoint=block"
            )
        if self.model.offload and self.parallel.shard > 1:
            raise ValueError(
                f"model.offload={self.model.offload} moves whole weights, which parallel.shard={self.parallel.shard} "
                "shards: leave one of them out"
            )
        return self

    def checkpointing(self) -> Checkpointing:
        """The policy for the denoiser's activations until the backward pass."""
        asked, default = self.gradient.denoiser, "nested" if self.model.gradient_checkpointing else "call"
        return Checkpointing(cast(Any, asked.checkpoint or default), asked.inputs)

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
