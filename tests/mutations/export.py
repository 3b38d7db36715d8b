"""Exporters: the program that all start from, QuantizeLinear forms, and what compares backends with torch."""

from __future__ import annotations

from . import Part

PART = Part("export", "dqa_plugins/export", "export", "matrix")
add = PART.add

add("constants of another rank", "frozen.py", "kind = (x.ndim, compute_dtype(x.dtype))", "kind = self.kinds[0]")
add("dynamic scales are constant", "frozen.py", "            grid = grid.scaled(scale)\n", "            pass\n")
add(
    "the zero point is forgotten",
    "frozen.py",
    'field.name != "exact_zero":',
    'field.name not in ("exact_zero", "zero_point"):',
)
add(
    "shared quantizers are copied once",
    "frozen.py",
    "model.named_modules(remove_duplicate=False)",
    "model.named_modules()",
)
add("observing quantizers export", "program.py", '        if quantizer.state != "frozen":', "        if False:")
add("stored models export", "program.py", 'if type(module).__module__.startswith("dqa_plugins.storage."):', "if False:")
add(
    "the model itself is changed",
    "program.py",
    "    ready = copy.deepcopy(model)\n    for",
    "    ready = model\n    for",
)
add(
    "noise is not removed in integers",
    "qdq.py",
    "return value if grid.bias is None else value - grid.bias",
    "return value",
)
add("noise is not added in integers", "qdq.py", "y = x if grid.bias is None else x + grid.bias", "y = x")
add("codes of fewer bits do not clip", "qdq.py", "        if not self.saturates:", "        if False:")
add("int4 whatever the width", "qdq.py", "and grid.width() <= 4 else 8", "else 8")
add("float weights are quantized by the backend", "qdq.py", " or _beside_float_weights(program, node)", "")
add("weights are dequantized in every run", "qdq.py", "if node.name in self.beside_integers else plain_dequantize", "")
add("any file beside it is replaced", "file.py", "and part.name.encode() not in known", "and False")
add("signed codes are not moved", "qdq.py", "full[0] - code_range(self.width, low < 0)[0]", "0")
add("outliers become integers", "qdq.py", "    if grid.keep is not None:\n", "    if False:\n")
add(
    "NaN of a backend is no difference",
    "parity.py",
    "return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)",
    "return max((v for v in found if v == v), default=0.0)",
)
add("a step off is no step off", "parity.py", "~(differences <= 0.5 * step)", "~(differences <= 1.5 * step)")
add("every difference is a tie", "parity.py", "worst <= TIE)", "True)")
add(
    "agreement of the same outputs",
    "parity.py",
    "(first.argmax(1) == got[0].argmax(1))",
    "(first.argmax(1) == first.argmax(1))",
)
add("touched samples are not counted", "parity.py", "        touched |= reached\n", "")
add(
    "OpenVINO multiplies by the reciprocal of a static step",
    "openvino.py",
    "            _divide_wide(node, step)",
    "            pass",
    "export/test_ties.py",
)
add(
    "OpenVINO multiplies by the reciprocal of a dynamic step",
    "openvino.py",
    '            node.get_rt_info()["nonconvertable_divide_0"] = ""',
    "            pass",
    "export/test_ties.py",
)
