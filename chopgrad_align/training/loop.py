"""The one trainer: LoRA on a pipeline's denoiser, by the gradient of rewards on its decoded pixels."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from ..data.prompts import Condition, read_conditions
from ..errors import UsageError
from ..evaluation.curves import draw_curves
from ..evaluation.heldout import Paired, paired
from ..evaluation.report import write_report
from ..evaluation.sheet import draw_samples
from ..objective import Objective, Statistics
from ..reward import FrameReward, check_reward
from ..rollout import check_call
from ..steps import LastSteps
from .config import Config, load_config, to_yaml
from .evaluate import Scores, evaluate, held_out_pairs, pipeline_inputs, term_weights
from .folder import RunFolder, said_in_words
from .lora import add_lora, load_lora_state, lora_config, lora_parameters, lora_state, save_lora
from .models import check_model, load_objective, load_pipeline
from .phases import Phases
from .step import MicroBatch, Trainee

_MOST_SKIPS = 3  # non-finite steps in a row
_STATISTICS = ("initial_statistics", "running_statistics")  # of normalized rewards, in progress.json


def check_files(config: Config, resume: bool) -> tuple[list[Condition], list[Condition]]:
    """What can be checked without loading anything; returns the training and the held-out conditions.

    Raises:
        UsageError: A run folder, prompt file, model, batch size or tracker that cannot work.
    """
    folder = RunFolder(config.run.folder)
    folder.check(resume)
    if resume:
        _expect_same_run(config, folder)
    conditions = read_conditions(config.data.train), read_conditions(config.data.held_out)
    check_model(config.model)
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UsageError(f"trackers: {tracker} is not installed: pip install 'chopgrad-align[track]'")
    for condition in itertools.chain(*conditions):
        for name in condition.weights:
            if name not in config.rewards:
                near = difflib.get_close_matches(name, config.rewards, 1, cutoff=0)[0]
                raise UsageError(f"data: no reward is called as in the column 'weight.{name}'; the nearest is {near!r}")
    train, validation = config.train, config.validation
    if any(c.image for both in conditions for c in both) and max(train.micro_batch, validation.batch) > 1:
        raise UsageError("pipelines take one image a call: set train.micro_batch=1 and validation.batch=1")
    return conditions


def _expect_same_run(config: Config, folder: RunFolder) -> None:
    """A resumed run may be longer, and be watched otherwise, but must compute the same."""

    def comparable(c: Config) -> dict[str, str]:
        sections = {name: repr(getattr(c, name)) for name in ("model", "data", "rewards", "lora", "gradient")}
        train = {f"train.{k}": repr(v) for k, v in vars(c.train).items() if k not in ("steps", "micro_batch")}
        return {**sections, **train, "run.seed": repr(c.run.seed), "validation.pairs": repr(c.validation.pairs)}

    saved, asked = comparable(load_config(folder.config)), comparable(config)
    for key, value in asked.items():
        if saved[key] != value:
            raise UsageError(f"--resume: {key} differs from the run in {folder.path}: it has {saved[key]}, not {value}")


def train(config: Config, resume: bool = False, dry_run: bool = False) -> Paired | None:
    """Train, measure, save and report; the main process returns the held-out comparison of before and after.

    All randomness is a function of the seed, the step and the sample, so that a resumed run is the same run, and that
    the number of processes and the size of micro-batches change rounding only. The exception is what layers draw
    as they run, the masks of `lora.dropout` > 0 and noise that a decoder injects: that is seeded by the step and the
    process, and drawn in the order of the micro-batches, so that results then depend on both numbers.

    Raises:
        UsageError: Anything about the config that can be known before long work; a reward that breaks its contract;
            three steps in a row whose loss or gradient is not finite.
    """
    # Everything that can be wrong is looked at first, the cheap things before the slow ones.
    training, held_out = check_files(config, resume)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=config.trackers or None, project_dir=config.run.folder
    )
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    local = config.train.batch_size // world
    if config.train.batch_size % (world * config.train.micro_batch):
        raise UsageError(
            f"train.batch_size={config.train.batch_size} must be a multiple of processes × micro_batch = "
            f"{world} × {config.train.micro_batch}"
        )
    if config.validation.pairs < world:
        raise UsageError(
            f"validation.pairs={config.validation.pairs} must be at least the number of processes, {world}"
        )
    pipe = load_pipeline(config.model, device)
    call = dict(config.model.call)
    check_call(pipe, call)
    objective = load_objective(config.rewards, device)
    _check_rewards(objective, [c.prompt for c in (held_out * 2)[:2]], call, device)
    adapter = lora_config(config.lora.rank, config.lora.alpha, config.lora.targets, config.lora.dropout)
    torch.manual_seed(config.run.seed)  # the LoRA's first weights
    denoisers = add_lora(pipe, adapter)
    if config.model.gradient_checkpointing:
        for denoiser in denoisers.values():
            denoiser.enable_gradient_checkpointing()
    parameters = lora_parameters(denoisers)
    count = sum(p.numel() for p in parameters)
    # Weights and AdamW's two moments in float32; a new checkpoint is complete before the oldest goes.
    folder = RunFolder(config.run.folder)
    folder.check_space(3 * 4 * count * (config.checkpoint.keep + 1))
    if accelerator.is_main_process:
        names = ", ".join(
            f"{t.weight:g} × {name}{' (normalized)' * t.normalize}" for name, t in objective.terms.items()
        )
        print(
            f"{config.model.name}: {count:,} trained weights; objective: {names}; {world} process(es) on {device.type}"
        )
    if dry_run:
        return None

    # State: the LoRA and its optimizer, the spread of rewards, and how far they are.
    optimizer = torch.optim.AdamW(
        parameters, lr=config.train.learning_rate, betas=config.train.betas, weight_decay=config.train.weight_decay
    )
    pairs = held_out_pairs(held_out, config.validation.pairs)
    first, skipped, before = 0, 0, None
    initial: dict[str, Statistics] = {}  # of the model as it was: with these held-out scores stay comparable
    running: dict[str, Statistics] = {}
    if resume:
        latest = folder.latest_checkpoint()
        load_lora_state(denoisers, latest / "lora.safetensors")
        optimizer.load_state_dict(torch.load(latest / "optimizer.pt", map_location="cpu", weights_only=True))
        progress = json.loads((latest / "progress.json").read_text())
        first, skipped, before = progress["step"], progress["skipped"], progress["before"]
        initial, running = ({name: Statistics(**s) for name, s in progress[key].items()} for key in _STATISTICS)
    if accelerator.is_main_process:
        if resume:
            folder.rewind(first)
        folder.write(folder.config, _header(config) + to_yaml(config))
        folder.write(folder.samples / "prompts.json", json.dumps([c.prompt for c, _ in pairs]))
    accelerator.init_trackers("chopgrad_align")

    def measure(step: int, name: str) -> Scores:
        nonlocal initial
        for denoiser in denoisers.values():
            denoiser.eval()
        videos = (folder.samples / name, config.validation.videos, config.model.fps)
        share = evaluate(pipe, call, objective, pairs, config.validation.batch, (rank, world), videos)
        shares = gather_object([share])
        terms = {name: [v for s in shares for v in s[name]] for name in objective.terms}
        initial = initial or objective.first_statistics(terms)
        raw = {name: torch.tensor(values, dtype=torch.float64) for name, values in terms.items()}
        values = objective.values(raw, term_weights(objective, [c for c, _ in pairs]), initial)
        scores = Scores(torch.stack([*values.values()]).sum(0).tolist(), terms)
        if accelerator.is_main_process:
            folder.append(scores.row(step))
        accelerator.log({k: v for k, v in scores.row(step).items() if k != "step"}, step=step)
        return scores

    def save(step: int) -> None:
        if accelerator.is_main_process:
            with folder.checkpoint(step, config.checkpoint.keep) as path:
                # Through Python's own files, whose errors say what is wrong with the disk; torch's do not.
                (path / "lora.safetensors").write_bytes(safetensors.torch.save(lora_state(denoisers)))
                buffer = io.BytesIO()
                torch.save(optimizer.state_dict(), buffer)
                (path / "optimizer.pt").write_bytes(buffer.getvalue())
                state: dict[str, Any] = {"step": step, "skipped": skipped, "before": before}
                for key, statistics in zip(_STATISTICS, (initial, running), strict=True):
                    state[key] = {name: dataclasses.asdict(s) for name, s in statistics.items()}
                (path / "progress.json").write_text(json.dumps(state))
        accelerator.wait_for_everyone()

    # Before.
    if before is None:
        before = measure(0, "before").total
        if not all(map(math.isfinite, before)):
            raise UsageError(
                f"the reward of a held-out video of the model as it is, untrained, is not finite: {before}"
            )
        running = initial
        save(0)

    # Training.
    phases = Phases(device)
    trainee = Trainee(
        pipe=pipe,
        call=call,
        objective=objective,
        steps=LastSteps(config.gradient.last_steps),
        backprop=config.gradient.policy(),
        batch_size=config.train.batch_size,
        phases=phases,
    )
    skips_in_a_row = 0
    bar = tqdm(
        range(first, config.train.steps), initial=first, total=config.train.steps, disable=rank != 0, desc="align"
    )
    for step in bar:
        for denoiser in denoisers.values():
            denoiser.train(config.lora.dropout > 0)
        torch.manual_seed(_mix(config.run.seed, step, rank))  # dropout, and whatever a decoder draws
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate * min(1.0, (step + 1) / max(1, config.train.warmup_steps))

        # This process's part of the batch, a micro-batch at a time.
        chosen = _choose(len(training), config.train.batch_size, config.run.seed, step)
        results = []
        for start in range(rank * local, (rank + 1) * local, config.train.micro_batch):
            places = range(start, start + config.train.micro_batch)
            conditions = [training[chosen[i]] for i in places]
            seeds = [_mix(config.run.seed, step, i, 1) for i in places]
            micro_batch = MicroBatch(
                inputs=pipeline_inputs(pipe, conditions, seeds),
                prompts=[condition.prompt for condition in conditions],
                frame_seeds=[_mix(config.run.seed, step, i, 2) for i in places],
                weights=term_weights(objective, conditions),
            )
            results.append(trainee.accumulate(micro_batch, running))

        # The pipeline calls the bare denoiser, past the wrapper by which DistributedDataParallel would see the
        # backward pass: gradients are summed over processes here.
        with phases("step"):
            table = accelerator.gather(torch.cat(results)).cpu()  # a row for each video of the batch
            _sum_gradients(parameters, accelerator)
            norm = nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
            finite = math.isfinite(norm) and bool(torch.isfinite(table).all())
            if finite:
                optimizer.step()
                by_reward = dict(zip(objective.terms, table[:, 1:].T.tolist(), strict=False))
                running = {name: statistics.updated(by_reward[name]) for name, statistics in running.items()}
            optimizer.zero_grad(set_to_none=True)

        skips_in_a_row = 0 if finite else skips_in_a_row + 1
        skipped += not finite
        reward, *means = table.mean(0).tolist()
        row = {"step": step + 1, "reward": reward, "loss": -reward, "grad_norm": float(norm)}
        keys = [f"{name}/{kind}" for kind in ("score", "value") for name in objective.terms]
        row |= dict(zip(keys, means, strict=True))
        row |= {f"{name}/std": statistics.std for name, statistics in running.items()}
        row |= {"learning_rate": optimizer.param_groups[0]["lr"], "skipped": skipped, **phases.collect()}
        if accelerator.is_main_process:
            folder.append(row)
        accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step + 1)
        bar.set_postfix(reward=f"{row['reward']:.4f}", skipped=skipped)
        if skips_in_a_row == _MOST_SKIPS:
            raise UsageError(
                f"{_MOST_SKIPS} steps in a row, up to step {step + 1}, had a loss or gradient that is not finite "
                f"(reward {row['reward']:.4g}, gradient norm {row['grad_norm']:.4g}): lower train.learning_rate or "
                "gradient.last_steps, or use float32; the last checkpoint is whole"
            )

        # At intervals.
        done = step + 1
        if done == config.train.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
            save(done)
        if config.validation.every and done % config.validation.every == 0 and done < config.train.steps:
            measure(done, f"step-{done:06d}")

    # After.
    if accelerator.is_main_process:
        with said_in_words(folder.path):
            save_lora(pipe, denoisers, adapter, folder.lora)
    after = measure(config.train.steps, "after").total
    result = paired(before, after)
    if accelerator.is_main_process:
        held = {
            "before": before,
            "after": after,
            "prompts": [c.prompt for c, _ in pairs],
            "seeds": [s for _, s in pairs],
        }
        with said_in_words(folder.path):
            folder.write(folder.held_out, json.dumps(held))
            draw_curves(folder.path)
            draw_samples(folder.path)
            write_report(folder.path)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # also ends the process group
    return result if accelerator.is_main_process else None


def _header(config: Config) -> str:
    return f"# accelerate launch scripts/align.py --config {Path(config.run.folder) / 'config.yaml'} run.folder=NEW\n"


def _check_rewards(objective: Objective, prompts: list[str], call: dict[str, Any], device: torch.device) -> None:
    size, frames = (call.get("height"), call.get("width")), call.get("num_frames", 5)
    for name, term in objective.terms.items():
        check_reward(
            term.reward,
            name,
            prompts=prompts,
            # Frames that are scored alone need no more than a few; a model of whole videos may need all.
            frames=min(frames, 5) if isinstance(term.reward, FrameReward) else frames,
            size=(64, 64) if None in size else size,  # type: ignore[arg-type]
            device=device,
        )


def _choose(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Which conditions the batch of a step has: shuffled epochs, each condition once in each."""
    order: list[int] = []
    epoch, start = divmod(step * batch, count)
    while len(order) < start + batch:
        order += torch.randperm(count, generator=torch.Generator().manual_seed(_mix(seed, epoch))).tolist()
        epoch += 1
    return order[start : start + batch]


def _mix(*numbers: int) -> int:
    """A seed from several numbers (a multiplicative hash; 63 bits)."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return value


def _sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    flat = accelerator.reduce(flat, "sum")
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)
