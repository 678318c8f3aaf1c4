"""Score videos by a reward: files, folders or tables in, a table out.

    chopgrad-align score --reward hps_v2 --video a.mp4 --prompt "a fox runs through snow"
    chopgrad-align score --reward aesthetic --video runs/embedded/samples/after --prompt "" --out scores.csv
    chopgrad-align score --reward clip_score --csv clips.csv frames=8

A table has the columns `video` (a path relative to the table) and `prompt`; a video `a.mp4` may have its prompt in
`a.txt` beside it. Further columns, such as `image`, are told to rewards that read them. The result has the columns
video, prompt, score and error. Status 1: some videos could not be read, or their score is no number.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Sequence

from ..common import command_line as cli
from ..common.errors import UsageError, exit_on_usage_error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(__doc__, "score")
    parser.add_argument("--reward", required=True, help="a published name, package.module:Class or file.py:Class")
    parser.add_argument("--video", type=cli.path, action="append", default=[], help="file or folder; may be repeated")
    parser.add_argument("--csv", type=cli.path, action="append", default=[], metavar="FILE", help=".csv or .jsonl")
    parser.add_argument("--prompt", help="of videos that have none of their own")
    parser.add_argument("--out", type=cli.path, metavar="FILE", help="CSV file to write (default: standard output)")
    parser.add_argument(
        "--reduce", metavar="HOW", help="scores of frames to one: mean (default), min, worst, worst=0.1, softmin=0.05"
    )
    parser.add_argument("--device", type=cli.device, help="default: cuda if there is one")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="of the reward")
    args = parser.parse_intermixed_args(arguments)
    with exit_on_usage_error():
        unscored = run(args)
    if unscored:
        raise SystemExit(1)


def run(args: argparse.Namespace) -> int:
    """Number of videos without a score that is a number."""
    from tqdm import tqdm

    from ..evaluation.loading import reward_on_device
    from ..evaluation.score import find_clips, score_clips, summary
    from ..objective.reward import reduction

    clips = find_clips(args.video, args.csv, args.prompt)
    if not clips:
        raise UsageError("nothing to score: give --video or --csv")
    if args.out and args.out.exists():
        raise UsageError(f"{args.out} exists, and nothing is overwritten: choose another --out")
    if args.out and not args.out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {args.out.parent}")
    how = None if args.reduce is None else reduction(_spelled(args.reduce))
    reward, device = reward_on_device(args.reward, args.arguments, args.device)
    results = []
    with open(args.out, "w", newline="", encoding="utf-8") if args.out else contextlib.nullcontext(sys.stdout) as file:
        table = csv.writer(file)
        table.writerow(["video", "prompt", "score", "error"])
        for scored in tqdm(score_clips(reward, args.reward, clips, device, how), total=len(clips), unit="video"):
            table.writerow([scored.clip.video, scored.clip.prompt, scored.score, scored.reason])
            file.flush()  # what is scored stays, whatever comes
            results.append(scored)
    print(summary(results), file=sys.stderr)
    return sum(bool(scored.reason) for scored in results)


def _spelled(reduce: str) -> str | dict[str, float]:
    """`worst=0.1` as a config has it, `{worst: 0.1}`."""
    name, equals, number = reduce.partition("=")
    try:
        return {name: float(number)} if equals else name
    except ValueError:
        raise UsageError(f"--reduce {reduce}: expected a number after {name}=, got {number!r}") from None
