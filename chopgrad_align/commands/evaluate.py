"""Compare methods of a restoration task on held-out clips: a table, a CSV file, videos side by side, and a page.

    chopgrad-align evaluate --config configs/sr_x4.yaml --method mine=runs/sr_x4 --out evaluation
    chopgrad-align evaluate --config configs/sr_x4.yaml --method a=runs/a --method b=runs/b \\
        --metrics psnr lpips warping_error:raft fvd:videomae:MCG-NJU/videomae-base --count 20 --out evaluation
    chopgrad-align evaluate --pred restored --target originals --out evaluation

The clips are those of `data.held_out` of the config. A method is a run's folder, or that of its LoRA or trained
modules. Baselines: `input`, the degraded video (brought to the target's size by bicubic interpolation), `base`, the
model without a LoRA, and `target`, the target itself, which shows what a perfect result would get. Without a config,
videos of folders are compared by their names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import command_line as cli
from ..common.arguments import usable_path
from ..common.errors import UsageError, exit_on_usage_error, located

if TYPE_CHECKING:
    from ..data.clips import Clip
    from ..evaluation.compare import Method
    from ..training.config import Config

BASELINES = ("input", "base", "target")
METRICS = ["psnr", "ssim", "warping_error", "relative_warping_error", "flicker"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "evaluate")
    parser.add_argument("--config", metavar="FILE", help="of a training run whose data are clips")
    parser.add_argument("--method", action="append", default=[], metavar="NAME=PATH", help="a run, or its lora/")
    parser.add_argument("--partial", action="store_true", help="leave out what of a LoRA does not fit the model")
    parser.add_argument("--baseline", nargs="*", choices=BASELINES, help="default: input and base")
    parser.add_argument("--pred", action="append", default=[], metavar="[NAME=]FOLDER", help="of videos; with --target")
    parser.add_argument("--target", type=cli.path, metavar="FOLDER", help="of videos with the same names")
    parser.add_argument("--out", type=cli.path, required=True, metavar="FOLDER", help="must not exist")
    parser.add_argument(
        "--metrics",
        nargs="+",
        help="psnr ssim flicker lpips[:alex|vgg|squeeze] dists warping_error[:dis|raft|raft_small] "
        "relative_warping_error[likewise] seams:WINDOW:OVERLAP fvd:videomae:CHECKPOINT fvd:i3d:FILE reward:NAME "
        "(default: those that need no weights; seams, if clips are longer than the model's window)",
    )
    parser.add_argument("--reference", metavar="NAME", help="method that differences are taken to (default: the first)")
    parser.add_argument("--count", type=cli.count, metavar="N", help="clips; default: one of each file")
    parser.add_argument(
        "--videos", type=cli.whole, default=8, metavar="N", help="clips to show side by side (default: 8)"
    )
    parser.add_argument("--device", type=cli.device, help="of the metrics; default: cuda if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the config")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with exit_on_usage_error():
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    # Mistakes are looked for first, in order of cost.
    if bool(args.config) == bool(args.pred and args.target):
        raise UsageError("give either --config, or --pred and --target")
    if args.out.exists():
        raise UsageError(f"--out: {args.out} exists, and nothing is overwritten; choose another folder")

    import torch
    from tqdm import tqdm

    from ..evaluation.compare import compare
    from ..evaluation.metrics import load_metrics
    from ..training.config_file import load_config

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loras = _loras(args.method)
    config = load_config(args.config, args.overrides) if args.config else None
    metrics = load_metrics(args.metrics or METRICS + _seams(config), device)
    methods, clips, total = _from_config(args, config, loras) if config else _from_folders(args)
    shown = tqdm(clips, total=total, unit="clip")
    table = compare(methods, shown, metrics, args.out, reference=args.reference, videos=args.videos, device=device)
    print(table.markdown())
    print(f"look at {args.out}/index.html")


def _seams(config: Config | None) -> list[str]:
    """The metric of seams, if there are clips longer than the model's window."""
    clips, window = config and config.data.clips, config and config.model.call.get("num_frames")
    if config and clips and window and any(frames > window for frames, _, _ in clips.buckets):
        return [f"seams:{window}:{config.prediction.overlap}"]
    return []


def _loras(arguments: Sequence[str]) -> dict[str, Path]:
    """The LoRA of each `--method`."""
    paths = _named(arguments, "--method")
    if twice := paths.keys() & set(BASELINES):
        raise UsageError(f"--method {min(twice)}=…: that is the name of a baseline; choose another")
    loras = {name: path / "lora" if (path / "lora").is_dir() else path for name, path in paths.items()}
    if missing := [str(path) for path in loras.values() if not path.exists()]:
        raise UsageError(f"--method: there is no {missing[0]}; give the folder of a run, or of its LoRA")
    return loras


def _from_config(
    args: argparse.Namespace, config: Config, loras: Mapping[str, Path]
) -> tuple[Mapping[str, Method], Iterable[Clip], int]:
    from ..evaluation.compare import input_video, target_video
    from ..training.predictors import HeldOutClips, restorers

    baselines = ["input", "base"] if args.baseline is None else args.baseline
    clips = HeldOutClips(config, args.count)
    models: dict[str, Path | None] = {"base": None} if "base" in baselines else {}
    models |= loras
    methods = {"input": input_video, "target": target_video} | (
        restorers(config, models, args.partial) if models else {}
    )
    return {name: methods[name] for name in [*baselines, *loras]}, clips, len(clips)


def _from_folders(args: argparse.Namespace) -> tuple[Mapping[str, Method], Iterable[Clip], int]:
    from ..evaluation.video_pairs import VideoPairs

    if args.overrides or args.method or args.baseline:
        raise UsageError("--method, --baseline and key=value belong to --config, not to --pred and --target")
    pairs = VideoPairs(args.target, _named(args.pred, "--pred"), args.count)
    return pairs.methods, pairs, len(pairs)


def _named(arguments: Sequence[str], option: str) -> dict[str, Path]:
    """Each `NAME=PATH`, or a path whose last part is its name."""
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals:
            name, path = Path(argument).name, argument
        if not name or not path or name in named:
            raise UsageError(f"{option} {argument}: expected NAME=PATH, with another name each time")
        with located(option):
            named[name] = Path(usable_path(path))
    return named
