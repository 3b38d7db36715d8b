"""What of NNCF is touched, only if `register` is called: one function gets a wrapper.

`create_ptq_pipeline`, as NNCF's PostTrainingQuantization calls it: where the activations' `mode` is one of our
methods, MinMaxQuantization is replaced by `ActivationQuantization` in the pipeline that it returns. Every other call
goes through unchanged.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization

from dqa_plugins.errors import FrameworkMismatch, InvalidMethod, UnsupportedCombination
from dqa_plugins.host import hooks
from dqa_plugins.host.hooks import MARK, Hook
from dqa_plugins.method import Method
from dqa_plugins.methods import METHODS, check_method

from .algorithm import ActivationQuantization, Plan
from .config import check
from .host import PIPELINE, POST_TRAINING, check_framework, this_host


def register() -> None:
    """Make plain `nncf.quantize(..., QuantizationParameters(num_bits=4, mode="dqa"))` work; again changes nothing.

    `mode` is "direct", "dqa", "noisyquant" or "dense_sparse", or a method itself: mode=DQA(bits=4, ratio=0.2).

    Raises:
        FrameworkMismatch: another version of NNCF, or somebody else replaced the function.
    """
    check_framework()
    module = importlib.import_module(POST_TRAINING)
    hooks.install([Hook(module, "create_ptq_pipeline", PIPELINE, _wrap)], this_host(), strict=True)


def unregister() -> None:
    """Undo `register`."""
    module = importlib.import_module(POST_TRAINING)
    current: Any = module.create_ptq_pipeline
    if getattr(current, MARK, False):
        module.create_ptq_pipeline = current.__wrapped__  # type: ignore[attr-defined]


def is_ours(parameters: Any) -> bool:
    """True for QuantizationParameters whose mode names one of our methods."""
    mode = getattr(parameters, "mode", None)
    return isinstance(mode, Method) or (isinstance(mode, str) and str(mode) in METHODS)


def method_of(parameters: Any) -> Method:
    """The method that NNCF's QuantizationParameters describe.

    Raises:
        InvalidMethod: num_bits is out of range, or a field is given twice.
        UnsupportedCombination: narrow_range, which no method has; or a method that NNCF cannot do.
    """
    if parameters.narrow_range:
        raise UnsupportedCombination("QuantizationParameters(narrow_range=True): our methods use all 2^n codes.")
    given = {
        "bits": parameters.num_bits,
        "signed": parameters.signedness_to_force,
        "granularity": None if parameters.per_channel is None else ("tensor", "channel")[parameters.per_channel],
    }
    fields = {key: value for key, value in given.items() if value is not None}
    if isinstance(parameters.mode, Method):
        if fields:
            raise InvalidMethod(f"QuantizationParameters(mode={parameters.mode}): {', '.join(fields)} is given twice.")
        return check(check_method(parameters.mode), "nncf.quantize")
    return check(METHODS[str(parameters.mode)](**fields), "nncf.quantize")


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_ptq_pipeline(*args: Any, **kwargs: Any) -> Any:
        advanced = kwargs.get("advanced_parameters")
        if args or advanced is None or not is_ours(advanced.activations_quantization_params):
            return original(*args, **kwargs)
        if kwargs.get("mode") is not None:
            raise UnsupportedCombination(f"nncf.quantize(mode={kwargs['mode']}) is an FP8 mode; leave it out.")
        if advanced.activations_range_estimator_params != type(advanced)().activations_range_estimator_params:
            raise UnsupportedCombination(
                "activations_range_estimator_params do not apply: the method's own clip and reduce decide."
            )
        method = method_of(advanced.activations_quantization_params)
        stock = dataclasses.replace(advanced, activations_quantization_params=None)
        pipeline = original(**{**kwargs, "advanced_parameters": stock})
        replaced = [_replace(step, method, stock, kwargs) for step in pipeline.pipeline_steps]
        if sum(replaced) != 1:
            raise FrameworkMismatch(f"NNCF's pipeline has {sum(replaced)} MinMaxQuantization steps; one was expected.")
        return pipeline

    return create_ptq_pipeline


def _replace(step: list[Any], method: Method, advanced: Any, kwargs: dict[str, Any]) -> int:
    """Put our algorithm where MinMaxQuantization is in a pipeline step; returns how many were replaced."""
    count = 0
    for index, algorithm in enumerate(step):
        if type(algorithm) is MinMaxQuantization:
            step[index] = ActivationQuantization(
                Plan(method, num_samples=kwargs.get("subset_size", 300)),
                preset=kwargs.get("preset"),
                target_device=kwargs.get("target_device"),
                subset_size=kwargs.get("subset_size", 300),
                model_type=kwargs.get("model_type"),
                ignored_scope=kwargs.get("ignored_scope"),
                overflow_fix=advanced.overflow_fix,
                quantize_outputs=advanced.quantize_outputs,
                inplace_statistics=advanced.inplace_statistics,
                weights_quantization_params=advanced.weights_quantization_params,
                weights_range_estimator_params=advanced.weights_range_estimator_params,
                quantizer_propagation_rule=advanced.quantizer_propagation_rule,
                backend_params=advanced.backend_params,
            )
            count += 1
    return count
