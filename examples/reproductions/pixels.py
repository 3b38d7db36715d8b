"""The papers' data sets with a target per pixel, read from folders that the user has: Cityscapes, Set5, Set14."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dqa_plugins.metrics import IGNORED
from examples.networks.photos import luma
from examples.reproductions.datasets import (
    PHOTO_SUFFIXES,
    DatasetError,
    MissingDataset,
    check_folder,
    normalise,
    read_image,
)

CITYSCAPES_CLASSES = 19
CITYSCAPES_SIZE = (256, 512)
# The label ids that are evaluated, in the order of their training ids 0 to 18.
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cityscapes(
    folder: Path, part: str, limit: int | None = None, *, seed: int = 0, size: tuple[int, int] = CITYSCAPES_SIZE
) -> tuple[Tensor, Tensor]:
    """Cityscapes from `leftImg8bit/<part>/<city>/` and `gtFine/<part>/<city>/`.

    Args:
        folder: with leftImg8bit and gtFine in it.
        part: "train" or "val".
        limit: read so many images, drawn by the seed; None: all.
        size: height and width after resizing (images antialiased, labels nearest).

    Returns:
        images (N, 3, H, W) float32, normalised; labels (N, H, W) int64, 0 to 18, or IGNORED.

    Raises:
        DatasetError: folders or label files are missing, or a label id is unknown.
    """
    if part not in ("train", "val"):
        raise DatasetError(f"part={part!r}: 'train' or 'val'.")
    expected = f"leftImg8bit/{part}/<city>/*_leftImg8bit.png and gtFine/{part}/<city>/*_gtFine_labelIds.png"
    check_folder(folder / "leftImg8bit" / part, expected)
    check_folder(folder / "gtFine" / part, expected)
    files = sorted((folder / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
    if not files:
        raise MissingDataset(f"{folder / 'leftImg8bit' / part} holds no image; expected {expected}.")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:limit].tolist()
    images, labels = [], []
    for path in (files[k] for k in order):
        name = path.name.replace("_leftImg8bit", "_gtFine_labelIds")
        target = folder / "gtFine" / part / path.parent.name / name
        if not target.is_file():
            raise MissingDataset(f"{path} has no labels: {target} is not there.")
        photo = F.interpolate(read_image(path)[None].float(), size=size, mode="bilinear", antialias=True)
        images.append(normalise(photo.round().clamp(0, 255), _MEAN, _STD))
        labels.append(_training_ids(target, size))
    return torch.cat(images), torch.stack(labels)


def _training_ids(path: Path, size: tuple[int, int]) -> Tensor:
    """(H, W) int64 of one file of label ids."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            ids = torch.from_numpy(np.array(image)).long()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read as an image: {error}") from error
    if ids.ndim != 2 or int(ids.max()) > 33:
        raise DatasetError(f"{path}: label ids must be one channel of 0 to 33, got shape {tuple(ids.shape)}.")
    table = torch.full((34,), IGNORED)
    table[list(_EVALUATED)] = torch.arange(CITYSCAPES_CLASSES)
    return F.interpolate(table[ids][None, None].float(), size=size, mode="nearest-exact")[0, 0].long()


def super_resolution_folder(folder: Path, scale: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Set5, Set14 or any folder of photos: luma images and their downscaled versions.

    Where file names end in `_HR` (the layout with pairs), only those are read, and those of this scale if the names
    tell (`_SRF_2_HR`); the low resolution is always made here (bicubic, antialiased, 8 bits), as for the stand-ins.

    Args:
        folder: of images, or with `original` or `image_SRF_<scale>` in it.
        scale: factor between the two sizes.

    Returns:
        (low (1, 1, h, w), high (1, 1, scale * h, scale * w)) per photo, float32 in [0, 1].

    Raises:
        DatasetError: no image there, or one is too small.
    """
    check_folder(folder, "images, as in Set5 or Set14")
    places = [folder / f"image_SRF_{scale}", folder / "original", folder]
    place = next(path for path in places if path.is_dir())
    files = sorted(path for path in place.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    marked = [path for path in files if path.stem.endswith("_HR")]
    marked = [path for path in marked if "_SRF_" not in path.stem or f"_SRF_{scale}_" in path.stem]
    pairs = []
    for path in marked or files:
        high = luma(read_image(path))
        height, width = (size // scale * scale for size in high.shape[2:])
        if min(height, width) < 16 * scale:
            raise DatasetError(f"{path} is {high.shape[3]} x {high.shape[2]} pixels: too small to score.")
        high = high[..., :height, :width]
        low = F.interpolate(high, scale_factor=1 / scale, mode="bicubic", align_corners=False, antialias=True)
        pairs.append(((low.clamp(0, 1) * 255).round() / 255, high))
    if not pairs:
        raise MissingDataset(f"{place} holds no image ({', '.join(PHOTO_SUFFIXES)}).")
    return pairs
