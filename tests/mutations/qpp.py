"""Predicted parameters: features, regression, sessions of a forward."""

from __future__ import annotations

from . import Part

PART = Part(
    "qpp",
    "dqa_plugins/qpp",
    *(f"qpp/test_{name}.py" for name in ("features", "regression", "radial", "session", "qpp")),
)
add = PART.add
QPP = "qpp/test_qpp.py"

add(
    "features in single precision",
    "features.py",
    "x.mean(-1, keepdim=True, dtype=torch.float64)",
    "x.mean(-1, keepdim=True).double()",
)
add("the maximum is left out", "features.py", "mean, flat.amax(1).double()]", "mean, mean]")
add("quantiles of another level", "features.py", "LEVELS = (0.9, 0.99, 0.999)", "LEVELS = (0.8, 0.99, 0.999)")
add("contrast along the width only", "features.py", "for axis in (-1, -2):", "for axis in (-1, -1):")
add("outliers on one side only", "features.py", "else (x < -sides[0]) | (x > sides[1])", "else x > sides[1]", QPP)
add(
    "no intercept where one is asked for",
    "fit.py",
    "least_squares(design[:, used], scaled, quantizer.method.prediction.intercept)",
    "least_squares(design[:, used], scaled, False)",
    QPP,
)
add("too few samples are fitted", "fit.py", "    if originals < FEW:", "    if False:", QPP)
add("constant features are fitted", "fit.py", "<= 1e-9 * (1e-12 + features.abs().amax(0))).all()", "< 0).all()", QPP)
add(
    "falling back is silent",
    "fit.py",
    "    if fallen:\n",
    "    if False:\n",
    QPP,
)
add(
    "predictions are not bounded",
    "predictor.py",
    "value = torch.minimum(torch.maximum(value, self.low), self.high)",
    "value = value + 0",
    QPP,
)
add(
    "logarithms are not undone",
    "predictor.py",
    "torch.where(self.logarithmic, linear.clamp(-80.0, 80.0).exp(), linear * scale)",
    "linear * scale",
    QPP,
)
add(
    "a matrix product, whose sums depend on the batch",
    "predictor.py",
    "sum_of(known.unsqueeze(1) * self.weight.t()) + self.bias",
    "(known.float() @ self.weight.float()).double() + self.bias",
    QPP,
)
add(
    "earlier summaries are dropped",
    "predictor.py",
    "torch.cat([features, *earlier, *summaries[-1:]], 1)",
    "torch.cat([features, *(0 * e for e in earlier), *summaries[-1:]], 1)",
    QPP,
)
add(
    "another forward's features are read",
    "session.py",
    "        del stack[stack.index(session) :]",
    "        pass",
    "qpp/test_session.py",
)
add(
    "threads share their sessions",
    "session.py",
    "_running = threading.local()",
    "_running = type('Shared', (), {})()",
    "qpp/test_session.py",
)
add(
    "calibration is not augmented",
    "session.py",
    "if not self.calibrating or session.augmented or output is None:",
    "if True:",
    QPP,
)
add("samples are numbered by batch", "session.py", "self.next_sample += len(tensors[0])", "self.next_sample += 0", QPP)
add(
    "ridge without a penalty",
    "regression.py",
    "(values**2 + factor * len(features))",
    "(values**2 + 0 * factor * len(features))",
    "qpp/test_regression.py",
)
add(
    "left-out rows are left in",
    "regression.py",
    "residual / (1 - hat.diagonal())[:, None].clamp(min=1e-6)",
    "residual",
    "qpp/test_regression.py",
)
add(
    "constant features are divided by",
    "regression.py",
    "live = spread > 1e-9 * (1 + mean.abs())",
    "live = spread > -1",
    "qpp/test_regression.py",
)
