"""One run of the trainer: check, build, train."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from ..common.errors import UsageError
from ..evaluation.heldout import Paired
from ..evaluation.witnesses import check_witnesses
from .build import load_models, make_guard, make_method, make_state, make_witnesses
from .config import Config, load_config
from .data import Data, read_data
from .folder import RunFolder
from .history import History
from .models import check_model
from .parallel import Replicas
from .phases import Phases
from .trainer import Trainer

# What a resumed run may have another of.
_FREE = (
    *("run.folder", "run.threads", "data.cache", "train.steps", "train.micro_batch"),
    *("validation.every", "validation.videos", "validation.batch", "checkpoint.", "guard.", "trackers"),
    *("model.gradient_checkpointing", "model.fps", "gradient.cache", "gradient.checkpoint", "gradient.rows"),
)


def train(config: Config, resume: bool = False, dry_run: bool = False) -> Paired | None:
    """Train, measure, save and report; the main process returns the held-out comparison of before and after.

    Raises:
        UsageError: Anything about the config that can be known before long work; a reward that breaks its contract;
            three steps in a row whose loss or gradient is not finite.
    """
    data = check_files(config, resume)
    trainer = build(config, data)
    if trainer.parallel.is_main:
        print(trainer)
    if dry_run:
        return None
    trainer.prepare(resume)
    return trainer.run()


def check_files(config: Config, resume: bool) -> Data:
    """What can be checked without loading a model; returns the training and the held-out data.

    Raises:
        UsageError: A run folder, prompt file, folder of videos, model, batch size or tracker that cannot work.
    """
    folder = RunFolder(config.run.folder)
    folder.check(resume)
    if resume:
        _expect_same_run(config, folder)
    check_model(config.model)
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UsageError(f"trackers: {tracker} is not installed: pip install 'chopgrad-align[track]'")
    return read_data(config)


def build(config: Config, data: Data) -> Trainer:
    """Load everything that a run needs.

    Raises:
        UsageError: As `load_models`; a batch that the processes cannot share; a reward that breaks its contract; a
            disk too small for the checkpoints.
    """
    parallel = Replicas(config.trackers, config.run.folder, config.run.threads)
    shares = parallel.shares(config.train.batch_size, config.train.micro_batch)
    if config.validation.pairs < parallel.world:
        raise UsageError(
            f"validation.pairs={config.validation.pairs} must be at least the number of processes, {parallel.world}"
        )
    call = dict(config.model.call)
    models = load_models(config, parallel.device, data.shapes(call))
    batches = data.batches(models.pipe, models.objective, config)
    size = (call["height"], call["width"]) if call.get("height") and call.get("width") else (64, 64)
    for name, term in models.objective.terms.items():
        prompts = (batches.prompts(0) * 2)[:2]  # there may be one
        term.check(name, prompts, call.get("num_frames", 5), size, parallel.device)
    witnesses = make_witnesses(config)
    check_witnesses(witnesses, (batches.prompts(0) * 2)[:2], call.get("num_frames", 5), size)
    # Weights and two moments in float32; a new checkpoint is complete before the oldest goes.
    folder, count = RunFolder(config.run.folder), sum(p.numel() for p in models.trainable.parameters)
    folder.check_space(3 * 4 * count * (config.checkpoint.keep + 1))
    phases = Phases(parallel.device)
    return Trainer(
        config=config,
        data=data,
        pipe=models.pipe,
        parallel=parallel,
        shares=shares,
        batches=batches,
        method=make_method(config, models, phases),
        witnesses=witnesses,
        guard=make_guard(config.guard, witnesses),
        state=make_state(config, models.trainable),
        history=History(folder.measurements),
        folder=folder,
        phases=phases,
    )


def _expect_same_run(config: Config, folder: RunFolder) -> None:
    """A resumed run may be longer, be watched otherwise, and save memory otherwise, but must compute the same.

    What saves memory in `gradient` and `model` changes gradients within rounding only: with other settings than before,
    the run is that of before to a tolerance, and not to the bit.
    """
    saved, asked = _flat(load_config(folder.config)), _flat(config)
    for key in {**asked, **saved}:
        one, other = saved.get(key, "nothing"), asked.get(key, "nothing")
        if one != other and not key.startswith(_FREE):
            raise UsageError(f"--resume: {key} differs from the run in {folder.path}: it has {one}, not {other}")


def _flat(tree: Any, key: str = "") -> dict[str, str]:
    """Each value of a config, as it is written in Python, by its whole key."""
    if dataclasses.is_dataclass(tree):
        tree = vars(tree)
    if not isinstance(tree, dict):
        return {key: repr(tree)}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{key}.{name}" if key else name).items()}
