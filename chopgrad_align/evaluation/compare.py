"""Methods that predict a video, compared on the same clips: figures, videos side by side, and one page of both."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..common.errors import UsageError
from ..common.files import whole_file
from ..data.clips import Clip
from ..data.video import write_video
from .crops import Crop, CropSearch
from .estimates import TARGET, Table, make_table
from .metrics import Metric, SetMetric
from .page import data_uri, write_page
from .side_by_side import side_by_side

Method = Callable[[Clip], Tensor]
"""A clip -> the predicted video `(F, 3, H, W)` in [0, 1], of the target's shape. It must not look at the target."""

_SHOWN_AS_INPUT = ("degraded", "control")
INPUT = "input"


@dataclass(frozen=True)
class _Shown:
    """A picture or video of the page."""

    uri: str
    caption: str


def input_video(clip: Clip) -> Tensor:
    """The method that does nothing: the degraded (or control) video itself, as the data gives it.

    Data sets of clips bring a degraded video back to the target's size by bicubic interpolation, so for
    super-resolution this is the bicubic baseline.

    Raises:
        UsageError: The clip has neither.
    """
    shown = _given(clip)
    if shown is None:
        raise UsageError(
            f"clip {clip.name!r} has no {' or '.join(_SHOWN_AS_INPUT)} video; leave out the method 'input'"
        )
    return shown


def target_video(clip: Clip) -> Tensor:
    """The method that knows the answer: what each metric says of it is where a perfect result would be."""
    return clip.videos["target"]


def compare(
    methods: Mapping[str, Method],
    clips: Iterable[Clip],
    metrics: Mapping[str, Metric | SetMetric],
    folder: str | Path,
    *,
    reference: str | None = None,
    videos: int = 8,
    device: torch.device | str = "cpu",
) -> Table:
    """Run every method on every clip, one clip in memory at a time, and write what comes out into a new folder.

    `metrics.csv` has a row a clip and method, and is written as they are done; `table.md` the means with standard
    errors and the paired differences; `videos/` the first clips side by side; `index.html` all of it on a page that
    needs no other file, with the squares in which each method gains and loses most against the reference.

    Args:
        methods: In the order of the table.
        clips: With `target`.
        metrics: As `load_metrics` returns them, loaded on `device`.
        folder: Must not exist.
        reference: The method that differences are taken to; default: the first.
        videos: How many clips are written as videos.
        device: Where metrics are computed.

    Returns:
        The table.

    Raises:
        UsageError: The folder exists, there are no methods, metrics or clips, a method returns something else than a
            video of the target's shape in [0, 1], or a metric cannot be computed.
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists, and nothing is overwritten; choose another folder")
    if not (methods and metrics):
        raise UsageError(f"expected at least one method and one metric, got {len(methods)} and {len(metrics)}")
    reference = next(iter(methods)) if reference is None else reference
    if reference not in methods:
        raise UsageError(f"the reference {reference!r} is not one of the methods: {', '.join(methods)}")
    figures = _Figures(methods, metrics)
    competitors = [method for method in methods if method not in (reference, TARGET)]
    searches = [CropSearch(method, reference) for method in competitors] or [CropSearch(reference, None)]
    shown: list[_Shown] = []
    count = 0

    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["index", "clip", "method", *figures.of_clips])
        for count, clip in enumerate(clips, 1):
            target = _target(clip).to(device)
            predictions = {name: _checked(method(clip), target, name, clip) for name, method in methods.items()}
            for name, found in figures.add(predictions, clip).items():
                rows.writerow([count - 1, clip.name, name, *found])
            file.flush()  # what is done stays, whatever comes
            given = _given(clip)
            columns = ({} if given is None else {INPUT: given.to(device)}) | predictions
            for search in searches:
                search.look(clip.name, columns, target)
            if count <= videos:
                path = folder / "videos" / f"{count - 1:03}-{_slug(clip.name)}.mp4"
                write_video(path, side_by_side({**columns, TARGET: target}), clip.fps)
                shown.append(
                    _Shown(
                        data_uri(path.read_bytes(), "video/mp4"),
                        f"{clip.name}: {clip.caption}" if clip.caption else clip.name,
                    )
                )
    if not count:
        raise UsageError("there are no clips to compare methods on; look at the data set and at the count")

    table = figures.table(reference, count)
    with whole_file(folder / "table.md") as partial:
        partial.write_text(table.markdown(), encoding="utf-8")
    _write_page(folder / "index.html", table, shown, searches)
    return table


class _Figures:
    """Results of every method: values of each clip, and the features of sets."""

    def __init__(self, methods: Iterable[str], metrics: Mapping[str, Metric | SetMetric]) -> None:
        self.of_clips = {name: metric for name, metric in metrics.items() if isinstance(metric, Metric)}
        self._of_sets = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
        self._higher_is_better = {name: metric.higher_is_better for name, metric in metrics.items()}
        self._values: dict[str, dict[str, list[float]]] = {m: {name: [] for name in self.of_clips} for m in methods}
        self._features: dict[str, dict[str, list[Tensor]]] = {m: {n: [] for n in self._of_sets} for m in methods}
        self._target_features: dict[str, list[Tensor]] = {name: [] for name in self._of_sets}

    def add(self, predictions: Mapping[str, Tensor], clip: Clip) -> dict[str, list[float]]:
        """Measure a clip; for each method its values, in the order of `of_clips`."""
        like = next(iter(predictions.values()))
        clip = replace(clip, videos={role: video.to(like) for role, video in clip.videos.items()})
        target = clip.videos["target"]
        for name, set_metric in self._of_sets.items():
            self._target_features[name].append(set_metric.features(target))
            for method, video in predictions.items():
                self._features[method][name].append(set_metric.features(video))
        for method, video in predictions.items():
            for name, metric in self.of_clips.items():
                self._values[method][name].append(metric.of_clip(video, clip))
        return {method: [values[-1] for values in self._values[method].values()] for method in predictions}

    def table(self, reference: str, clips: int) -> Table:
        targets = {name: torch.stack(features) for name, features in self._target_features.items()}
        of_sets = {
            method: {n: self._of_sets[n].distance(torch.stack(f), targets[n]) for n, f in features.items()}
            for method, features in self._features.items()
        }
        notes = [f"{name}: {metric.note(targets[name])}." for name, metric in self._of_sets.items()]
        return make_table(self._values, of_sets, self._higher_is_better, reference, clips, notes)


def _given(clip: Clip) -> Tensor | None:
    return next((clip.videos[role] for role in _SHOWN_AS_INPUT if role in clip.videos), None)


def _target(clip: Clip) -> Tensor:
    if "target" not in clip.videos:
        raise UsageError(
            f"clip {clip.name!r} has no target to compare with, only {', '.join(clip.videos) or 'nothing'}"
        )
    return clip.videos["target"]


def _checked(video: Tensor, target: Tensor, method: str, clip: Clip) -> Tensor:
    where = f"method {method!r} on clip {clip.name!r}"
    if video.shape != target.shape:
        raise UsageError(
            f"{where}: expected a video of the target's shape {tuple(target.shape)}, got {tuple(video.shape)}"
        )
    video = video.detach().to(target)
    lowest, highest = video.min().item(), video.max().item()
    if not (lowest > -0.01 and highest < 1.01):  # written so that NaN fails too
        raise UsageError(f"{where}: expected pixels in [0, 1], got [{lowest:.3g}, {highest:.3g}]")
    return video.clamp(0, 1)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name.rsplit(".", 1)[0]).strip("-")[-60:] or "clip"


def _write_page(path: Path, table: Table, videos: list[_Shown], searches: list[CropSearch]) -> None:
    write_page(
        path,
        "compare.html",
        table=table,
        videos=videos,
        searches=[
            (search.method, search.reference, [*map(_picture, search.best)], [*map(_picture, search.worst)])
            for search in searches
        ],
    )


def _picture(crop: Crop) -> _Shown:
    sheet = side_by_side(crop.pictures, narrowest=128)[0]
    content = io.BytesIO()
    Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy()).save(content, format="png")
    error = f"mean squared error {crop.error:.2g}"
    if crop.reference_error is not None:
        error += f", of the reference {crop.reference_error:.2g}"
    return _Shown(data_uri(content.getvalue(), "image/png"), f"{crop.clip}, frame {crop.frame}: {error}")
