"""Measure what each way of backpropagating through a video decoder costs, and how wrong it is.

    python scripts/bench_decode.py                                      # the embedded VAE, on procedural clips
    python scripts/bench_decode.py --clips videos --out runs/real       # on the middle frames of videos
    python scripts/bench_decode.py --vae Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dtype bfloat16 --size 256x256 --frames 17
    python scripts/bench_decode.py --figures runs/benchmark/benchmark.json --out docs   # measure nothing: draw again

The output folder gets `benchmark.md`, `benchmark.json` and the pictures `benchmark_*.png`: memory against frames,
influence against temporal distance, gradient error against truncation distance, and cosine, memory and time of every
way, those of other projects among them. Ratios of times hold for a quiet machine only.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from chopgrad_align.common import command_line as cli
from chopgrad_align.common.errors import exit_on_usage_error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--vae", type=cli.name, help="folder of a VAE or of a pipeline, or hub id of a pipeline (default: embedded)"
    )
    parser.add_argument(
        "--pipeline", type=cli.name, help="pipeline for the LoRA's curve (default: embedded; with --vae: left out)"
    )
    parser.add_argument("--clips", type=cli.name, metavar="FOLDER", help="of videos (default: procedural clips)")
    parser.add_argument("--count", type=cli.count, default=2, help="clips, and prompts for the LoRA (default: 2)")
    parser.add_argument("--frames", type=cli.count, default=33, help="of a clip (default: 33)")
    parser.add_argument("--size", type=cli.size, default=(64, 64), metavar="HxW", help="in pixels (default: 64x64)")
    parser.add_argument(
        "--time-sizes",
        type=cli.size,
        nargs="+",
        metavar="HxW",
        help="to take times at (default: that of --size)",
    )
    parser.add_argument("--memory-frames", type=cli.count, nargs="+", default=[9, 17, 33], help="lengths of curve (a)")
    parser.add_argument("--distances", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of truncation, in groups")
    parser.add_argument(
        "--probes", type=cli.count, default=2, help="random cotangents a group of frames, for the influence"
    )
    parser.add_argument("--repetitions", type=cli.count, default=5, help="of each timing (default: 5)")
    parser.add_argument(
        "--options",
        nargs="*",
        default=["bfloat16", "channels_last_3d"],
        choices=["bfloat16", "channels_last_3d", "torch.compile"],
        help="changes of the VAE (default: all but torch.compile, which compiles for many minutes)",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--out", type=cli.path, default=Path("runs/benchmark"), help="folder (default: runs/benchmark)")
    parser.add_argument(
        "--figures",
        type=cli.path,
        metavar="FILE",
        help="benchmark.json of an earlier run: write its page to --out again",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with exit_on_usage_error():
        from chopgrad_align.benchmark.report import check_new, read_figures, write_report

        if args.figures:
            results = read_figures(args.figures)
        else:
            check_new(args.out)
            given = sys.argv[1:] if arguments is None else arguments
            results = {"command": shlex.join(["python", "scripts/bench_decode.py", *given]), **_measure(args)}
        print(write_report(results, args.out))


def _measure(args: argparse.Namespace) -> dict:
    import torch

    from chopgrad_align.benchmark.cases import EMBEDDED
    from chopgrad_align.benchmark.run import Settings, benchmark

    return benchmark(
        Settings(
            vae=args.vae or EMBEDDED,
            pipeline=args.pipeline or (None if args.vae else EMBEDDED),
            clips=args.clips,
            count=args.count,
            frames=args.frames,
            size=args.size,
            time_sizes=tuple(args.time_sizes or [args.size]),
            memory_frames=tuple(args.memory_frames),
            distances=tuple(args.distances),
            probes=args.probes,
            repetitions=args.repetitions,
            options=tuple(args.options),
            dtype=args.dtype,
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
    )


if __name__ == "__main__":
    main()
