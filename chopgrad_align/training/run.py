"""A run of the trainer: check, build, train."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from ..common.arguments import whole_number
from ..common.errors import UsageError
from ..data.cache import Cache
from ..evaluation.heldout import Paired
from ..evaluation.witnesses import Witness, check_witnesses
from ..objective.objective import Objective
from ..sampling.call_shape import frames_asked
from ..sampling.outputs import expect_sound, sound_rate
from ..sampling.predictions.columns import arguments
from .batches import Batches
from .build import load_models, make_guard, make_method, make_state, make_witnesses
from .config import Config
from .config_file import header, to_yaml
from .context import expect_splittable, split_tokens
from .data import Data, read_data
from .encoded_prompts import encode_prompts
from .environment import environment
from .fingerprints import fingerprints
from .folder import RunFolder
from .history import History
from .known_samples import known_samples
from .models import check_model
from .observers import Observers
from .outcome import Outcome
from .parallel import Replicas, check_launch, launched_as_main
from .phases import Phases
from .resume import expect_same_inputs, expect_same_run, take_up
from .stopping import StopRequests
from .trainer import Trainer
from .validation import Validation


def train(
    config: Config, resume: bool = False, dry_run: bool = False, allow_changed: bool = False, profile: int = 0
) -> Paired | None:
    """Train, measure, save and report; the main process returns the held-out comparison of before and after.

    Args:
        config: Of the run. It is code: files that it names as rewards are executed, so load only configs you trust.
        resume: Go on from the last whole checkpoint of the run folder; from the beginning if there is none yet. Of a
            run that is complete nothing is done, and None returned.
        dry_run: Stop before sampling, and write nothing.
        allow_changed: Resume though files have changed that the run reads.
        profile: Steps, after the first, of which a trace is written into the run folder.

    Raises:
        UsageError: Anything about the config that can be known before long work; a reward that breaks its contract;
            three steps in a row whose loss or gradient is not finite.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came, and everything is saved and reported.
    """
    folder = RunFolder(config.run.folder)
    whole_number("profile", profile, at_least=0)
    check_launch()
    folder.check(resume)
    if launched_as_main():
        folder.expect_no_owner()
    if resume:
        expect_same_run(config, folder)
        if folder.is_complete(config.train.steps):
            if launched_as_main():
                print(f"{folder.path} is complete, with {config.train.steps} steps: there is nothing to do")
            return None
        expect_same_inputs(config, folder, allow_changed)
    trainer = build(config, check_files(config), profile)
    if trainer.parallel.is_main:
        print(trainer)
    if dry_run:
        return None
    with ExitStack() as until_the_end:
        trainer.parallel.on_main(lambda: until_the_end.enter_context(trainer.folder.owned(resume)))
        prepare(trainer, resume)
        return trainer.run()


def check_files(config: Config) -> Data:
    """Check what can be checked without loading a model; returns the training and the held-out data.

    Raises:
        UsageError: A prompt file, folder of videos, model, batch size or tracker that cannot work.
    """
    check_model(config.model)
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UsageError(f"trackers: {tracker} is not installed: pip install 'chopgrad-align[track]'")
    return read_data(config)


def _check_scores(
    pipe: Any,
    batches: Batches,
    call: Mapping[str, Any],
    objective: Objective,
    witnesses: Mapping[str, Witness],
    device: torch.device,
) -> None:
    """Try terms and witnesses on a small random video, with the prompts and rows of the run.

    Raises:
        UsageError: One breaks its contract, or reads sound that the pipeline does not make.
    """
    size = (call["height"], call["width"]) if call.get("height") and call.get("width") else (64, 64)
    frames, prompts = frames_asked(call) or 5, (batches.prompts(0) * 2)[:2]  # there may be one
    audio: list[torch.Tensor] = []
    if objective.reads_audio or any(witness.reads_audio for witness in witnesses.values()):
        expect_sound(pipe, call)
        audio = [torch.rand(2, int(sound_rate(pipe) or 16_000)) - 0.5]
    told: dict[str, Any] = {}
    if objective.reads_sample or any(witness.reads_sample for witness in witnesses.values()):
        sample = known_samples(batches.held_out(range(1)), device, audio, sound_rate(pipe)).take([0, 0])
        for video in (of[0] for of in sample.videos.values() if len(of[0]) > 1):
            frames, size = len(video), (video.shape[2], video.shape[3])
        told["sample"] = sample
    for name, term in objective.terms.items():
        term.check(name, prompts, frames, size, device, **(told if term.reads_sample else {}))
    check_witnesses(witnesses, prompts, frames, size, device, **told)


def build(config: Config, data: Data, profile: int = 0) -> Trainer:
    """Load everything that a run needs.

    Raises:
        UsageError: As `load_models`; a batch that the processes cannot share; a reward that breaks its contract; a
            disk too small for the checkpoints.
    """
    layout = config.parallel
    parallel = Replicas(
        config.trackers, config.run.folder, config.run.threads, layout.timeout, layout.shard, layout.context
    )
    shares = parallel.shares(config.train.batch_size, config.train.micro_batch)
    if config.validation.pairs < parallel.groups:
        raise UsageError(
            f"validation.pairs={config.validation.pairs} must be at least the number of {parallel.workers}, "
            f"{parallel.groups}"
        )
    call = dict(config.model.call)
    models = load_models(config, parallel.device, lambda pipe: data.calls(pipe, call), mesh=parallel.sharing())
    if (context := parallel.context()) is not None:
        expect_splittable(models.pipe, data.calls(models.pipe, call), layout.context)
        split_tokens(models.pipe, context)
    batches = data.batches(models.pipe, models.objective, config)
    witnesses = make_witnesses(config)
    _check_scores(models.pipe, batches, call, models.objective, witnesses, parallel.device)
    # Weights, two moments and an average in float32; a new checkpoint is complete before the oldest goes.
    folder, count = RunFolder(config.run.folder), sum(p.numel() for p in models.trainable.parameters)
    folder.check_space(4 * (3 if config.ema.decay is None else 4) * count * (config.checkpoint.keep + 1))
    phases, requests = Phases(parallel.device), StopRequests(say=parallel.is_main)
    method, state = make_method(config, models, phases), make_state(config, models.pipe, models.trainable)
    validation = Validation(
        method=method,
        data=data,
        batches=batches,
        settings=config.validation,
        fps=config.model.fps,
        witnesses=witnesses,
        guard=make_guard(config.guard, witnesses),
        parallel=parallel,
        folder=folder,
        requests=requests,
        history=History(folder.measurements),
    )
    return Trainer(
        config=config,
        parallel=parallel,
        shares=shares,
        batches=batches,
        method=method,
        state=state,
        validation=validation,
        outcome=Outcome(state, validation, folder, config.checkpoint.export),
        folder=folder,
        phases=phases,
        requests=requests,
        observers=Observers(config, folder, parallel),
        profile=profile,
    )


def prepare(trainer: Trainer, resume: bool) -> None:
    """Encode prompts, move the pipeline to its device, and take up where the last checkpoint was."""
    config, parallel, method, batches = trainer.config, trainer.parallel, trainer.method, trainer.batches
    if config.model.encode_prompts_once:
        # The rest of the pipeline waits on the CPU.
        first, *others = (
            {**method.call, **kind.inputs, **arguments(method.prediction.columns, kind.videos)}
            for kind in batches.kinds()
        )
        texts = batches.texts(config.train.steps)
        stacked = max(config.train.micro_batch, config.validation.batch) > 1
        encode_prompts(method.pipe, first, texts, Cache(config.data.cache), parallel.device, others, stacked)
    method.pipe.to(parallel.device)
    trainer.inputs = parallel.on_main(lambda: fingerprints(config))
    if resume:
        trainer.saved = take_up(config, trainer.state, trainer.validation, trainer.inputs)
    if parallel.is_main:
        trainer.folder.clean()
        trainer.folder.write(trainer.folder.config, header(config) + to_yaml(config))
        trainer.folder.note_environment(environment(parallel.device, parallel.world))
    trainer.observers.open()
