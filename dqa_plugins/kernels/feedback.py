"""Rounding with error feedback: what one channel is rounded by is made up for in the channels that come after it.

The error e of a vector of D channels costs e' F e. With F = R' R, R upper triangular, that is the sum over j of
R_jj^2 (e_j + sum over k > j of U_jk e_k)^2, U = R / diag(R): channels are rounded from the last to the first, each to
what makes its bracket small (GPTQ does so with weights: Frantar et al., 2023). Decoding knows nothing of it.

Tokens lie side by side, so that all of them are rounded at once by vector instructions.
"""

from __future__ import annotations

import numpy as np

from .compiling import kernel


@kernel
def round_block(x, steps, high, feedback, offset, errors):  # type: ignore[no-untyped-def]
    """Round a block in place to multiples of each channel's step.

    Args:
        x: (H, D, T) float32.
        steps: (H, D) float32, > 0. high: (H, D) float32, the largest code; the smallest is -high - 1.
        feedback: (H, D, D) float32; [h, j, i], i < j, is U_ij: what an error of channel j adds to channel i.
        offset: in (0, 0.5]: magnitudes are rounded down to floor(magnitude + offset).
        errors: (D, T) float32, overwritten.
    """
    heads, width, tokens = x.shape
    zero, shift = np.float32(0), np.float32(offset)
    for h in range(heads):
        errors[:] = zero
        for j in range(width - 1, -1, -1):
            step, top = steps[h, j], high[h, j]
            low = -top - np.float32(1)
            for t in range(tokens):
                value = x[h, j, t]
                aim = (value + errors[j, t]) / step
                size = np.floor(abs(aim) + shift)
                code = min(max(size if aim >= zero else -size, low), top)
                x[h, j, t] = code * step
                errors[j, t] = value - code * step
            for i in range(j):
                weight = feedback[h, j, i]
                for t in range(tokens):
                    errors[i, t] += weight * errors[j, t]
