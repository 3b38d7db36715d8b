"""What the papers' tables are measured on: a network, its test part, calibration subsets, and the score.

A workload is the paper's own (CIFAR-10, Cityscapes, ImageNet, Set5 and Set14) where `--data` names its folder, and a
stand-in otherwise (`examples.networks`); `data` and `title` say which. The sizes of the calibration subsets are the
DQA paper's on its data, scaled down on the stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from dqa_plugins.metrics import IGNORED
from examples.networks import digits, efficientnet_lite, load, photos, scenes
from examples.networks.mobilenet import MobileNetV2
from examples.networks.others import HRNetSegmentation, torchvision_resnet
from examples.networks.resnet import resnet32
from examples.networks.unet import UNet
from examples.reproductions.common import Options
from examples.reproductions.datasets import Split, cifar10, imagenet
from examples.reproductions.pixels import CITYSCAPES_CLASSES, CITYSCAPES_SIZE, cityscapes, super_resolution_folder

IMAGENET_GREY = (
    torch.tensor([0.485, 0.456, 0.406])[:, None, None],
    torch.tensor([0.229, 0.224, 0.225])[:, None, None],
)
Batches = list[tuple[Tensor, Tensor]]
PATCH = 80  # pixels, low resolution: what ESPCN is calibrated on
# EfficientNet-Lite0 without ImageNet: crops of these photos are tested, crops of the others calibrate
CROPS_TEST = ("chelsea", "coffee", "motorcycle", "china", "coins", "hubble", "page", "brick")
CROPS_CALIBRATION = ("flower", "astronaut", "rocket", "camera", "retina", "immunohistochemistry", "grass", "gravel")
NAMES = {
    "resnet32": "ResNet-32",
    "mobilenetv2": "MobileNetV2",
    "unet": "U-Net",
    "espcn": "ESPCN",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "hrnet": "HRNetV2-W18",
}
PAPERS_OWN = ("resnet18", "resnet34", "hrnet")  # the QPP paper's; --data only
HRNET_SIZE = (512, 1024)


@dataclass
class Workload:
    """A network with everything that it takes to quantize and score it.

    Attributes:
        key: name of the network in `examples.networks`.
        data: the data really used, in words.
        real: the data set is the paper's.
        model: in eval mode, float.
        test: batches of (inputs, targets), never calibrated on.
        draw: draw(count, seed) -> (inputs, targets), a random calibration subset.
        calibration: samples of a calibration subset.
        ranking: samples that channels are ranked on.
        batch: batch size of the DQA paper.
        ratio: share of important channels in the DQA paper.
        metric: "accuracy %", "mIoU %" or "PSNR dB".
        grey: (mean, std) that inputs were normalised with: (grey - mean) / std, grey in [0, 1].
    """

    key: str
    data: str
    real: bool
    model: nn.Module
    test: Batches
    draw: Callable[[int, int], tuple[Tensor, Tensor]]
    calibration: int
    ranking: int
    batch: int
    ratio: float
    metric: str
    grey: tuple[Tensor, Tensor] = field(repr=False, default=(torch.zeros(()), torch.ones(())))

    @property
    def network(self) -> str:
        """The network's name as the papers write it."""
        return NAMES[self.key]

    @property
    def title(self) -> str:
        """Network and data, for titles."""
        return f"{self.network}, {self.data}"

    def calibration_batches(self, seed: int, count: int | None = None) -> Batches:
        """A random calibration subset, cut into batches."""
        inputs, targets = self.draw(count or self.calibration, seed)
        return list(zip(inputs.split(self.batch), targets.split(self.batch), strict=True))

    def score(self, model: nn.Module, batches: Batches | None = None) -> float:
        """The metric of a model in eval mode on the test part (or on other batches)."""
        return SCORES[self.metric](model, self.test if batches is None else batches)

    def scores(self, model: nn.Module, batches: Batches | None = None) -> dict[str, float]:
        """The metric as "score"; where it is mIoU also the share of right pixels, which papers call accuracy."""
        if self.metric != "mIoU %":
            return {"score": self.score(model, batches)}
        found = confusion(model, self.test if batches is None else batches)
        return {"score": iou_of(found), "pixel_accuracy": 100 * float(found.diagonal().sum() / found.sum())}

    def shifted(self, seed: int = 0) -> Batches:
        """The test part under other exposures: grey times 2^u, u uniform in [-1, 1] per sample, cut at 1.

        Where the target is an image, it is exposed alike.
        """
        generator = torch.Generator().manual_seed(seed)
        mean, std = self.grey
        found = []
        for inputs, targets in self.test:
            gain = 2 ** (2 * torch.rand(len(inputs), 1, 1, 1, generator=generator) - 1)
            grey = ((inputs * std + mean).clamp(0, 1) * gain).clamp(0, 1)
            exposed = (targets * gain).clamp(0, 1) if self.metric == "PSNR dB" else targets
            found.append(((grey - mean) / std, exposed))
        return found


# ---------------------------------------------------------------- scores


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy in percent."""
    hits = sum(int((model(inputs).argmax(1) == targets).sum()) for inputs, targets in batches)
    return 100 * hits / sum(len(targets) for _, targets in batches)


@torch.no_grad()
def confusion(model: nn.Module, batches: Batches) -> Tensor:
    """(K, K) float64: pixels by their class (row) and the model's answer (column); IGNORED pixels do not count."""
    total = torch.zeros(())
    for inputs, targets in batches:
        outputs = model(inputs)
        classes = outputs.shape[1]
        counted = targets != IGNORED
        pairs = targets[counted] * classes + outputs.argmax(1)[counted]
        total = total + torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).double()
    return total


def iou_of(confusion: Tensor) -> float:
    """Mean over the classes present of intersection / union in percent."""
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return 100 * float((hits[union > 0] / union[union > 0]).mean())


def mean_iou(model: nn.Module, batches: Batches) -> float:
    """Mean over the classes present of intersection / union in percent; IGNORED pixels do not count."""
    return iou_of(confusion(model, batches))


@torch.no_grad()
def psnr(model: nn.Module, batches: Batches, border: int = 2) -> float:
    """Mean over the images of the peak signal-to-noise ratio in dB (peak 1), `border` pixels left out."""
    values = []
    for inputs, targets in batches:
        error = (model(inputs).clamp(0, 1) - targets)[..., border:-border, border:-border]
        values += (-10 * torch.log10(error.double().square().mean((1, 2, 3)))).tolist()
    return sum(values) / len(values)


SCORES: dict[str, Callable[[nn.Module, Batches], float]] = {
    "accuracy %": accuracy,
    "mIoU %": mean_iou,
    "PSNR dB": psnr,
}


# ---------------------------------------------------------------- workloads


@cache
def workload(key: str, data: Path | None = None, weights: Path | None = None, *, quick: bool = False) -> Workload:
    """A workload by the name of its network. Made once per process; leave it as it is.

    Args:
        key: one of NAMES.
        data: folder of the paper's data set; None: the stand-in.
        weights: safetensors file for the network that fits `data`; ESPCN and EfficientNet-Lite0 have theirs.
        quick: smaller subsets.

    Raises:
        ValueError: no such network, or weights are needed; DatasetError: the folder does not hold the data set.
    """
    if key not in NAMES:
        raise ValueError(f"no workload for {key!r}; there are {', '.join(NAMES)}.")
    if data is None and key in PAPERS_OWN:
        raise ValueError(f"{NAMES[key]} has no stand-in: give --data, a folder of the QPP paper's data set.")
    if data is not None and key in ("resnet32", "mobilenetv2", "unet", "hrnet") and weights is None:
        raise ValueError(
            f"the shipped weights of {key} were trained on stand-in data and do not fit {data}: give --weights, a "
            "safetensors file of the same network trained there (3 input channels; 10 classes, U-Net and HRNet 19)."
        )
    if key in ("resnet32", "mobilenetv2"):
        return _classifier(key, data, weights, quick)
    if key in ("unet", "hrnet"):
        return _segmentation(key, data, weights, quick)
    return _espcn(data, quick) if key == "espcn" else _imagenet(key, data, weights, quick)


def _with_weights(model: nn.Module, weights: Path) -> nn.Module:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(weights))
    return model.eval()


def _pick(inputs: Tensor, targets: Tensor) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Random subsets without repetition; at most all."""

    def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:count]
        return inputs[chosen], targets[chosen]

    return draw


def _cut(inputs: Tensor, targets: Tensor, size: int) -> Batches:
    return list(zip(inputs.split(size), targets.split(size), strict=True))


@cache
def _cifar10(data: Path) -> Split:
    return cifar10(data)


def _classifier(key: str, data: Path | None, weights: Path | None, quick: bool) -> Workload:
    if data is not None and weights is not None:
        found = _cifar10(data)
        network = resnet32(3) if key == "resnet32" else MobileNetV2(3)
        test = _cut(found.test_images, found.test_labels, 128)
        draw = _pick(found.train_images, found.train_labels)
        grey = (
            torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None],
            torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None],
        )
        model = _with_weights(network, weights)
        return Workload(key, "CIFAR-10", True, model, test, draw, 5000, 5000, 128, 0.4, "accuracy %", grey)
    split = digits.load_split()
    count = 400 if quick else len(split.test_images)
    test = _cut(split.test_images[:count], split.test_labels[:count], 128)
    draw = _pick(split.train_images, split.train_labels)
    grey = (torch.tensor(digits.MEAN), torch.tensor(digits.STD))
    name = "scikit-learn digits (stand-in for CIFAR-10)"
    calibration, ranking = (128, 64) if quick else (256, 128)
    return Workload(key, name, False, load(key)[0], test, draw, calibration, ranking, 128, 0.4, "accuracy %", grey)


def _segmentation(key: str, data: Path | None, weights: Path | None, quick: bool) -> Workload:
    if data is not None and weights is not None:
        size = CITYSCAPES_SIZE if key == "unet" else HRNET_SIZE
        test = _cut(*cityscapes(data, "val", 50 if quick else None, size=size), 4)
        network = UNet(3, CITYSCAPES_CLASSES) if key == "unet" else HRNetSegmentation(CITYSCAPES_CLASSES)
        model = _with_weights(network, weights)

        def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
            return cityscapes(data, "train", count, seed=seed, size=size)

        name = f"Cityscapes at {size[0]} x {size[1]}"
        return Workload(key, name, True, model, test, draw, 50, 50, 4, 0.5, "mIoU %", IMAGENET_GREY)
    inputs, targets = scenes.digit_scenes(60 if quick else 200, seed=1, part="test")
    draw = _pick(*scenes.digit_scenes(500, seed=0, part="train"))
    grey = (torch.tensor(digits.MEAN), torch.tensor(digits.STD))
    name = "pasted digits (stand-in for Cityscapes)"
    ranking, test = 16 if quick else 50, _cut(inputs, targets, 4)
    return Workload("unet", name, False, load("unet")[0], test, draw, 50, ranking, 4, 0.5, "mIoU %", grey)


def _espcn(data: Path | None, quick: bool) -> Workload:
    """Calibrated on patches of the training photos, tested on whole photos, one by one: they differ in size."""
    training = photos.super_resolution_pairs(photos.TRAIN_PHOTOS)

    def draw(count: int, seed: int, patch: int = PATCH) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lows, highs = [], []
        for _ in range(count):
            low, high = training[int(torch.randint(len(training), (), generator=generator))]
            y, x = (int(torch.randint(size - patch + 1, (), generator=generator)) for size in low.shape[2:])
            lows.append(low[..., y : y + patch, x : x + patch])
            highs.append(high[..., 2 * y : 2 * (y + patch), 2 * x : 2 * (x + patch)])
        return torch.cat(lows), torch.cat(highs)

    if data is not None:
        name, test = f"{data.name} ({len(list(data.iterdir()))} files)", super_resolution_folder(data)
    else:
        name = "six photos of scikit-image (stand-in for Set5 and Set14)"
        test = photos.super_resolution_pairs(photos.TEST_PHOTOS)
        if quick:
            test = [(low[..., 60:204, 60:204], high[..., 120:408, 120:408]) for low, high in test]
    return Workload("espcn", name, data is not None, load("espcn")[0], test, draw, 128, 32, 16, 0.4, "PSNR dB")


def _imagenet(key: str, data: Path | None, weights: Path | None, quick: bool) -> Workload:
    """Networks with real ImageNet weights. Without the data set the targets are the float network's own answers."""
    if key == "efficientnet_lite0":
        model, grey = load(key)[0], (torch.tensor(127 / 255), torch.tensor(128 / 255))
    else:
        model, grey = torchvision_resnet(key, trained=weights is None), IMAGENET_GREY
        model = model if weights is None else _with_weights(model, weights)
    if data is not None:
        mean, std = grey
        folder = imagenet(data)
        size = efficientnet_lite.INPUT_SIZE
        order = torch.randperm(len(folder.files), generator=torch.Generator().manual_seed(0)).tolist()
        # the folder has no training part: subsets are drawn from the first half, the score is taken on the other
        half = len(order) // 2
        test_images, test_labels = folder.load(order[half : half + (500 if quick else 5000)], size)
        test = _cut((test_images / 255 - mean) / std, test_labels, 16)

        def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
            chosen = torch.randperm(half, generator=torch.Generator().manual_seed(seed))[:count].tolist()
            images, labels = folder.load([order[k] for k in chosen], size)
            return (images / 255 - mean) / std, labels

        name = f"ImageNet folder, {len(test_labels)} images"
        return Workload(key, name, True, model, test, draw, 128, 32, 16, 0.4, "accuracy %", grey)
    crops, per_photo = (6 if quick else 26), 4
    test_inputs = efficientnet_lite.normalize(photos.photo_crops(crops, names=CROPS_TEST))
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(1) for part in test_inputs.split(16)])

    def draw_crops(count: int, seed: int) -> tuple[Tensor, Tensor]:
        found = photos.photo_crops(-(-count // len(CROPS_CALIBRATION)), seed=seed + 1, names=CROPS_CALIBRATION)[:count]
        inputs = efficientnet_lite.normalize(found)
        with torch.no_grad():
            return inputs, model(inputs).argmax(1)

    name = f"{len(answers)} crops of eight photos, agreement with FP32 (stand-in for ImageNet)"
    test, count = _cut(test_inputs, answers, 16), per_photo * len(CROPS_CALIBRATION)
    return Workload(key, name, False, model, test, draw_crops, count, 16, 16, 0.4, "accuracy %", grey)


def chosen(options: Options, networks: Iterable[str]) -> list[Workload]:
    """The workloads that a command line asks for: of one network, or of all these."""
    names = [options.network] if options.network else networks
    return [workload(name, options.data, options.weights, quick=options.quick) for name in names]
