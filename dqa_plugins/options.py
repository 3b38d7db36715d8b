"""The words that options take, as types, and the checks that calls share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from .errors import InvalidArgument

Granularity = Literal["tensor", "channel"]
QParamsKind = Literal["static", "dynamic"]
Clip = Literal["max", "mse"]
Reduction = Literal["max", "mean"]
Scope = Literal["sample", "batch"]
PredictionMode = Literal["extended", "paper"]
Coding = Literal["none", "shift_error", "joint", "auto"]
WeightScheme = Literal["channel", "qpp"]
FileForm = Literal["float", "qdq"]


def check_option(caller: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless an argument is one of the words that it takes.

    Args:
        caller, name: of the call and of its argument, for the message.
        value: what was given.
        allowed: the words; `typing.get_args` of a type above.

    Raises:
        InvalidArgument: it is none of them.
    """
    if value not in allowed:
        raise InvalidArgument(f"{caller}({name}={value!r}): {name} is one of {', '.join(map(repr, allowed))}.")


def check_weights(caller: str, weight_bits: Any, weight_scheme: str = "channel") -> None:
    """Raise unless weights can be quantized so.

    Args:
        caller: for the message.
        weight_bits: 2 to 8; None leaves weights float.
        weight_scheme: "channel" or "qpp".

    Raises:
        InvalidArgument: other values.
    """
    check_option(caller, "weight_scheme", weight_scheme, get_args(WeightScheme))
    if weight_bits is not None and (isinstance(weight_bits, bool) or weight_bits not in range(2, 9)):
        raise InvalidArgument(
            f"{caller}(weight_bits={weight_bits!r}): an integer from 2 to 8 (the hosts keep weights as int8), or None "
            "for float."
        )
