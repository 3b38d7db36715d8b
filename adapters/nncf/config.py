"""The config entry: a dict or a JSON file in the shape NNCF's configs had before 3.0, every key checked.

{"compression": {
    "algorithm": "quantization",
    "activations": {"mode": "dqa", "bits": 4, "extra_bits": 3, "ratio": 0.4},    # mode, then fields of the method
    "weights": {"bits": 8, "mode": "symmetric", "per_channel": true},            # absent: float weights
    "ignored_scopes": ["{re}.*fc.*"], "target_scopes": ["layer2"], "skip": ["first", "last"],
    "scope_overrides": {"activations": {"layer2.0.relu1": {"bits": 8}, "input.0": null}},
    "initializer": {"range": {"num_init_samples": 256}},                         # samples; absent: all
    "bias_correction": true,                                                     # default: where weights are
    "quantize_outputs": false}}
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqa_plugins.errors import DQAError, InvalidMethod, UnsupportedCombination
from dqa_plugins.method import Method
from dqa_plugins.methods import METHODS, method_from_dict


class InvalidConfig(DQAError, ValueError):
    """A key of the config entry is unknown, missing, contradictory or has a value it cannot have."""


@dataclass(frozen=True)
class Weights:
    """How NNCF quantizes weights: 8 bits, "symmetric" or "asymmetric", per channel or per tensor."""

    mode: str = "symmetric"
    per_channel: bool = True


@dataclass(frozen=True)
class Entry:
    """A validated config entry.

    Args:
        method: of every activation that no override names.
        overrides: (scope, method or None for float), in the order of the config.
        weights: None leaves them float.
        ignored, target: scopes of operations, see `scopes`. An empty target means all.
        skip: "first", "last", or module names.
        num_samples: calibration samples, None for all.
        bias_correction: run NNCF's FastBiasCorrection; left out, with a warning, where parameters are predicted.
        quantize_outputs: also quantize the outputs of the model.
    """

    method: Method
    overrides: tuple[tuple[str, Method | None], ...] = ()
    weights: Weights | None = None
    ignored: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    num_samples: int | None = None
    bias_correction: bool = False
    quantize_outputs: bool = False


_KEYS = (
    "algorithm activations weights ignored_scopes target_scopes skip scope_overrides initializer bias_correction "
    "quantize_outputs"
).split()

# what users of the old configs may still write
_HINTS = {
    "input_info": "shapes come from the dataset's first item",
    "per_channel": "write granularity: 'channel' or 'tensor'",
    "preset": "write weights: {mode: ...} and activations: {mode: ...}",
    "overrides": "write scope_overrides: {activations: {...}}",
    "num_init_samples": "it belongs into initializer: {range: {num_init_samples: ...}}",
    "num_bits": "write bits",
    "method": "write mode",
    "target_device": "every device computes the same fake quantization; leave it out",
}


def parse(source: Any) -> Entry:
    """Validate a config entry.

    Args:
        source: a dict, the path of a JSON file that holds one, or a method: that for every activation, weights float.

    Raises:
        InvalidConfig: unknown, missing or contradictory key, or a bad value; the message names it and the way out.
        InvalidMethod: a field of a method has a value that it cannot have.
        UnsupportedCombination: valid, but not in NNCF.
        FileNotFoundError: the path leads nowhere.
    """
    if isinstance(source, Method):
        return Entry(check(source, "quantize"))
    config = _mapping(read(source), "the config", ("compression",))
    entry = _mapping(_required(config, "compression", "the config"), "compression", _KEYS)
    algorithm = _required(entry, "algorithm", "compression")
    if algorithm != "quantization":
        raise InvalidConfig(f"compression.algorithm={algorithm!r}: the only algorithm here is 'quantization'.")
    method = _method(_required(entry, "activations", "compression"), "compression.activations", None)
    weights = _weights(entry.get("weights"))
    correct = _flag(entry, "bias_correction", default=weights is not None)
    if correct and weights is None:
        raise InvalidConfig(
            "compression.bias_correction=true contradicts absent weights: NNCF corrects biases for the error of "
            "quantized weights. Add weights: {'bits': 8}, or leave bias_correction out."
        )
    found = Entry(
        method=method,
        overrides=_overrides(entry.get("scope_overrides"), method),
        weights=weights,
        ignored=_names(entry, "ignored_scopes"),
        target=_names(entry, "target_scopes"),
        skip=_names(entry, "skip"),
        num_samples=_samples(entry.get("initializer")),
        bias_correction=correct,
        quantize_outputs=_flag(entry, "quantize_outputs", default=False),
    )
    for scope in (*found.ignored, *found.skip):
        if scope in found.target:
            raise InvalidConfig(f"{scope!r} is both in target_scopes and in ignored_scopes or skip: choose one.")
    return found


def read(source: Any) -> Any:
    """The dict itself, or what a JSON file holds.

    Raises:
        InvalidConfig: not a dict or path, or the file is no JSON.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise InvalidConfig(f"config: a dict, the path of a JSON file, or a method; got a {type(source).__name__}.")
    text = Path(source).read_text(encoding="utf-8")
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise InvalidConfig(f"{source}: no JSON: {error}.") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys and forgets the first in silence
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise InvalidConfig(f"the key {key!r} appears twice in one object: which one counts?")
    return dict(pairs)


def _mapping(value: Any, where: str, allowed: Iterable[str]) -> Mapping[str, Any]:
    allowed = tuple(allowed)
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"{where}: an object with the keys {', '.join(allowed)}; got {value!r}.")
    for key in value:
        if key not in allowed:
            hint = f" ({_HINTS[key]})" if key in _HINTS else ""
            raise InvalidConfig(f"{where}: unknown key {key!r}{hint}; allowed: {', '.join(allowed)}.")
    return value


def _required(value: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in value:
        raise InvalidConfig(f"{where}: the key {key!r} is missing.")
    return value[key]


def _flag(entry: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = entry.get(key, default)
    if not isinstance(value, bool):
        raise InvalidConfig(f"compression.{key}={value!r}: true or false.")
    return value


def _names(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = entry.get(key, ())
    if isinstance(value, str) or not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise InvalidConfig(f"compression.{key}={value!r}: a list of names or {{re}} patterns.")
    return tuple(value)


def _samples(value: Any) -> int | None:
    if value is None:
        return None
    initializer = _mapping(value, "compression.initializer", ("range",))
    span = _mapping(initializer.get("range", {}), "compression.initializer.range", ("num_init_samples",))
    count = span.get("num_init_samples")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise InvalidConfig(
            f"compression.initializer.range.num_init_samples={count!r}: a number of samples, at least 1; leave it out "
            "to use all."
        )
    return count


def _weights(value: Any) -> Weights | None:
    if value is None:
        return None
    weights = _mapping(value, "compression.weights", ("bits", "mode", "per_channel"))
    bits, mode = weights.get("bits", 8), weights.get("mode", "symmetric")
    per_channel = weights.get("per_channel", True)
    if bits != 8 or isinstance(bits, bool):
        raise InvalidConfig(
            f"compression.weights.bits={bits!r}: NNCF's post-training quantization takes 8-bit weights; for others "
            "use the FX adapter (weight_bits)."
        )
    if mode not in ("symmetric", "asymmetric"):
        raise InvalidConfig(f"compression.weights.mode={mode!r}: 'symmetric' or 'asymmetric'.")
    if not isinstance(per_channel, bool):
        raise InvalidConfig(f"compression.weights.per_channel={per_channel!r}: true or false.")
    return Weights(mode, per_channel)


def _method(value: Any, where: str, base: Method | None) -> Method:
    """The method of an activations object; where `base` has the same mode, absent fields are those of the base."""
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"{where}: an object with 'mode' and the fields of that method; got {value!r}.")
    modes = ", ".join(repr(name) for name in METHODS)
    mode = value.get("mode", base.name if base else None)
    if mode is None:
        raise InvalidConfig(f"{where}: the key 'mode' is missing; one of {modes}.")
    if mode in ("symmetric", "asymmetric"):
        flag = str(mode == "symmetric").lower()
        raise InvalidConfig(f"{where}.mode={mode!r}: write 'mode': 'direct', 'symmetric': {flag}; modes are {modes}.")
    if not isinstance(mode, str) or mode not in METHODS:
        raise InvalidConfig(f"{where}.mode={mode!r}: one of {modes}.")
    known = tuple(field.name for field in dataclasses.fields(METHODS[mode]))
    fields = {key: field for key, field in value.items() if key != "mode"}
    for key in fields:
        owners = [m for m, kind in METHODS.items() if key in {f.name for f in dataclasses.fields(kind)}]
        if key not in known and owners:
            raise InvalidConfig(
                f"{where}: {key!r} contradicts mode {mode!r}: it is a field of {' and '.join(owners)}; {mode!r} has "
                f"{', '.join(known)}."
            )
    _mapping(fields, f"{where} (mode {mode!r})", ("mode", *known))
    try:
        method = base.replace(**fields) if base is not None and base.name == mode else None
        return check(method or method_from_dict({"method": mode, **fields}), where)
    except InvalidMethod as error:
        raise InvalidMethod(f"{where}: {error}") from error


def check(method: Method, where: str) -> Method:
    """Refuse what NNCF cannot do.

    Raises:
        UnsupportedCombination: NoisyQuant(objective="output").
    """
    if method.needs_next_layer:
        raise UnsupportedCombination(
            f"{where}: NoisyQuant(objective='output') needs the next linear layer of each activation, which NNCF's "
            "statistics do not have; use objective='activation', or the FX or PT2E adapter."
        )
    return method


def _overrides(value: Any, base: Method) -> tuple[tuple[str, Method | None], ...]:
    if value is None:
        return ()
    groups = _mapping(value, "compression.scope_overrides", ("activations",))
    sites = groups.get("activations", {})
    if not isinstance(sites, Mapping):
        raise InvalidConfig(f"compression.scope_overrides.activations: site -> fields or null; got {sites!r}.")
    where = "compression.scope_overrides.activations"
    return tuple((s, None if v is None else _method(v, f"{where}.{s}", base)) for s, v in sites.items())
