"""The memory that a training run needs, and the fastest setting that fits a card; needs neither a GPU nor weights.

    chopgrad-align plan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 480x832 --frames 81 \\
        --reward hps_v2 --gpu 40GiB lora.rank=32 gradient.last_steps=2
    chopgrad-align plan --config configs/wan2.1_t2v_1.3b_hps.yaml --gpu 80GiB model.call.num_frames=81

It runs one training step of the real code on tensors without data, and counts their storage. Without --gpu the run is
counted as it is. Exit status 1: nothing fits.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..common import command_line as cli
from ..common.errors import UsageError, exit_on_usage_error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "plan")
    parser.add_argument(
        "--model", type=cli.name, help="hub id of a known model, or folder of a pipeline (weights are not read)"
    )
    parser.add_argument("--size", type=cli.size, metavar="HxW", help="of the video, in pixels, such as 480x832")
    parser.add_argument("--frames", type=cli.count)
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        help="a published name; may be repeated (default: colorfulness, which needs next to nothing)",
    )
    parser.add_argument("--config", metavar="FILE", help="plan for this run instead of --model and what goes with it")
    parser.add_argument(
        "--gpu", metavar="SIZE", help="memory of the card, such as 24GiB (default: nothing is changed to fit one)"
    )
    parser.add_argument(
        "--margin",
        default="1.5GiB",
        metavar="SIZE",
        help="kept free for the CUDA context, workspaces of kernels and the allocator's gaps (default: 1.5GiB)",
    )
    parser.add_argument("--json", action="store_true", help="print everything that was simulated as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the config")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.disable(logging.WARNING)  # the model libraries', about weights that are not there
    warnings.simplefilter("ignore")
    with exit_on_usage_error():
        gpu, margin = args.gpu and _bytes("--gpu", args.gpu), _bytes("--margin", args.margin)
        if gpu and margin >= gpu:
            raise UsageError(f"--margin={args.margin} leaves nothing of --gpu={args.gpu}")
        if args.json and not gpu:
            raise UsageError("--json is of a search for a setting that fits: give --gpu too")
        given = _given(args)

        from diffusers.utils import logging as diffusers_logging

        from ..planner import config_of, make_plan
        from ..planner.report import as_it_is, in_json, in_words, table
        from ..planner.simulate import simulate
        from ..training.config_file import load_config

        diffusers_logging.disable_progress_bar()
        config = config_of(given, args.overrides) if given else load_config(args.config, args.overrides)
        if not gpu:
            figures = simulate(config)
            print(f"{table(figures)}\n\nas it is: {as_it_is(figures)}")
            return
        plan = make_plan(config, gpu - margin, trying=_say)
    if args.json:
        print(json.dumps(in_json(plan, given, args.overrides), indent=2))
    else:
        print(in_words(plan, given, args.overrides))
    if plan.chosen is None:
        raise SystemExit(1)


def _bytes(argument: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(GiB|GB|MiB)", text)
    if not match:
        raise UsageError(f"{argument}={text}: expected a number with GiB, GB or MiB, such as 24GiB")
    return int(float(match[1]) * {"GiB": 2**30, "GB": 10**9, "MiB": 2**20}[match[2]])


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The sections of a config that the arguments describe; none with --config."""
    if args.config is not None:
        if args.model or args.size or args.frames or args.reward:
            raise UsageError("--config has the model, its call and the rewards: change them by key.sub=value")
        return {}
    for name in ("model", "size", "frames"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name} is missing: give it, or a whole run as --config")

    from ..planner import known_models, sections

    height, width = args.size
    call = {"height": height, "width": width, "num_frames": args.frames}
    call |= known_models().get(args.model, {}).get("call", {})
    return sections(args.model, args.reward or ["colorfulness"], call)


def _say(setting: dict[str, Any]) -> None:
    print("trying", ", ".join(f"{key}={json.dumps(value)}" for key, value in setting.items()), file=sys.stderr)
