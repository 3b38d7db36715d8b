"""The toy example of the QPP paper (section 4): does a layer's variance follow from the statistics of the input?

    python -m examples.reproductions.qpp_toy --quick

Ten linear layers without bias, ReLU between them, Xavier weights; layer l has N_l = 3088 - 256 (l - 1) outputs, so
that the tenth gives an image of 28 x 28 = 784 pixels back. --quick divides all sizes by four (14 x 14 pixels). The
task is denoising; scikit-learn's digits, upsampled, stand for MNIST. Each point is one sample: the variance of its
activations behind the ReLU of layer 4 or 9, over the mean square mu^2 + sigma^2 of its input.

Is the constant of equation 10 right? One layer turns the mean square s = mu^2 + sigma^2 of its input into a Gaussian
of variance v = N w s (N inputs, w the variance of the weights). Behind the ReLU, E[x^2] = v / 2 and
E[x] = sqrt(v / 2 pi), so the variance is (1 - 1/pi) v / 2: equations 8 and 9. What the next layer reads is their sum,
v (1/(2 pi) + 1/2 - 1/(2 pi)) = v / 2 exactly. Hence l layers give (1 - 1/pi) / 2^l times the product of N w: equation
10 is right as printed. Both forms are computed here, the closed one and layer by layer. It is an expectation over the
weights: one draw of a narrow network is off by as much as chi-squared sums over its layers are, so the ratio of the
fitted slope to equation 10 is given over several draws.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from examples.networks import digits
from examples.reproductions import common

LAYERS = 10
SHOWN = (4, 9)
NOISE = 0.3  # standard deviation of the noise to be removed; grey levels are in [0, 1]


def sizes(divisor: int) -> list[int]:
    """Inputs of the first layer, then outputs of all ten."""
    hidden = [(3088 - 256 * layer) // divisor for layer in range(LAYERS)]
    return [hidden[-1], *hidden]


def build(divisor: int, seed: int) -> nn.Sequential:
    """The network: linear layers without bias and ReLU between them, Xavier (normal)."""
    torch.manual_seed(seed)
    widths = sizes(divisor)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.xavier_normal_(linear.weight)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def images(side: int) -> tuple[Tensor, Tensor]:
    """Training and test digits, (N, side * side), grey in [0, 1]."""
    split = digits.load_split(size=side)
    parts = (split.train_images, split.test_images)
    train, test = ((part * digits.STD + digits.MEAN).clamp(0, 1).flatten(1) for part in parts)
    return train, test


def noisy(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Under pixel noise, cut to [0, 1] as an image is."""
    return (clean + NOISE * torch.randn(clean.shape, generator=generator)).clamp(0, 1)


def train(model: nn.Sequential, clean: Tensor, epochs: int, seed: int, progress: bool) -> float:
    """Denoise: mean squared error, Adam. Returns the last epoch's loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    loss = torch.zeros(())
    for _ in tqdm(range(epochs), unit="epoch", disable=not progress):
        total = 0.0
        for chosen in torch.randperm(len(clean), generator=generator).split(64):
            target = clean[chosen]
            loss = F.mse_loss(model(noisy(target, generator)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
    return total / len(clean)


@torch.no_grad()
def variances(model: nn.Sequential, inputs: Tensor) -> dict[int, Tensor]:
    """Variance over the activations of each sample behind the ReLU of the layers shown: {layer: (N,)}."""
    found = {}
    x = inputs
    for index, module in enumerate(model):
        x = module(x)
        layer = (index + 1) // 2
        if index % 2 and layer in SHOWN:
            found[layer] = x.double().var(1, correction=0)
    return found


@torch.no_grad()
def predicted_slope(model: nn.Sequential, layer: int) -> tuple[float, float]:
    """Variance behind layer `layer` per mean square of the input: equation 10, and equations 8 and 9 layer by layer."""
    weights = [module.weight.double() for module in model if isinstance(module, nn.Linear)][:layer]
    factors = [w.shape[1] * float(w.var(correction=0)) for w in weights]
    closed = (1 - 1 / math.pi) / 2**layer * math.prod(factors)
    square = variance = 1.0
    for factor in factors:
        mean_square, variance = square * factor / (2 * math.pi), 0.5 * (1 - 1 / math.pi) * factor * square
        square = mean_square + variance
    return closed, variance


def measure(name: str, model: nn.Sequential, inputs: Tensor) -> list[dict[str, Any]]:
    """The points, equation 10 and the least-squares line at each layer shown."""
    x = inputs.double().square().mean(1)
    rows = []
    for layer, y in variances(model, inputs).items():
        closed, stepwise = predicted_slope(model, layer)
        design = torch.stack([x, torch.ones_like(x)], 1)
        slope, intercept = torch.linalg.lstsq(design, y[:, None]).solution[:, 0].tolist()
        spread = float((y - y.mean()).square().sum())
        rows.append(
            {
                "network": name,
                "layer": layer,
                "slope_equation_10": closed,
                "slope_layer_by_layer": stepwise,
                "slope_fitted": slope,
                "intercept_fitted": intercept,
                "r2_equation_10": 1 - float((y - closed * x).square().sum()) / spread,
                "r2_fitted": 1 - float((y - slope * x - intercept).square().sum()) / spread,
                "relative_error_equation_10": float(((y - closed * x).abs() / y).mean()),
                "mean_square_of_input": x.tolist(),
                "variance": y.tolist(),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], title: str, options: common.Options) -> None:
    """One panel per network and layer."""
    figure, panels = common.axes(len(rows), width=4.8, height=3.8, columns=2)
    for axis, row in zip(panels, rows, strict=True):
        x, y = row["mean_square_of_input"], row["variance"]
        ends = [min(x), max(x)]
        axis.scatter(x, y, s=5, alpha=0.5, color="tab:grey", label="samples")
        axis.plot(ends, [row["slope_equation_10"] * e for e in ends], color="tab:blue", label="equation 10")
        line = [row["slope_fitted"] * e + row["intercept_fitted"] for e in ends]
        label = f"least squares, R² = {row['r2_fitted']:.2f}"
        axis.plot(ends, line, color="tab:red", linestyle=":", linewidth=2, label=label)
        axis.set_title(f"{row['network']}, layer {row['layer']}", fontsize=10)
        axis.set_xlabel("mean² + variance of the input")
        axis.set_ylabel("variance of the activations")
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    common.save(figure, options, "qpp_toy")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(5, 5))
    started = time.perf_counter()
    common.settle()
    torch.set_num_threads(options.workers)
    divisor, side, epochs = (4, 14, 15) if options.quick else (1, 28, 8)
    clean, test = images(side)
    inputs = noisy(test, torch.Generator().manual_seed(1))
    draws: dict[int, list[float]] = {layer: [] for layer in SHOWN}
    for seed in range(options.runs):
        for row in measure("untrained", build(divisor, seed), inputs):
            draws[row["layer"]].append(row["slope_fitted"] / row["slope_equation_10"])
    model = build(divisor, seed=0)
    rows = measure("untrained", model, inputs)
    loss = train(model, clean, epochs, seed=0, progress=options.progress)
    with torch.no_grad():
        error = float(F.mse_loss(model(inputs), test))
    rows += measure("trained", model, inputs)
    width = f"N_l = {sizes(divisor)[1]} - {256 // divisor} (l - 1)"
    data = f"denoising scikit-learn digits at {side} x {side} (stand-in for MNIST), {width}"
    untouched = float(F.mse_loss(inputs, test))
    names = ("slope_equation_10", "slope_fitted", "intercept_fitted", "r2_equation_10", "r2_fitted")
    common.show(
        f"QPP toy example, {data}; test error {error:.4f} (noisy input {untouched:.4f})",
        ("network", "layer", "slope, eq. 10", "slope, fitted", "intercept", "R², eq. 10", "R², fitted"),
        [[row["network"], str(row["layer"]), *(f"{row[name]:.4g}" for name in names)] for row in rows],
    )
    for layer, ratios in draws.items():
        print(
            f"untrained, layer {layer}: fitted slope / equation 10 over {len(ratios)} draws {common.mean_std(ratios)}"
        )
    plot(rows, f"Variance of the activations: {data}", options)
    report: dict[str, Any] = {
        "data": data,
        "train_loss": loss,
        "test_loss": error,
        "noisy_input_error": untouched,
        "rows": rows,
    }
    report["slope_ratio_over_draws"] = draws
    common.write(options, "qpp_toy", report, started)
    return report


if __name__ == "__main__":
    main()
