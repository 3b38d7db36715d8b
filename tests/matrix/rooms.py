"""The four adapters behind one interface: a network whose four ReLUs hold one method each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, QPP, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers, method_to_dict

METHODS: dict[str, Method] = {
    "Direct": Direct(bits=4),
    "DQA": DQA(bits=3),
    "NoisyQuant": NoisyQuant(bits=5, amplitude=0.4),
    "DenseSparse": DenseSparse(bits=2, density=0.05),
}
SITES = {name: f"relu{k}" for k, name in enumerate(METHODS, 1)}
SOURCES = ("static", "dynamic", "predicted")


class Net(nn.Module):
    """Four conv-ReLU pairs, the float layers `stem` and `fc` around them; no batch norm, so no folding moves a bit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        for k in range(1, 5):
            setattr(self, f"conv{k}", nn.Conv2d(6, 6, 3, padding=1))
            setattr(self, f"relu{k}", nn.ReLU())
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        x = self.relu3(self.conv3(x))
        x = self.relu4(self.conv4(x))
        return self.fc(x.mean((2, 3)))


def net() -> Net:
    """With fixed weights, in eval mode."""
    torch.manual_seed(3)
    return Net().eval()


def batches(count: int = 3, size: int = 8, seed: int = 0) -> list[Tensor]:
    """Inputs of different size per sample."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.3, 2, size).reshape(-1, 1, 1, 1)
    return [torch.randn(size, 3, 10, 10, generator=generator) * scale for _ in range(count)]


def methods(source: str) -> dict[str, Method]:
    """Site -> method, for one qparams source. Predicted: each site reads its own tensor (see also test_predicted)."""

    def of(site: str) -> str | QPP:
        return QPP(mode="paper", sites=("input", site)) if source == "predicted" else source

    return {SITES[name]: method.replace(qparams=of(SITES[name])) for name, method in METHODS.items()}


def fx(wanted: dict[str, Method]) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping

    mapping = get_qconfig_mapping(None)
    for site, method in wanted.items():
        mapping.set_module_name(site.replace("relu", "conv"), get_qconfig(method, weight_bits=None))
    prepared = prepare_fx(net(), mapping, (batches()[0],))
    with torch.no_grad():
        for x in batches():
            prepared(x)
    return convert_fx(prepared)


def pt2e(wanted: dict[str, Method]) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer

    quantizer = PluginQuantizer(weight_bits=None)
    for site, method in wanted.items():
        quantizer.set_module_name(site.replace("relu", "conv"), method)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = torch.export.export(net(), (batches()[0],), dynamic_shapes=dynamic).module()
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for x in batches():
            prepared(x)
    return convert_pt2e(prepared)


def brevitas(wanted: dict[str, Method]) -> nn.Module:
    from brevitas.graph.calibrate import calibration_mode

    from dqa_plugins.adapters.brevitas import substitute_layers

    model = net()
    substitute_layers(model, dict(wanted))
    with torch.no_grad(), calibration_mode(model):
        for x in batches():
            model(x)
    return model.eval()


def nncf(wanted: dict[str, Method]) -> nn.Module:
    import nncf as host

    from dqa_plugins.adapters.nncf import quantize

    def entry(method: Method) -> dict[str, Any]:
        fields = {k: v for k, v in method_to_dict(method).items() if v is not None and k != "method"}
        return {"mode": method.name, **fields}

    first = next(iter(wanted.values()))
    # NNCF also places quantizers on the input and behind the stem: those sites stay float here
    names = {site: entry(method) for site, method in wanted.items()}
    config = {
        "compression": {
            "algorithm": "quantization",
            "activations": entry(first),
            "scope_overrides": {"activations": {**names, "input.0": None, "stem": None, "mean.0": None}},
        }
    }
    return quantize(net(), host.Dataset(batches()), config)


ROOMS: dict[str, Callable[[dict[str, Method]], nn.Module]] = {
    "fx": fx,
    "pt2e": pt2e,
    "brevitas": brevitas,
    "nncf": nncf,
}


def sites(model: nn.Module) -> dict[str, Any]:
    """Site name -> quantizer."""
    return dict(iter_quantizers(model))
