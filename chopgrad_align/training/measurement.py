"""Score the same held-out pairs of condition and seed, whatever the LoRA is at the moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.order import mix
from ..data.video import write_video
from ..evaluation.witnesses import Witness, observe, on_device
from ..objective.objective import Objective
from ..objective.terms import Reference
from ..sampling.outputs import frames_of, sound_of, sound_rate
from ..sampling.predictions import Prediction
from ..sampling.randomness import seeded
from .batches import Batches
from .known_samples import known_samples
from .methods.protocol import MicroBatch


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
    shown: bool = True,
) -> Scores:
    """Score one share of the held-out pairs; random frames are those of the pair's seed.

    Every process makes equally many calls of the pipeline, since processes may share one model: where pairs do not go
    round, the last ones repeat pairs of others, and drop the scores.

    Args:
        witnesses: Observe the videos beside the objective.
        pairs: How many there are.
        batch: How many are predicted at a time.
        share: Which one, of how many.
        videos: Folder, number and frames per second of the mp4 files to write, of the first pairs of all; conditions
            and targets, if there are any, go into folders beside it, once.
        interrupted: Asked before each batch, and of one mind in all processes; the rest is left out if it is not 0.
        shown: Whether there is a bar.

    Returns:
        The scores of the share.
    """
    place, shares = share
    count = math.ceil(pairs / shares)
    start = min(place * count, pairs - count)
    repeated, stop = min(place * count - start, count), start + count
    terms = list(objective.terms)
    scores = Scores([], {n: [] for n in terms}, {n: [] for n in terms}, {n: [] for n in witnesses})
    with (
        tqdm(total=stop - start, desc="held-out", leave=False, disable=not shown) as bar,
        on_device(witnesses, pipe.device),
    ):
        for first in range(start, stop, batch):
            if interrupted():
                break
            places = range(first, min(first + batch, stop))
            chosen = batches.held_out(places)
            reads = objective.reads_sample or any(witness.reads_sample for witness in witnesses.values())
            sound = objective.reads_audio or any(witness.reads_audio for witness in witnesses.values())
            video, reference = predict(pipe, call, prediction, chosen, objective.reads_latents, reads, sound)
            scores.prompts.extend(chosen.prompts)
            for name, values in objective.scores(video, chosen.prompts, chosen.frame_seeds, reference).items():
                scores.terms[name] += values.tolist()
                scores.weights[name] += (chosen.weights or {}).get(name, [1.0] * len(values))
            for name, witness in witnesses.items():
                kept = observe(witness, video, chosen.prompts, chosen.frame_seeds, reference.sample)
                scores.kept[name] += kept.cpu().unbind()
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
    pipe: Any,
    call: dict[str, Any],
    prediction: Prediction,
    batch: MicroBatch,
    latents: bool = False,
    sample: bool = False,
    audio: bool = False,
) -> tuple[Tensor, Reference]:
    """Videos `(B, F, 3, H, W)` in [0, 1] by the pipeline's plain call, and what to compare them with.

    Args:
        pipe: A diffusers pipeline.
        call: Arguments of its call that are the same for all videos.
        prediction: The way in which the call predicts a video.
        batch: On the pipeline's device.
        latents: Whether true latents are wanted.
        sample: Whether it is wanted what the data say of each video.
        audio: Whether the sound is wanted there.
    """
    with prediction.prepare(pipe, batch.videos, batch.seeds, False, latents) as begun:
        inputs = call | dict(batch.inputs) | dict(begun.inputs)
        with seeded(pipe, inputs.get("generator"), mix(*batch.seeds)):
            output = pipe(**inputs, output_type="pt")
    reference = begun.reference()
    if sample:
        sound = [*sound_of(output)] if audio else []
        reference = replace(reference, sample=known_samples(batch, pipe.device, sound, sound_rate(pipe)))
    return frames_of(pipe, output), reference
