"""Networks as operations and values, and the one table of what each operation does.

A room describes its host's graph once, in order of execution: an `Operation` for each call of a leaf module or of a
function, a `Value` for each tensor. All that is judged about a network (placement, axes, aliases) is judged on these.

The table knows an operation by its name, however it is spelled: `Conv2d`, `conv2d`; `iadd`, `__radd__`, `add_` and
`add`; torch.ao's `ConvBnReLU2d` is a convolution. Names that are not in the table are of the kind "other".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# kind, where the channels of the result are, whether the result can share memory with the first input, names.
# Kinds:
#   computes   layers: convolution, linear, products of activations
#   changes    arithmetic, averages and activations with a range of their own
#   joins      puts tensors beside each other: same values, one range
#   clamps     cuts values off: the range behind it is the one that counts
#   norm       normalizes
#   moves      only moves, selects or repeats values
#   function   other functions of values; float, but what quantized operations read of them is quantized
#   looks up   rows of a table, by integers
#   opaque     layers whose inside stays float
#   creates    depends on shapes only: positions, masks, zeros, sizes
# Channels: "1", "last", "same" (elementwise), "product" (see `axes`), "reduced", "moved", "" (not known).
_TABLE = (
    ("computes", "1", False, "conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d convolution"),
    ("computes", "last", False, "linear bilinear nondynamicallyquantizablelinear scaleddotproductattention"),
    ("computes", "product", False, "matmul bmm mm baddbmm addmm addbmm"),
    ("looks up", "last", False, "embedding embeddingbag"),
    (
        "opaque",
        "last",
        False,
        "multiheadattention multiheadattentionforward lstm gru rnn rnntanh rnnrelu lstmcell grucell rnncell "
        "transformer transformerencoder transformerdecoder transformerencoderlayer transformerdecoderlayer",
    ),
    (
        "norm",
        "1",
        False,
        "batchnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm groupnorm instancenorm instancenorm1d "
        "instancenorm2d instancenorm3d localresponsenorm",
    ),
    ("norm", "last", False, "layernorm rmsnorm"),
    ("changes", "same", False, "add sub mul div floordiv leakyrelu elu celu selu prelu rrelu hardswish"),
    (
        "changes",
        "1",
        False,
        "avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d lppool1d lppool2d "
        "interpolate upsample upsamplenearest2d upsamplingnearest2d upsamplingbilinear2d upsamplebilinear2d",
    ),
    ("changes", "reduced", False, "mean sum"),
    ("joins", "same", False, "cat concat concatenate stack hstack vstack"),
    ("clamps", "same", False, "relu relu6 hardtanh clamp clip clampmin clampmax"),
    (
        "function",
        "same",
        False,
        "gelu silu mish sigmoid hardsigmoid logsigmoid tanh softmax logsoftmax softmin softplus softsign softmax2d "
        "exp log log2 log1p sqrt rsqrt reciprocal pow square erf sin cos abs neg sign round floor where maskedfill "
        "tril triu cumsum maximum minimum normalize threshold hardshrink softshrink tanhshrink addcmul addcdiv lerp",
    ),
    ("function", "reduced", False, "amax amin max min var std norm linalgvectornorm prod"),
    (
        "moves",
        "same",
        True,
        "contiguous detach identity dropout dropout1d dropout2d dropout3d alphadropout featurealphadropout "
        "stochasticdepth droppath to float double half bfloat16 type typeas cpu cuda alias",
    ),
    ("moves", "same", False, "clone roll flip repeatinterleave pad"),
    ("moves", "1", False, "maxpool1d maxpool2d maxpool3d adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d"),
    ("moves", "1", False, "pixelshuffle pixelunshuffle channelshuffle"),
    (
        "moves",
        "moved",
        True,
        "flatten unflatten transpose permute reshape view viewas squeeze unsqueeze getitem narrow select slice chunk "
        "split tensorsplit unbind expand expandas t mt adjoint swapaxes swapdims movedim moveaxis ravel",
    ),
    ("moves", "moved", False, "repeat tile fold unfold indexselect gather"),
    (
        "creates",
        "",
        False,
        "size shape dim ndim numel len getattr arange linspace zeros ones full empty eye tensor zeroslike oneslike "
        "fulllike emptylike newzeros newones newfull newempty newtensor rand randn scalartensor finfo",
    ),
)

_SPELLINGS = {
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "truedivide": "div",
    "floordivide": "floordiv",
    "multiply": "mul",
    "subtract": "sub",
    "rsub": "sub",
    "concatenate": "cat",
    "concat": "cat",
}
_REFLECTED = re.compile(r"^[ir](?=(add|mul|sub|div|truediv|floordiv|pow|matmul)$)")
_FUSED = (  # torch.ao's fused modules go by the layer that is in them
    (re.compile(r"^conv(?:bn)?(?:add)?(?:relu)?([123])d$"), r"conv\1d"),
    (re.compile(r"^linear(relu|bn1d|leakyrelu|tanh)$"), "linear"),
    (re.compile(r"^bnrelu([23])d$"), r"batchnorm\1d"),
)


@dataclass(frozen=True)
class Facts:
    """What the table says of an operation: its kind, where its channels are, whether its result can be a view."""

    kind: str
    channels: str
    views: bool


_OTHER = Facts("other", "", False)
OPERATIONS = {name: Facts(kind, channels, views) for kind, channels, views, names in _TABLE for name in names.split()}
# these quantize what they read and what they make
QUANTIZED = frozenset(("computes", "changes", "joins", "clamps", "norm"))


def canonical(op: str) -> str:
    """The table's name of an operation: `Conv2d`, `conv2d_`, `ConvBnReLU2d` are conv2d; `iadd`, `__radd__` are add."""
    name = op.strip("_").lower()
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    name = _REFLECTED.sub("", name.replace("_", ""))
    for fused, layer in _FUSED:
        name = fused.sub(layer, name)
    return _SPELLINGS.get(name, name)


def function_name(function: Any, fallback: str = "") -> str:
    """The name of a function of torch; that of the attribute for what reads one, such as `x.T`."""
    name = str(getattr(function, "__name__", fallback))
    owner = getattr(function, "__self__", None)
    return str(getattr(owner, "__name__", name)) if name == "__get__" else name


def facts(op: str) -> Facts:
    """The table's entry of an operation, in any spelling."""
    return OPERATIONS.get(canonical(op), _OTHER)


@dataclass(eq=False)
class Value:
    """A tensor (or a tuple of some) that one operation makes and others read.

    Args:
        key: the host's handle: a node, an edge, a name.
        shape: None where it is not known.
        floating: False for integers and booleans.
        single: False for a tuple or list of tensors, which cannot be quantized as one.
        quantized: True if the host, or another quantizer, quantizes it already.

    `producer` and `readers` are filled by the operations that are made with it.
    """

    key: Any
    shape: tuple[int | None, ...] | None = None
    floating: bool = True
    single: bool = True
    quantized: bool = False
    producer: Operation | None = field(default=None, repr=False)
    readers: list[Operation] = field(default_factory=list, repr=False)


@dataclass(eq=False)
class Operation:
    """A call of a leaf module or of a function.

    Args:
        op: class name of the module, name of the function, method or operator; "" for inputs, parameters and outputs.
        how: "module", "function" (torch.*, F.*), "method" (of a tensor) or "operator"; "input", "parameter" (also
            buffers and constants of the graph), "output" (of the model).
        path: qualified name of the module, of the module around a function, of the parameter; `input.<k>`.
        types: qualified class names of the modules around, innermost first.
        inputs: what it reads, in the order of its arguments; the parameters of modules are left out.
        outputs: what it makes. The first is called like the site.
        site: the site's name.
        arguments: positional arguments that are no values, in order (the axes of a transpose).
        keywords: likewise.
        writes: those of `inputs` that it changes in place.
    """

    op: str
    how: str
    path: str = ""
    types: tuple[str, ...] = ()
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    site: str = ""
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    writes: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        for value in dict.fromkeys(self.inputs):
            value.readers.append(self)
        for value in self.outputs:
            value.producer = self

    @property
    def name(self) -> str:
        """The table's name of the operation."""
        return canonical(self.op)

    @property
    def facts(self) -> Facts:
        """The table's entry."""
        return facts(self.op)

    @property
    def kind(self) -> str:
        """The table's kind; "input", "parameter" and "output" for those."""
        return self.how if self.how in ("input", "parameter", "output") else self.facts.kind

    def value_name(self, value: Value) -> str:
        """Site name of an output: the operation's, with `.part<k>` for the second, third, ... part of a tuple."""
        index = self.outputs.index(value)
        return self.site if index == 0 else f"{self.site}.part{index}"
