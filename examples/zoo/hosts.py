"""The four hosts: how a network gets to them, and their own int8 of it, calibrated on the same batches."""

from __future__ import annotations

import copy
import importlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROOMS = ("fx", "pt2e", "brevitas", "nncf")

Batches = Sequence[tuple[Tensor, ...]]


def quantize_model(room: str) -> Callable[..., nn.Module]:
    """The room's own `quantize_model`."""
    found: Callable[..., nn.Module] = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model
    return found


def for_room(model: nn.Module, room: str, example: tuple[Tensor, ...]) -> tuple[nn.Module, str]:
    """(the network as it goes to a room, how it was traced).

    FX and Brevitas need a graph of torch.fx. Where torch.fx cannot trace a network (those of transformers test shapes
    in their forward), they get the graph that TorchDynamo makes of it: the same operations, with parameters read by
    functions instead of modules. PT2E gets an exported program's module, made once.
    """
    if room == "nncf":
        return model, "as it is"
    if room == "pt2e":
        return torch.export.export(model, example).module(), "torch.export"
    try:
        torch.fx.symbolic_trace(model)
        return model, "torch.fx"
    except Exception:
        exported = torch._dynamo.export(model, aten_graph=False, tracing_mode="fake")(*example).graph_module
        graph = torch.fx.symbolic_trace(exported.eval())
        for name, constant in list(graph.named_buffers(recurse=False)):
            setattr(graph, name, constant.clone(memory_format=torch.contiguous_format))  # expanded ones do not load
        return graph, "dynamo"


def run(model: nn.Module, batches: Batches) -> None:
    """Run a prepared model on calibration batches."""
    with torch.no_grad():
        for batch in batches:
            model(*batch)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside, in the main thread, once so much processor time is spent."""

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fx(model: nn.Module, batches: Batches) -> tuple[nn.Module, str]:
    """The default mapping of torch.ao FX (histogram observers, weights per channel), as integer kernels."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), batches[0])
    run(prepared, batches)
    return convert_fx(prepared), "default mapping"


def pt2e(model: nn.Module, batches: Batches) -> tuple[nn.Module, str]:
    """torchao's XNNPACKQuantizer, which quantizes additions, products and pooling as we do.

    It quantizes integers too: where the model then fails, X86InductorQuantizer, which quantizes little but the inputs
    of convolutions and linear layers. Without convert's search for convolutions that QAT scaled: half a minute where
    batch norms are left (torchao 0.18), and there are none.
    """
    from unittest.mock import patch

    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    def quantized(quantizer: Any) -> nn.Module:
        prepared = prepare_pt2e(copy.deepcopy(model), quantizer)
        run(prepared, batches)
        with patch("torchao.quantization.pt2e.quantize_pt2e._fold_conv_bn_qat", lambda m: m):
            converted: nn.Module = convert_pt2e(prepared)
        run(converted, batches[:1])
        return converted

    try:
        return quantized(
            XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        ), "XNNPACKQuantizer"
    except Exception:
        config = x86.get_default_x86_inductor_quantization_config()
        return quantized(x86.X86InductorQuantizer().set_global(config)), "X86InductorQuantizer"


def brevitas(model: nn.Module, batches: Batches) -> tuple[nn.Module, str]:
    """Brevitas' stock 8 bits: its quantize(), or layer by layer where that fails: networks that it cannot trace, and
    those for which it never ends (residual_handler, 0.13).
    """
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize

    def calibrated(network: nn.Module) -> nn.Module:
        network.eval()
        with torch.no_grad(), calibration_mode(network):
            run(network, batches)
        with torch.no_grad():
            network(*batches[0])
        return network

    try:
        with at_most(15.0):
            return calibrated(quantize(preprocess_for_quantize(copy.deepcopy(model)))), "quantize"
    except Exception:
        return calibrated(layerwise_quantize(copy.deepcopy(model))), "layerwise_quantize"


def nncf(model: nn.Module, batches: Batches) -> tuple[nn.Module, str]:
    """nncf.quantize, for transformers as their model type says."""
    import nncf as host

    layers = sum(isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__ for module in model.modules())
    kind = host.ModelType.TRANSFORMER if layers > 1 else None
    quantized: Any = host.quantize(
        copy.deepcopy(model), host.Dataset(batches), subset_size=len(batches), model_type=kind
    )
    return quantized, "quantize" if kind is None else "quantize, transformer"


STOCK: dict[str, Callable[[nn.Module, Batches], tuple[nn.Module, str]]] = {
    "fx": fx,
    "pt2e": pt2e,
    "brevitas": brevitas,
    "nncf": nncf,
}
