"""From a float model and a dataset to a quantized model: NNCF's pipeline with our quantizers in it."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import nncf
import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import QuantizationParameters
from nncf.quantization.algorithms.fast_bias_correction.algorithm import FastBiasCorrection
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.torch.function_hook import wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.function_hook.statistics.aggregator import PT2StatisticsAggregator
from torch import nn

from dqa_plugins.errors import DQAWarning, InvalidArgument, UncalibratedQuantizer, UnsupportedInput
from dqa_plugins.host.quantize import calibration_calls, require_float, split_methods
from dqa_plugins.method import Method
from dqa_plugins.qpp import link
from dqa_plugins.report.placement import PlacementReport, report_of

from .algorithm import ActivationQuantization, Plan
from .config import Weights, check, parse
from .describe import describe
from .names import record_calls
from .place import float_operations, place
from .samples import FirstSamples, tensors_of
from .scopes import ignored_operations

_ALL = 2**62  # NNCF's subset sizes are numbers, with 100 or 300 as the default


def quantize(model: nn.Module, dataset: nncf.Dataset, config: Any) -> nn.Module:
    """Quantize a copy of a model after training, as a config entry says.

    Args:
        model: float. NNCF calibrates in eval mode and returns a model in eval mode.
        dataset: an nncf.Dataset whose items are what the model takes.
        config: a dict or the path of a JSON file, see `config`; or a method for every activation.

    Returns:
        the copy, wrapped by NNCF, with frozen ActivationQuantizers as hooks; see `iter_quantizers`.

    Raises:
        InvalidConfig: a key is unknown, contradictory or wrong, or a scope matches nothing.
        InvalidMethod, UnsupportedCombination: a method's field is wrong, or not possible in NNCF.
        UncalibratedQuantizer: the dataset is empty, or a site saw no data.
        NonFiniteInput: NaN or Inf in an activation.
        UnsupportedInput: not a torch model, quantized already, or not an nncf.Dataset.
    """
    entry = parse(config)
    samples, items = _samples(model, dataset, entry.num_samples)
    wrapper = _wrap(model, items)
    graph = wrapper.get_graph()
    ignored = ignored_operations(entry, graph, wrapper.model, record_calls(wrapper).enclosing)
    plan = Plan(entry.method, entry.overrides, weights=entry.weights is not None, samples=samples)
    return _run(plan, entry.weights, ignored, wrapper, items, entry.bias_correction, entry.quantize_outputs)


def quantize_model(
    model: nn.Module,
    method: Method | Mapping[str, Method | None],
    calibration: Iterable[Any],
    *,
    example_inputs: Any = None,
    weight_bits: int | None = 8,
    inputs: Callable[[Any], Any] | None = None,
) -> nn.Module:
    """Quantize a copy of a model by NNCF's own pipeline, its outputs too: the same sites as in the other rooms.

    Biases are corrected for the error of quantized weights, as nncf.quantize does by default.

    Args:
        model: float; it is not changed.
        method: for every layer, or {site or module: method or None}; what the mapping does not name stays float,
            unless it names "", which stands for all.
        calibration: what a DataLoader yields (see `dqa_plugins.batches`); targets are left out.
        example_inputs: for NNCF's graph; None: the first item.
        weight_bits: 8; None leaves weights float.
        inputs: a function item -> inputs, where those are not clear.

    Raises:
        NotAMethod, InvalidArgument, UnsupportedCombination, UncalibratedQuantizer.
        InvalidConfig: a name is neither a site nor a module.
    """
    if weight_bits not in (None, 8) or isinstance(weight_bits, bool):
        raise InvalidArgument(
            f"quantize_model(weight_bits={weight_bits!r}): NNCF's post-training quantization takes 8-bit "
            "weights, or None for float; for others use the FX adapter."
        )
    calls, example = calibration_calls(model, calibration, inputs, example_inputs)
    everywhere, named = split_methods(method)
    for wanted in (everywhere, *named.values()):
        if wanted is not None:
            check(wanted, "quantize_model")
    samples, items = _samples(model, nncf.Dataset(_Once(calls), lambda call: call.inputs), None)
    wrapper = _wrap(model, example=example.inputs)
    samples.inputs = len(tuple(tensors_of(wrapper.example_input)))
    ignored = float_operations(describe(wrapper.get_graph(), wrapper.model, record_calls(wrapper)), everywhere, named)
    weights = None if weight_bits is None else Weights()
    plan = Plan(everywhere, named=named, weights=weight_bits is not None, samples=samples)
    return _run(plan, weights, ignored, wrapper, items, weights is not None, outputs=True)


def placement(model: nn.Module, dataset: nncf.Dataset, config: Any) -> PlacementReport:
    """What `quantize` would place, without calibrating: the same arguments and errors."""
    entry = parse(config)
    _, items = _samples(model, dataset, entry.num_samples)
    wrapper = _wrap(model, items)
    calls, graph = record_calls(wrapper), wrapper.get_graph()
    ignored = ignored_operations(entry, graph, wrapper.model, calls.enclosing)
    described = describe(graph, wrapper.model, calls)
    found = place(described, entry.method, entry.overrides, ignored, quantize_outputs=entry.quantize_outputs)
    return report_of([found.summary()])


class _Once:
    """An iterable of which NNCF may ask for the length."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def _samples(model: Any, dataset: Any, limit: int | None) -> tuple[FirstSamples, nncf.Dataset]:
    if not isinstance(model, nn.Module):
        raise UnsupportedInput(f"quantize takes a torch.nn.Module; got a {type(model).__name__}.")
    if type(model).forward is nn.Sequential.forward:
        raise UnsupportedInput(
            "the model is an nn.Sequential, and NNCF (3.4) keeps its hooks in a module of the model, which that would "
            "call like a layer. Put it into a module of your own, whose forward calls it."
        )
    require_float(model, "quantize")
    if not isinstance(dataset, nncf.Dataset):
        raise UnsupportedInput(
            f"quantize takes an nncf.Dataset; got a {type(dataset).__name__}: wrap it, nncf.Dataset(...)."
        )
    samples = FirstSamples(dataset, limit, inspect.signature(model.forward).parameters)
    return samples, nncf.Dataset(samples)


def _wrap(model: nn.Module, items: nncf.Dataset | None = None, example: Any = None) -> GraphModelWrapper:
    if items is not None:
        example = next(iter(items.get_inference_data()), None)
    if example is None:
        raise UncalibratedQuantizer("quantize: the dataset is empty; calibration needs at least one sample.")
    return GraphModelWrapper(wrap_model(copy.deepcopy(model)), example)


def _run(
    plan: Plan,
    weights: Weights | None,
    ignored: list[str],
    wrapper: GraphModelWrapper,
    items: nncf.Dataset,
    bias_correction: bool,
    outputs: bool,
) -> nn.Module:
    parameters = None
    if weights is not None:
        scheme = QuantizationScheme(weights.mode)
        # None is per channel too, except for the vectors of a LayerNorm, where True fails in NNCF 3.4
        parameters = QuantizationParameters(num_bits=8, mode=scheme, per_channel=None if weights.per_channel else False)
    algorithm = ActivationQuantization(
        plan,
        ignored_scope=nncf.IgnoredScope(names=ignored),
        quantize_outputs=outputs,
        weights_quantization_params=parameters,
        inplace_statistics=False,
    )
    steps: list[Any] = [algorithm]
    if bias_correction and not plan.predicts:
        steps.append(FastBiasCorrection(subset_size=_ALL))
    elif bias_correction:
        warnings.warn(
            DQAWarning(
                "NNCF's bias correction is left out: it runs parts of the model, where QPP has no features to predict "
                "from, and in the run that QPP augments. Set bias_correction to false, or use static parameters."
            ),
            stacklevel=4,
        )
    with torch.no_grad():
        return link(_pipeline(steps, wrapper, wrapper.get_graph(), items).eval())


def _pipeline(steps: list[Any], wrapper: GraphModelWrapper, graph: NNCFGraph, items: nncf.Dataset) -> nn.Module:
    """One NNCF pipeline step, with statistics over all items."""
    pipeline = Pipeline([steps])
    aggregator = PT2StatisticsAggregator(items)
    aggregator.register_statistic_points(pipeline.get_statistic_points_for_step(0, wrapper, graph))
    # NNCF would stop after the largest subset size that a collector asks for, which is 1 where only weights ask
    aggregator.stat_subset_size = None
    aggregator.collect_statistics(wrapper, graph)
    statistics = {0: aggregator.statistic_points}
    model: nn.Module = pipeline.run_from_step(wrapper, items, graph, 0, statistics).model
    return model
