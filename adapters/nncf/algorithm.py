"""NNCF's MinMaxQuantization with our quantizers in it: an algorithm that NNCF's pipelines run like any other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.graph.transformations.layout import TransformationLayout
from nncf.common.tensor_statistics.statistic_point import StatisticPoint, StatisticPointsContainer
from nncf.common.utils.backend import BackendType, get_backend
from nncf.quantization.advanced_parameters import OverflowFix
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
from nncf.scopes import get_ignored_node_names_from_ignored_scope
from nncf.torch.function_hook.commands import PT2InsertionCommand
from nncf.torch.function_hook.model_transformer import PT2ModelTransformer
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from torch import nn

from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.host.placement import Placement
from dqa_plugins.host.settings import warn_idle
from dqa_plugins.host.sites import keep_summary
from dqa_plugins.method import Method
from dqa_plugins.qpp import connect, fit

from .describe import describe
from .forward import keep_eager
from .names import record_calls
from .observer import SiteCollector
from .place import Site, make_sites, place, place_named
from .samples import FirstSamples
from .weights import WeightBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What `ActivationQuantization` does beyond NNCF's MinMaxQuantization.

    Args:
        method: of every operation; None: float unless named.
        overrides: (scope, method or None), see `place.choose_methods`.
        named: {site or module: method or None}, instead of `overrides`; NNCF's ignored scope then is about weights.
        weights: False leaves them float.
        num_samples: dataset items to run, None for all.
        samples: the dataset, which tells QPP of each forward and may run augmented items too.
    """

    method: Method | None
    overrides: tuple[tuple[str, Method | None], ...] = ()
    named: Mapping[str, Method | None] | None = None
    weights: bool = True
    num_samples: int | None = None
    samples: FirstSamples | None = field(default=None, compare=False)

    @property
    def predicts(self) -> bool:
        """Whether parameters of some quantizer are predicted."""
        methods = [self.method, *(method for _, method in self.overrides), *(self.named or {}).values()]
        return any(method is not None and method.source == "predicted" for method in methods)


class ActivationQuantization(MinMaxQuantization):
    """MinMaxQuantization with an ActivationQuantizer at each site that the judge finds; weights are NNCF's own.

    A subclass rather than a patch: NNCF finds its points with its stock 8-bit configs (anything narrower is
    "incompatible with HW capabilities"), of which those of weights are kept.

    Args:
        plan: ours.
        kwargs: of MinMaxQuantization.
    """

    def __init__(self, plan: Plan, **kwargs: Any) -> None:
        # MinMaxQuantization would choose 7-bit weights for the first layer, meant for saturating int8 instructions
        kwargs["overflow_fix"] = kwargs.get("overflow_fix") or OverflowFix.DISABLE
        super().__init__(**kwargs)
        self.plan = plan
        self.placement = Placement()
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
        self._keep_weights(*self._get_quantization_target_points(model, graph))
        container = self._get_statistic_point_container(self._quantization_target_points_to_qconfig, graph)
        self.sites = self._place(model, graph)
        self.collectors = []
        for site in self.sites:
            collector = SiteCollector(site.quantizer, self.plan.num_samples)
            self.collectors.append(collector)
            for points in site.tensors:
                container.add_statistic_point(StatisticPoint(points[0], collector, self._algorithm_key))
        samples = self.plan.samples
        # nncf.quantize itself hands the model's inputs to nobody: there the first site starts a forward
        quantizers = [site.quantizer for site in self.sites]
        forwards = connect(quantizers, inputs=0 if samples is None else samples.inputs)
        if samples is not None:
            samples.forwards = forwards
        elif forwards is not None:
            self.collectors[0].forwards = forwards
        return container

    def _keep_weights(self, points: Any, groups: Any) -> None:
        """Leave only the points of weights to MinMaxQuantization, those with one scale for several weights too."""
        weights = {p: c for p, c in points.items() if p.is_weight_target_point() and self.plan.weights}
        unified = [[point for point in group if point in weights] for group in groups]
        points.clear()
        points.update(weights)
        groups[:] = [group for group in unified if len(group) > 1]

    def _place(self, model: GraphModelWrapper, graph: NNCFGraph) -> list[Site]:
        described, plan = describe(graph, model.model, record_calls(model)), self.plan
        if plan.named is not None:
            self.placement = place_named(described, plan.method, plan.named, quantize_outputs=self._quantize_outputs)
        else:
            scope = self._ignored_scope
            ignored = get_ignored_node_names_from_ignored_scope(scope, graph, strict=scope.validate)
            self.placement = place(
                described, plan.method, plan.overrides, ignored, quantize_outputs=self._quantize_outputs
            )
        return make_sites(self.placement, described)

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
        summary = self.placement.summary()
        keep_summary(summary, model.model, [site.quantizer for site in self.sites])
        if self.plan.named is not None:
            warn_idle(summary)
        elif not self.sites:
            logger.warning("NNCF found no activation to quantize (are all of them ignored?)")
        if not self.sites:
            return model
        return PT2ModelTransformer(model).transform(layout)
