"""The judge on networks as torch.fx sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import DQA, DenseSparse, Direct
from dqa_plugins.errors import DuplicateSites
from dqa_plugins.graph.operations import Operation
from dqa_plugins.host import placement
from dqa_plugins.host.placement import Placement, judge
from tests.graph.nets import NETS, build, described, network

SITES = {
    "language": "tokens add.0 add.1 mul.0 norm1.mul.1 attention.q attention.k attention.v attention.matmul.0 "
    "attention.div.0 attention.softmax.0 attention.matmul.1 attention.out add.2 norm2.add.1 up act down add.3 lstm "
    "lstm.part1 add.4 head",
    "vision": "input.0 relu.0 other mul.0 add.0 cat.0 relu6.0 squeeze relu.1 fc2 sigmoid.0 mul.1 conv2d.0 "
    "adaptive_avg_pool2d.0 head mul.2",
    "in_place": "input.0 mul.0 second add.0 add.1 mul.1 add.2 second.1 sum.0 add.3",
}


def places(operations: list[Operation], **options: Any) -> Placement:
    return judge(operations, lambda operation: Direct(), **options)


def names(found: Placement) -> list[str]:
    return [site.name for site in found.sites]


@pytest.mark.parametrize("name", NETS)
def test_sites_of_networks(name: str) -> None:
    assert names(places(network(name))) == SITES[name].split()


def test_what_changes_values_has_a_range_of_its_own() -> None:
    """Scalar factors, average pools, the squeeze, means: none shares; the concatenation does, with its inputs."""
    found = places(network("vision"))
    groups: dict[Any, list[str]] = {}
    for site in found.sites:
        groups.setdefault(site.group, []).append(site.name)
    assert [group for group in groups.values() if len(group) > 1] == [["add.0", "cat.0"]]


def test_concatenations_share_only_where_methods_allow() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x), self.c(x)], 1)

    operations = described(Join(), (torch.randn(2, 3, 4, 4),))

    def shared(method_of: Any) -> list[list[str]]:
        groups: dict[Any, list[str]] = {}
        for site in judge(operations, method_of).sites:
            groups.setdefault(site.group, []).append(site.name)
        return [group for group in groups.values() if len(group) > 1]

    assert shared(lambda op: Direct()) == [["a", "b", "c", "cat.0"]]
    assert shared(lambda op: DQA()) == [["a", "b"]]
    assert shared(lambda op: Direct(bits=2) if op.path == "b" else Direct()) == [["a", "c", "cat.0"]]


def test_moved_values_are_quantized_where_they_come_from() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[:, 1:].transpose(1, 2).flatten(1)[:, :4]) + F.gelu(x).sum((1, 2)).unsqueeze(1)

    found = places(described(Moved(), (torch.randn(2, 3, 4),)))
    assert names(found) == ["input.0", "fc", "gelu.0", "sum.0", "add.0"]
    (reader,) = found.sites[0].readers or ()
    assert reader.op == "getitem", "GELU reads the input as it is"


def test_no_quantizer_in_front_of_a_write_in_place() -> None:
    found = places(network("in_place"))
    floats = dict(found.floats)
    assert floats["first"] == floats["getitem.0"] == placement.WRITTEN


def test_what_stays_float_is_listed_with_its_reason() -> None:
    floats = dict(places(network("language")).floats)
    assert floats["learned"] == floats["positions"] == floats["norm1.weight"]
    assert floats["norm1.rsqrt.0"] == floats["norm1.mul.0"] == placement.INTERNAL
    assert floats["lstm"] == placement.OPAQUE
    assert dict(places(network("vision")).floats) == {"mean.0": placement.SCALAR}


def test_integers_and_0d_tensors_are_left_alone() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            return (x.mean() + 1) * (k + 1)

    operations = described(Plain(), (torch.randn(2, 3), torch.arange(3)))
    assert names(places(operations)) == ["input.0", "mul.0"]


def test_methods_by_operation_by_name_and_none() -> None:
    operations = network("vision")
    wanted = {"input": None, "relu.0": DQA(bits=3), "sigmoid.0": None, "squeeze": DenseSparse(), "nothing": None}
    found = judge(operations, lambda op: None if op.path == "fc1" else Direct(), overrides=wanted)
    methods = {site.name: site.method for site in found.sites}
    assert methods["relu.0"] == DQA(bits=3)
    assert methods["squeeze"] == DenseSparse()
    assert not {"input.0", "sigmoid.0"} & methods.keys()
    assert found.unmatched == ["nothing"]
    assert dict(found.floats)["sigmoid.0"] == placement.OVERRIDDEN


def test_sites_by_name_alone() -> None:
    """{site: method} and nothing else quantizes these sites, functions of the table's other kinds included."""
    found = judge(network("vision"), lambda op: None, overrides={"sigmoid.0": Direct(), "relu.0": DQA()})
    assert {site.name: site.method for site in found.sites} == {"relu.0": DQA(), "sigmoid.0": Direct()}
    assert dict(found.floats)["other"] == placement.NO_METHOD


def test_outputs_can_stay_float() -> None:
    assert names(places(network("vision"), quantize_outputs=False)) == SITES["vision"].split()[:-1]


def test_two_sites_of_one_name_are_refused() -> None:
    operations = network("vision")
    for operation in operations:
        if operation.site == "other":
            operation.site = "add.0"
    with pytest.raises(DuplicateSites, match=r"add\.0"):
        places(operations)


def test_without_shapes_the_same_tensors_are_found() -> None:
    """Shapes only tell integers, 0-d tensors and channels."""
    found = names(places(described(build("vision"), None)))
    assert [name for name in found if name != "mean.0"] == SITES["vision"].split()
