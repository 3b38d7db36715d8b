"""Is this the NNCF that the adapter stands on?"""

from __future__ import annotations

import importlib
from typing import Any

import nncf

from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.host.hooks import Host, check_version, require

TESTED = "3.4.0"
POST_TRAINING = "nncf.quantization.algorithms.post_training.algorithm"
PIPELINE = ("mode", "preset", "target_device", "subset_size", "fast_bias_correction", "model_type", "ignored_scope")

_MIN_MAX = "nncf.quantization.algorithms.min_max"
# (module, name, first parameters): internals which the room subclasses or wraps
_NEEDED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (f"{_MIN_MAX}.algorithm", "MinMaxQuantization.get_statistic_points", ("self", "model")),
    (
        f"{_MIN_MAX}.algorithm",
        "MinMaxQuantization._get_quantization_target_points",
        ("self", "model", "nncf_graph"),
    ),
    (
        f"{_MIN_MAX}.algorithm",
        "MinMaxQuantization._get_statistic_point_container",
        ("self", "quantization_target_points", "graph"),
    ),
    (
        f"{_MIN_MAX}.torch_backend",
        "PTMinMaxAlgoBackend.create_quantizer_insertion_command",
        ("nncf_graph", "target_point", "quantizer_config", "parameters"),
    ),
    (
        f"{_MIN_MAX}.torch_backend",
        "PTMinMaxAlgoBackend.create_unified_scales_quantizers_insertion_commands",
        ("nncf_graph", "target_points", "quantizer_config", "parameters"),
    ),
    (POST_TRAINING, "create_ptq_pipeline", PIPELINE),
    ("nncf.quantization.algorithms.pipeline", "Pipeline.run_from_step", ("self", "model", "dataset", "graph")),
    ("nncf.torch.function_hook.commands", "PT2InsertionCommand.__init__", ("self", "target_points", "hook_module")),
    ("nncf.torch.function_hook.hook_executor_mode", "FunctionHookMode.get_next_op_call_name", ("self", "fn_name")),
    ("nncf.torch.function_hook.hook_executor_mode", "FunctionHookMode.push_module_call_stack", ("self", "module")),
    ("nncf.torch.quantization.layers", "SymmetricQuantizer.quantize", ("self", "x")),
    ("nncf.torch.quantization.layers", "AsymmetricQuantizer.quantize", ("self", "x")),
)


def this_host() -> Host:
    """NNCF as it is installed."""
    version = str(getattr(nncf, "__version__", "unknown"))
    return Host("nncf", version, TESTED, "NNCF", "use the FX or PT2E adapter")


def check_framework() -> None:
    """Compare NNCF's version, then the presence and parameters of every internal that the room uses.

    Raises:
        FrameworkMismatch: another version, or an internal is gone or takes other parameters.
    """
    host = this_host()
    check_version(host, strict=True)
    for module, path, parameters in _NEEDED:
        *owners, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
        except (ImportError, AttributeError) as error:
            raise FrameworkMismatch(
                f"{module}.{path} is gone in NNCF {host.version}; the adapter stands on it. {host.way_out}."
            ) from error
        require(owner, name, host, parameters)
