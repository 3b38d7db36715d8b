"""The packed KV cache of transformers."""

from __future__ import annotations

from . import Part

PART = Part("cache", "adapters/transformers", "adapters/transformers")
add = PART.add

add("values are not centred", "blocks.py", " - s.center.to(x.device)[:, None]", "")
add(
    "blocks of another sequence are dropped",
    "blocks.py",
    "if at < last and at + count > first:",
    "if at <= last and at + count >= first:",
)
add("the first tokens are packed", "layer.py", "self.first = 0 if sliding else first", "self.first = 0")
add(
    "the sliding window is a token longer",
    "layer.py",
    "return self.sliding_window - 1 if self.sliding_window else",
    "return self.sliding_window if self.sliding_window else",
)
add(
    "autograd reads the workspace",
    "layer.py",
    "fresh = torch.is_grad_enabled() and (",
    "fresh = False and (",
    "adapters/transformers/test_generate.py",
)
add("NaN is kept", "layer.py", "            if not bool(torch.isfinite(x.detach()).all()):", "            if False:")
add("a crop forgets no length", "layer.py", "length = max(0, length - count)", "length = max(0, length)")
add(
    "a forward that failed is taken up again",
    "cache.py",
    "            self._give_up()\n        try:",
    "            pass\n        try:",
    "adapters/transformers/test_cache.py",
)
add(
    "layers commit one by one",
    "cache.py",
    "if all(layer.pending is not None for layer in self.layers):",
    "if layer_idx + 1:",
    "adapters/transformers/test_cache.py",
)
add(
    "padding is calibrated on",
    "calibrate.py",
    "used = mask & (mask.cumsum(1) > first)",
    "used = mask.cumsum(1) > -1",
)
add(
    "the rotation of keys is not undone in calibration",
    "calibrate.py",
    "rotated(x.detach().float().cpu().mT, turn(turns, positions), back=True)",
    "x.detach().float().cpu().mT",
)
add(
    "blocks are rotated as if they were the first",
    "layer.py",
    "blocks + count).behind(state.blocks * block)",
    "blocks + count)",
)
add("steps grow with sensitivity", "allocate.py", "(2.0**level / r).float()", "(2.0**level * r).float()")
add(
    "errors are fed to the wrong channels",
    "allocate.py",
    "(r / d[..., None]).mT.tril(-1)",
    "(r / d[..., None]).triu(1)",
)
add(
    "two groups of one table lose a channel",
    "settings.py",
    "tuple(sorted(own.get(_content(g), ()) + g.channels))",
    "g.channels",
)
add("the checksum is not checked", "saving.py", "    if zlib.crc32(body) != crc:", "    if False:")
add(
    "bytes of other settings are read",
    "saving.py",
    'if header["settings"] != settings.fingerprint:',
    "if False:",
    "adapters/transformers/test_cache.py",
)

CODER = Part("cache coder", "dqa_plugins", "adapters/transformers")
CODER.add("blocks begin at the first token", "kernels/blocks.py", "begin = (block - first) * inner", "begin = 0")
CODER.add(
    "the centre of another channel",
    "kernels/blocks.py",
    "row[d] = np.float32(codes[k + d]) * steps[first + d] + centers[first + d]",
    "row[d] = np.float32(codes[k + d]) * steps[first + d] + centers[d]",
)
CODER.add(
    "errors are fed back twice",
    "kernels/feedback.py",
    "errors[j, t] = value - code * step",
    "errors[j, t] += value - code * step",
)
PARTS = (PART, CODER)
