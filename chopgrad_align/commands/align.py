"""Fine-tune a video diffusion pipeline by rewards and losses on its decoded pixels.

    chopgrad-align align                                              # the embedded pipeline
    chopgrad-align align --config wan2.1_t2v_1.3b_hps train.steps=500
    chopgrad-align align --config runs/mine/config.yaml --resume
    accelerate launch -q -m chopgrad_align align --config runs/mine/config.yaml      # on all GPUs

A config is code: the files that it names as rewards are executed. Load only those that you trust.

`--resume` is the one command of a job that is started again and again: it begins a run, goes on with one that was cut
off, and does nothing for one that is complete. SIGINT (Ctrl-C), SIGTERM and SIGUSR1 end the step, save, export and
report; a second signal ends at once. Exit status: 0, done; 2, a usage error, in one line; 128 + signal, ended early.
With `-q`, accelerate does not bury that line under a traceback of its own, but makes every status but 0 a 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..common import command_line as cli
from ..common.errors import exit_on_usage_error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(__doc__, "align")
    parser.add_argument(
        "--config", metavar="FILE", help="a complete run, or the name of a config of the package (default: embedded)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in run.folder, or begin it")
    parser.add_argument("--allow-changed", action="store_true", help="resume though files have changed that it reads")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="load and check everything, and stop before sampling")
    parser.add_argument(
        "--profile",
        type=cli.whole,
        default=0,
        metavar="N",
        help="write a trace of N steps into the run folder, for Perfetto",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="a key of the config; '~key' leaves one out; keys: chopgrad_align/training/config.py",
    )
    args = parser.parse_intermixed_args(arguments)
    with exit_on_usage_error():
        from ..training.config_file import load_config, to_yaml

        config = load_config(args.config, args.overrides)
        if args.print_config:
            print(to_yaml(config), end="")
            return
        from ..training.run import train

        result = train(config, args.resume, args.dry_run, args.allow_changed, args.profile)
        if result is not None:
            from ..evaluation.changes import summary

            print(f"held-out {'objective' if config.losses else 'reward'}: {result}")
            print("\n".join(summary(config.run.folder)))
            print(f"look at {config.run.folder}/report.html; the LoRA is in {config.run.folder}/lora")
