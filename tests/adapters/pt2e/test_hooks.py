"""What is touched in torchao: installed once, checked at import, harmless to others."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import torch
from torchao.quantization.pt2e import quantize_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from dqa_plugins.adapters.pt2e import PluginQuantizer, PT2EObserver, hooks
from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.host.hooks import Hook, install

from .zoo import calibrate, exported, inputs


def test_a_missing_torchao_names_the_extra() -> None:
    """In a process that cannot import it."""
    script = (
        "import sys; sys.modules['torchao'] = None\n"
        "from dqa_plugins.errors import MissingDependency\n"
        "try:\n    import dqa_plugins.adapters.pt2e\n"
        "except MissingDependency as error:\n    assert '.[pt2e]' in str(error), error\n"
        "else:\n    raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_changed_torchao_is_refused_by_name() -> None:
    """A function that is gone, and one whose parameters changed."""
    fake = types.ModuleType("torchao.fake")
    with pytest.raises(FrameworkMismatch, match=r"torchao\.fake\.prepare is gone"):
        install([Hook(fake, "prepare", ("model",), lambda f: f)], hooks.HOST)
    fake.prepare = lambda graph: graph  # type: ignore[attr-defined]
    with pytest.raises(FrameworkMismatch, match=r"takes \('graph',\)"):
        install([Hook(fake, "prepare", ("model",), lambda f: f)], hooks.HOST)


def test_installing_twice_wraps_once() -> None:
    """Idempotent, also when the room is imported again."""
    before = quantize_pt2e.prepare
    hooks.install()
    importlib.reload(importlib.import_module("dqa_plugins.adapters.pt2e"))
    assert quantize_pt2e.prepare is before


def test_stock_quantizers_do_not_notice() -> None:
    """X86's model, prepared through the hooks, equals the one without."""
    outputs = []
    for wrapped in (True, False):
        names = ("prepare", "_fuse_conv_bn_", "_fuse_linear_bn_", "_fold_conv_bn_qat")
        saved = {name: getattr(quantize_pt2e, name) for name in names}
        if not wrapped:
            for name, function in saved.items():
                setattr(quantize_pt2e, name, function.__wrapped__)
        try:
            quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
            prepared = quantize_pt2e.prepare_pt2e(exported("residual"), quantizer)
            calibrate(prepared, "residual")
            outputs.append(quantize_pt2e.convert_pt2e(prepared)(*inputs("residual")))
        finally:
            for name, function in saved.items():
                setattr(quantize_pt2e, name, function)
    assert torch.equal(*outputs)


def test_int8_qparams_are_refused() -> None:
    """Whoever asks an observer of ours for a scale and a zero point would replace the method in silence."""
    prepared = quantize_pt2e.prepare_pt2e(exported("shared_relu"), PluginQuantizer().set_global(_direct()))
    observer = next(module for module in prepared.modules() if isinstance(module, PT2EObserver))
    with pytest.raises(FrameworkMismatch, match=r"'input\.0' \(Direct, 4 bits\)"):
        observer.calculate_qparams()


def _direct() -> object:
    from dqa_plugins import Direct

    return Direct()
