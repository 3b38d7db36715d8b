"""Train the example networks and write the weights that ``examples.networks.load`` reads.

    python -m examples.networks.training --network resnet32

writes ``examples/networks/weights/resnet32.safetensors``. What was reached, with which seed, epochs and
version of torch, stands in the file's metadata. A run on the same machine with the same threads repeats
itself; across machines, convolutions sum in another order and the weights differ.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from examples.networks import NETWORKS, WEIGHTS, parameter_count, tasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained.

    Attributes:
        task: makes the task (its data is only read when called).
        epochs: passes over the task's training data.
        batch_size: samples in a step.
        optimizer: "sgd" (Nesterov, momentum 0.9) or "adamw".
        learning_rate: the peak of the one-cycle schedule.
        weight_decay: of the optimizer.
    """

    task: Callable[[], tasks.Task]
    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be positive: {self.epochs}, {self.batch_size}")


_DIGIT_CNN = Recipe(
    task=tasks.DigitClassification,
    epochs=20,
    batch_size=64,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=1e-3,
)

RECIPES: dict[str, Recipe] = {
    "resnet32": _DIGIT_CNN,
    "mobilenetv2": _DIGIT_CNN,
    "vit": Recipe(
        task=tasks.DigitClassification,
        epochs=80,
        batch_size=64,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=5e-2,
    ),
    "unet": Recipe(
        task=tasks.SceneSegmentation,
        epochs=20,
        batch_size=8,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=1e-3,
    ),
    "espcn": Recipe(
        task=tasks.SuperResolution,
        epochs=15,
        batch_size=16,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.0,
    ),
}


def train(
    model: nn.Module,
    task: tasks.Task,
    recipe: Recipe,
    *,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Train the model in place and leave it in eval mode.

    Args:
        model: the network; its initial weights are the caller's (seed torch before building it).
        task: the data and the loss.
        recipe: everything else; its own ``task`` is not used here.
        seed: of the order of the batches and of the augmentation.
        progress: show a tqdm bar on stderr.

    Returns:
        Seconds it took.

    Raises:
        RuntimeError: the loss became NaN or infinite; the message names the epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    rate, decay = recipe.learning_rate, recipe.weight_decay
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, nesterov=True, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    total = recipe.epochs * task.steps(recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=0.2)
    start = time.perf_counter()
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        for epoch in range(recipe.epochs):
            model.train()
            for inputs, targets in task.epoch(recipe.batch_size, generator):
                loss = task.loss(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            if not torch.isfinite(loss):
                raise RuntimeError(f"the loss is {loss.item()} in epoch {epoch}: lower the learning rate")
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
            logger.debug("epoch %d: loss %.4f", epoch + 1, loss.item())
    model.eval()
    return time.perf_counter() - start


def train_network(
    name: str, *, seed: int = 0, epochs: int | None = None, progress: bool = True
) -> tuple[nn.Module, dict[str, str]]:
    """Build a network by name, train it by its recipe and score it.

    Args:
        name: a key of ``RECIPES``.
        seed: of the initial weights, the order of the batches and the augmentation.
        epochs: instead of the recipe's.
        progress: show a tqdm bar on stderr.

    Returns:
        The model in eval mode, and what ``save_weights`` stores with it (text to text, as safetensors asks).
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe for {name!r}; recipes: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    task = recipe.task()
    seconds = train(model, task, recipe, seed=seed, progress=progress)
    metadata = {
        "network": name,
        "metric": task.metric,
        "score": f"{task.score(model):.4f}",
        "seed": str(seed),
        "epochs": str(recipe.epochs),
        "parameters": str(parameter_count(model)),
        "torch": torch.__version__,
        "training_seconds": f"{seconds:.1f}",
    }
    if task.metric == "accuracy_percent":
        metadata["accuracy"] = metadata["score"]
    return model, metadata


def save_weights(model: nn.Module, metadata: dict[str, str], path: Path) -> None:
    """Write the state dict and its metadata as safetensors; a crash leaves nothing half-written."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # save_file (safetensors 0.8) makes files which only their owner can read; write_bytes follows the umask.
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    partial.write_bytes(save(state, metadata))
    partial.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """The command line: train one network, write its weights, print its metadata."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m examples.networks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--network", required=True, choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: weights/<network>.safetensors beside this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    path = options.output or WEIGHTS / f"{options.network}.safetensors"
    model, metadata = train_network(
        options.network, seed=options.seed, epochs=options.epochs, progress=not options.quiet
    )
    save_weights(model, metadata, path)
    Console().print({"file": str(path), **metadata})


if __name__ == "__main__":
    main()
