"""Check a reward before training with it: contract, gradient, memory, time. Status 2: it is broken, and why.

chopgrad-align check-reward clip_score frames=8
chopgrad-align check-reward my_rewards.py:Warmth --video clip.mp4 --prompt "a fox runs through snow"
chopgrad-align check-reward hps_v2 'frames={random: 4}' version=v2.0
chopgrad-align check-reward my_rewards.py:Likeness --row '{"image": "face.png", "name": "Ada"}'
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..common import command_line as cli
from ..common.errors import UsageError, exit_on_usage_error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(__doc__, "check-reward")
    parser.add_argument("reward", help="a published name, package.module:Class or path/to/file.py:Class")
    parser.add_argument(
        "--video", type=cli.name, metavar="FILE", help="default: a clip of 9 frames of 64x64, made by a formula"
    )
    parser.add_argument("--prompt", help="default: what that clip shows")
    parser.add_argument("--other-prompt", default="a blue square on the grass", help="for the second sample of a batch")
    parser.add_argument(
        "--row", default="{}", metavar="JSON", help="what a row of the data says, for a reward that reads it"
    )
    parser.add_argument("--device", type=cli.device, help="default: cuda if there is one")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="of the reward")
    args = parser.parse_intermixed_args(arguments)
    with exit_on_usage_error():
        from ..evaluation.check_reward import clip, examine, known_of
        from ..evaluation.loading import reward_on_device
        from ..objective.reward.protocol import at_fps

        video, prompt, fps = clip(args.video, args.prompt)
        reward, device = reward_on_device(args.reward, args.arguments, args.device)
        reward, known = at_fps(reward, fps), known_of(video, fps, _row(args.row))
        for what, found in examine(reward, args.reward, video.to(device), [prompt, args.other_prompt], known):
            print(f"{what:<20}{found}", flush=True)


def _row(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UsageError(f'--row {text}: expected cells by column, as JSON: {{"image": "face.png"}}')
    return row
