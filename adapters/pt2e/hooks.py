"""What of torchao's PT2E mode is touched, and the check that it is still there.

Three functions get a wrapper, once, when this room is imported. All are looked up in their module at call time, so
it does not matter whether prepare_pt2e was imported before. Only our observers are treated differently.

- `quantize_pt2e._fuse_conv_bn_`: names the sites before batch norms disappear into convolutions; a Quantizer is only
  asked afterwards (torchao 0.18).
- `quantize_pt2e.prepare`: tells our observers that prepare_qat_pt2e is at work, which no Quantizer gets to know.
- `export_utils._replace_dropout`: move_exported_model_to_eval and _to_train end there. They rewrite dropout and batch
  norm and leave `.training` of observers alone; ours must stop learning in eval mode.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch.fx import GraphModule

from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.qpp.edges import prepare_graph
from dqa_plugins.sites import iter_quantizers

from .host import ANNOTATION, TESTED, torchao
from .naming import name_sites
from .observer import PT2EObserver, PT2EWeight

MARK = "__dqa_plugins_hook__"


def _hook(module: ModuleType, name: str, parameters: tuple[str, ...], wrap: Callable[..., Any]) -> None:
    original = getattr(module, name, None)
    if getattr(original, MARK, False):
        return
    if not callable(original):
        raise FrameworkMismatch(
            f"{module.__name__}.{name} is gone in torchao {torchao.__version__}; the PT2E adapter stands on it. It was "
            f"tested with torchao {TESTED}: install that version, or use the FX flow."
        )
    found = tuple(inspect.signature(original).parameters)
    if found[: len(parameters)] != parameters:
        raise FrameworkMismatch(
            f"{module.__name__}.{name} takes {found} in torchao {torchao.__version__}, not {parameters}; the PT2E "
            f"adapter was tested with torchao {TESTED}."
        )
    wrapper = functools.wraps(original)(wrap(original))
    setattr(wrapper, MARK, True)
    setattr(module, name, wrapper)


def _fuse_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def fuse(m: GraphModule, *args: Any, **kwargs: Any) -> Any:
        name_sites(m.graph)
        return original(m, *args, **kwargs)

    return fuse


def _prepare_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(model: GraphModule, node_name_to_scope: Any, is_qat: bool, *args: Any, **kwargs: Any) -> GraphModule:
        prepared = original(model, node_name_to_scope, is_qat, *args, **kwargs)
        if is_qat:
            for module in prepared.modules():
                if isinstance(module, PT2EObserver):
                    module.quantizer.start_qat()
                elif isinstance(module, PT2EWeight):
                    module.enable_fake_quant()
        prepare_graph(prepared, [quantizer for _, quantizer in iter_quantizers(prepared)])
        return prepared

    return prepare


def _dropout_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def replace_dropout(m: GraphModule, train_to_eval: bool, *args: Any, **kwargs: Any) -> Any:
        for module in m.modules():
            if isinstance(module, PT2EObserver):
                module.train(not train_to_eval)
        return original(m, train_to_eval, *args, **kwargs)

    return replace_dropout


def install() -> None:
    """Install the wrappers; a second call changes nothing.

    Raises:
        FrameworkMismatch: torchao lacks a function, or its parameters changed.
    """
    quantize_pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    export_utils = importlib.import_module("torchao.quantization.pt2e.export_utils")
    quantizer = importlib.import_module("torchao.quantization.pt2e.quantizer.quantizer")
    if getattr(quantizer, "Q_ANNOTATION_KEY", None) != ANNOTATION:
        raise FrameworkMismatch(
            f"torchao {torchao.__version__} keeps annotations elsewhere than in Node.meta[{ANNOTATION!r}]; the PT2E "
            f"adapter was tested with torchao {TESTED}."
        )
    _hook(quantize_pt2e, "_fuse_conv_bn_", ("m",), _fuse_hook)
    _hook(quantize_pt2e, "prepare", ("model", "node_name_to_scope", "is_qat"), _prepare_hook)
    _hook(export_utils, "_replace_dropout", ("m", "train_to_eval"), _dropout_hook)
