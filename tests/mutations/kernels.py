"""Compiled loops, and where they are used."""

from __future__ import annotations

from . import Part

FILES = "fake_quantize observe predict eager".split()
PART = Part("kernels", "dqa_plugins/kernels", *(f"kernels/test_{name}.py" for name in FILES))
add = PART.add

add(
    "the inverse of the step",
    "vectors.py",
    "builder.fdiv(builder.fadd(v, bias) if full else v, divisor)",
    "builder.fmul(builder.fadd(v, bias) if full else v, builder.fdiv(ir.Constant(v.type, [1.0] * LANES), divisor))",
)
add(
    "values on the threshold are kept",
    "vectors.py",
    'builder.fcmp_ordered(">", v, upper)',
    'builder.fcmp_ordered(">=", v, upper)',
)
add(
    "the sample's parameters are those of the first",
    "fake_quantize.py",
    "            at, left = at + count, period",
    "            left = period",
)
add(
    "rows of channels begin at the first",
    "fake_quantize.py",
    "table, row // free * inner + begin - row * inner, full",
    "table, row // free * inner, full",
)
add(
    "the bracket's end belongs to it",
    "observe.py",
    "if k >= high:\n            above",
    "if k > high:\n            above",
)
add("a missed bracket is not noticed", "observe.py", "if rank - offset < below:", "if rank - offset < below - 1:")
add(
    "infinity is a NaN",
    "observe.py",
    "if least < ~_INFINITY or most > _INFINITY:\n        return 3",
    "if least <= ~_INFINITY or most >= _INFINITY:\n        return 3",
)
add("the next rank is the same", "observe.py", "out[0] if within > following - offset else _MOST", "out[0]")
add("predictions are not made valid", "tables.py", "scale = _LEAST if scale < _LEAST else scale", "scale = scale")
add("an empty range is at zero", "tables.py", "zero if step > zero else -lower", "zero")
add("summaries count one side", "predict.py", "np.int32((v < lower) | (v > upper))", "np.int32(v > upper)")
add("no radial part", "predict.py", "linear += near[r] * bumps[r, p]", "linear += 0 * near[r]")
add("kernels under functorch", "eager.py", "and torch._C._functorch.peek_interpreter_stack() is None", "")
add("kernels under a dispatch mode", "eager.py", "and torch._C._len_torch_dispatch_stack() == 0", "")
