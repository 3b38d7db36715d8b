"""Features, summaries and predictions by kernels beside the plain path.

What is promised: features and summaries agree to 1e-12 relative (sums in float64 add up in another order), predictions
to one unit in the last place of float32, and of a sample they never depend on its batch. So rooms, which all run the
same path, agree to the last bit, and exported programs as closely as before.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqa_plugins import QPP, DenseSparse
from dqa_plugins.qpp.features import EXTENDED_FEATURES, PAPER_FEATURES, Summary, channel_features, site_features
from dqa_plugins.qpp.predictor import Predictor
from tests.kernels.plain import plain

CLOSE = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}


def inputs() -> dict[str, tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 14, 15, generator=generator)
    hostile = x.clone()
    hostile[0, 0, 0, 0], hostile[1, 1, 1, 1] = float("nan"), float("inf")
    return {
        "image": (x, 1),
        "relu": (x.relu(), 1),
        "last": (x.to(memory_format=torch.channels_last), 1),
        "half": (x.half() * 300, 1),
        "tokens": (torch.randn(2, 9, 33, generator=generator), -1),
        "flat": (torch.randn(3, 7, generator=generator), 1),
        "many": (torch.randn(2, 130, 3, 3, generator=generator), 1),
        "hostile": (hostile, 1),
    }


@pytest.mark.parametrize("name", inputs())
def test_features_and_summaries_agree_with_the_plain_path(name: str) -> None:
    x, axis = inputs()[name]
    for mode in ("paper", "extended"):
        torch.testing.assert_close(site_features(x, mode), plain(lambda m=mode: site_features(x, m)), **CLOSE)  # type: ignore[misc]
    torch.testing.assert_close(channel_features(x, axis), plain(lambda: channel_features(x, axis)), **CLOSE)
    for sides, groups in ((1, 1), (2, 1), (2, x.shape[axis])):
        prediction = torch.linspace(-0.2, 1.5, len(x) * sides * groups).reshape(len(x), sides, groups)
        expected = plain(lambda p=prediction: Summary(axis)(x, p))  # type: ignore[misc]
        torch.testing.assert_close(Summary(axis)(x, prediction), expected, **CLOSE)


@pytest.mark.parametrize(("mode", "radial"), [("paper", 0), ("extended", 0), ("extended", 7)])
def test_the_regression_agrees_with_the_plain_path(mode: str, radial: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = PAPER_FEATURES if mode == "paper" else EXTENDED_FEATURES
    summaries = [normal(6, 2 + 2 * 4) for _ in range(0 if mode == "paper" else 3)]
    size, outputs = features + (2 + 2 + 10 if summaries else 0), 6
    predictor = Predictor(DenseSparse(qparams=QPP(mode=mode)))
    predictor.groups = 3
    bumps = (normal(features).abs() * 0.1, normal(radial, features), normal(radial, outputs)) if radial else None
    limits = (torch.full((outputs,), -2.0).double(), torch.full((outputs,), 2.0).double())
    logarithmic = torch.tensor([True, False] * 3) if mode == "extended" else torch.zeros(6, dtype=torch.bool)
    predictor.finish(normal(size, outputs) * 0.2, normal(outputs), logarithmic, limits, bumps)
    site = normal(6, features)
    site[5] = float("nan")
    found, expected = predictor(site, *summaries), plain(lambda: predictor(site, *summaries))
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-30, equal_nan=True)
    assert found.shape == (6, 2, 3)
    assert 0 < int((found.abs() < 2).sum()) < found.numel()  # some are moved inside the limits, some are inside
    alone = torch.cat([predictor(site[i : i + 1], *(s[i : i + 1] for s in summaries)) for i in range(6)])
    assert torch.equal(found.nan_to_num(), alone.nan_to_num())
    predictor.bias.add_(0.25)
    torch.testing.assert_close(
        predictor(site, *summaries), plain(lambda: predictor(site, *summaries)), rtol=2e-7, atol=1e-30, equal_nan=True
    )
