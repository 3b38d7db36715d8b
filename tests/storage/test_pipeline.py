"""prepare_stored and convert_stored: which values are found, exact outputs, and that floats are really gone."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import DQA, QPP, DenseSparse, Direct, iter_quantizers
from dqa_plugins.errors import DQAError, ExportFailed, InvalidArgument, NotAMethod, UncalibratedQuantizer
from dqa_plugins.storage import (
    CorruptFrame,
    NothingToStore,
    NotPackable,
    TraceFailed,
    convert_stored,
    prepare_stored,
    storage_bound,
    storage_report,
    stored_edges,
)
from dqa_plugins.storage.model.sites import Pack, StoredSite, Unpack


class Block(nn.Module):
    """A residual block; `stride` 2 subsamples the shortcut by slicing or by a 1x1 convolution."""

    def __init__(self, channels: int, stride: int = 1, conv: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride = stride
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu1(self.conv1(x)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return self.relu2(y + x)


class Net(nn.Module):
    """Three kinds of shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(Block(8), Block(8, 2), Block(8, 2, conv=True), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Skip(nn.Module):
    """One level of a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 16, 3, 1, 1)
        self.inner = nn.Conv2d(16, 16, 3, 1, 1)
        self.up = nn.Conv2d(32, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))
        y = F.max_pool2d(x, 2)
        y = F.relu(self.inner(y))
        return self.up(torch.cat([x, F.interpolate(y, scale_factor=2.0)], 1))


def network(seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    return Net().eval(), torch.randn(4, 3, 16, 16)


def fake_quantized(prepared: nn.Module) -> nn.Module:
    """The prepared model with its quantizers frozen: what the stored model must equal."""
    model = copy.deepcopy(prepared)
    for site in model.modules():
        if isinstance(site, StoredSite):
            site.quantizer.freeze()
    return model


def test_the_long_lived_values_are_found() -> None:
    model, x = network()
    found = {e.name: (e.shape, e.readers) for e in stored_edges(prepare_stored(model, DQA(), x))}
    assert found == {
        "relu": ((4, 8, 16, 16), ("add",)),
        "blocks.0.relu2": ((4, 8, 8, 8), ("getitem",)),  # subsampled before it is stored
        "blocks.1.relu2": ((4, 8, 4, 4), ("Conv2d",)),  # likewise, for a 1x1 convolution with a stride
        "blocks.2.relu2": ((4, 8, 4, 4), ("add",)),
    }


def test_min_lifetime_and_skip() -> None:
    model, x = network()
    lifetimes = [e.lifetime for e in stored_edges(prepare_stored(model, DQA(), x))]
    assert lifetimes == [2, 2, 1, 2]  # the strided convolution could run right after its sibling
    with pytest.raises(NothingToStore, match="3 or more"):
        prepare_stored(model, DQA(), x, min_lifetime=3)
    names = [e.name for e in stored_edges(prepare_stored(model, DQA(), x, skip=("relu", "blocks.1.relu2")))]
    assert names == ["blocks.0.relu2", "blocks.2.relu2"]


def test_projections_of_one_tensor_are_no_long_life() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.norm(x)
            q, k, v = self.q(y), self.k(y), self.v(y)
            return x + self.o(torch.softmax(q @ k.transpose(1, 2), -1) @ v)

    prepared = prepare_stored(Attention().eval(), DQA(), torch.randn(2, 5, 8))
    assert [e.name for e in stored_edges(prepared)] == ["mul.0"]


def test_a_value_that_nobody_reads_early_is_not_stored() -> None:
    """Reshaping is no reading: `v` waits for its only reader, and there is no early one whose float it could share."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.q, self.o = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            v = self.v(x).view(2, 8, 5)
            return self.o(self.q(x)) @ v

    with pytest.raises(NothingToStore):
        prepare_stored(Late().eval(), DQA(), torch.randn(2, 5, 8))


def test_a_crop_is_stored_cropped() -> None:
    class Cropped(Skip):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.down(x))
            y = F.relu(self.inner(F.max_pool2d(x, 2)))
            return self.up(torch.cat([x[:, :, 4:12, 4:12], y], 1))

    model, x = Cropped().eval(), torch.rand(2, 1, 16, 16)
    prepared = prepare_stored(model, DQA(), x)
    assert [e.shape for e in stored_edges(prepared)] == [(2, 16, 8, 8)]
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))
        stored = convert_stored(prepared)
        assert torch.equal(stored(x), fake_quantized(prepared)(x))


def test_preparing_changes_neither_the_model_nor_its_output() -> None:
    model, x = network()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(x)
        found = prepare_stored(model, DQA(), x)(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # a strided 1x1 convolution became slice + conv
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


METHODS = [DQA(bits=3), DQA(bits=3, qparams="dynamic"), Direct(bits=4, symmetric=False), DenseSparse()]


@pytest.mark.parametrize("coding", ["none", "shift_error", "joint", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_equal_the_fake_quantized_model(method: DQA, coding: str) -> None:
    model, x = network()
    prepared = prepare_stored(model, method, x)
    with torch.no_grad():
        prepared(x)
        stored = convert_stored(prepared, coding)
        fresh = torch.randn(7, 3, 16, 16)
        assert torch.equal(stored(fresh), fake_quantized(prepared)(fresh))


def test_the_float_is_gone_between_producer_and_late_reader() -> None:
    """While the last layer before the late reader runs, neither the stored tensor nor an unpacked one is alive."""
    torch.manual_seed(0)
    model, x = Skip().eval(), torch.rand(2, 1, 16, 16)
    prepared = prepare_stored(model, DQA(bits=3), x)
    prepared(x)
    stored = convert_stored(prepared, "joint")
    alive: list[weakref.ref[Tensor]] = []
    seen: list[list[bool]] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        alive.append(weakref.ref(inputs[0] if isinstance(module, Pack) else output))

    for module in stored.modules():
        if isinstance(module, Pack | Unpack):
            module.register_forward_hook(watch)
    stored.inner.register_forward_pre_hook(lambda *_: seen.append([ref() is not None for ref in alive]))
    stored.up.register_forward_pre_hook(lambda *_: seen.append([ref() is not None for ref in alive]))
    with torch.no_grad():
        stored(x)
    assert seen == [[False], [False, False]], "packed float alive at the inner layer, or unpacked after cat"


def test_the_allocator_sees_the_saving() -> None:
    """Peak of torch's CPU allocator, from the profiler's memory events: FP32 against stored."""
    torch.manual_seed(0)
    model, x = Deep().eval(), torch.rand(1, 1, 256, 256)
    prepared = prepare_stored(model, DQA(bits=3), x)
    with torch.no_grad():
        prepared(x)
        stored = convert_stored(prepared, "joint")
        stored(x)
        held, packed = peak_in(model, "inner", x), peak_in(stored, "inner", x)
    skip = 32 * 256 * 256 * 4
    assert held - packed > 0.8 * skip, (held, packed, skip)


class Deep(nn.Module):
    """A wide skip around a narrow layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 32, 1)
        self.narrow = nn.Conv2d(32, 4, 1)
        self.inner = nn.Conv2d(4, 32, 1)
        self.out = nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(x))
        return self.out(x + self.inner(self.narrow(x)))


def peak_in(model: nn.Module, layer: str, x: Tensor) -> int:
    """Bytes that torch's allocator holds when `layer` starts, over those before the model ran."""
    marks: list[int] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda *_: marks.append(_mark()))

    def _mark() -> int:
        with torch.profiler.record_function("mark"):
            return 0

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(x)
    handle.remove()
    total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "mark":
            return total
        if event.name() == "[memory]":
            total += event.nbytes()
    raise AssertionError("the layer did not run")


def test_report_adds_up() -> None:
    model, x = network()
    prepared = prepare_stored(model, DQA(bits=3), x)
    prepared(x)
    stored = convert_stored(prepared, "joint")
    report = storage_report(stored, x)
    assert [e.name for e in report.edges] == [e.name for e in stored_edges(stored)]
    assert report.elements == 4 * 8 * (16 * 16 + 8 * 8 + 2 * 4 * 4)
    assert report.float_nbytes == 4 * report.elements
    assert report.nbytes == sum(e.nbytes for e in report.edges)
    assert report.bits_per_activation == 8 * (report.nbytes + report.codebook_nbytes) / report.elements
    assert "blocks.0.relu2" in str(report)
    bounds = storage_bound(stored, (4, 3, 16, 16))
    assert isinstance(bounds, dict)
    assert all(e.nbytes <= bounds[e.name] for e in report.edges)


def test_state_dict_carries_the_tables() -> None:
    model, x = network()
    prepared = prepare_stored(model, DQA(bits=3), x)
    prepared(x)
    stored = convert_stored(prepared, "joint")
    other = prepare_stored(network(1)[0], DQA(bits=3), x)
    other(x * 2)
    loaded = convert_stored(other, "joint")
    file = io.BytesIO()
    torch.save(stored.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(x), stored(x))
    assert storage_report(loaded, x).nbytes == storage_report(stored, x).nbytes
    assert torch.equal(copy.deepcopy(stored)(x), stored(x))


def test_quantizers_are_found_and_ranked_by_name() -> None:
    model, x = network()
    prepared = prepare_stored(model, DQA(bits=3), x)
    prepared(x)
    names = [name for name, _ in iter_quantizers(prepared)]
    assert names == ["relu", "blocks.0.relu2", "blocks.1.relu2", "blocks.2.relu2"]
    quantizers = dict(iter_quantizers(prepared))
    quantizers["relu"].set_extra_bits(torch.tensor([3, 2, 1, 0, -1, -2, 0, 0]))
    stored = convert_stored(prepared, "joint")
    assert torch.equal(stored(x), fake_quantized(prepared)(x))


def test_in_place_operations_are_followed() -> None:
    """The late reader of a value that an in-place ReLU changed must get the changed one."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.c(self.b(F.relu_(x)))
            return x + y

    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.randn(2, 4, 8, 8)
    prepared = prepare_stored(model, Direct(bits=8), x)
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))
        stored = convert_stored(prepared, "joint")
        assert torch.equal(stored(x), fake_quantized(prepared)(x))
        assert next(iter_quantizers(prepared))[1].calibration.minimum == 0


def test_a_compiled_model_packs_and_an_exported_one_is_refused() -> None:
    model, x = network()
    prepared = prepare_stored(model, DQA(bits=3), x)
    with torch.no_grad():
        prepared(x)
        stored = convert_stored(prepared, "joint")
        assert torch.equal(torch.compile(stored, backend="eager")(x), stored(x))
    with pytest.raises(ExportFailed, match="'relu' packs its tensor"):
        torch.export.export(stored, (x,))
    with pytest.raises(ExportFailed, match="'relu' packs its tensor"):
        torch.jit.trace(stored, x)


def test_sizes_and_tuples_are_no_activations() -> None:
    """Sizes that are read late, as vision transformers do, and the parts of a split."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            n, (height, width) = x.shape[0], x.shape[2:]
            early, late = x.split(2, 1)
            y = self.c(self.b(torch.cat([early, late], 1)) * height)
            y = y.reshape(n, -1, x.size(2), width)
            return torch.cat([y[:, :2] + early, y[:, 2:] + late], 1) / n

    torch.manual_seed(0)
    model, x = Sized().eval(), torch.randn(2, 4, 8, 8)
    prepared = prepare_stored(model, DQA(bits=8, extra_bits=8), x)
    assert [e.shape for e in stored_edges(prepared)] == [(2, 2, 8, 8), (2, 2, 8, 8)]
    with torch.no_grad():
        assert torch.equal(prepared(x), model(x))
        stored = convert_stored(prepared)
        torch.testing.assert_close(stored(x), model(x), rtol=0.01, atol=0.01)
        torch.testing.assert_close(stored(x[:1]), prepared(x[:1]), rtol=0.01, atol=0.01)


def test_a_forged_codebook_in_a_state_dict() -> None:
    """It is checked when it is loaded, and again against the quantizer when it is used."""
    model, x = network()
    prepared = prepare_stored(model, DQA(bits=3), x)
    prepared(x)
    stored = convert_stored(prepared, "joint")
    pack = next(m for m in stored.modules() if isinstance(m, Pack))
    for state in (torch.zeros(40, dtype=torch.uint8), torch.zeros(3), "text", None):
        with pytest.raises(CorruptFrame):
            pack.set_extra_state(state)  # type: ignore[arg-type]
    others = prepare_stored(network()[0], DQA(bits=4), x)
    others(x)
    theirs = next(m for m in convert_stored(others).modules() if isinstance(m, Pack))
    pack.set_extra_state(theirs.get_extra_state())
    with pytest.raises(NotPackable, match="'relu'"):
        stored(x)


def test_errors_name_the_cause() -> None:
    model, x = network()

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceFailed, match="Branching"):
        prepare_stored(Branching(), DQA(), x)
    with pytest.raises(NothingToStore):
        prepare_stored(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), DQA(), x)
    with pytest.raises(NotPackable, match="QPP"):
        prepare_stored(model, DQA(qparams=QPP(sites=("input",))), x)
    with pytest.raises(NotAMethod):
        prepare_stored(model, "dqa", x)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="min_lifetime=0"):
        prepare_stored(model, DQA(), x, min_lifetime=0)
    prepared = prepare_stored(model, DQA(), x)
    with pytest.raises(UncalibratedQuantizer, match="'relu'"):
        convert_stored(prepared)
    prepared(x)
    with pytest.raises(InvalidArgument):
        convert_stored(prepared, "zip")
    with pytest.raises(NothingToStore):
        convert_stored(model)  # type: ignore[arg-type]
    with pytest.raises(DQAError, match="relu"):
        convert_stored(prepared)(x * float("nan"))
