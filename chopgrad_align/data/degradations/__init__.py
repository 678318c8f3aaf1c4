"""Degradations and masks, and how a config names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ...common.arguments import nearest, shown
from ...common.errors import UsageError
from .base import Chain, Degradation, Maybe, OneOf
from .blur import Blur, Sinc
from .boxes import BoxMask
from .compression import Jpeg, VideoCodec
from .floaters import Floaters
from .ghosting import Ghosting
from .holes import Holes
from .mask_videos import MaskVideos
from .masks import Mask
from .noise import GaussianNoise, PoissonNoise
from .objects import ObjectMask
from .resize import Downscale
from .second_order import SecondOrder
from .strokes import StrokeMask

DEGRADATIONS: dict[str, type] = {
    "blur": Blur,
    "downscale": Downscale,
    "floaters": Floaters,
    "gaussian_noise": GaussianNoise,
    "ghosting": Ghosting,
    "holes": Holes,
    "jpeg": Jpeg,
    "maybe": Maybe,
    "one_of": OneOf,
    "poisson_noise": PoissonNoise,
    "second_order": SecondOrder,
    "sinc": Sinc,
    "video_codec": VideoCodec,
}
MASKS: dict[str, type] = {"box": BoxMask, "objects": ObjectMask, "strokes": StrokeMask, "videos": MaskVideos}


def load_degradation(spec: Any) -> Degradation:
    """Make a degradation from what a config says.

        load_degradation({"name": "blur", "sigma": [0.5, 2]})
        load_degradation([{"name": "blur"}, {"name": "maybe", "part": {"name": "jpeg"}}])       # one after the other

    Raises:
        UsageError: An unknown name or field, or a value that it cannot have.
    """
    if isinstance(spec, list) and spec:
        return Chain(tuple(load_degradation(part) for part in spec))
    return _named(spec, DEGRADATIONS, "degradation")


def load_mask(spec: Any) -> Mask:
    """Make a mask from what a config says, such as `{"name": "box", "area": [0.1, 0.2]}`.

    Raises:
        UsageError: As `load_degradation`.
    """
    return _named(spec, MASKS, "mask")


def _named(spec: Any, known: Mapping[str, type], what: str) -> Any:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise UsageError(f"expected a {what} with a name and its settings, got {shown(spec)}")
    name = spec["name"]
    if name not in known:
        raise UsageError(f"no {what} is called {name!r}{nearest(name, known)}. Known: {', '.join(known)}")
    return _built(known[name], {key: value for key, value in spec.items() if key != "name"}, name)


def _built(kind: type, settings: Mapping[str, Any], where: str) -> Any:
    if not isinstance(settings, Mapping):
        raise UsageError(f"{where}: expected settings by name, got {shown(settings)}")
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
    values = {}
    for key, value in settings.items():
        if key not in names:
            raise UsageError(f"{where} has no setting {key!r}{nearest(key, names)}. Its settings: {', '.join(names)}")
        values[key] = _value(hints[key], value, f"{where}.{key}")
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory]  # both MISSING
    if missing:
        raise UsageError(f"{where}: {', '.join(missing)} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint == tuple[Degradation, ...]:
        if not isinstance(value, list) or not value:
            raise UsageError(f"{where}: expected a list of degradations, got {shown(value)}")
        return tuple(load_degradation(part) for part in value)
    if hint is Degradation:
        return load_degradation(value)
    if is_dataclass(hint):
        return _built(hint, value, where)  # type: ignore[arg-type]
    if hint is not bool and any(isinstance(part, bool) for part in (value if isinstance(value, list) else [value])):
        raise UsageError(f"{where}: expected numbers or names, got {shown(value)}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise UsageError(f"{where}: {error.errors()[0]['msg']}, got {shown(value)}") from error
