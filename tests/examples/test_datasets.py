"""Readers of the papers' data sets, on tiny folders made here: right values, and errors that name the path."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dqa_plugins.metrics import IGNORED
from examples.reproductions.datasets import (
    CIFAR_BYTES,
    CIFAR_MEAN,
    CIFAR_STD,
    DatasetError,
    MissingDataset,
    cifar10,
    imagenet,
)
from examples.reproductions.pixels import cityscapes, super_resolution_folder

PIL = pytest.importorskip("PIL.Image")
NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


def batches(rows: int = 3) -> dict[str, tuple[np.ndarray, list[int]]]:
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(0, 256, (rows, CIFAR_BYTES), np.uint8), generator.integers(0, 10, rows).tolist())
        for name in NAMES
    }


def write_pickled(folder: Path, protocol: int = 2) -> dict[str, tuple[np.ndarray, list[int]]]:
    found = batches()
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, labels) in found.items():
        batch = {b"data": data, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a.png"] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return found


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(pixels).save(path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_pickles_give_what_was_written(tmp_path: Path, protocol: int) -> None:
    found = write_pickled(tmp_path / "cifar-10-batches-py", protocol)
    split = cifar10(tmp_path)
    assert split.train_images.shape == (15, 3, 32, 32)
    assert split.test_labels.tolist() == found["test_batch"][1]
    mean, std = torch.tensor(CIFAR_MEAN)[:, None, None], torch.tensor(CIFAR_STD)[:, None, None]
    pixels = ((split.test_images * std + mean) * 255).round().reshape(3, -1)
    assert pixels.tolist() == found["test_batch"][0].tolist()


def test_binary_and_pickled_cifar_agree(tmp_path: Path) -> None:
    found = write_pickled(tmp_path / "py")
    (tmp_path / "bin").mkdir()
    for name, (data, labels) in found.items():
        rows = np.concatenate([np.array(labels, np.uint8)[:, None], data], 1)
        rows.tofile(tmp_path / "bin" / f"{name}.bin")
    one, other = cifar10(tmp_path / "py"), cifar10(tmp_path / "bin")
    assert torch.equal(one.train_images, other.train_images)
    assert torch.equal(one.test_labels, other.test_labels)


class Touch:
    """A pickle that makes a file when it is loaded the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_cifar_pickle_that_names_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    write_pickled(tmp_path)
    proof = tmp_path / "proof"
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Touch(proof), b"labels": [1]}))
    with pytest.raises(DatasetError, match=r"data_batch_3.*no pickled CIFAR-10 batch"):
        cifar10(tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "no pickled CIFAR-10 batch"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({b"labels": [1]}), "no array called 'data'"),
        (pickle.dumps({b"data": np.zeros((2, 7), np.uint8), b"labels": [1, 2]}), "must be"),
        (pickle.dumps({b"data": np.zeros((2, CIFAR_BYTES), np.float32), b"labels": [1, 2]}), "must be"),
        (pickle.dumps({b"data": np.zeros((2, CIFAR_BYTES), np.uint8), b"labels": [1]}), "do not agree"),
        (pickle.dumps({b"data": np.zeros((1, CIFAR_BYTES), np.uint8), b"labels": ["a"]}), "integers"),
        (pickle.dumps({b"data": np.zeros((1, CIFAR_BYTES), np.uint8), b"labels": [10]}), "0 to 9"),
    ],
)
def test_a_damaged_cifar_batch_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_pickled(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        cifar10(tmp_path)


def test_missing_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataset, match="is not a folder"):
        cifar10(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no CIFAR-10"):
        cifar10(tmp_path)
    write_pickled(tmp_path)
    (tmp_path / "data_batch_2").unlink()
    with pytest.raises(MissingDataset, match="lacks data_batch_2"):
        cifar10(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in NAMES:
        (tmp_path / "bin" / f"{name}.bin").write_bytes(b"12345")
    with pytest.raises(DatasetError, match="5 bytes"):
        cifar10(tmp_path / "bin")


def test_imagenet_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    for number, name in enumerate(("n02", "n01")):
        for k in range(2):
            pixels = np.full((40, 60, 3), 100 * number + k, np.uint8)
            write_image(tmp_path / "val" / name / f"{k}.png", pixels)
    folder = imagenet(tmp_path, classes=2)
    images, labels = folder.load([0, 3], size=32)
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert images.mean((1, 2, 3)).round().tolist() == [100, 1]  # n01 comes first
    with pytest.raises(DatasetError, match="2 class folders"):
        imagenet(tmp_path)
    (tmp_path / "val" / "n03").mkdir()
    with pytest.raises(DatasetError, match="n03 holds no image"):
        imagenet(tmp_path, classes=3)
    (tmp_path / "val" / "n03" / "a.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"a\.png cannot be read"):
        imagenet(tmp_path, classes=3).load([4], size=32)


def test_cityscapes_labels_become_training_ids(tmp_path: Path) -> None:
    ids = np.repeat(np.array([[7, 33], [0, 26]], np.uint8), 8, 0).repeat(8, 1)
    write_image(tmp_path / "leftImg8bit" / "val" / "bonn" / "a_leftImg8bit.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(MissingDataset, match="gtFine"):
        cityscapes(tmp_path, "val")
    target = tmp_path / "gtFine" / "val" / "bonn" / "a_gtFine_labelIds.png"
    target.parent.mkdir(parents=True)
    with pytest.raises(MissingDataset, match="has no labels"):
        cityscapes(tmp_path, "val")
    write_image(target, ids)
    images, labels = cityscapes(tmp_path, "val", size=(4, 4))
    assert images.shape == (1, 3, 4, 4)
    assert labels[0, ::2, ::2].tolist() == [[0, 18], [IGNORED, 13]]
    write_image(target, np.full((16, 16), 99, np.uint8))
    with pytest.raises(DatasetError, match="0 to 33"):
        cityscapes(tmp_path, "val", size=(4, 4))
    with pytest.raises(DatasetError, match="'train' or 'val'"):
        cityscapes(tmp_path, "test")


def test_super_resolution_pairs_come_from_images(tmp_path: Path) -> None:
    with pytest.raises(MissingDataset, match="holds no image"):
        super_resolution_folder(tmp_path)
    generator = np.random.default_rng(0)
    write_image(tmp_path / "bird.png", generator.integers(0, 256, (65, 80, 3), np.uint8))
    ((low, high),) = super_resolution_folder(tmp_path)
    assert low.shape == (1, 1, 32, 40)
    assert high.shape == (1, 1, 64, 80)
    assert 0 <= float(low.min()) <= float(low.max()) <= 1
    marked = tmp_path / "image_SRF_2"
    for name in ("img_SRF_2_HR", "img_SRF_2_LR", "img_SRF_4_HR"):
        write_image(marked / f"{name}.png", np.zeros((40, 40, 3), np.uint8))
    assert len(super_resolution_folder(tmp_path)) == 1
    write_image(tmp_path / "original" / "x.png", np.zeros((8, 8, 3), np.uint8))
    (marked / "img_SRF_2_HR.png").rename(tmp_path / "original" / "y.png")
    for path in marked.iterdir():
        path.unlink()
    marked.rmdir()
    with pytest.raises(DatasetError, match="too small"):
        super_resolution_folder(tmp_path)
