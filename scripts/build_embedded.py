"""Train the embedded pipeline and its rewards from nothing, on procedural videos, and record what they reached.

    python scripts/build_embedded.py                       # all stages, in order; interrupted, it goes on where it was
    python scripts/build_embedded.py vae --work DIR        # one stage
    python scripts/build_embedded.py evaluate --clips DIR  # figures for the model card, real clips included

Stages: `vae` (AutoencoderKLWan in Wan 2.2's residual, patchified shape), `decoder` (its decoder by itself, on latents
with noise), `reward` (open_clip on single frames, contrastive), `video_reward` (whole videos, with captions that differ
in one word), `latents` (the denoiser's training set, encoded once), `denoiser` (WanTransformer3DModel and its text
encoder, flow matching) and `finer` (the same in four times as many tokens), `export` (a diffusers folder and those of
the rewards, float16 safetensors), `evaluate` (figures, sample grid, card). All in `embedded_stages/`. The weights that
come with the package were made so, except that the clips of all `denoiser` steps and of the first 1390 of 2800 `finer`
steps had the full spread of places and poses, and that the video reward had 660 steps without the change at its key
points and without more of what turns or stands, then 120 with both.
"""

from __future__ import annotations

from pathlib import Path

from embedded_stages.decoder import train_decoder
from embedded_stages.denoiser import train_denoiser, train_finer_denoiser
from embedded_stages.evaluate import evaluate
from embedded_stages.export import export
from embedded_stages.latents import encode_latents
from embedded_stages.reward import train_reward
from embedded_stages.vae import train_vae
from embedded_stages.video_reward import train_video_reward

from chopgrad_align.common import command_line as cli
from chopgrad_align.common.errors import exit_on_usage_error

# What runs, and how much of it: training steps, clips or videos.
STAGES = {
    "vae": (train_vae, 2400),
    "decoder": (train_decoder, 300),
    "reward": (train_reward, 1000),
    "video_reward": (train_video_reward, 1600),
    "latents": (encode_latents, 8000),
    "denoiser": (train_denoiser, 8000),
    "finer": (train_finer_denoiser, 2800),
    "export": (export, 0),
    "evaluate": (evaluate, 128),
}


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("stage", nargs="*", help=f"of {', '.join(STAGES)}; default: all, in order")
    parser.add_argument("--work", type=cli.path, default=Path("runs/build_embedded"), help="checkpoints and logs")
    parser.add_argument("--clips", type=cli.path, help="folder of real mp4 files, for `evaluate`")
    parser.add_argument("--compile", action="store_true", help="compile the denoisers: half the time, if there is g++")
    args = parser.parse_args()
    if unknown := set(args.stage) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; expected some of {', '.join(STAGES)}")
    with exit_on_usage_error():
        args.work.mkdir(parents=True, exist_ok=True)
        compiled = {"compiled": args.compile}
        options = {"denoiser": compiled, "finer": compiled, "evaluate": {"clips": args.clips}}
        for name in args.stage or STAGES:
            run, count = STAGES[name]
            run(args.work, count, **options.get(name, {}))


if __name__ == "__main__":
    main()
