"""What every cell imports, once: the packages and the core, no room. Processes of cells are forked from here."""

import contextlib
import importlib

from examples.zoo import cell  # noqa: F401
from examples.zoo.entry import prepare_torchvision

prepare_torchvision()
for package in ("onnxruntime", "onnxscript", "timm", "torchao", "transformers"):
    with contextlib.suppress(ImportError):  # a cell that needs it says so
        importlib.import_module(package)
