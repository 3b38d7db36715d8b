"""From the extents of each sample to the parameters that quantize it: qparams and a Grid, without small tensors."""

from __future__ import annotations

import numpy as np

from .compiling import kernel
from .fake_quantize import BIAS, DIVISOR, LOWER, STEP, UPPER, ZERO_POINT

_LEAST = np.float32(1e-30)  # of a predicted scale


@kernel(error_model="numpy")
def derive(unit, extents, steps, ranged, keep, predicted, out):  # type: ignore[no-untyped-def]
    """A table of parameters for each sample.

    Args:
        unit: (ROWS, 1, C or 1) float32: the Grid of scale 1; where `ranged`, only its codes count.
        extents: (B, S, G) float32; where `ranged`, of both sides, or of the upper one: then the lower end is 0.
        steps: float32, steps from zero to the extent; where `ranged`, half of those from end to end.
        keep: whether values beyond the range stay as they are.
        predicted: whether the parameters are made valid, as `ranges.valid` does.
        out: (ROWS, B, C or G) float32, written.
    """
    one, zero = np.float32(1), np.float32(0)
    for b in range(out.shape[1]):
        for c in range(out.shape[2]):
            u, g = min(c, unit.shape[2] - 1), min(c, extents.shape[2] - 1)
            for row in range(out.shape[0]):
                out[row, b, c] = unit[row, 0, u]
            if ranged:
                upper = extents[b, -1, g]
                lower = -extents[b, 0, g] if extents.shape[1] > 1 else zero
                if predicted:
                    least = lower + abs(lower) * np.float32(1e-6) + _LEAST
                    upper = upper if upper > least or upper != upper else least
                width = upper * np.float32(0.5) - lower * np.float32(0.5)
                step = (zero if width < zero else width) / steps
                divisor = step if step > zero else one / zero
                out[STEP, b, c], out[DIVISOR, b, c] = step, divisor
                out[ZERO_POINT, b, c] = np.rint(-lower / divisor)
                out[BIAS, b, c] = zero if step > zero else -lower
                if keep:
                    out[LOWER, b, c], out[UPPER, b, c] = lower, upper
            else:
                scale = extents[b, 0, g] / steps
                if predicted:
                    scale = _LEAST if scale < _LEAST else scale
                step = unit[STEP, 0, u] * scale
                out[STEP, b, c], out[DIVISOR, b, c] = step, step if step > zero else one / zero
                out[BIAS, b, c] = unit[BIAS, 0, u] * scale
