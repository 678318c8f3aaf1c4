"""Observers of a run, which have no say in it: the metrics file, the trackers, the progress bar."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import av
import yaml
from tqdm import tqdm

from .config import Config
from .config_file import to_yaml
from .folder import RunFolder
from .parallel import Replicas

_SMOOTHING = 0.9  # of the reward in the bar: about the last ten steps
_SHOWN = 8  # samples, in trackers
_SECONDS_IN_A_LOG = 30.0  # between lines of the bar, where it is no terminal that shows it


class Observers:
    """Readers of each row of a run; all but the trackers' opening and closing is done by the main process alone.

    Args:
        config: Of the run.
        folder: Where `metrics.jsonl` is.
        parallel: Has the trackers.
    """

    def __init__(self, config: Config, folder: RunFolder, parallel: Replicas) -> None:
        self._config, self._folder, self._parallel = config, folder, parallel
        self._bar: tqdm | None = None
        self._mean, self._weight = 0.0, 0.0

    def open(self) -> None:
        """Open the trackers, and tell them the run's name and its config, as `config.yaml` has it."""
        self._parallel.start_trackers(self._folder.path.name, by_key(yaml.safe_load(to_yaml(self._config))))

    def bar(self, done: int) -> tqdm:
        """The bar of all steps, of which some are done; training rows move it while it is open."""
        file = sys.stderr if sys.stderr.isatty() else _Lines(sys.stderr)
        self._bar = tqdm(
            initial=done,
            total=self._config.train.steps,
            disable=not self._parallel.is_main,
            desc="align",
            file=file,
            mininterval=0.1 if file is sys.stderr else _SECONDS_IN_A_LOG,
        )
        return self._bar

    def row(self, row: Mapping[str, float]) -> None:
        """Show a row of metrics."""
        if self._parallel.is_main:
            self._folder.append(dict(row))
        self._parallel.track({key: value for key, value in row.items() if key != "step"}, int(row["step"]))
        if self._bar is not None and "reward" in row:
            self._bar.set_postfix(self._postfix(row), refresh=False)
            self._bar.update()

    def _postfix(self, row: Mapping[str, float]) -> dict[str, str]:
        if row["reward"] == row["reward"]:
            self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * row["reward"]
            self._weight = _SMOOTHING * self._weight + 1 - _SMOOTHING
        shown = {"reward": f"{row['reward']:.4f}", "smoothed": f"{self._mean / (self._weight or 1):.4f}"}
        if "peak_memory_gib" in row:  # some systems do not say
            shown["memory"] = f"{row['peak_memory_gib']:.1f}GiB"
        return shown | ({"skipped": f"{row['skipped']:.0f}"} if row["skipped"] else {})

    def samples(self, step: int, folder: Path, prompts: Sequence[str]) -> None:
        """Show the first sample videos of a measurement, `NNN.mp4` of the folder, with their prompts."""
        for path in sorted(folder.glob("*.mp4"))[:_SHOWN]:
            prompt = prompts[int(path.stem)] if int(path.stem) < len(prompts) else ""
            for tracker in self._parallel.trackers:
                _SHOW[tracker.name](tracker.tracker, f"samples/{path.stem}", path, prompt, step)


def by_key(tree: Any, key: str = "") -> dict[str, Any]:
    """Each value of nested dictionaries by its whole key; what is not a number, a truth value or a text as JSON."""
    if isinstance(tree, Mapping) and tree:
        return {
            k: v for name, value in tree.items() for k, v in by_key(value, f"{key}.{name}" if key else name).items()
        }
    return {key: tree if isinstance(tree, bool | int | float | str) else json.dumps(tree)}


def _show_in_tensorboard(writer: Any, name: str, path: Path, prompt: str, step: int) -> None:
    """Add an animated GIF, as TensorBoard shows videos; its own `add_video` needs one more package for the same."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_image() for frame in container.decode(video=0)]
    gif = io.BytesIO()
    frames[0].save(gif, "gif", save_all=True, append_images=frames[1:], duration=int(1000 / (rate or 8)), loop=0)
    width, height = frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
    writer.add_text(f"{name}/prompt", prompt, step)


def _show_in_wandb(run: Any, name: str, path: Path, prompt: str, step: int) -> None:
    import wandb

    run.log({name: wandb.Video(str(path), caption=prompt, format="mp4")}, step=step)


_SHOW = {"tensorboard": _show_in_tensorboard, "wandb": _show_in_wandb}


class _Lines(io.TextIOBase):
    """A stream that ends a line where a terminal would write over it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if line := text.strip():
            self._stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
