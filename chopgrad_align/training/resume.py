"""Resuming a run: what may have changed, what must be as it was, and the checkpoint that is taken up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..common.errors import UsageError
from .checkpoints import read_state
from .config import Config
from .config_file import interpolations, load_config
from .fingerprints import fingerprints, leaves
from .folder import RunFolder
from .state import TrainState
from .validation import Validation

# Changes nothing that is computed, but for rounding.
_FREE = (
    *("run.folder", "run.threads", "data.cache", "trackers", "parallel."),
    *("validation.every", "validation.videos", "validation.batch", "checkpoint.", "guard."),
    *("model.gradient_checkpointing", "model.fps", "gradient.cache", "gradient.checkpoint", "gradient.rows"),
    *("gradient.denoiser.", "model.offload"),
)
# Changes what comes, and is offered to a run that cannot go on as it is.
_REMEDIES = ("train.learning_rate", "train.max_grad_norm")


def draws_by_micro_batch(config: Config) -> bool:
    """True if what is drawn at random depends on the size of micro-batches, and so on the number of processes.

    The masks of a LoRA's dropout are drawn for a micro-batch at a time. So is the time of `prediction.mode=denoise`:
    the denoiser is told one in each call.
    """
    return config.lora.dropout > 0 or config.prediction.mode == "denoise"


def changed_settings(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Settings that a resumed run computes with from now on, old and new value by key.

    What saves memory in `gradient` and `model` changes gradients within rounding only: with other settings than before,
    the run is that of before to a tolerance, and not to the bit.

    Raises:
        UsageError: The config would have computed something else from the start.
    """
    free = [*_FREE]
    if not draws_by_micro_batch(config):
        free.append("train.micro_batch")
    if not config.train.schedule_reads_steps:  # by which the learning rate of every step would change
        free.append("train.steps")
    saved, asked = (dict(leaves(each)) for each in (load_config(folder.config), config))
    found = {}
    for key in {**asked, **saved}:
        one, other = (repr(each[key]) if key in each else "nothing" for each in (saved, asked))
        if one == other or key.startswith(tuple(free)):
            continue
        if key not in _REMEDIES:
            values = "" if key in _secrets(config) else f": it has {one}, not {other}"
            raise UsageError(f"--resume: {key} differs from the run in {folder.path}{values}")
        found[key] = [saved[key], asked[key]]
    return found


def expect_same_run(config: Config, folder: RunFolder) -> None:
    """Raise a UsageError if a config is not that of the run, or asks for fewer steps than are done.

    A run without a checkpoint has done nothing yet, and starts with any config.
    """
    if steps := folder.checkpoints.steps():
        changed_settings(config, folder)
        if config.train.steps < steps[-1]:
            raise UsageError(
                f"--resume: train.steps={config.train.steps} is fewer than the {steps[-1]} steps that are done"
            )
    elif (done := folder.last_row()) > 0:
        raise UsageError(
            f"--resume: {folder.checkpoints.folder} holds no checkpoint of the {done} steps that were done; start "
            "again in another run.folder=…"
        )


def expect_same_inputs(config: Config, folder: RunFolder, allow_changed: bool) -> None:
    """Raise a UsageError if files have changed that the run reads, and that is not allowed."""
    if allow_changed or not (steps := folder.checkpoints.steps()):
        return
    facts = folder.checkpoints.facts(steps[-1])
    if changed := changed_inputs(facts.get("inputs", {}), fingerprints(config)):
        values, hidden = dict(leaves(config)), _secrets(config)
        named = [key if key in hidden else f"{key} ({values.get(key)})" for key in changed]
        raise UsageError(
            f"--resume: {', '.join(named)} changed after the run was started; put back what was there, or go on with "
            "what is there now by --allow-changed"
        )
    before, now = facts.get("processes"), int(os.environ.get("WORLD_SIZE", "1"))
    said = f"{before} process(es), not {now}"
    if before in (None, now):
        before, now = facts.get("context", 1), config.parallel.context
        said = f"parallel.context={before}, not {now}"
    if before != now and draws_by_micro_batch(config):
        raise UsageError(
            f"--resume: the run had {said}, and what is drawn with lora.dropout or prediction.mode=denoise depends on "
            "that; take as many, or go on otherwise by --allow-changed"
        )


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Keys of which both fingerprints are known and differ."""
    return sorted(key for key in before.keys() & now.keys() if before[key] != now[key])


def _secrets(config: Config) -> set[str]:
    return {".".join(map(str, path)) for path in interpolations(config)}


def take_up(config: Config, state: TrainState, validation: Validation, inputs: Mapping[str, str]) -> int | None:
    """Load the last whole checkpoint, with what the config changes; none is the run's beginning.

    Args:
        config: Of this part of the run.
        state: Gets the checkpoint's content.
        validation: Gets the measurements until then.
        inputs: Fingerprints of what is read now.

    Returns:
        The step of the checkpoint.
    """
    folder, parallel = validation.folder, validation.parallel
    step, changed = parallel.on_main(lambda: _last_checkpoint(config, folder, state.state_dict()["weights"], inputs))
    if step is not None:
        state.load_state_dict(read_state(folder.checkpoints.path(step)))
        validation.restore(step)
    if changed:
        state.progress.skipped_in_a_row = 0
        state.change_learning_rate(config.train.learning_rate)
    if parallel.is_main:
        rows = -1 if step is None else step
        folder.rewind(rows)
        validation.history.rewind(rows)
    return step


def _last_checkpoint(
    config: Config, folder: RunFolder, weights: Mapping[str, Tensor], inputs: Mapping[str, str]
) -> tuple[int | None, dict[str, Any]]:
    """The step of the last whole checkpoint, and what settings change; later checkpoints are named."""
    step, left_out = folder.checkpoints.newest(weights)
    for sentence in left_out:
        tqdm.write(f"{sentence}; going on from step {step or 0}")
    if step is None:
        if folder.last_row() > 0:
            raise UsageError(f"--resume: no checkpoint in {folder.path} is whole; start again in another run.folder=…")
        return None, {}
    changed, before = changed_settings(config, folder), folder.checkpoints.facts(step).get("inputs", {})
    if noted := changed | dict.fromkeys(changed_inputs(before, inputs), "another content"):
        folder.note_resume(step, noted)
    return step, changed
