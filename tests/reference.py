"""An independent reference: integer arithmetic in numpy, straight from the papers and the design page.

Nothing of dqa_plugins is imported, and nothing is shared with it: codes are int64, halves go to even (`np.rint`),
shift errors are taken with `>>` and `&`, every sample is treated by itself in a Python loop. Scales are float32
(float64 for float64 input), as the design page asks, and one cast at the end goes back to the dtype of the input.

Methods come as plain dicts of their fields, with their name under "method". A result of -0.0 counts as 0.0: an integer
has no negative zero (`np.array_equal` agrees).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

HUGE = 2.0**60  # far outside every code range, and still exact as int64
KEPT_SAMPLES, KEPT_VALUES = 64, 2**18


def compute_dtype(x: np.ndarray) -> type:
    """float64 for float64, else float32."""
    return np.float64 if x.dtype == np.float64 else np.float32


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def round_to_codes(x: np.ndarray, step: np.ndarray) -> np.ndarray:
    """round(x / step) as int64, half to even; 0 where the step is 0."""
    step = np.broadcast_to(step, x.shape)
    with np.errstate(over="ignore"):
        ratio = np.divide(x, step, out=np.zeros_like(x), where=step > 0)
    return np.clip(np.rint(ratio), -HUGE, HUGE).astype(np.int64)


# ---------------------------------------------------------------- methods, with their parameters given


def direct_codes(x: np.ndarray, scale: Any, bits: int, signed: bool, clamp: bool = True) -> np.ndarray:
    """DQA paper, eq. 1, with the clamp of the design page."""
    codes = round_to_codes(x, scale)
    return np.clip(codes, *code_range(bits, signed)) if clamp else codes


def direct(x: np.ndarray, scale: Any, bits: int, signed: bool, clamp: bool = True) -> np.ndarray:
    dtype = compute_dtype(x)
    scale = np.asarray(scale, dtype)
    codes = direct_codes(x.astype(dtype), scale, bits, signed, clamp)
    return (codes.astype(dtype) * scale).astype(x.dtype)


def dqa_codes(
    x: np.ndarray, scale: Any, extra: np.ndarray, bits: int, signed: bool, clamp: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the DQA paper, lines 5 to 8: (code, shift error). `extra` is laid along the channels of x."""
    step = np.asarray(scale, x.dtype) / np.ldexp(1.0, extra).astype(x.dtype)
    q = round_to_codes(x, step)
    if clamp:
        top = np.int64(1) << (bits + extra - (1 if signed else 0)).astype(np.int64)
        q = np.clip(q, -top if signed else 0, top - 1)
    shift = np.maximum(extra, 0).astype(np.int64)
    return q >> shift, q & ((np.int64(1) << shift) - 1)


def dqa(x: np.ndarray, scale: Any, extra: np.ndarray, bits: int, signed: bool, clamp: bool = True) -> np.ndarray:
    """Eq. 3 and algorithm 2: delta_n * (code + shift_error / 2^m), as delta_{n+m} times an integer."""
    dtype = compute_dtype(x)
    scale = np.asarray(scale, dtype)
    code, error = dqa_codes(x.astype(dtype), scale, extra, bits, signed, clamp)
    q = (code << np.maximum(extra, 0).astype(np.int64)) | error
    return (q.astype(dtype) * (scale / np.ldexp(1.0, extra).astype(dtype))).astype(x.dtype)


def noisyquant(x: np.ndarray, scale: Any, noise: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Q(x + N) - N with N = noise * scale."""
    dtype = compute_dtype(x)
    scale = np.asarray(scale, dtype)
    bias = noise.astype(dtype) * scale
    codes = direct_codes(x.astype(dtype) + bias, scale, bits, signed)
    return (codes.astype(dtype) * scale - bias).astype(x.dtype)


def range_codes(x: np.ndarray, a: np.ndarray, b: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zero point and step of [a, b] (QPP paper, eq. 12); x, a, b of one shape in the compute dtype."""
    step = np.maximum(b - a, 0) / x.dtype.type((1 << bits) - 1)
    zero = round_to_codes(-a, step)
    return np.clip(round_to_codes(x, step) + zero, 0, (1 << bits) - 1), zero, step


def asymmetric(x: np.ndarray, a: Any, b: Any, bits: int) -> np.ndarray:
    dtype = compute_dtype(x)
    a, b = (np.broadcast_to(np.asarray(t, dtype), x.shape) for t in (a, b))
    codes, zero, step = range_codes(x.astype(dtype), a, b, bits)
    return np.where(step > 0, (codes - zero).astype(dtype) * step, a).astype(x.dtype)


def dense_sparse(x: np.ndarray, a: Any, b: Any, bits: int) -> np.ndarray:
    """Eq. 11 with a clamp: the grid inside [a, b], x itself strictly outside, a where b <= a and x = a."""
    inside = asymmetric(x, a, b, bits)
    wide = x.astype(compute_dtype(x))
    return np.where((wide < a) | (wide > b), x, inside)


# ---------------------------------------------------------------- parameters, from samples


def quantile(values: np.ndarray, level: float) -> Any:
    """Linear interpolation between order statistics, in the dtype of values."""
    ordered = np.sort(values.ravel())
    position = min(max(level, 0.0), 1.0) * (ordered.size - 1)
    low = int(np.floor(position))
    high = min(low + 1, ordered.size - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * values.dtype.type(position - low)


def groups_of(sample: np.ndarray, granularity: str, axis: int) -> list[np.ndarray]:
    """The values of one sample, (...), by group; `axis` counts with the batch."""
    if granularity == "tensor":
        return [sample.ravel()]
    axis = axis - 1 if axis > 0 else axis
    return [channel.ravel() for channel in np.moveaxis(sample, axis, 0)]


def sample_statistic(sample: np.ndarray, fields: dict[str, Any], signed: bool, axis: int) -> np.ndarray:
    """(1, G) of the maximum or quantile behind the scale, or (2, G) of the thresholds a and b."""
    sample = sample.astype(compute_dtype(sample))
    clip, found = fields["clip"], []
    for values in groups_of(sample, fields["granularity"], axis):
        if fields["method"] == "dense_sparse":
            density = fields["density"]
            if signed:
                found.append([quantile(values, density / 2), quantile(values, 1 - density / 2)])
            else:
                found.append([values.dtype.type(0), quantile(values, 1 - density)])
        elif not fields.get("symmetric", True):
            if isinstance(clip, float):
                low, high = quantile(values, 1 - clip), quantile(values, clip)
            else:
                low, high = values.min(), values.max()
            found.append([values.dtype.type(0) if fields["signed"] is False else low, high])
        else:
            magnitude = np.abs(values) if signed else np.maximum(values, 0)
            found.append([quantile(magnitude, clip) if isinstance(clip, float) else magnitude.max()])
    return np.stack([np.stack(row) for row in found], axis=1)


def is_signed(fields: dict[str, Any], batches: list[np.ndarray]) -> bool:
    """As the method says, else whether calibration saw a negative value."""
    if fields["signed"] is not None:
        return bool(fields["signed"])
    return any(bool((batch < 0).any()) for batch in batches)


def reduced_statistic(batches: list[np.ndarray], fields: dict[str, Any], signed: bool, axis: int) -> np.ndarray:
    """Static: the per-sample statistics of all calibration samples, reduced by maximum or mean."""
    rows = np.stack([sample_statistic(sample, fields, signed, axis) for batch in batches for sample in batch])
    default = "mean" if fields["method"] == "dense_sparse" else "max"
    if (fields["reduce"] or default) == "mean":
        # exact, as a record's sum is: in float64 the order of a plain sum would show
        return (np.apply_along_axis(math.fsum, 0, rows.astype(np.float64)) / len(rows)).astype(rows.dtype)
    widest = rows.max(0)
    if len(widest) == 2:
        widest[0] = rows[:, 0].min(0)  # the widest range starts at the lowest a
    return widest


def divisor(fields: dict[str, Any], signed: bool) -> int:
    bits = fields["bits"]
    if not fields.get("full_range", True):
        return (1 << (bits - 1)) - 1
    return 1 << (bits - 1) if signed else 1 << bits


def along(vector: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """Lay (G,) along the channel axis; a single group broadcasts."""
    shape = [1] * ndim
    if vector.size > 1:
        shape[axis] = -1
    return vector.reshape(shape)


# ---------------------------------------------------------------- the whole quantizer


def quantize_sample(
    sample: np.ndarray, found: np.ndarray, fields: dict[str, Any], signed: bool, axis: int, found_by_search: dict
) -> np.ndarray:
    """One sample, (1, ...), with its statistic (S, G)."""
    factor = found_by_search.get("factor")
    if factor is not None:
        found = found * factor.astype(found.dtype)
    bits, kind = fields["bits"], fields["method"]
    if len(found) == 2:
        a, b = (along(t, sample.ndim, axis) for t in found)
        return dense_sparse(sample, a, b, bits) if kind == "dense_sparse" else asymmetric(sample, a, b, bits)
    scale = along(found[0] / found.dtype.type(divisor(fields, signed)), sample.ndim, axis)
    if kind == "dqa":
        return dqa(sample, scale, along(found_by_search["extra_bits"], sample.ndim, axis), bits, signed)
    if kind == "noisyquant":
        return noisyquant(sample, scale, along(found_by_search["noise"], sample.ndim, axis), bits, signed)
    return direct(sample, scale, bits, signed)


def fake_quantize(
    x: np.ndarray, batches: list[np.ndarray], fields: dict[str, Any], axis: int, found_by_search: dict[str, np.ndarray]
) -> np.ndarray:
    """What a quantizer calibrated on `batches` makes of x, (B, ...), sample by sample.

    Args:
        fields: of the method, with its name under "method".
        axis: channel axis, counted with the batch, possibly negative.
        found_by_search: "extra_bits" (C,), "noise" (C,) in units of the scale, "factor" (G,): results of searches,
            which have references of their own.
    """
    signed = is_signed(fields, batches)
    if fields["qparams"] == "static":
        shared = reduced_statistic(batches, fields, signed, axis)
        per_sample = [shared] * len(x)
    else:
        per_sample = [sample_statistic(sample, fields, signed, axis) for sample in x]
        if fields["scope"] == "batch":
            per_sample = [np.max(per_sample, axis=0)] * len(x)
    rows = zip(x, per_sample, strict=True)
    return np.concatenate([quantize_sample(s[None], f, fields, signed, axis, found_by_search) for s, f in rows])


# ---------------------------------------------------------------- searches, naively


def kept_values(batches: list[np.ndarray], axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(D, K) kept values and (K,) their samples: the first 64 samples, 2^18 values, evenly strided positions."""
    columns, owner = [], []
    for index, sample in enumerate(s for batch in batches for s in batch):
        wide = sample.astype(compute_dtype(sample))
        if axis is None:
            rows = wide.reshape(1, -1)
        else:
            moved = np.moveaxis(wide, axis - 1 if axis > 0 else axis, 0)
            rows = moved.reshape(len(moved), -1)
        depth, positions = rows.shape
        if index >= min(KEPT_SAMPLES, max(1, KEPT_VALUES // depth)):
            break
        wanted = min(positions, max(1, KEPT_VALUES // KEPT_SAMPLES // depth))
        columns.append(rows[:, [k * positions // wanted for k in range(wanted)]])
        owner += [index] * wanted
    return np.concatenate(columns, axis=1), np.asarray(owner)


def noise_error(values: np.ndarray, scale: np.ndarray, shift: np.ndarray, bits: int, signed: bool) -> float:
    """Squared error of Q(x + t delta) - t delta over kept values, in float64. shift: (C, 1) in units of the scale."""
    values, scale = values.astype(np.float64), np.broadcast_to(scale, values.shape).astype(np.float64)
    codes = np.clip(round_to_codes(values + shift * scale, scale), *code_range(bits, signed))
    return float(np.sum((codes * scale - shift * scale - values) ** 2))
