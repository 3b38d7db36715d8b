"""From a float model and a dataset to a quantized model: NNCF's pipeline with our quantizers in it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import nncf
import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.common.graph.transformations.layout import TransformationLayout
from nncf.common.quantization.structs import QuantizationScheme
from nncf.common.tensor_statistics.statistic_point import StatisticPoint, StatisticPointsContainer
from nncf.common.utils.backend import BackendType, get_backend
from nncf.quantization.advanced_parameters import OverflowFix, QuantizationParameters
from nncf.quantization.algorithms.fast_bias_correction.algorithm import FastBiasCorrection
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.torch.function_hook import wrap_model
from nncf.torch.function_hook.commands import PT2InsertionCommand
from nncf.torch.function_hook.model_transformer import PT2ModelTransformer
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.function_hook.statistics.aggregator import PT2StatisticsAggregator
from torch import Tensor, nn

from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination, UnsupportedInput
from dqa_plugins.methods import Method
from dqa_plugins.qpp import Forwards, connect, fit, link
from dqa_plugins.qpp.session import end
from dqa_plugins.sites import iter_quantizers

from .config import Entry, parse
from .forward import keep_eager
from .naming import enclosing_modules, site_names
from .observer import SiteCollector
from .place import Site, choose_methods, find_tensors, make_sites
from .scopes import ignored_operations
from .weights import WeightBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What `ActivationQuantization` does beyond NNCF's MinMaxQuantization.

    Args:
        method: of every site.
        overrides: (scope, method or None), see `place.choose_methods`.
        weights: False leaves them float.
        num_samples: dataset items to run, None for all.
        samples: the dataset, which tells QPP of each forward and may run augmented items too.
    """

    method: Method
    overrides: tuple[tuple[str, Method | None], ...] = ()
    weights: bool = True
    num_samples: int | None = None
    samples: FirstSamples | None = None


class ActivationQuantization(MinMaxQuantization):
    """NNCF's MinMaxQuantization with an ActivationQuantizer at each activation point; weights are NNCF's own.

    A subclass rather than a patch: NNCF finds the points with its stock 8-bit configs (anything narrower is
    "incompatible with HW capabilities"), and runs it in its pipelines like any other algorithm.

    Args:
        plan: ours.
        kwargs: of MinMaxQuantization.
    """

    def __init__(self, plan: Plan, **kwargs: Any) -> None:
        # MinMaxQuantization would choose 7-bit weights for the first layer, meant for saturating int8 instructions
        kwargs["overflow_fix"] = kwargs.get("overflow_fix") or OverflowFix.DISABLE
        super().__init__(**kwargs)
        self.plan = plan
        self.sites: list[Site] = []
        self.collectors: list[SiteCollector] = []

    def _set_backend_entity(self, model: Any) -> None:
        if get_backend(model) != BackendType.TORCH:
            raise UnsupportedCombination(
                f"{type(self.plan.method).__name__} quantizes PyTorch models; got one for {get_backend(model).value}. "
                "Quantize the PyTorch model, then export it."
            )
        self._backend_entity = WeightBackend()

    def get_statistic_points(self, model: GraphModelWrapper, graph: NNCFGraph) -> StatisticPointsContainer:
        """Find the sites; ask for a quantizer at one point of each tensor, and for NNCF's statistics of weights."""
        self._set_backend_entity(model)
        self._reset_cache()
        points, groups = self._get_quantization_target_points(model, graph)
        weights = {p: c for p, c in points.items() if p.is_weight_target_point() and self.plan.weights}
        activations = [p for p in points if not p.is_weight_target_point()]
        names = site_names(graph, model.model, enclosing_modules(model))
        tensors = find_tensors(activations, graph, names)
        methods = choose_methods(tensors, self.plan.method, self.plan.overrides)
        self.sites = make_sites(tensors, methods, groups, graph)
        # from here on MinMaxQuantization itself handles weights only
        points.clear()
        points.update(weights)
        groups.clear()
        container = self._get_statistic_point_container(points, graph)
        self.collectors = []
        for site in self.sites:
            collector = SiteCollector(site.quantizer, self.plan.num_samples)
            self.collectors.append(collector)
            for tensor in site.tensors:
                container.add_statistic_point(StatisticPoint(tensor.points[0], collector, self._algorithm_key))
        samples = self.plan.samples
        # nncf.quantize itself hands the model's inputs to nobody: there the first site starts a forward
        quantizers = [site.quantizer for site in self.sites]
        forwards = connect(quantizers, inputs=0 if samples is None else samples.inputs)
        if samples is not None:
            samples.forwards = forwards
        elif forwards is not None:
            self.collectors[0].forwards = forwards
        return container

    def apply(
        self,
        model: GraphModelWrapper,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> GraphModelWrapper:
        """Hook the frozen quantizers into the model.

        Raises:
            UncalibratedQuantizer: a site saw no data.
        """
        fit(nn.ModuleList(site.quantizer for site in self.sites))
        layout = TransformationLayout()
        for site, collector in zip(self.sites, self.collectors, strict=True):
            layout.register(PT2InsertionCommand(target_points=site.points, hook_module=collector.freeze()))
        if self._quantization_target_points_to_qconfig:
            model = super().apply(model, graph, statistic_points, dataset)
        keep_eager(model.model)
        if not self.sites:
            logger.warning("NNCF found no activation to quantize (are all of them ignored?)")
            return model
        return PT2ModelTransformer(model).transform(layout)


class FirstSamples:
    """The first samples of a dataset, whatever its batch size: the last batch is cut.

    Args:
        dataset: of NNCF; items are tensors, or tuples, lists or dicts of them.
        limit: number of samples, None for all.
    """

    def __init__(self, dataset: nncf.Dataset, limit: int | None) -> None:
        self.dataset, self.limit = dataset, limit
        self.forwards: Forwards | None = None  # QPP: of the model
        self.augment = True
        self.inputs = 0  # tensors in an item

    def __iter__(self) -> Iterator[Any]:
        for item in self._items():
            tensors = tuple(_tensors(item))
            self.inputs = len(tensors)
            if self.forwards is None:
                yield item
                continue
            yield from self._run(item, tensors)

    def _run(self, item: Any, tensors: tuple[Tensor, ...]) -> Iterator[Any]:
        """The item in a session, and what augmentation makes of it in another."""
        if self.forwards is None:
            return
        session = self.forwards.start(tensors)
        yield item
        end(session)
        changed = self.forwards.changed(tensors) if self.augment else None
        if changed is not None:
            session = self.forwards.start(changed, augmented=True)
            yield _replaced(item, iter(changed))
            end(session)

    def _items(self) -> Iterator[Any]:
        if self.limit is None:
            yield from self.dataset.get_inference_data()
            return
        left = self.limit
        for item in self.dataset.get_inference_data():
            size = batch_size(item)
            yield item if size <= left else _cut(item, size, left)
            left -= size
            if left <= 0:
                return
        if left > 0:
            logger.warning("num_init_samples=%s, but the dataset holds %s samples", self.limit, self.limit - left)


def _replaced(item: Any, tensors: Iterator[Tensor]) -> Any:
    """An item with other tensors, in the order of `_tensors`."""
    if isinstance(item, Tensor):
        return next(tensors)
    if isinstance(item, dict):
        return {key: _replaced(value, tensors) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)([_replaced(value, tensors) for value in item])
    return item


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict | list | tuple):
        for value in item.values() if isinstance(item, dict) else item:
            yield from _tensors(value)


def batch_size(item: Any) -> int:
    """Samples in a dataset item: the first dimension of its first tensor; 1 without one."""
    return next((len(tensor) for tensor in _tensors(item) if tensor.ndim), 1)


def _cut(item: Any, size: int, left: int) -> Any:
    if isinstance(item, Tensor):
        return item[:left] if item.ndim and len(item) == size else item
    if isinstance(item, dict):
        return {key: _cut(value, size, left) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)([_cut(value, size, left) for value in item])
    return item


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
    if not isinstance(model, nn.Module):
        raise UnsupportedInput(f"quantize takes a torch.nn.Module; got a {type(model).__name__}.")
    placed = [name for name, _ in iter_quantizers(model)]
    if placed:
        raise UnsupportedInput(f"quantize takes a float model; this one is quantized already ({placed[0]!r}, ...).")
    if not isinstance(dataset, nncf.Dataset):
        raise UnsupportedInput(
            f"quantize takes an nncf.Dataset; got a {type(dataset).__name__}: wrap it, nncf.Dataset(...)."
        )
    samples = FirstSamples(dataset, entry.num_samples)
    items = nncf.Dataset(samples)
    example = next(iter(items.get_inference_data()), None)
    if example is None:
        raise UncalibratedQuantizer("quantize: the dataset is empty; calibration needs at least one sample.")
    wrapper = GraphModelWrapper(wrap_model(copy.deepcopy(model)), example)
    graph = wrapper.get_graph()
    ignored = ignored_operations(entry, graph, wrapper.model, enclosing_modules(wrapper))
    # bias correction takes its statistics from the same run, which must not be of augmented items then
    samples.augment = not entry.bias_correction
    steps: list[Any] = [_algorithm(entry, ignored, samples)]
    if entry.bias_correction:
        steps.append(FastBiasCorrection(subset_size=_ALL))
    with torch.no_grad():
        quantized = _run(steps, wrapper, graph, items).eval()
    return link(quantized)


_ALL = 2**62  # NNCF's subset sizes are numbers, with 100 or 300 as the default


def _algorithm(entry: Entry, ignored: list[str], samples: FirstSamples) -> ActivationQuantization:
    weights = None
    if entry.weights is not None:
        scheme = QuantizationScheme(entry.weights.mode)
        # None is per channel too, except for the vectors of a LayerNorm, where True fails in NNCF 3.4
        per_channel = None if entry.weights.per_channel else False
        weights = QuantizationParameters(num_bits=8, mode=scheme, per_channel=per_channel)
    return ActivationQuantization(
        Plan(entry.method, entry.overrides, entry.weights is not None, samples=samples),
        ignored_scope=nncf.IgnoredScope(names=ignored),
        quantize_outputs=entry.quantize_outputs,
        weights_quantization_params=weights,
        inplace_statistics=False,
    )


def _run(steps: list[Any], wrapper: GraphModelWrapper, graph: NNCFGraph, items: nncf.Dataset) -> nn.Module:
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
