"""Methods that users register: packed as an explicit grid, without a line changed anywhere else."""

from __future__ import annotations

import pytest
import torch

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.storage import PackedActivation, calibrate_tables, convert_stored, pack, prepare_stored, storage_bound
from tests.storage.cases import CODINGS, DTYPES, Banded, Narrow, quantizer_for, tensor
from tests.storage.test_pipeline import fake_quantized, network

KINDS = {
    Narrow(): "explicit",
    Narrow(qparams="dynamic", bits=8): "explicit",
    Narrow(granularity="channel", qparams="dynamic"): "explicit",
    Banded(): "explicit",
    Banded(granularity="channel"): "explicit",
    Banded(qparams="dynamic"): "explicit",
    DQA(): "grid",
    NoisyQuant(amplitude=0.4): "noise",
    Direct(symmetric=False): "affine",
    DenseSparse(qparams="dynamic"): "dense_sparse",
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("method", KINDS, ids=lambda m: f"{m.name}-{m.qparams}-{m.granularity}")
def test_the_grid_decides_how_a_quantizer_is_written(method: Method, coding: str) -> None:
    for dtype in DTYPES:
        x = tensor((3, 5, 40, 41), 0, "normal", dtype)
        quantizer = quantizer_for(method, x)
        packed = pack(x, quantizer, coding, calibrate_tables(quantizer, x[:2], coding))
        assert packed.codebook.kind == KINDS[method]
        assert packed.nbytes <= storage_bound(quantizer, tuple(x.shape), coding)
        again = PackedActivation.from_bytes(packed.to_bytes())
        for found in (packed, again):
            assert torch.equal(found.unpack(), quantizer(x)), (method, coding, dtype)


@pytest.mark.parametrize("method", [Narrow(bits=6), Banded(qparams="dynamic")])
def test_stored_models_take_them(method: Method) -> None:
    model, x = network()
    prepared = prepare_stored(model, method, x)
    with torch.no_grad():
        prepared(x)
        assert torch.equal(convert_stored(prepared)(x * 0.9), fake_quantized(prepared)(x * 0.9))
