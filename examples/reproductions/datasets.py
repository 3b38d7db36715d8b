"""The papers' classification data sets, read from folders that the user has: CIFAR-10 and ImageNet.

Nothing is downloaded. A folder that is not there, or does not hold what its data set holds, raises `DatasetError` with
the path and what was expected. `pixels.py` reads Cityscapes, Set5 and Set14.

CIFAR-10 comes as pickled batches or as binary ones. The pickled ones are read by an unpickler that knows three names,
each bound to an inert stand-in that only keeps what it is given: no code that a file names ever runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
CIFAR_BYTES = 3 * 32 * 32
PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff")


class DatasetError(ValueError):
    """A folder does not hold the data set that it should."""


class MissingDataset(DatasetError, FileNotFoundError):
    """A folder or a file of a data set is not there."""


@dataclass(frozen=True)
class Split:
    """Images and labels of the two parts.

    Attributes:
        train_images, test_images: (N, 3, H, W) float32, normalised.
        train_labels, test_labels: (N,) int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def check_folder(folder: Path, expected: str) -> Path:
    """Return `folder` if it is one.

    Raises:
        MissingDataset: it is not; the message says what was expected in it.
    """
    if not folder.is_dir():
        raise MissingDataset(f"{folder} is not a folder; expected {expected}.")
    return folder


def read_image(path: Path) -> Tensor:
    """One image file: (3, H, W) uint8, RGB.

    Raises:
        DatasetError: the file is no image, or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise DatasetError(f"{path} cannot be read as an image: {error}") from error


# ---------------------------------------------------------------- CIFAR-10


class _Kept:
    """Stands for an array or a dtype in a pickle: keeps arguments and state, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encoded(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in old protocols: text and the name of an encoding."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


class _InertUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers, bytes and numpy arrays; refuses every other name."""

    _NAMES: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _Kept,
        ("numpy._core.multiarray", "_reconstruct"): _Kept,
        ("numpy", "ndarray"): _Kept,
        ("numpy", "dtype"): _Kept,
        ("_codecs", "encode"): _encoded,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch does")
        return self._NAMES[module, name]


def _pickled_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            batch = _InertUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises anything
        raise DatasetError(f"{path} is no pickled CIFAR-10 batch ({type(error).__name__}: {error}).") from error
    if not isinstance(batch, dict):
        raise DatasetError(f"{path} holds a {type(batch).__name__}; a CIFAR-10 batch is a dict.")
    named = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    data, labels = named.get("data"), named.get("labels")
    state = data.state if isinstance(data, _Kept) else None
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[4], bytes):
        raise DatasetError(f"{path} has no array called 'data'.")
    _, shape, dtype, fortran, raw = state
    kind = dtype.arguments[0] if isinstance(dtype, _Kept) and dtype.arguments else None
    if kind not in ("u1", b"u1") or fortran or not isinstance(shape, tuple) or shape[1:] != (CIFAR_BYTES,):
        raise DatasetError(f"{path}: 'data' must be (N, {CIFAR_BYTES}) uint8 in rows, got {kind!r} of shape {shape}.")
    if len(raw) != shape[0] * CIFAR_BYTES or not isinstance(labels, list) or len(labels) != shape[0]:
        raise DatasetError(f"{path}: {shape[0]} rows, {len(raw)} bytes and {len(labels or ())} labels do not agree.")
    if not all(isinstance(label, int) for label in labels):
        raise DatasetError(f"{path}: labels must be integers.")
    return np.frombuffer(raw, np.uint8).reshape(shape), np.array(labels, np.int64)


def _binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % (1 + CIFAR_BYTES):
        raise DatasetError(f"{path} has {raw.size} bytes, not a multiple of {1 + CIFAR_BYTES} (a label and an image).")
    rows = raw.reshape(-1, 1 + CIFAR_BYTES)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def cifar10(folder: Path) -> Split:
    """CIFAR-10 from `data_batch_1..5` and `test_batch`, pickled or (with .bin) binary.

    Args:
        folder: with the files, or with `cifar-10-batches-py` or `cifar-10-batches-bin` in it.

    Raises:
        DatasetError: files are missing, damaged or of another data set.
    """
    expected = (
        "data_batch_1 to data_batch_5 and test_batch (or the same with .bin): the CIFAR-10 python or binary version"
    )
    check_folder(folder, expected)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for suffix, read in (("", _pickled_batch), (".bin", _binary_batch)):
            paths = [place / f"{name}{suffix}" for name in names]
            if any(path.is_file() for path in paths):
                missing = [path.name for path in paths if not path.is_file()]
                if missing:
                    raise MissingDataset(f"{place} lacks {', '.join(missing)}; expected {expected}.")
                return _cifar_split([read(path) for path in paths], place)
    raise MissingDataset(f"{folder} holds no CIFAR-10; expected {expected}.")


def _cifar_split(batches: list[tuple[np.ndarray, np.ndarray]], place: Path) -> Split:
    def part(chosen: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.concatenate([data for data, _ in chosen]).reshape(-1, 3, 32, 32))
        labels = torch.from_numpy(np.concatenate([found for _, found in chosen]))
        if int(labels.min()) < 0 or int(labels.max()) > 9:
            raise DatasetError(f"{place}: labels from {int(labels.min())} to {int(labels.max())}; CIFAR-10 has 0 to 9.")
        return normalise(pixels, CIFAR_MEAN, CIFAR_STD), labels

    return Split(*part(batches[:5]), *part(batches[5:]))


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) uint8 -> float32, (grey - mean) / std with grey in [0, 1], channel by channel."""
    return (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


# ---------------------------------------------------------------- ImageNet


@dataclass(frozen=True)
class ImageFolder:
    """Files and labels; pixels are read when asked for."""

    files: tuple[Path, ...]
    labels: Tensor

    def load(self, chosen: Sequence[int], size: int, crop: float = 0.875) -> tuple[Tensor, Tensor]:
        """The middle square, `crop` of the shorter side, resized (bicubic, antialiased).

        Args:
            chosen: numbers of the files.
            size: height and width of the result in pixels.

        Returns:
            images (N, 3, size, size) float32, RGB in 0..255; labels (N,) int64.
        """
        images = []
        for number in chosen:
            photo = read_image(self.files[number])[None].float()
            side = max(1, round(min(photo.shape[2:]) * crop))
            y, x = (photo.shape[2] - side) // 2, (photo.shape[3] - side) // 2
            square = photo[..., y : y + side, x : x + side]
            images.append(F.interpolate(square, size=size, mode="bicubic", align_corners=False, antialias=True))
        return torch.cat(images).clamp(0, 255), self.labels[list(chosen)]


def imagenet(folder: Path, classes: int = 1000) -> ImageFolder:
    """An ImageNet folder: one sub-folder per class, whose names in alphabetical order are classes 0 to 999.

    Args:
        folder: with the class folders, or with `val` holding them.
        classes: how many there must be.

    Raises:
        DatasetError: another number of classes, or a class without images.
    """
    expected = f"{classes} folders of images (n01440764, ...), or val/ with them"
    place = folder / "val" if (folder / "val").is_dir() else folder
    names = sorted(path for path in check_folder(place, expected).iterdir() if path.is_dir())
    if len(names) != classes:
        raise DatasetError(f"{place} has {len(names)} class folders; expected {expected}.")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(path for path in name.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
        if not found:
            raise DatasetError(f"{name} holds no image ({', '.join(PHOTO_SUFFIXES)}).")
        files += found
        labels += [label] * len(found)
    return ImageFolder(tuple(files), torch.tensor(labels))
