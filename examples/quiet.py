"""Silence for what the hosts repeat at every call; what dqa_plugins warns of is always shown."""

from __future__ import annotations

import warnings

from dqa_plugins.errors import DQAWarning

HOSTS = ("torch", "torchao", "brevitas", "nncf", "openvino", "onnx", "onnxruntime", "onnxscript")


def quiet_hosts() -> None:
    """Ignore the warnings of the hosts' modules, by module, and torch.ao's announcement of its end, by its words."""
    for host in HOSTS:
        warnings.filterwarnings("ignore", module=rf"{host}(\.|$)")
    # this one is attributed to whoever calls prepare_fx
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated", category=DeprecationWarning)
    # ours may be attributed to torch's nn.Module, which calls our forward: last, so that it is asked first
    warnings.filterwarnings("default", category=DQAWarning)
