"""Types of values in a config, with the checks that each of them makes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ..common.arguments import readable_text, shown, usable_path


def _number(value: object) -> object:
    if isinstance(value, bool):  # pydantic takes True for 1
        raise ValueError(f"expected a number, got {value}")
    return value


def _term_name(name: str) -> str:
    if not name.strip() or "/" in name or len(name) > 64 or name in _RESERVED:
        raise ValueError(
            f"expected a name of at most 64 characters, without '/' and none of {', '.join(_RESERVED)}, "
            f"got {shown(name)}"
        )
    return readable_text(name)


def _each_once(values: list[str]) -> list[str]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return values


def _targets(value: object) -> object:
    each = value if isinstance(value, list) else [value]
    if not each or not all(isinstance(part, str) and part.strip() for part in each):
        raise ValueError(f"expected a list of strings, or one string, got {shown(value)}")
    return value


def _no_float16(value: object) -> object:
    if value == "float16":
        raise ValueError(
            "gradients of activations fall below the range of float16, and losses are not scaled: use bfloat16"
        )
    return value


def _bound(value: object) -> object:
    each = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if value is not None and not all(isinstance(v, int | float) and not isinstance(v, bool) for v in each):
        raise ValueError(f"expected a number, two in a list, or null, got {shown(value)}")
    return value


_MOST = 2**31 - 1  # of a count
_RESERVED = ("heldout", "seconds")  # keys of metrics begin with them, as with the names of terms

Positive = Annotated[int, Field(ge=1, le=_MOST), BeforeValidator(_number)]
NonNegative = Annotated[int, Field(ge=0, le=_MOST), BeforeValidator(_number)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Time = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
FramesPerSecond = Annotated[float, Field(ge=0.01, le=1000, allow_inf_nan=False), BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_number)]
Batch = Annotated[int, Field(ge=1, le=2**16), BeforeValidator(_number)]
Pairs = Annotated[int, Field(ge=2, le=2**20), BeforeValidator(_number)]
Threads = Annotated[int, Field(ge=1, le=2**12), BeforeValidator(_number)]
Pixels = Annotated[int, Field(ge=1, le=2**14), BeforeValidator(_number)]
Name = Annotated[str, Field(strict=True), AfterValidator(usable_path)]
"""Name of a file, a folder, a class or a model, for which a file system can be asked."""
Caption = Annotated[str, Field(strict=True), AfterValidator(readable_text)]
Bound = Annotated[float | tuple[float, float] | None, BeforeValidator(_bound)]
TermName = Annotated[str, AfterValidator(_term_name)]
"""Name of a reward or a loss, in keys of metrics and in columns of prompt files."""
Targets = Annotated[list[str] | str, BeforeValidator(_targets)]
EachOnce = AfterValidator(_each_once)
Quantized = Literal["nf4", "int8", "fp8"]
Dtype = Annotated[Literal["float32", "bfloat16"], BeforeValidator(_no_float16)]
