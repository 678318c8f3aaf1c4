"""Make videos with a diffusers pipeline, with or without a LoRA that was trained here.

    chopgrad-align generate --prompt "a large red star spinning in a starry night" --out videos
    chopgrad-align generate --run runs/embedded --prompts captions.txt --out videos
    chopgrad-align generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --frames 81 --size 480x832 --fps 16 \\
        --lora fox.safetensors --prompt "a fox runs through snow" --out videos

Each video has a seed of its own: `--seed` for the first prompt, and one more for each that follows. With `--run` the
model, its scheduler and the pipeline's call are those that the run was trained and measured with, as its `config.yaml`
has them. Otherwise a model folder may hold `call_defaults.json`, an object of arguments of the pipeline's call. The
command line goes before either.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import command_line as cli
from ..common.errors import UsageError, exit_on_usage_error, located
from ..data.prompts import Condition, read_conditions

if TYPE_CHECKING:
    from ..training.config import Config


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "generate")
    parser.add_argument("--run", type=cli.path, help="folder of a training run: its model, settings and LoRA")
    parser.add_argument(
        "--model", type=cli.name, help="folder or hub id of a diffusers pipeline (default: the embedded one)"
    )
    parser.add_argument("--lora", type=cli.path, help="folder or file of LoRA weights, such as RUN/lora")
    parser.add_argument(
        "--lora-scale",
        type=float,
        metavar="SCALE",
        help="below 1: between the base model and the tuned one, if that went too far (default: 1)",
    )
    parser.add_argument("--partial", action="store_true", help="leave out what of the LoRA does not fit the model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="may be repeated")
    what.add_argument(
        "--prompts", type=cli.path, metavar="FILE", help=".txt; or .csv, .jsonl with `prompt` and/or `image`"
    )
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR", help="folder of the mp4 files")
    parser.add_argument("--steps", type=cli.count, help="denoising steps")
    parser.add_argument("--guidance", type=cli.finite, help="guidance scale")
    parser.add_argument("--frames", type=cli.count)
    parser.add_argument("--size", type=cli.size, metavar="HxW", help="height x width in pixels, such as 480x832")
    parser.add_argument(
        "--fps",
        type=cli.frames_per_second,
        help="of the file: 8 is CogVideoX's, 16 Wan's (default: the run's, or 8)",
    )
    parser.add_argument("--seed", type=cli.whole, default=0)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: the run's; without --run bfloat16, float32 on CPU",
    )
    parser.add_argument("--device", type=cli.device, help="default: cuda if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with exit_on_usage_error():
        generate(args)


def generate(args: argparse.Namespace) -> None:
    # Mistakes are looked for first, in order of cost: the files, the model, the first call.
    conditions = (
        read_conditions(args.prompts) if args.prompts else [Condition(prompt.strip()) for prompt in args.prompt]
    )
    if Condition() in conditions:
        raise UsageError("an empty --prompt; write what the video should show")
    paths = [args.out / f"{index:03}-{_slug(condition)}.mp4" for index, condition in enumerate(conditions)]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not args.overwrite:
        raise UsageError(f"{existing[0]} exists; choose another --out, or allow it with --overwrite")

    from ..training.lora import load_lora
    from ..training.lora_files import lora_file, open_lora
    from ..training.models import check_model, check_pipeline, load_pipeline, read_pipeline
    from ..training.modules import MODULES_NAME, load_modules

    config = _config(args)
    model = args.model or str(files("chopgrad_align") / "embedded" / "pipeline")
    if config:
        check_model(config.model)
    else:
        check_pipeline(model, "--model")
    adapter = args.run / "lora" if config else args.lora
    modules = adapter if adapter and (adapter / MODULES_NAME).is_file() else None
    lora = lora_file(adapter) if adapter and not modules else None
    if args.lora_scale is not None and not math.isfinite(args.lora_scale):
        raise UsageError(f"--lora-scale {args.lora_scale}: expected a number, such as 0.6")
    if lora:
        open_lora(lora)
    if args.lora_scale is not None and lora is None:
        raise UsageError(f"--lora-scale {args.lora_scale}: there is no LoRA; give --run or --lora too")

    import torch
    from tqdm import tqdm

    from ..data.video import write_video
    from ..sampling.initial_noise import starting_from
    from ..sampling.outputs import frames_of
    from ..sampling.predictions.latents import frame_axis
    from ..sampling.randomness import seeded
    from ..sampling.rollout import check_call
    from ..training.batches import call_inputs
    from ..training.bound_conditions import bind

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config:
        pipe, defaults, fps = load_pipeline(config.model), config.model.call, config.model.fps
    else:
        dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
        pipe, defaults, fps = read_pipeline(model, "--model", {"default": dtype}), _call_defaults(model), 8
    pipe.to(device)
    if modules:
        load_modules(pipe, modules)
    if lora:
        load_lora(pipe, lora, scale=1.0 if args.lora_scale is None else args.lora_scale, partial=args.partial)
    call = _call_arguments(pipe, defaults, args)
    noise = config.model.initial_noise() if config else None
    rows = bind(pipe, conditions, config.data.ignore if config else ()).rows
    for row in (row for row in rows if row.constants):
        with located(row.condition.place):
            check_call(pipe, {**call, **row.constants})
    for index, (row, path) in enumerate(zip(rows, tqdm(paths, unit="video"), strict=True)):
        condition = row.condition
        pipe.set_progress_bar_config(desc=path.stem, leave=False)
        told = config.data.captions().told(condition.prompt) if config else condition.prompt
        seed = args.seed + index if condition.seed is None else condition.seed
        inputs = call_inputs(pipe, [told], [seed])
        if condition.negative_prompt is not None:
            inputs["negative_prompt"] = condition.negative_prompt
        inputs |= row.inputs(pipe, call)
        try:
            start = nullcontext() if noise is None else starting_from(pipe, noise, frame_axis(pipe))
            with start, seeded(pipe, inputs["generator"], seed):
                video = frames_of(pipe, pipe(**{**call, **inputs}, output_type="pt"))[0]
        except (ValueError, TypeError) as error:  # diffusers checks a call's arguments, and only those, with these
            raise UsageError(f"{type(pipe).__name__} refuses the call: {error}") from error
        write_video(path, video, fps if args.fps is None else args.fps)


def _slug(condition: Condition) -> str:
    text = condition.prompt or (condition.image.stem if condition.image else "")
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "video"


def _config(args: argparse.Namespace) -> Config | None:
    """The config of `--run`."""
    if not args.run:
        return None
    for option in ("model", "lora"):
        if getattr(args, option):
            raise UsageError(f"--{option}: --run has a model and a LoRA of its own; leave one of the two options out")
    for needed in ("config.yaml", "lora"):
        if not (args.run / needed).exists():
            raise UsageError(f"--run: there is no {args.run / needed}; give the folder of a run that has ended")

    from ..training.config_file import load_config

    types = [f"model.{name}={args.dtype}" for name in ("dtype", "vae_dtype")] if args.dtype else []
    config = load_config(args.run / "config.yaml", types)
    if config.prediction.mode == "one_step" or config.prediction.columns.keys() - {"image"}:
        raise UsageError(f"--run: {args.run} makes videos from clips, not from prompts; see chopgrad-align evaluate")
    return config


def _call_defaults(model: str) -> dict[str, Any]:
    path = Path(model) / "call_defaults.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _call_arguments(pipe: Any, defaults: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of each video's call: the defaults, with what the command line says in their place."""
    from ..sampling.rollout import check_call

    height, width = args.size or (None, None)
    options = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "num_frames": args.frames,
        "height": height,
        "width": width,
    }
    call = {**defaults, **{name: value for name, value in options.items() if value is not None}}
    check_call(pipe, call)
    return call
