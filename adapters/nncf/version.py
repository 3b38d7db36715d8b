"""Is this the NNCF that the adapter stands on?"""

from __future__ import annotations

import importlib
import inspect

import nncf

from dqa_plugins.errors import FrameworkMismatch

TESTED = "3.4"

# (module, name, first parameters): internals which the room subclasses or wraps
_NEEDED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("nncf.quantization.algorithms.min_max.algorithm", "MinMaxQuantization.get_statistic_points", ("self", "model")),
    (
        "nncf.quantization.algorithms.min_max.algorithm",
        "MinMaxQuantization._get_quantization_target_points",
        ("self", "model", "nncf_graph"),
    ),
    (
        "nncf.quantization.algorithms.min_max.algorithm",
        "MinMaxQuantization._get_statistic_point_container",
        ("self", "quantization_target_points", "graph"),
    ),
    (
        "nncf.quantization.algorithms.min_max.torch_backend",
        "PTMinMaxAlgoBackend.create_quantizer_insertion_command",
        ("nncf_graph", "target_point", "quantizer_config", "parameters"),
    ),
    (
        "nncf.quantization.algorithms.post_training.algorithm",
        "create_ptq_pipeline",
        ("mode", "preset", "target_device", "subset_size", "fast_bias_correction", "model_type", "ignored_scope"),
    ),
    ("nncf.quantization.algorithms.pipeline", "Pipeline.run_from_step", ("self", "model", "dataset", "graph")),
    ("nncf.torch.function_hook.commands", "PT2InsertionCommand.__init__", ("self", "target_points", "hook_module")),
    ("nncf.torch.function_hook.hook_executor_mode", "FunctionHookMode.get_next_op_call_name", ("self", "fn_name")),
    ("nncf.torch.quantization.layers", "SymmetricQuantizer.quantize", ("self", "x")),
    ("nncf.torch.quantization.layers", "AsymmetricQuantizer.quantize", ("self", "x")),
)


def check_framework() -> None:
    """Compare NNCF's version, then the presence and parameters of every internal that the room uses.

    Raises:
        FrameworkMismatch: another version, or an internal is gone or takes other parameters.
    """
    version = getattr(nncf, "__version__", "unknown")
    if ".".join(version.split(".")[:2]) != TESTED:
        raise FrameworkMismatch(
            f"the NNCF adapter subclasses internals of NNCF {TESTED}; found NNCF {version}. "
            f"pip install 'nncf~={TESTED}.0', or use the FX or PT2E adapter."
        )
    for module, path, parameters in _NEEDED:
        try:
            found = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise FrameworkMismatch(
                f"{module}.{path} is gone in NNCF {version}; the adapter stands on it. Install NNCF {TESTED}.0."
            ) from error
        given = tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
        if given[: len(parameters)] != parameters:
            raise FrameworkMismatch(
                f"{module}.{path} takes {given} in NNCF {version}, not {parameters}; install NNCF {TESTED}.0."
            )
