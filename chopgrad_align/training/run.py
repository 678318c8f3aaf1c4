"""The one trainer: LoRA on a pipeline's denoiser, by the gradient of rewards on its decoded pixels."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from ..common.errors import UsageError
from ..data.cache import Cache
from ..data.order import mix
from ..evaluation.curves import draw_curves
from ..evaluation.heldout import Paired, paired
from ..evaluation.report import write_report
from ..evaluation.sheet import draw_samples
from ..objective.objective import Objective, Statistics, Term
from ..objective.reward import FrameReward, check_reward
from ..sampling.predictions.columns import arguments
from ..sampling.rollout import check_call
from ..sampling.steps import LastSteps
from .batches import held_out_seed, on_device
from .config import Config, load_config, to_yaml
from .data import Data, clip_encoder, read_data
from .encoded_prompts import encode_prompts
from .folder import RunFolder, said_in_words
from .lora import add_lora, load_lora_state, lora_config, lora_parameters, lora_state, save_lora
from .measurement import evaluate, heldout_row
from .methods.direct import Trainee
from .models import check_model, check_prediction, load_objective, load_pipeline
from .phases import Phases
from .prefetch import Prefetched

_MOST_SKIPS = 3  # non-finite steps in a row
_STATISTICS = ("initial_statistics", "running_statistics")  # of normalized rewards, in progress.json
# What a resumed run may have another of.
_FREE = (
    *("run.folder", "run.threads", "data.cache", "train.steps", "train.micro_batch"),
    *("validation.every", "validation.videos", "validation.batch", "checkpoint.", "trackers"),
    *("model.gradient_checkpointing", "model.fps", "gradient.cache", "gradient.checkpoint", "gradient.rows"),
)


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
    data = check_files(config, resume)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=config.trackers or None, project_dir=config.run.folder
    )
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    local = config.train.batch_size // world
    together = min(config.train.micro_batch, max(local, 1))
    if config.train.batch_size % (world * together):
        raise UsageError(
            f"train.batch_size={config.train.batch_size} must be a multiple of processes × micro_batch = "
            f"{world} × {together}"
        )
    if config.validation.pairs < world:
        raise UsageError(
            f"validation.pairs={config.validation.pairs} must be at least the number of processes, {world}"
        )
    if device.type == "cpu":
        torch.set_num_threads(config.run.threads or _share_of_the_cores())
    pipe = load_pipeline(config.model)
    check_prediction(pipe, config)
    call = dict(config.model.call)
    for shape in data.shapes(call):
        check_call(pipe, {**shape, **config.prediction.columns})
    objective = load_objective(config.rewards, device, config.losses)
    prediction = config.prediction.policy(clip_encoder(config))
    batches = data.batches(pipe, objective, config)
    _check_rewards(objective, batches.prompts(0), call, device)
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
    if config.model.encode_prompts_once:
        # The rest of the pipeline waits on the CPU.
        pair = batches.held_out(range(1))
        inputs = {**call, **pair.inputs, **arguments(prediction.columns, pair.videos)}
        encode_prompts(pipe, inputs, batches.prompts(config.train.steps), Cache(config.data.cache), device)
    pipe.to(device)

    # State: the LoRA and its optimizer, the spread of rewards, and how far they are.
    optimizer = torch.optim.AdamW(
        parameters, lr=config.train.learning_rate, betas=config.train.betas, weight_decay=config.train.weight_decay
    )
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
    accelerator.init_trackers("chopgrad_align")

    def measure(step: int, name: str) -> tuple[list[float], list[str]]:
        """The objective and the prompt of each held-out pair."""
        nonlocal initial
        for denoiser in denoisers.values():
            denoiser.eval()
        videos = (folder.samples / name, config.validation.videos, config.model.fps)
        share = evaluate(
            pipe,
            call,
            prediction,
            objective,
            batches,
            config.validation.pairs,
            config.validation.batch,
            (rank, world),
            videos,
        )
        shares = gather_object([share])
        terms = {name: [v for s in shares for v in s.terms[name]] for name in objective.terms}
        weights = {name: [w for s in shares for w in s.weights[name]] for name in objective.terms}
        initial = initial or objective.first_statistics(terms)
        raw = {name: torch.tensor(values, dtype=torch.float64) for name, values in terms.items()}
        prompts = [prompt for s in shares for prompt in s.prompts]
        totals = torch.stack([*objective.values(raw, weights, initial).values()]).sum(0).tolist()
        row = heldout_row(step, totals, terms)
        if accelerator.is_main_process:
            folder.append(row)
            folder.write(folder.samples / "prompts.json", json.dumps(prompts))
        accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
        return totals, prompts

    def measure_if_due(step: int) -> None:
        if config.validation.every and step % config.validation.every == 0 and 0 < step < config.train.steps:
            measure(step, f"step-{step:06d}")

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
        before, _ = measure(0, "before")
        if not all(map(math.isfinite, before)):
            raise UsageError(
                f"the reward of a held-out video of the model as it is, untrained, is not finite: {before}"
            )
        running = initial
        save(0)
    elif not folder.measured(first):  # killed between the checkpoint and its measurement
        measure_if_due(first)

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
        prediction=prediction,
    )
    skips_in_a_row = 0
    bar = tqdm(
        range(first, config.train.steps), initial=first, total=config.train.steps, disable=rank != 0, desc="align"
    )
    starts = range(rank * local, (rank + 1) * local, together)
    parts = [range(start, start + together) for start in starts]
    asked = ((step, places) for step in range(first, config.train.steps) for places in parts)
    with Prefetched(batches.micro_batch, asked) as micro_batches:
        for step in bar:
            for denoiser in denoisers.values():
                denoiser.train(config.lora.dropout > 0)
            torch.manual_seed(mix(config.run.seed, step, rank))  # dropout, and whatever a decoder draws
            for group in optimizer.param_groups:
                group["lr"] = config.train.learning_rate * min(1.0, (step + 1) / max(1, config.train.warmup_steps))

            # This process's part of the batch, a micro-batch at a time.
            results = []
            for _ in parts:
                with phases("data"):
                    micro_batch = on_device(next(micro_batches), device)
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
            measure_if_due(done)

    # After.
    if accelerator.is_main_process:
        with said_in_words(folder.path):
            save_lora(pipe, denoisers, adapter, folder.lora)
    after, prompts = measure(config.train.steps, "after")
    conditions = data.conditions(len(before))
    result = paired(before, after, conditions)
    if accelerator.is_main_process:
        held = {
            "before": before,
            "after": after,
            "prompts": prompts,
            "conditions": conditions,
            "seeds": [held_out_seed(i) for i in range(len(prompts))],
        }
        with said_in_words(folder.path):
            folder.write(folder.held_out, json.dumps(held))
            draw_curves(folder.path)
            draw_samples(folder.path)
            write_report(folder.path)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # also ends the process group
    return result if accelerator.is_main_process else None


def _share_of_the_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _header(config: Config) -> str:
    return f"# accelerate launch scripts/align.py --config {Path(config.run.folder) / 'config.yaml'} run.folder=NEW\n"


def _check_rewards(objective: Objective, prompts: list[str], call: dict[str, Any], device: torch.device) -> None:
    size, frames = (call.get("height"), call.get("width")), call.get("num_frames", 5)
    for name, term in objective.terms.items():
        if not isinstance(term, Term):
            continue
        check_reward(
            term.reward,
            name,
            prompts=(prompts * 2)[:2],  # there may be one
            # Frames that are scored alone need no more than a few; a model of whole videos may need all.
            frames=min(frames, 5) if isinstance(term.reward, FrameReward) else frames,
            size=(64, 64) if None in size else size,  # type: ignore[arg-type]
            device=device,
        )


def _sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Over the processes; what no process has a gradient of keeps none, so that weight decay leaves it alone too."""
    if accelerator.num_processes == 1:
        return
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    somewhere = accelerator.reduce(reached, "sum").tolist()
    parameters = [parameter for parameter, count in zip(parameters, somewhere, strict=True) if count]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)
