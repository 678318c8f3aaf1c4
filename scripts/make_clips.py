"""Write folders of small procedural clips to try tasks with pixel losses on: `train` and `held_out`.

    python scripts/make_clips.py --out clips
    python scripts/make_clips.py --out clips --train 500 --held-out 50 --size 96

Each folder has a `metadata.csv` with the columns file_name and caption; control (the shape in white on black), empty
(the same scene without its shape) and instruction (which shape to remove). Held-out captions are none of the training
ones.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

from chopgrad_align.common import command_line as cli
from chopgrad_align.common.errors import UsageError, exit_on_usage_error

COLUMNS = ("file_name", "caption", "control", "empty", "instruction")
FPS = 8


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR")
    parser.add_argument("--train", type=cli.count, default=120, help="clips (default: 120)")
    parser.add_argument("--held-out", type=cli.count, default=24, help="clips (default: 24)")
    parser.add_argument("--frames", type=cli.count, default=25, help="of each (default: 25)")
    parser.add_argument("--size", type=cli.count, default=64, help="height and width (default: 64)")
    parser.add_argument("--seed", type=cli.whole, default=0)
    args = parser.parse_args()
    with exit_on_usage_error():
        if args.out.exists():
            raise UsageError(f"--out: {args.out} exists, and nothing is overwritten; choose another folder")
        for name, count in (("train", args.train), ("held_out", args.held_out)):
            write_clips(args.out / name, count, args.frames, args.size, args.seed, held_out=name == "held_out")


def write_clips(folder: Path, count: int, frames: int, size: int, seed: int, held_out: bool) -> None:
    """Write a folder and its metadata."""
    from tqdm import tqdm

    from chopgrad_align.data.procedural import layers, random_scene
    from chopgrad_align.data.video import write_video

    folder.mkdir(parents=True)
    rng = random.Random(f"{seed} {held_out}")
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for i in tqdm(range(count), desc=folder.name):
            scene = random_scene(rng, held_out)
            background, painted, inside = layers(scene, rng.randrange(2**31), frames, size)
            videos = {
                "": painted * inside + background * (1 - inside),
                ".control": inside.expand(3, -1, -1, -1),
                ".empty": background,
            }
            names = {kind: f"{i:04d}{kind}.mp4" for kind in videos}
            for kind, video in videos.items():
                write_video(folder / names[kind], video.transpose(0, 1).clamp(0, 1), FPS)
            instruction = f"remove the {scene.colour} {scene.shape}"
            rows.writerow([names[""], scene.caption, names[".control"], names[".empty"], instruction])


if __name__ == "__main__":
    main()
