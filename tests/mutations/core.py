"""The core: the arithmetic, what calibration records and decides, the methods, the quantizer's states."""

from __future__ import annotations

from . import Part

FILES = (
    "functional grid quantizer extra_bits calibration statistics search states bad_input persistence methods sites"
).split()
PART = Part("core", "dqa_plugins", *(f"core/test_{name}.py" for name in FILES))
add = PART.add


def test(name: str) -> str:
    return f"core/test_{name}.py"


# ---- grid: the one arithmetic
add(
    "noise is not added",
    "grid.py",
    "            y = y + self.bias\n",
    "            y = y + 0 * self.bias\n",
    test("grid"),
)
add("noise is not removed", "grid.py", "else values - self.bias", "else values", test("grid"))
add(
    "halves go up, not to even",
    "grid.py",
    "torch.round(y / (nonzero(self.step) if self.divisor is None else self.divisor))",
    "torch.floor(y / (nonzero(self.step) if self.divisor is None else self.divisor) + 0.5)",
    test("grid"),
)
add(
    "times the inverse of the step",
    "grid.py",
    "torch.round(y / (nonzero(self.step) if self.divisor is None else self.divisor))",
    "torch.round(y * (1 / (nonzero(self.step) if self.divisor is None else self.divisor)))",
    test("grid"),
)
add(
    "no clamp",
    "grid.py",
    "return rounded, bound(rounded, self.low, self.high)",
    "return rounded, rounded",
    test("grid"),
)
add("zero point is not added", "grid.py", "rounded = rounded + self.zero_point", "rounded = rounded + 0", test("grid"))
add("thresholds are outliers", "grid.py", "(y < self.keep[0]) | (y >", "(y <= self.keep[0]) | (y >=", test("grid"))
add("outliers are quantized", "grid.py", "torch.where(outside, detached, x_hat)", "x_hat", test("quantizer"))
add("everything is an outlier", "grid.py", "torch.where(outside, detached, x_hat)", "detached", test("quantizer"))
add("gradient everywhere", "grid.py", "x_hat, (rounded, codes))", "x_hat, None)", test("states"))
add(
    "zero point in steps of 2^n", "grid.py", "min=0) / ((2**bits - 1) / 2)", "min=0) / (2**bits / 2)", test("quantizer")
)
add("an empty range gives zero", "grid.py", "torch.zeros_like(lower), -lower)", "torch.zeros_like(lower), 0 * lower)")
add("the scale leaves the bias alone", "grid.py", "None if self.bias is None else self.bias * scale", "self.bias")
add("kept values have codes", "grid.py", "codes.masked_fill(outside, 0)", "codes", test("grid"))
add("a code is a bit wider", "grid.py", "int(codes).bit_length()", "int(codes + 1).bit_length()", test("grid"))
add("constants lose their bias", "grid.py", "bool((self.bias != 0).any())", "bool((self.bias > 9).any())", test("grid"))
add("ties are not seen", "grid.py", "(y - y.floor() - 0.5).abs()", "(y - y.floor()).abs()", test("grid"))

# ---- rounding
add("clamp off by one above", "rounding.py", "2 ** (bits - 1) - 1) if", "2 ** (bits - 1)) if", test("quantizer"))
add("clamp off by one below", "rounding.py", "(-(2 ** (bits - 1)),", "(-(2 ** (bits - 1)) + 1,", test("quantizer"))
add("zero scale gives NaN", "rounding.py", "torch.where(scale > 0, scale, math.inf)", "scale", test("quantizer"))
add(
    "half precision arithmetic",
    "rounding.py",
    "torch.float64 if dtype == torch.float64 else torch.float32",
    "dtype",
    test("quantizer"),
)
add("half overflows", "rounding.py", "x.clamp(-largest, largest).to(dtype)", "x.to(dtype)", test("quantizer"))
add("powers of two are one off", "rounding.py", "exponent.long() + 16]", "exponent.long() + 17]", test("functional"))
add("gradients do not stop", "rounding.py", "grads[0] * ctx.saved_tensors[0]", "grads[0]", test("functional"))
add("forward derivatives vanish", "rounding.py", "tangent * ctx.saved_tensors[0]", "tangent * 0", test("functional"))

# ---- functional: the papers
add(
    "paper: halves go up",
    "functional.py",
    "codes = torch.round(y / nonzero(scale))\n    if zero",
    "codes = torch.floor(y / nonzero(scale) + 0.5)\n    if zero",
)
add("paper: shift errors forgotten", "functional.py", " + shift_errors.to(torch.int32)", "")
add(
    "paper: shift rounds to zero",
    "functional.py",
    "codes = q >> shift ",
    'codes = torch.div(q, 1 << shift, rounding_mode="trunc") ',
)
add("paper: folded bias has the wrong sign", "functional.py", "bias - removed", "bias + removed")
add(
    "paper: thresholds are outliers",
    "functional.py",
    "outside = (y < lower) | (y > upper)",
    "outside = (y <= lower) | (y >= upper)",
)
add("paper: noise is not removed", "functional.py", "codes * step - bias, x.dtype", "codes * step, x.dtype")
add(
    "paper: outlier codes are kept",
    "functional.py",
    "torch.where(outliers | (scale <= 0), torch.zeros_like(codes), codes)",
    "codes",
)

# ---- ranges: from tensors to qparams
add(
    "quantile without interpolation",
    "ranges.py",
    "first + (second - first) * (position - rank)",
    "first",
    test("statistics"),
)
add(
    "channels along axis 1 always",
    "ranges.py",
    "x.movedim(channel_axis, 1).flatten(2)",
    "x.flatten(2)",
    test("statistics"),
)
add(
    "qparams along axis 1 always",
    "ranges.py",
    "    axis = channel_axis % x.ndim\n",
    "    axis = 1\n",
    test("quantizer"),
)
add("the maximum, not of the magnitude", "ranges.py", "values = x.abs() if", "values = x if", test("statistics"))
add("the lower end has the wrong sign", "ranges.py", '-end if extent.of == "lower" else end', "end", test("statistics"))
add(
    "clip factor ignored",
    "ranges.py",
    "extent * cast(factor, extent.dtype) for extent in found",
    "extent for extent in found",
    test("search"),
)
add(
    "a predicted range may be empty",
    "ranges.py",
    "torch.maximum(upper, lower + lower.abs() * 1e-6 + 1e-30)",
    "upper",
    test("statistics"),
)
add(
    "one sample's qparams for all",
    "ranges.py",
    "        shape[0] = -1\n",
    "        parameter = parameter[:1]\n",
    test("quantizer"),
)

# ---- search and resolve
add("noise is the same everywhere", "search.py", '{seed}:{name}"', '{seed}"', test("search"))
add("noise search takes the worst", "search.py", "errors.argmin()", "errors.argmax()", test("search"))
add(
    "important channels: the lowest",
    "search.py",
    "argsort(descending=True,",
    "argsort(descending=False,",
    test("extra_bits"),
)
add("no important channel", "search.py", "order[: round(ratio", "order[: 0 * round(ratio", test("extra_bits"))
add(
    "ties to the higher index",
    "search.py",
    "importance.argsort(descending=True, stable=True)",
    "importance.flip(0).argsort(descending=True, stable=True).sub(len(importance) - 1).neg()",
    test("extra_bits"),
)
add(
    "clip search takes the worst",
    "search.py",
    "torch.where(error < best_error",
    "torch.where(error > best_error",
    test("search"),
)
add(
    "clip search: smaller factor wins ties",
    "search.py",
    "torch.where(error < best_error",
    "torch.where(error <= best_error",
    test("search"),
)
add(
    "output error without the weight",
    "search.py",
    "(weight @ difference).square().sum()",
    "difference.square().sum()",
    test("search"),
)
add(
    "noise errors are not weighted",
    "search.py",
    "scale.square().numpy()",
    "torch.ones_like(scale).numpy()",
    test("search"),
)
add("searches use the static scale", "resolve.py", 'if method.qparams != "static":', "if False:", test("search"))
add("no clip search", "resolve.py", 'if method.clip == "mse":', "if False:", test("search"))
add(
    "a missing next layer is no error",
    "resolve.py",
    "    if weight is None:\n        raise",
    "    if weight is None:\n        return None\n        raise",
    test("search"),
)

# ---- methods
add(
    "steps: signed and unsigned swapped",
    "method.py",
    "if signed else 2**self.bits)",
    "if not signed else 2**self.bits)",
    test("quantizer"),
)
add("DQA: step of n bits", "methods.py", "plain.step * power_of_two(-extra, dtype)", "plain.step", test("quantizer"))
add(
    "DQA: range of n bits",
    "methods.py",
    "power_of_two(extra + self.bits -",
    "power_of_two(0 * extra + self.bits -",
    test("quantizer"),
)
add(
    "DQA: unsigned codes go below zero",
    "methods.py",
    "-width if signed else torch.zeros_like(width)",
    "-width",
    test("quantizer"),
)
add("DQA: m is 3 at two bits", "methods.py", "min(3, self.bits) if", "3 if", test("methods"))
add(
    "NoisyQuant: noise in units of x",
    "methods.py",
    ".to(plain.step.dtype) * plain.step)",
    ".to(plain.step.dtype))",
    test("grid"),
)
add(
    "NoisyQuant: full range always",
    "methods.py",
    "super().steps(signed) if self.full_range else",
    "super().steps(signed) if True else",
    test("quantizer"),
)
add(
    "Dense+Sparse: density on both sides",
    "methods.py",
    "1 - self.density / 2)",
    "1 - self.density)",
    test("statistics"),
)
add("Dense+Sparse: nothing is kept", "method.py", "keep=self.keeps_outliers", "keep=False", test("quantizer"))
add(
    "Dense+Sparse: reduced by maximum",
    "methods.py",
    'return self.reduce or "mean"',
    'return self.reduce or "max"',
    test("calibration"),
)
add("a duplicate method is taken", "methods.py", "    if kind.name in METHODS:", "    if False:", test("grid"))
add(
    "a grid not proportional is taken",
    "methods.py",
    "    if not method.uses_range:\n        one",
    "    if False:\n        one",
    test("grid"),
)
add("bits beyond 8 are taken", "method.py", "not low <= value <= high:", "not low <= value:", test("methods"))
add("unknown fields are dropped", "methods.py", "    if unknown:\n", "    if False:\n", test("methods"))

# ---- calibration
add(
    "static: mean instead of maximum",
    "calibration.py",
    '        if method.reduction == "max":\n            return self.maximum\n',
    "",
    test("calibration"),
)
add(
    "static: the last batch's maximum",
    "calibration.py",
    "values.amax(0) if self.count == 0 else torch.maximum(self.maximum, values.amax(0))",
    "values.amax(0)",
    test("calibration"),
)
add(
    "a smaller minimum is forgotten",
    "calibration.py",
    "torch.minimum(self.minimum, measured.minimum.double())",
    "measured.minimum.double()",
    test("calibration"),
)
add(
    "merge forgets the sum",
    "calibration.py",
    "self._add(other.total.reshape(-1, *other.maximum.shape))",
    "self.total = 1 * self.total",
    test("calibration"),
)
add(
    "merge keeps too much",
    "calibration.py",
    "columns = other.kept_sample < room",
    "columns = other.kept_sample < 64",
    test("calibration"),
)
add("kept values in a block, not strided", "calibration.py", " * positions // columns", "", test("calibration"))
add("the moving average stands still", "calibration.py", "QAT_AVERAGING * (top", "0 * (top", test("states"))

# ---- sources, quantizer, parameters, state
add(
    "quantizers do nothing",
    "quantizer.py",
    "        return self.fake_quantize(x, prediction)",
    "        return x",
    test("quantizer"),
)
add("scope='batch' ignored", "source.py", 'if site.method.scope == "batch"', "if False", test("quantizer"))
add(
    "the batch's scale, not the sample's",
    "source.py",
    'if site.method.scope == "batch"',
    "if True",
    test("quantizer"),
)
add(
    "uncalibrated freezes in silence",
    "quantizer.py",
    "        if self.calibration.count == 0:",
    "        if False:",
    test("states"),
)
add("NaN is let in", "ranges.py", "    if not ends.finite:\n", "    if False:\n", test("bad_input"))
add(
    "another number of channels is let in",
    "quantizer.py",
    "x.shape[self._checked_axis(x)] != self._channels:",
    "False:",
    test("bad_input"),
)
add("frozen forgets its sign", "quantizer.py", "        self._signed = self.signed\n", "", test("states"))
add(
    "train() thaws a frozen quantizer",
    "quantizer.py",
    'if self._state == "observe":\n            self._observe',
    'if self._state == "observe" or self.training:\n            self._observe',
    test("states"),
)
add(
    "calibration overrides a ranking",
    "quantizer.py",
    'if not (name == "extra_bits" and self.ranked):',
    "if True:",
    test("extra_bits"),
)
add("extra bits of any size", "quantizer.py", "if extra_bits.numel() and not", "if False and not", test("bad_input"))
add(
    "signed and unsigned swapped",
    "parameters.py",
    "self.calibration.negative if self._signed",
    "not self.calibration.negative if self._signed",
    test("quantizer"),
)
add(
    "a loaded model keeps its old grid",
    "parameters.py",
    "        quantizer.derive_grid()",
    "        pass",
    test("persistence"),
)
add(
    "half() casts qparams",
    "state.py",
    "if after is not None and after.dtype != before.dtype:",
    "if False:",
    test("persistence"),
)
add("the state of another method loads", "state.py", "    if saved != method:", "    if False:", test("persistence"))
add("state 'foo' loads", "state.py", "if value not in STATES if", "if False if", test("persistence"))
add("negative scales load", "state.py", "if low < least or", "if", test("grid"))

# ---- metrics and reports
REPORT = "report/test_activation_report.py"
add("failure rate: strict margin", "metrics.py", "> margin * (1 + 1e-6)", ">= margin", "qpp/test_qpp.py")
add(
    "ignored positions count",
    "metrics.py",
    "counted.sum(1).clamp(min=1)",
    "counted.shape[1]",
    "ranking/test_search.py",
)
add(
    "report: outliers cost nothing",
    "report/activations.py",
    "kept_share(grid, x) * (32 + ",
    "0 * kept_share(grid, x) * (32 + ",
    REPORT,
)
add(
    "report: per-sample qparams cost nothing",
    "report/activations.py",
    "        bits += 32 * values / x.numel()",
    "        pass",
    REPORT,
)
add(
    "report: mean over sites, not values",
    "report/activations.py",
    "sum(s.bits * s.elements for s in self.sites) / sum(s.elements for s in self.sites)",
    "sum(s.bits for s in self.sites) / len(self.sites)",
    REPORT,
)
add(
    "report: signal and noise swapped",
    "report/activations.py",
    "math.log10(self.signal / self.noise)",
    "math.log10(self.noise / self.signal)",
    REPORT,
)
