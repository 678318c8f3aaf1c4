"""Replacement of a pipeline's scheduler: by another class, by the same one with other settings.

What a model was trained as does not change with its sampler, and classes of diffusers give it different names, or
none. So those settings are translated; then the new scheduler is tried on a perfect model of the same kind.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch

from ..common.arguments import nearest, shown
from ..common.errors import UsageError
from ..sampling.predictions.probability_paths import ProbabilityPath, path_of
from ..sampling.scheduler_trial import CannotSample, SchedulerUse, quiet, try_scheduler

_NOISE_SCHEDULE = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
_BOUNDS = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_SHIFTS = ("flow_shift", "shift")
_READ = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")  # by pipelines, from any scheduler
_TIMES = (
    *("num_train_timesteps", "timestep_spacing", "steps_offset", "set_alpha_to_one"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_dynamic_shifting", "time_shift_type", "shift_terminal", *_READ),
)


def replaced_scheduler(pipe: Any, settings: Mapping[str, Any], steps: Any) -> Any:
    """The scheduler that a config asks for.

    Args:
        pipe: A diffusers pipeline with its own scheduler.
        settings: Arguments of the new one, and its class as `name`; without `name`, that of the pipeline's own.
        steps: `num_inference_steps`, if it is known.

    Raises:
        UsageError: diffusers has no such class, it has no such setting or not with such a value, or it does not sample
            this model.
    """
    import diffusers

    settings = dict(settings)
    own = type(pipe.scheduler).__name__
    name = settings.pop("name", own)
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise UsageError(f"model.scheduler.name: diffusers has no {name!r}{nearest(name, known)}")
    _check_settings(name, getattr(diffusers, name), settings)
    original = Original.of(pipe, steps)
    try:
        return original.replaced_by(name, settings)
    except CannotSample as error:
        if settings and (name == own or original.can_be(name)):
            raise UsageError(f"model.scheduler: {name} with {settings} cannot sample this model: {error}") from error
        if original.path is None:
            raise UsageError(f"model.scheduler.name: {name} cannot take the place of {own}: {error}") from error
        others = [other for other in known if original.can_be(other)]
        raise UsageError(
            f"model.scheduler.name: {name} cannot sample this model, which predicts {original.path.predicts}: {error}; "
            f"take one of {', '.join(others)}"
        ) from error


@dataclass(frozen=True)
class Original:
    """The scheduler that a model came with, how its pipeline uses it, and what it tells of the model.

    Attributes:
        path: Of the model; None if it is not known, since the scheduler itself does not sample it.
        first: Time of the first step, in (0, 1].
        bounded: The model's data are in [-1, 1], where the scheduler clips them.
    """

    scheduler: Any
    use: SchedulerUse
    steps: int
    path: ProbabilityPath | None
    first: float
    bounded: bool

    @classmethod
    def of(cls, pipe: Any, steps: Any) -> Original:
        scheduler, use = pipe.scheduler, SchedulerUse.of(pipe)
        if type(steps) is not int or not 0 < steps <= 1000:
            given = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
            steps = given.default if given and type(given.default) is int else 10
        for bounded in (False, True):
            with suppress(CannotSample, UsageError):
                path = path_of(scheduler)
                return cls(scheduler, use, steps, path, try_scheduler(scheduler, path, use, steps, bounded), bounded)
        return cls(scheduler, use, steps, None, 0.0, False)

    def can_be(self, name: str) -> bool:
        try:
            self.replaced_by(name, {})
        except CannotSample:
            return False
        return True

    def replaced_by(self, name: str, settings: Mapping[str, Any]) -> Any:
        """The scheduler of a class for the same model, with settings that take precedence.

        Raises:
            CannotSample: It cannot be made, or does not sample the model at the times that it was made for.
        """
        import diffusers

        cls = getattr(diffusers, name)
        try:
            with quiet():
                if cls is type(self.scheduler):
                    made = cls.from_config(self.scheduler.config, **settings)
                else:
                    made = self._translated(cls, settings)
                if self.path is None:
                    _take_a_step(cls.from_config(made.config), self.steps)
        except CannotSample:
            raise
        except Exception as error:  # each scheduler has its own ways to refuse
            raise CannotSample.by(error) from error
        if self.path is not None:
            first = try_scheduler(made, self.path, self.use, self.steps, self.bounded)
            if first < self.first / 2:
                raise CannotSample(f"in {self.steps} steps it would not begin with noise")
            self._expect_same_shift(made)
        return made

    def _translated(self, cls: type, settings: Mapping[str, Any]) -> Any:
        """Another class, with the settings of the own one that mean the same there."""
        if self.path is None:
            raise CannotSample("what its model predicts is not known")
        config, accepted = self.scheduler.config, inspect.signature(cls).parameters
        kept = _TIMES + (_BOUNDS if self.bounded else ())
        carried: dict[str, Any] = {"clip_sample": False, **{key: config[key] for key in kept if key in config}}
        carried |= self.path.settings
        if (shift := _shift(config)) is not None:
            carried |= dict.fromkeys(_SHIFTS, shift)
        if settings.keys() & _NOISE_SCHEDULE:
            carried.pop("trained_betas", None)
        made = cls(**{key: value for key, value in {**carried, **settings}.items() if key in accepted})
        made.register_to_config(**{key: config[key] for key in _READ if key in config.keys() - accepted})
        return made

    def _expect_same_shift(self, made: Any) -> None:
        own, new = self.scheduler.config, made.config
        if _shift(own) not in (None, 1.0) and _shift(new) is None:
            raise CannotSample(f"it has no setting for the shift of the times by {_shift(own)}")
        if own.get("use_dynamic_shifting") and "use_dynamic_shifting" not in new:
            raise CannotSample("it does not shift the times for the size of the video")


def _shift(config: Mapping[str, Any]) -> float | None:
    """The setting for which classes of diffusers have two names."""
    return next((config[key] for key in _SHIFTS if key in config), None)


def _take_a_step(scheduler: Any, steps: int) -> None:
    """Let a scheduler make its times and use the first of them, as a pipeline would; raise whatever it raises."""
    if scheduler.config.get("use_dynamic_shifting"):  # the pipeline tells the shift for its size
        return
    scheduler.set_timesteps(steps)
    times, sample = torch.as_tensor(scheduler.timesteps), torch.zeros(1, 1, 1, 1, 1)
    if not times.isfinite().all():
        raise ValueError(f"its times would be {times.tolist()[:3]}, …")
    if hasattr(scheduler, "scale_model_input"):
        sample = scheduler.scale_model_input(sample, times[0])
    scheduler.step(sample, times[0], sample)


def _check_settings(name: str, cls: type, settings: Mapping[str, Any]) -> None:
    """Raise a UsageError for a setting that a class does not have, or of another type than its signature declares."""
    accepted = inspect.signature(cls).parameters
    for key, value in settings.items():
        if key not in accepted:
            raise UsageError(f"model.scheduler: {name} has no setting {key!r}{nearest(key, accepted)}")
        if value is None and accepted[key].default is None:
            continue  # whatever is declared
        argument, annotation = f"model.scheduler.{key}", accepted[key].annotation
        allowed = set(get_args(annotation) or [annotation])
        if allowed <= {bool, int, float, str, type(None)} and not (
            type(value) in allowed or (float in allowed and type(value) is int)
        ):
            kinds = " or ".join(sorted(kind.__name__ for kind in allowed - {type(None)}))
            raise UsageError(f"{argument}: expected {kinds}, got {shown(value)}")
        if get_origin(annotation) is Literal and value not in (choices := get_args(annotation)):
            raise UsageError(f"{argument}: expected one of {', '.join(map(str, choices))}, got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{argument}: expected a finite number, got {value}")
        if key.endswith("shift") and isinstance(value, float | int) and not isinstance(value, bool) and value <= 0:
            raise UsageError(f"{argument}: expected a number above 0, got {value}")
