"""From the extents of each sample to the parameters that quantize it: qparams and a Grid, without small tensors."""

from __future__ import annotations

import numpy as np

from .compiling import kernel
from .fake_quantize import BIAS, DIVISOR, HIGH, LOW, LOWER, STEP, UPPER, ZERO_POINT

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
    across, along = int(unit.shape[2] > 1), int(extents.shape[2] > 1)
    for b in range(out.shape[1]):
        first, last = extents[b, 0], extents[b, -1]
        for row in (LOW, HIGH, ZERO_POINT, LOWER, UPPER):
            values, to = unit[row, 0], out[row, b]
            for c in range(to.size):
                to[c] = values[c * across]
        steps_of, divisors, biases = out[STEP, b], out[DIVISOR, b], out[BIAS, b]
        if not ranged:
            unit_steps, unit_biases = unit[STEP, 0], unit[BIAS, 0]
            for c in range(steps_of.size):
                scale = first[c * along] / steps
                if predicted:
                    scale = _LEAST if scale < _LEAST else scale
                step = unit_steps[c * across] * scale
                steps_of[c], divisors[c] = step, step if step > zero else one / zero
                biases[c] = unit_biases[c * across] * scale
            continue
        for c in range(steps_of.size):
            upper = last[c * along]
            lower = -first[c * along] if extents.shape[1] > 1 else zero
            if predicted:
                least = lower + abs(lower) * np.float32(1e-6) + _LEAST
                upper = upper if upper > least or upper != upper else least
            width = upper * np.float32(0.5) - lower * np.float32(0.5)
            step = (zero if width < zero else width) / steps
            divisor = step if step > zero else one / zero
            steps_of[c], divisors[c] = step, divisor
            out[ZERO_POINT, b, c] = np.rint(-lower / divisor)
            biases[c] = zero if step > zero else -lower
            if keep:
                out[LOWER, b, c], out[UPPER, b, c] = lower, upper
