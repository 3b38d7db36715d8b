"""Small networks that nobody would write, through every room.

With codes of 16 bits and float weights a converted network computes what the float one computes: an in-place write
that is lost, an alias, two layers with one name or a wrong edge shows at once.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import DQA, DQAError, iter_quantizers

from .registry import Refused, case_class

FINE = DQA(bits=8, extra_bits=8, ratio=1.0)
NAMES = (
    "add", "relu", "_", "__", "a_b", "a", "b", "a_b_c", "conv", "input", "x", "self", "forward_", "ünïcode", "层",
    "lambda", "0", "1", "add_1", "quantizer", "predictor", "activation_post_process", "n" * 200, "stored", "unpack",
)  # fmt: skip
LAYERS = ("conv", "conv3", "bn", "relu", "linear", "norm", "shared", "tied", "identity", "dropout")
UNARY = (
    *LAYERS, "f.relu", "gelu", "sigmoid", "scale", "pool", "avg", "permute", "const", "view write", "slice write",
    "relu_", "iscale", "chunk", "where", "float32", "mean",
)  # fmt: skip
BINARY = ("add", "iadd", "mul", "cat", "sub", "maximum", "slice from")


class Op(NamedTuple):
    """One operation on values by number; layers are called `name`, inside of a module `inside` where it is no ""."""

    kind: str
    first: int
    second: int = 0
    name: str = "conv"
    inside: str = ""


class Program(NamedTuple):
    """A network, how it returns its result, and who quantizes it."""

    ops: tuple[Op, ...]
    output: str
    inputs: int
    room: str
    seed: int


def programs(rooms: tuple[str, ...]) -> st.SearchStrategy[Program]:
    """Two to nine operations."""
    name, inside = st.sampled_from(NAMES), st.sampled_from(("", "", *NAMES[:8]))
    op = st.builds(
        Op,
        st.sampled_from([*UNARY, *BINARY, *LAYERS, "add", "iadd"]),
        st.integers(0, 9),
        st.integers(0, 9),
        name,
        inside,
    )
    outputs = st.sampled_from(["tensor", "tuple", "dict", "nested", "twice"])
    return st.builds(
        lambda ops, output, inputs, room, seed: Program((Op("conv3", 0), *ops), output, inputs, room, seed),
        st.lists(op, min_size=1, max_size=8), outputs, st.integers(1, 2), st.sampled_from(rooms), st.integers(0, 99),
    )  # fmt: skip


class Net(nn.Module):
    """Runs a program; every value is (B, 4, 6, 6)."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.paths: list[str] = []
        made: list[str] = []
        for op in program.ops:
            if op.kind not in LAYERS:
                self.paths.append("")
            elif op.kind == "shared" and made:
                self.paths.append(made[op.second % len(made)])
            else:
                made.append(self._place(self._layer(op.kind, made, op.second), op))
                self.paths.append(made[-1])
        self.constant = nn.Parameter(torch.linspace(-1, 1, 6))

    def _layer(self, kind: str, made: list[str], number: int) -> nn.Module:
        if kind == "tied":
            layer = nn.Conv2d(4, 4, 1)
            layers = [self.get_submodule(path) for path in made]
            before = [m for m in layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
            if before:
                layer.weight = before[number % len(before)].weight
            return layer
        makers = {
            "conv3": lambda: nn.Conv2d(4, 4, 3, padding=1), "bn": lambda: nn.BatchNorm2d(4), "relu": nn.ReLU,
            "linear": lambda: nn.Linear(6, 6), "norm": lambda: nn.LayerNorm(6), "identity": nn.Identity,
            "dropout": lambda: nn.Dropout(0.5),
        }  # fmt: skip
        return makers.get(kind, lambda: nn.Conv2d(4, 4, 1))()

    def _place(self, layer: nn.Module, op: Op) -> str:
        """Register a layer under its name, or the next free one."""
        parent, prefix = self, ""
        if op.inside and not hasattr(self, op.inside):
            self.add_module(op.inside, nn.Module())
        if op.inside and type(getattr(self, op.inside)) is nn.Module:
            parent, prefix = getattr(self, op.inside), op.inside + "."
        name = op.name
        while hasattr(parent, name):
            name += "_"
        parent.add_module(name, layer)
        return prefix + name

    def forward(self, x: Tensor) -> Any:
        return self._run([x])

    def _run(self, values: list[Tensor]) -> Any:
        unread = set(range(len(values)))
        for op, path in zip(self.program.ops, self.paths, strict=True):
            first, second = op.first % len(values), op.second % len(values)
            unread -= {first, second} if op.kind in BINARY else {first}
            values.append(self._apply_op(op.kind, path, values[first], values[second]))
            unread.add(len(values) - 1)
        last = values[-1]
        for number in sorted(unread - {len(values) - 1}):  # no operation is dead
            last = last + values[number]
        outputs = {
            "tuple": lambda: (last, values[0]), "dict": lambda: {"out": last, "other": values[len(values) // 2]},
            "nested": lambda: ([last], {"in": (values[-2], last)}), "twice": lambda: (last, last),
        }  # fmt: skip
        return outputs.get(self.program.output, lambda: last)()

    def _apply_op(self, kind: str, path: str, x: Tensor, y: Tensor) -> Tensor:
        if path:
            return self.get_submodule(path)(x)
        if kind == "view write":
            z = x * 1.5
            z.view(z.shape[0], 4, 36).add_(1.0)
            return z
        if kind == "slice write":
            z = torch.zeros_like(x)
            z[:, 1:3] = x[:, 1:3]
            return z
        if kind == "slice from":
            z = x.clone()
            z[:, :2] = y[:, :2]
            return z
        if kind == "relu_":
            return F.relu_(x + 0.5)
        if kind == "iscale":
            z = x + 1.0
            z *= 0.3
            return z
        if kind == "iadd":
            z = x * 0.5
            z += y
            return z
        simple = {
            "f.relu": lambda: F.relu(x), "gelu": lambda: F.gelu(x), "sigmoid": lambda: torch.sigmoid(x),
            "scale": lambda: x * 0.02, "pool": lambda: F.max_pool2d(x, 3, 1, 1),
            "avg": lambda: F.avg_pool2d(x, 3, 1, 1),
            "permute": lambda: x.permute(0, 1, 3, 2), "const": lambda: x + self.constant,
            "chunk": lambda: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0]], 1),
            "where": lambda: torch.where(x > 0, x, 0.1 * x),
            "float32": lambda: x.float(), "mean": lambda: x - x.mean((2, 3), keepdim=True), "add": lambda: x + y,
            "mul": lambda: x * y, "cat": lambda: torch.cat([x[:, :2], y[:, 2:]], 1), "sub": lambda: x - y,
            "maximum": lambda: torch.maximum(x, y),
        }  # fmt: skip
        return simple[kind]()


class Net2(Net):
    """With two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self._run([x, y])


def build(program: Program) -> Net:
    """With weights of the seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        return (Net if program.inputs == 1 else Net2)(program).eval()


def batch(program: Program, number: int = 0, size: int = 4) -> tuple[Tensor, ...]:
    """(size, 4, 6, 6) for every input."""
    generator = torch.Generator().manual_seed(program.seed + number)
    return tuple(torch.randn(size, 4, 6, 6, generator=generator) for _ in range(program.inputs))


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of nested outputs."""
    if isinstance(outputs, Tensor):
        return [outputs]
    items = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for item in items for tensor in flat(item)]


def near(found: Any, expected: Any, what: str, within: float = 0.01) -> None:
    """Equal to a share of the largest value, about three digits: 16-bit codes, through nine operations."""
    left, right = flat(found), flat(expected)
    assert len(left) == len(right), f"{what}: {len(left)} outputs against {len(right)}"
    for one, two in zip(left, right, strict=True):
        assert one.shape == two.shape, f"{what}: shape {tuple(one.shape)} against {tuple(two.shape)}"
        worst = float((one - two).abs().max()) / (float(two.abs().max()) + 1e-3)
        assert worst < within, f"{what}: {worst:.1%} off"


def nncf_graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What NNCF sees of a network. (Its own quantizers compile C++ at first use, which takes minutes.)"""
    from nncf.torch.function_hook import wrap_model
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper

    return GraphModelWrapper(wrap_model(model), inputs).get_graph()


def stock_takes(program: Program) -> bool:
    """Whether the host's own quantization takes the network: what it refuses is not for us to mend."""
    try:
        if program.room == "fx":
            from torch.ao.quantization import get_default_qconfig_mapping
            from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

            prepared = prepare_fx(build(program), get_default_qconfig_mapping(), batch(program))
            prepared(*batch(program))
            convert_fx(prepared)(*batch(program))
        elif program.room == "brevitas":
            torch.fx.symbolic_trace(build(program))(*batch(program))
        elif program.room == "nncf":
            nncf_graph(build(program), batch(program))
        else:
            torch.export.export(build(program), batch(program)).module()(*batch(program))
        return True
    except Exception:
        return False


@case_class("networks", programs(("fx",)), names=(), share=4)
@case_class("networks in PT2E", programs(("pt2e",)), names=(), needs=("torchao",), slow=True)
@case_class("networks in Brevitas", programs(("brevitas",)), names=(), needs=("brevitas",), slow=True)
@case_class("networks in NNCF", programs(("nncf",)), names=(), needs=("nncf",), slow=True)
def networks(case: Program) -> None:
    """Converted with 16-bit codes a network computes what the float one does, and its sites have names of their own."""
    float_model = build(case)
    with torch.no_grad():
        try:
            expected = float_model(*(x.clone() for x in batch(case)))
        except RuntimeError:
            reject()
        room = importlib.import_module(f"dqa_plugins.adapters.{case.room}")
        try:
            quantized = room.quantize_model(build(case), FINE, [batch(case), batch(case)], weight_bits=None)
            found = quantized(*(x.clone() for x in batch(case)))
        except Exception as error:
            if not isinstance(error, DQAError) and not stock_takes(case):
                raise Refused(str(error)) from error
            raise
    near(found, expected, case.room)
    names = [name for name, _ in iter_quantizers(quantized)]
    assert len(set(names)) == len(names), f"two sites of one name: {names}"


@case_class(
    "rooms against rooms",
    programs(("pt2e", "brevitas", "nncf")),
    names=(),
    needs=("torchao", "brevitas", "nncf"),
    slow=True,
)
def rooms(case: Program) -> None:
    """Another room puts the same sites as FX, with the same axes and signs, into one network, and the same scales."""
    found = {}
    with torch.no_grad():
        for room in ("fx", case.room):
            program = case._replace(room=room)
            if not stock_takes(program):
                reject()
            module = importlib.import_module(f"dqa_plugins.adapters.{room}")
            model = module.quantize_model(build(program), FINE, [batch(program)], weight_bits=None)
            found[room] = dict(iter_quantizers(model))
    fx, other = found["fx"], found[case.room]
    assert list(fx) == list(other), f"FX has {list(fx)}, {case.room} {list(other)}"
    for name, one in fx.items():
        two = other[name]
        assert (one.signed, one.channel_axis) == (two.signed, two.channel_axis), f"{name}: another sign or channel axis"
        torch.testing.assert_close(one.scale, two.scale, rtol=1e-2, atol=1e-6, msg=f"{name}: scales")
