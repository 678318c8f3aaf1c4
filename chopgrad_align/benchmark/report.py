"""The benchmark as a page: `benchmark.md` with its tables, `benchmark.json`, and the pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UsageError
from ..common.files import whole_file
from .cases import EMBEDDED
from .peers import PEERS
from .plots import draw_error, draw_influence, draw_memory, draw_ways, names_of
from .rows import EXACT, REFERENCE
from .speed import FORWARD

PAGE = """# Benchmark of decoding

What each way of backpropagating through a video decoder costs, and how far its gradient is from the exact one. The
first three curves are those of the ChopGrad paper (arXiv 2603.17812). Made by

```bash
{command}
```

on {machine}: {vae}, {clips} of {frames} frames of {size}, {groups} groups of latents, {dtype}. All figures are in
[benchmark.json](benchmark.json).

## Memory

![Peak memory against the number of frames](benchmark_memory.png)

Peak of decoding, loss and backward of one clip in MiB, besides weights and latents; {counted}.
Decoded pixels and their cotangents are in it, but for `fused`, which holds those of one group.

{memory}

## Influence of latents on later frames

![Influence of a latent group against temporal distance](benchmark_influence.png)

How far a pixel moves (root mean square) when the latents of an earlier group are moved by white noise of unit
variance. That is a Jacobian's Frobenius norm over the root of the number of pixels, estimated from random cotangents
({probes} for each group). Least squares on the logarithm give {scale:.3g} · {factor:.3f}^distance (R² =
{r_squared:.3f}): each further group leaves {factor:.0%} of the influence.

{influence}

## Error of a truncated gradient

![Cosine and relative error against truncation distance](benchmark_error.png)

Against plain autograd, as lowest to highest over {cases} cases: a loss to a target and a colour reward, on each clip.
{lora}

{error}

## Time, memory and direction of every way

![Cosine, memory and time of every way](benchmark_ways.png)

Time is the ratio of medians to plain autograd, with quartiles, over {repetitions} interleaved repetitions on the first
clip; plain autograd took {seconds}.
Cosine is that to the exact gradient of the latents, lowest to highest over the cases; memory is as above. A row named
`fused` is `decode_loss`; `bfloat16`, `channels_last_3d` and `torch.compile` change the VAE. Other projects' ways are
written here from their descriptions, kindly where they leave a choice: VADER scores one frame, VideoX-Fun the frames of
the first latents, DOVE decodes each latent alone, UniRL decodes the whole clip in tiles that are recomputed.

{ways}
{goals}"""


FIGURES = "benchmark.json"


def check_new(folder: Path) -> None:
    """Raise a UsageError if a folder holds figures of an earlier run."""
    if (folder / FIGURES).exists():
        raise UsageError(f"{folder} holds a benchmark already, and none is overwritten: choose another --out")


def read_figures(path: Path) -> dict[str, Any]:
    """The results of an earlier run.

    Raises:
        UsageError: The file cannot be read, or holds something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--figures: cannot read {path}: {error}; give the {FIGURES} of a run") from error
    if not isinstance(results, dict) or not {"command", "settings", "memory", "speed"} <= results.keys():
        raise UsageError(f"--figures: {path} holds no benchmark; give the {FIGURES} of a run")
    return results


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write JSON, pictures and page into a folder, which is made; returns the page's path.

    Raises:
        UsageError: The folder cannot be written to.
    """
    draw_memory(results["memory"], folder / "benchmark_memory.png")
    draw_influence(results["influence"], folder / "benchmark_influence.png")
    draw_error(results, folder / "benchmark_error.png")
    draw_ways(results, folder / "benchmark_ways.png")
    with whole_file(folder / FIGURES) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with whole_file(folder / "benchmark.md") as partial:
        partial.write_text(page(results), encoding="utf-8")
    return folder / "benchmark.md"


def page(results: dict[str, Any]) -> str:
    """The page, in Markdown."""
    settings, machine = results["settings"], results["machine"]
    memory, influence, error, speed = (results[part] for part in ("memory", "influence", "error", "speed"))
    lora = results.get("lora_error")
    cuda = settings["device"] == "cuda"
    distances = [f"Truncated({distance})" for distance in settings["distances"]] + [EXACT]
    columns = {"cosine, latents": error["cosine"], "relative error, latents": error["relative_error"]}
    if lora:
        columns |= {"cosine, LoRA": lora["cosine"], "relative error, LoRA": lora["relative_error"]}
    return PAGE.format(
        command=results["command"],
        machine=machine_name(machine),
        vae="the embedded VAE" if settings["vae"] == EMBEDDED else f"the VAE of {Path(settings['vae']).name}",
        clips=f"{settings['count']} {'procedural' if settings['clips'] is None else 'real'} clips",
        frames=settings["frames"],
        size="x".join(map(str, settings["size"])),
        groups=len(next(iter(influence["influence"].values()))),
        dtype=settings["dtype"],
        counted="as the allocator says" if cuda else "storages of tensors, counted, without what waits on the host",
        memory=_table(
            ["", *(f"{count} frames" for count in memory["frames"])],
            ([f"`{name}`", *map(mebibytes, peaks)] for name, peaks in memory["peak_bytes"].items()),
        ),
        probes=influence["probes"],
        **influence["fit"],
        influence=_table(
            ["distance in groups", *map(str, range(len(next(iter(influence["influence"].values())))))],
            ([name, *(f"{value:.2g}" for value in curve)] for name, curve in influence["influence"].items()),
        ),
        cases=len(error["cases"]),
        lora=f"For the LoRA: {len(lora['cases'])} cases, clips sampled by the pipeline, its last step." if lora else "",
        error=_table(
            ["", *columns],
            ([f"`{name}`", *(span(column[name]) for column in columns.values())] for name in distances),
        ),
        repetitions=settings["repetitions"],
        seconds=" and ".join(f"{_reference(of):.2f} s at {size}" for size, of in speed.items()),
        ways=_table(["", *(f"time, {size}" for size in speed), "memory, MiB", "cosine"], _ways(results)),
        goals=_goals(speed),
    )


def machine_name(machine: dict[str, Any]) -> str:
    """The machine as a sentence names it: "2 cores of an AMD EPYC (threads: 2, torch 2.15.0)"."""
    device, cores = machine["device"], machine["cores"]
    article = "an" if device[0] in "AEIO" else "a"
    where = f"{article} {device}" if machine["cuda"] else f"{cores} cores of {article} {device}"
    return f"{where} (threads: {machine['threads']}, torch {machine['torch']})"


def _ways(results: dict[str, Any]) -> Iterable[list[str]]:
    for name in names_of(results["speed"]):
        cosine = results["error"]["cosine"].get(name)
        peak = results["memory"]["of_clip"].get(name)
        yield [
            name if name in PEERS or name == FORWARD else f"`{name}`",
            *(_time(speed, name) for speed in results["speed"].values()),
            mebibytes(peak) if name in results["memory"]["of_clip"] else "",
            span(cosine) if cosine else "",
        ]


def _time(speed: dict[str, Any], name: str) -> str:
    low, _, high = (q / _reference(speed) for q in statistics.quantiles(speed["seconds"][name], n=4))
    return f"{speed['ratio'][name]:.2f} ({low:.2f}–{high:.2f})"


def _reference(speed: dict[str, Any]) -> float:
    return statistics.median(speed["seconds"][REFERENCE])


def _goals(speeds: dict[str, Any]) -> str:
    lines = [
        f"- `{name}` took {speed['ratio'][name]:.2f} of plain autograd at {size}; the goal is at most {goal:.2f}"
        for size, speed in speeds.items()
        for name, goal in speed["goal"].items()
    ]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def mebibytes(count: int | None) -> str:
    """Bytes as MiB, to three digits."""
    return "out of memory" if count is None else f"{count / 2**20:.3g}"


def span(values: Sequence[float]) -> str:
    """Lowest to highest."""
    low, high = (f"{value:.3f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
