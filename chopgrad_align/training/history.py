"""The held-out measurements of a run, kept in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..common.errors import UsageError
from ..common.files import whole_file
from ..evaluation.measurement import Measurement
from ..evaluation.witnesses import Witness

_BASE = "base.safetensors"


class History:
    """Measurements in order, the base model's first.

    They are files of their own, `step-NNNNNN.json`, and no part of checkpoints: each is written as soon as it is taken,
    before anything is made of it, and a run that goes on from an earlier checkpoint forgets those that came after.
    Beside them lies what witnesses compare later videos with (`base.safetensors`).

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.measured: list[Measurement] = []
        self._base: dict[str, list[Tensor]] = {}

    @property
    def baseline(self) -> Measurement:
        """The base model's measurement."""
        return self.measured[0]

    def has(self, step: int) -> bool:
        """True if a step was measured."""
        return any(measurement.step == step for measurement in self.measured)

    def values(
        self, witnesses: Mapping[str, Witness], kept: Mapping[str, list[Tensor]], groups: Sequence[int]
    ) -> dict[str, list[float]]:
        """The value of each witness and pair; the first call is of the base model."""
        if not self._base:
            self._base = {name: kept[name] for name, witness in witnesses.items() if witness.reads_base}
        values = {n: w.values(kept[n], self._base.get(n, []), groups) for n, w in witnesses.items()}
        return {name: each for name, each in values.items() if not all(map(math.isnan, each))}

    def add(self, measurement: Measurement, write: bool) -> None:
        """Take a measurement up, and write it if this process is to."""
        self.measured.append(measurement)
        if not write:
            return
        if measurement.step == 0 and self._base:
            tensors = {f"{n}/{i}": kept.contiguous() for n, pairs in self._base.items() for i, kept in enumerate(pairs)}
            with whole_file(self._folder / _BASE) as partial:
                partial.write_bytes(safetensors.torch.save(tensors))
        with whole_file(self._path(measurement.step)) as partial:
            partial.write_text(measurement.to_json(), encoding="utf-8")

    def load(self, step: int) -> None:
        """Read what was measured up to a step.

        Raises:
            UsageError: The base model's measurement is not there.
        """
        steps = [found for found in self._steps() if found <= step]
        if not steps or steps[0] != 0:
            raise UsageError(
                f"--resume: {self._path(0)} is not there, the measurement of the model before training; "
                "start again in another run.folder=…"
            )
        self.measured = [Measurement.from_json(self._path(found).read_text(encoding="utf-8")) for found in steps]
        if (self._folder / _BASE).is_file():
            tensors = safetensors.torch.load_file(self._folder / _BASE)
            for key in sorted(tensors, key=lambda key: int(key.rpartition("/")[2])):
                self._base.setdefault(key.rpartition("/")[0], []).append(tensors[key])

    def rewind(self, step: int) -> None:
        """Remove the files of what was measured after a step."""
        for later in self._steps():
            if later > step:
                self._path(later).unlink()

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.json"

    def _steps(self) -> list[int]:
        names = (path.stem.removeprefix("step-") for path in self._folder.glob("step-*.json"))
        return sorted(int(name) for name in names if name.isdecimal())
