"""Facts about networks, the judge of placement, conversion, and the rooms on top of them: FX and PT2E."""

from __future__ import annotations

from . import Part

GRAPH = Part("graph", "dqa_plugins/graph", "graph", "host", "adapters/fx")
HOST = Part("host", "dqa_plugins/host", "host", "adapters/fx", "adapters/test_networks.py")
FX = Part("fx", "adapters/fx", "adapters/fx", "adapters/test_networks.py")
PT2E = Part("pt2e", "adapters/pt2e", "adapters/pt2e", "adapters/test_networks.py")
PARTS = (GRAPH, HOST, FX, PT2E)

add = GRAPH.add
add("any operand's axis, not the last", "axes.py", "return -1 if -1 in known else (known[0]", "return (known[0]")
add(
    "Linear's channels are axis 1",
    "axes.py",
    '    if channels == "last":\n        return -1\n    operands',
    "    operands",
)
add("a transpose leaves the axis", "axes.py", "return _moved(op, source.shape, value.shape, axis)", "return axis")
add("readers say nothing of the axis", "axes.py", "read.get(value) if axis is None else axis", "axis")
add("writes through views are not seen", "aliases.py", "root[value] = root.get(source, source)", "root[value] = source")
add("every in-place write is a loss", "aliases.py", "read_last.get(value, -1) > i", "True")
add("no write is a loss", "aliases.py", "read_last.get(value, -1) > i", "False")
add("masks are activations", "constants.py", "    return MASK\n", "    return None\n")
add(
    "positions are activations",
    "constants.py",
    '    if op.how == "parameter" or op.kind == "creates":\n',
    "    if False:\n",
)
add("masked logits are quantized", "constants.py", 'if op.name in ("add", "sub") and _only', "if False and _only")
add("the inside of a norm is quantized", "constants.py", "inside |= above | below", "pass")
add("two sites may have one name", "names.py", "    if twice:\n", "    if False:\n")
add(
    "x += y is another operation",
    "operations.py",
    'name = _REFLECTED.sub("", name.replace("_", ""))',
    'name = name.replace("_", "")',
)
add(
    "max-pool is quantized again",
    "operations.py",
    '("moves", "1", False, "maxpool1d',
    '("changes", "1", False, "maxpool1d',
)

add(
    "recording leaves statistics behind",
    "record.py",
    "                buffer.detach().copy_(before)\n",
    "                pass\n",
    "host/test_plumbing.py",
)

add = HOST.add
add(
    "pooling shares its input's range",
    "placement.py",
    "kinds = root.kind in QUANTIZED or",
    'kinds = root.kind in QUANTIZED - {"changes"} or',
)
add("clamps quantize their input", "placement.py", 'if root.kind != "clamps":', "if True:")
add("0-d tensors are quantized", "placement.py", "        if value.shape == ():\n", "        if False:\n")
add(
    "values written later are quantized",
    "placement.py",
    "return WRITTEN if value in self.written else None",
    "return None",
)
add(
    "a moved value is quantized again",
    "placement.py",
    "for source, edge in reversed(chain):",
    "for source, edge in chain:",
)
add("all readers read a value quantized for one", "placement.py", "Group(method), [])", "Group(method), None)")
add("joins do not share", "placement.py", "                    site.group = group\n", "                    pass\n")
add(
    "an override of None is ignored",
    "placement.py",
    "if self.sites.pop(value, None) is not None:",
    "if value in self.sites:",
)
add("sharing mixes channels", "placement.py", "        elif probe.uses_channels:", "        elif False:")
add("sharing mixes predictions", "placement.py", "        if probe.predictor is not None:", "        if False:")
add(
    "settings that match nothing are not told",
    "placement.py",
    "[name for name in overrides if not _names_something(name, operations)]",
    "[]",
)
add("convert does not freeze", "convert.py", "    quantizer.freeze(_reader_weight(quantizer, model, node))\n", "")
add(
    "convert drops the quantizer",
    "convert.py",
    "    node.target = target\n",
    "    node.replace_all_uses_with(node.all_input_nodes[0])\n    model.graph.erase_node(node)\n    return\n",
)
add(
    "the next layer's weight is not found",
    "convert.py",
    "return None if layer is None else weight_rows(layer, model)",
    "return None",
)
add("skip takes a string", "skip.py", "    if isinstance(skip, str):", "    if False:", "adapters/fx/test_bad_input.py")
add(
    "skip='last' skips the first",
    "skip.py",
    'layers[:1] if item == "first" else layers[-1:]',
    "layers[:1]",
    "adapters/fx",
)
add(
    "a changed host is taken",
    "hooks.py",
    "        if found[: len(parameters)] != parameters:",
    "        if False:",
    "host/test_plumbing.py",
)
add(
    "hooks are installed twice",
    "hooks.py",
    "if not getattr(getattr(hook.owner, hook.name, None), MARK, False)]",
    "]",
    "host/test_plumbing.py",
)
add(
    "the first calibration item is lost",
    "quantize.py",
    "return itertools.chain((first,), calls), first",
    "return calls, first",
    "host/test_plumbing.py",
)

add = FX.add
add("sites lose their names", "place.py", "= site.name, site.channel_axis", '= "", site.channel_axis')
add("channel axis 1 everywhere", "place.py", "= site.name, site.channel_axis", "= site.name, 1")
add("every reader gets a quantizer of its own", "place.py", "if site.group not in observers:", "if True:")
add("all read quantized values", "place.py", "users = [user for user in users if user in reading]", "pass")
add("QAT does not train", "place.py", 'if qat and observer.quantizer.state == "observe":', "if False:")
add("order of execution is lost", "place.py", "        quantizer.index = index\n", "        pass\n")
add("settings that match nothing are silent", "place.py", "        warn_idle(summary)\n", "        pass\n")
add(
    "plain convert_fx goes its own way",
    "hooks.py",
    "        return observer.convert(model, node)",
    "        return original(model, node, modules, *args, **kwargs)",
)
add("weights of four bits have eight", "config.py", "limit = 2 ** (weight_bits - 1) - 1", "limit = 127")
add("QAT keeps a weight's range of the past", "config.py", "        self.reset_min_max_vals()\n", "")
add(
    "ConvTranspose's weight along axis 0",
    "config.py",
    "weight_bits=weight_bits, weight_axis=1",
    "weight_bits=weight_bits, weight_axis=0",
)

add = PT2E.add
add(
    "sites lose their readers",
    "place.py",
    "        if site.readers is None:\n            return None\n",
    "        return None\n",
)
add("writes are not seen", "place.py", "    return alias is not None and alias.is_write", "    return False")
add("integers are floating", "place.py", "_sizes(tensor), tensor.is_floating_point())", "_sizes(tensor), True)")
add(
    "torchao's observer switch is ignored",
    "observer.py",
    "bool(self.observer_enabled[0] == 1) and ",
    "",
)
add("torchao's fake-quant switch is ignored", "observer.py", "bool(self.fake_quant_enabled[0] == 1)", "True")
add(
    "channel axis 1 everywhere",
    "observer.py",
    "index=index, producer_axis=producer_axis)",
    "index=index, producer_axis=1)",
)
add("QAT keeps a weight's range of the past", "observer.py", "        self.reset_min_max_vals()\n", "")
FX.add(
    "weights of half types come out in float32",
    "hooks.py",
    "return found if found.is_quantized else found.to(weight.dtype)",
    "return found",
    "adapters/test_dtypes.py",
)
PT2E.add(
    "batch norms are folded in training mode",
    "hooks.py",
    "        if trained:\n",
    "        if False:\n",
    "adapters/pt2e/test_convert.py",
)
