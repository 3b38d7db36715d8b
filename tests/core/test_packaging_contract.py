"""The public names of the contract, and what importing them may not do."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dqa_plugins

PUBLIC = ["Direct", "DQA", "NoisyQuant", "DenseSparse", "ActivationQuantizer", "iter_quantizers", "functional"]
FUNCTIONS = [
    *(
        f"{method}_{step}"
        for method in ("direct", "dqa", "noisyquant", "dense_sparse")
        for step in ("quantize", "dequantize", "fake_quantize")
    ),
]
FX = [
    "dqa_qconfig",
    "direct_qconfig",
    "noisyquant_qconfig",
    "dense_sparse_qconfig",
    "get_qconfig",
    "get_qconfig_mapping",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_of_the_package(name):
    assert hasattr(dqa_plugins, name)
    assert name in dqa_plugins.__all__


def test_all_is_complete_and_true():
    assert all(hasattr(dqa_plugins, name) for name in dqa_plugins.__all__)
    assert len(set(dqa_plugins.__all__)) == len(dqa_plugins.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions(name):
    function = getattr(dqa_plugins.functional, name)
    assert inspect.getdoc(function), f"functional.{name} has no docstring"


@pytest.mark.parametrize("name", FX)
def test_public_names_of_the_fx_adapter(name):
    fx = pytest.importorskip("dqa_plugins.adapters.fx")
    assert hasattr(fx, name)


def test_a_quantizer_is_a_module_with_one_tensor_in_and_out():
    q = dqa_plugins.ActivationQuantizer(dqa_plugins.DQA(bits=4), name="relu1")
    assert isinstance(q, torch.nn.Module)
    assert isinstance(q(torch.ones(2, 3)), torch.Tensor)
    assert (q.state, q.method, q.name) == ("observe", dqa_plugins.DQA(bits=4), "relu1")
    assert "DQA(bits=4" in repr(q)
    assert "relu1" in repr(q)
    assert q.freeze().state == "frozen"


def test_the_package_is_typed_and_has_a_version():
    folder = Path(dqa_plugins.__file__).parent
    assert (folder / "py.typed").exists()
    assert dqa_plugins.__version__.count(".") >= 2


def test_adapters_do_not_take_the_top_level_name():
    """`import adapters` belongs to a package on PyPI; ours are dqa_plugins.adapters."""
    import dqa_plugins.adapters

    assert dqa_plugins.adapters.__name__ == "dqa_plugins.adapters"
    assert importlib.util.find_spec("dqa_plugins.adapters") is not None


FRESH = """
import sys
import dqa_plugins
wanted = {}
loaded = [name for name in sys.modules if name.split('.')[0] in {blocked} or name.startswith('dqa_plugins.adapters')]
assert not loaded, loaded
"""


def test_importing_the_core_imports_no_framework():
    """Only an adapter imports its framework; exporters and storage come when asked for."""
    blocked = {
        "onnx",
        "onnxruntime",
        "onnxscript",
        "openvino",
        "brevitas",
        "nncf",
        "torchao",
        "sklearn",
        "matplotlib",
        "rich",
    }
    code = FRESH.replace("{blocked}", repr(blocked))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_docstrings_of_public_names():
    for name in PUBLIC:
        assert inspect.getdoc(getattr(dqa_plugins, name)), name
