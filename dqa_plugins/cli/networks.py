"""`dqa-plugins compare` and `export`: networks by reference, methods as text."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

from dqa_plugins.errors import InvalidArgument
from dqa_plugins.export import to_exported_program, to_onnx, to_openvino
from dqa_plugins.method import Method
from dqa_plugins.methods import METHODS, method_from_dict
from dqa_plugins.prediction import QPP
from dqa_plugins.report import compare_methods

from .answer import Answer


def factory(reference: str, returns: str, count: int) -> tuple[Any, ...]:
    """What the function behind "module:function" returns.

    Args:
        returns: what it should, for messages.
        count: of its parts.

    Raises:
        InvalidArgument: there is no such function, or it returns something else.
    """
    module_name, colon, name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        function = getattr(importlib.import_module(module_name), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise InvalidArgument(f"{reference!r}: {error}.") from error
    if not callable(function):
        raise InvalidArgument(f"{reference!r} is no reference to a function: write module:function.")
    found = function()
    if not isinstance(found, tuple) or len(found) != count:
        raise InvalidArgument(f"{reference!r} has to return {returns}; it returned a {type(found).__name__}.")
    return found


def method(text: str) -> Method:
    """The method of "dqa:bits=3,granularity=channel"; qparams=qpp predicts them.

    Raises:
        InvalidArgument: a part is no field=value. NotAMethod, InvalidMethod: as `method_from_dict`.
    """
    name, _, listed = text.partition(":")
    fields: dict[str, Any] = {"method": name}
    for part in filter(None, listed.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InvalidArgument(f"{text!r}: {part!r} is no field=value. Methods are {', '.join(METHODS)}.")
        fields[key] = QPP() if (key, value) == ("qparams", "qpp") else _value(value)
    return method_from_dict(fields)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def compare(options: argparse.Namespace) -> Answer:
    """`compare_methods` of a network by reference."""
    room = f"dqa_plugins.adapters.{options.room}"
    if not options.room.isidentifier() or importlib.util.find_spec(room) is None:
        raise InvalidArgument(f"--room {options.room}: there is no such adapter.")
    methods = {text: method(text) for text in options.methods}
    model, calibration, evaluate = factory(options.network, "(model, calibration, evaluate)", 3)
    found = compare_methods(
        model,
        methods,
        calibration,
        evaluate,
        quantize=importlib.import_module(room).quantize_model,
        weight_bits=options.weight_bits or None,
        progress=not (options.no_progress or options.json),
    )
    return Answer(str(found), found.to_dict(), not any(row.failed for row in found.rows))


def export(options: argparse.Namespace) -> Answer:
    """`to_onnx`, `to_openvino` or `to_exported_program` of a converted model by reference."""
    path = options.path
    if path.suffix not in (".onnx", ".xml", ".pt2"):
        raise InvalidArgument(f"{str(path)!r}: the ending says the format: .onnx, .xml or .pt2.")
    model, inputs = factory(options.network, "(converted model, example inputs)", 2)
    dynamic = not options.static_batch
    if path.suffix == ".onnx":
        to_onnx(model, inputs, path, dynamic_batch=dynamic, form=options.form)
    elif path.suffix == ".xml":
        to_openvino(model, inputs, path, dynamic_batch=dynamic)
    else:
        torch.export.save(to_exported_program(model, inputs, dynamic_batch=dynamic), path)
    size = path.stat().st_size
    return Answer(f"{path}: {size} bytes", {"path": str(path), "bytes": size})
