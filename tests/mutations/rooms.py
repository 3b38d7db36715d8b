"""The rooms that do not convert torch.fx graphs: Brevitas and NNCF."""

from __future__ import annotations

from . import Part

BREVITAS = Part("brevitas", "adapters/brevitas", "adapters/brevitas", "adapters/test_networks.py")
NNCF = Part("nncf", "adapters/nncf", "adapters/nncf", "adapters/test_networks.py")
PARTS = (BREVITAS, NNCF)

add = BREVITAS.add
add("leaving calibration does not freeze", "proxy.py", "            self.quantizer.freeze()\n", "            pass\n")
add(
    "an interrupted calibration freezes",
    "proxy.py",
    "interrupted = id(sys.exc_info()[1]) != self._handled",
    "interrupted = False",
)
add("a second calibration goes on", "proxy.py", "            self._start_over()\n", "            pass\n")
add("a new calibration forgets the ranking", "proxy.py", "        if old.ranked:", "        if False:")
add(
    "sites lose their names",
    "proxy.py",
    "self.quantizer.name = name_from_callers(self)",
    'self.quantizer.name = "site"',
)
add(
    "an uncalibrated quantizer trains in eval mode",
    "proxy.py",
    "if not self.training or not torch.is_grad_enabled() or",
    "if",
)
add(
    "disabling is ignored",
    "proxy.py",
    "        if not self.is_quant_enabled:\n            return self.create",
    "        if False:\n            return self.create",
)
add("outliers are said to lie on a grid", "grid.py", "    if grid.keep is not None:", "    if False:")
add("a grid of n bits for DQA", "grid.py", "scale = grid.step.min()", "scale = grid.step.max()")
add("per-channel scales are reported", "grid.py", 'if method.granularity != "tensor":', "if False:")
add(
    "handlers forget the noise", "handlers.py", "            y = y - self._laid(codes.noise, x)\n", "            pass\n"
)
add("handlers forget outliers", "handlers.py", "        if codes.keep is not None:\n", "        if False:\n")
add("one clip range for all channels", "handlers.py", "return torch.minimum(torch.maximum(x, low), high)", "return x")
add("zero points of any size in bytes", "handlers.py", "return codes.bits <= 8 and within", "return codes.bits <= 8")

add = NNCF.add
add(
    "sites lose their names",
    "place.py",
    "NNCFQuantizer(site.method, name=site.name,",
    'NNCFQuantizer(site.method, name="",',
)
add("channel axis 1 everywhere", "place.py", "producer_axis=site.channel_axis", "producer_axis=1")
add(
    "all read quantized values",
    "place.py",
    "    if site.readers is not None:\n        reading",
    "    if False:\n        reading",
)
add("ignored scopes are quantized", "place.py", "return None if operation in skipped else method", "return method")
add(
    "what only ignored operations read is quantized",
    "place.py",
    "            placement.sites.remove(site)\n",
    "            pass\n",
)
add("a pattern goes before a name", "place.py", "for exact in (False, True):", "for exact in (True, False):")
add("patterns may disagree", "place.py", "if name in by and chosen[name] != wanted:", "if False:")
add("every site gets a quantizer of its own", "place.py", "        if site.group not in made:", "        if True:")
add("writes are not seen", "describe.py", "            inputs[:1] if in_place else (),", "            (),")
add("unknown keys are ignored", "config.py", "        if key not in allowed:", "        if False:")
add("num_init_samples counts anything", "config.py", "or isinstance(count, bool) or count < 1):", "):")
NNCF.add(
    "weights of half types come out in float32",
    "weights.py",
    "return cast((codes * scale - (-low * scale).round()).round() / scale, weight.dtype)",
    "return (codes * scale - (-low * scale).round()).round() / scale",
    "adapters/test_dtypes.py",
)
