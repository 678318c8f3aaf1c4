"""Score the same held-out pairs of condition and seed, whatever the LoRA is at the moment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.video import write_video
from ..evaluation.witnesses import Witness, on_device
from ..objective.objective import Objective
from ..objective.terms import Reference
from ..sampling.predictions import Prediction
from .batches import Batches
from .methods.protocol import MicroBatch


@dataclass(frozen=True)
class Measurement:
    """Findings of one held-out measurement: lists have an entry for each pair, in an order that is always the same.

    Attributes:
        step: Optimizer steps before it; 0 for the base model.
        objective: What should rise.
        terms: Scores of each term of the objective.
        witnesses: Values of each witness; one that has no value for any pair is left out.
        prompts: Of each pair.
        conditions: Equal for pairs of one condition.
    """

    step: int
    objective: list[float]
    terms: dict[str, list[float]]
    witnesses: dict[str, list[float]]
    prompts: list[str]
    conditions: list[int]

    def row(self) -> dict[str, float]:
        """A row of metrics: mean of the objective, its standard error, and means of terms and witnesses.

        Values that are not finite are left out.
        """
        total = torch.tensor([value for value in self.objective if math.isfinite(value)], dtype=torch.float64)
        return {
            "step": self.step,
            "heldout/reward_mean": total.mean().item(),
            "heldout/reward_stderr": total.std().item() / len(total) ** 0.5 if len(total) > 1 else math.nan,
            **{f"heldout/{name}": _mean_of_numbers(values) for name, values in self.terms.items()},
            **{f"heldout/witness/{name}": _mean_of_numbers(values) for name, values in self.witnesses.items()},
        }

    def to_json(self) -> str:
        """JSON, with null for what is not finite."""
        return json.dumps(with_nulls(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """The measurement that `to_json` wrote."""
        saved = json.loads(text)
        lists = {name: {k: _with_nan(v) for k, v in saved[name].items()} for name in ("terms", "witnesses")}
        return cls(**{**saved, **lists, "objective": _with_nan(saved["objective"])})


def comparison(measured: Sequence[Measurement], after: Measurement) -> dict[str, Any]:
    """Base model and exported model side by side, for JSON: for each pair the objective, terms and witnesses.

    Args:
        measured: The base model's, and those after it.
        after: The one of the model that is exported.
    """
    before, last = measured[0], measured[-1]
    sides = {"before": before, "after": after} | ({} if last is after else {"last": last})

    def each(of: Callable[[Measurement], dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
        return {n: {s: of(m)[n] for s, m in sides.items() if n in of(m)} for n in of(before) if n in of(after)}

    return with_nulls(
        {
            **{side: measurement.objective for side, measurement in sides.items()},
            "steps": {side: measurement.step for side, measurement in sides.items()},
            "prompts": after.prompts,
            "conditions": after.conditions,
            "terms": each(lambda m: m.terms),
            "witnesses": each(lambda m: m.witnesses),
        }
    )


def with_nulls(tree: Any) -> Any:
    """A tree of lists and dicts in which numbers that JSON lacks are None."""
    if isinstance(tree, dict):
        return {key: with_nulls(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_nulls(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _with_nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _mean_of_numbers(values: Sequence[float]) -> float:
    return fmean(numbers) if (numbers := [v for v in values if math.isfinite(v)]) else math.nan


@dataclass(frozen=True)
class Scores:
    """The prompt, the score of each term, how much it counts, and what each witness kept, for each pair in order."""

    prompts: list[str]
    terms: dict[str, list[float]]
    weights: dict[str, list[float]]
    kept: dict[str, list[Tensor]]

    def without_first(self, count: int) -> Scores:
        """These scores but for those of the first pairs."""

        def rest(lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {name: of[count:] for name, of in lists.items()}

        return Scores(self.prompts[count:], rest(self.terms), rest(self.weights), rest(self.kept))


def joined(shares: Sequence[Scores]) -> Scores:
    """The scores of all pairs from those of each process."""

    def lists(of: Callable[[Scores], dict[str, list[Any]]]) -> dict[str, list[Any]]:
        return {name: [item for share in shares for item in of(share)[name]] for name in of(shares[0])}

    prompts = [prompt for share in shares for prompt in share.prompts]
    return Scores(prompts, lists(lambda s: s.terms), lists(lambda s: s.weights), lists(lambda s: s.kept))


@torch.no_grad()
def evaluate(
    pipe: Any,
    call: dict[str, Any],
    prediction: Prediction,
    objective: Objective,
    witnesses: Mapping[str, Witness],
    batches: Batches,
    pairs: int,
    batch: int,
    share: tuple[int, int] = (0, 1),
    videos: tuple[Path, int, float] | None = None,
    interrupted: Callable[[], int] = lambda: 0,
) -> Scores:
    """Score this process's share of the held-out pairs; random frames are those of the pair's seed.

    Every process makes equally many calls of the pipeline, since processes may share one model: where pairs do not go
    round, the last ones repeat pairs of others, and drop the scores.

    Args:
        witnesses: Observe the videos beside the objective.
        pairs: How many there are.
        batch: How many are predicted at a time.
        share: This process's rank and the number of processes.
        videos: Folder, number and frames per second of the mp4 files to write, of the first pairs of all; conditions
            and targets, if there are any, go into folders beside it, once.
        interrupted: Asked before each batch, and of one mind in all processes; the rest is left out if it is not 0.

    Returns:
        The scores of the share.
    """
    rank, world = share
    count = math.ceil(pairs / world)
    start = min(rank * count, pairs - count)
    repeated, stop = min(rank * count - start, count), start + count
    terms = list(objective.terms)
    scores = Scores([], {n: [] for n in terms}, {n: [] for n in terms}, {n: [] for n in witnesses})
    with (
        tqdm(total=stop - start, desc="held-out", leave=False, disable=rank != 0) as bar,
        on_device(witnesses, pipe.device),
    ):
        for first in range(start, stop, batch):
            if interrupted():
                break
            places = range(first, min(first + batch, stop))
            chosen = batches.held_out(places)
            video, reference = predict(pipe, call, prediction, chosen, objective.reads_latents)
            scores.prompts.extend(chosen.prompts)
            for name, values in objective.scores(video, chosen.prompts, chosen.frame_seeds, reference).items():
                scores.terms[name] += values.tolist()
                scores.weights[name] += (chosen.weights or {}).get(name, [1.0] * len(values))
            for name, witness in witnesses.items():
                scores.kept[name] += witness.observe(video, chosen.prompts, chosen.frame_seeds).cpu().unbind()
            if videos is not None:
                with pictures("a sample video"):
                    _write_videos(*videos, places, video, chosen, repeated=start + repeated)
            bar.update(len(places))
    return scores.without_first(repeated)


def _write_videos(
    folder: Path, count: int, fps: float, places: range, video: Tensor, chosen: MicroBatch, repeated: int
) -> None:
    shown = {folder: video} | {folder.with_name(role): clips for role, clips in chosen.videos.items()}
    for into, clips in shown.items():
        for place, clip in zip(places, clips, strict=True):
            path = into / f"{place:03d}.mp4"
            if repeated <= place < count and (into == folder or not path.exists()):
                write_video(path, clip.expand(-1, 3, -1, -1).float().cpu().clamp(0, 1), fps)


@contextmanager
def pictures(what: str) -> Iterator[None]:
    """A block that may fail and then is said to have: scores and weights do not wait for what only shows them."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        tqdm.write(f"{what} could not be made, and the run goes on without it ({reason})")


def predict(
    pipe: Any, call: dict[str, Any], prediction: Prediction, batch: MicroBatch, latents: bool = False
) -> tuple[Tensor, Reference]:
    """Videos `(B, F, 3, H, W)` in [0, 1] by the pipeline's plain call, and what to compare them with."""
    with prediction.prepare(pipe, batch.videos, batch.seeds, False, latents) as begun:
        video = pipe(**call | dict(batch.inputs) | dict(begun.inputs), output_type="pt").frames
    return video, begun.reference()
