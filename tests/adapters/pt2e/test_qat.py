"""prepare_qat_pt2e: training moves weights and qparams, eval mode does not, converting keeps the numerics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torchao.quantization.pt2e import (
    allow_exported_model_train_eval,
    disable_fake_quant,
    disable_observer,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.pt2e import PluginQuantizer
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination

from .zoo import exported, inputs, sites

METHODS = {
    "direct": Direct(bits=4),
    "dqa": DQA(bits=3),
    "dqa_dynamic": DQA.paper(bits=3),
    "noisyquant": NoisyQuant(bits=4),
    "dense_sparse": DenseSparse(bits=3),
}


def trained(name: str, quantizer: PluginQuantizer, steps: int = 3) -> Any:
    """Prepared for QAT and trained for a few steps, still in training mode."""
    prepared = prepare_qat_pt2e(exported(name, train=True), quantizer)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for seed in range(steps):
        loss = (prepared(*inputs(name, seed)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prepared


@pytest.mark.parametrize(
    ("method", "weight_bits"),
    [*((method, 4) for method in METHODS.values()), (METHODS["dqa"], None)],
    ids=[*METHODS, "activations_only"],
)
def test_converted_equals_prepared_in_eval_mode(method: Any, weight_bits: int | None) -> None:
    """Exactly, whatever the method; and training moved every weight."""
    quantizer = PluginQuantizer(weight_bits=weight_bits).set_global(method)
    prepared = trained("concat", quantizer)
    before = dict(exported("concat").named_parameters())
    assert all(not torch.equal(value, before[name]) for name, value in prepared.named_parameters())
    move_exported_model_to_eval(prepared)
    with torch.no_grad():
        expected = prepared(*inputs("concat", 9))
        converted = convert_pt2e(prepared)
        assert torch.equal(converted(*inputs("concat", 9)), expected)
    assert {q.state for _, q in iter_quantizers(converted)} == {"frozen"}


def test_eval_mode_stops_learning_and_training_mode_resumes() -> None:
    """By torchao's own calls; `model.eval()` too, once allowed."""
    prepared = trained("shared_relu", PluginQuantizer().set_global(Direct()))
    quantizer = dict(iter_quantizers(prepared))["relu"]

    def learns() -> bool:
        count = quantizer.calibration.count
        prepared(*inputs("shared_relu", 7))
        return quantizer.calibration.count > count

    assert learns()
    move_exported_model_to_eval(prepared)
    assert not learns()
    move_exported_model_to_train(prepared)
    assert learns()
    allow_exported_model_train_eval(prepared)
    prepared.eval()
    assert not learns()
    prepared.train()
    assert learns()
    prepared.apply(disable_observer)
    assert not learns()


def test_fake_quantization_can_be_switched_off() -> None:
    """torchao's disable_fake_quant gives the float model back."""
    prepared = trained("shared_relu", PluginQuantizer().set_global(Direct(bits=2)), steps=1)
    quantized = prepared(*inputs("shared_relu"))
    prepared.apply(disable_fake_quant)
    plain = prepared(*inputs("shared_relu"))
    reference = exported("shared_relu")
    reference.load_state_dict({k: v for k, v in prepared.state_dict().items() if k in reference.state_dict()})
    assert torch.equal(plain, reference(*inputs("shared_relu")))
    assert not torch.equal(plain, quantized)


def test_sites_are_those_of_calibration() -> None:
    """Batch norms are folded later in QAT; the names do not change."""
    quantizer = PluginQuantizer().set_global(DQA())
    for name in ("shared_relu", "concat", "tokens"):
        qat = prepare_qat_pt2e(exported(name, train=True), quantizer)
        assert sites(qat) == sites(prepare_pt2e(exported(name), quantizer))
        assert {q.state for _, q in iter_quantizers(qat)} == {"qat"}


def test_qat_without_a_step_cannot_convert() -> None:
    """Uncalibrated is uncalibrated."""
    prepared = prepare_qat_pt2e(exported("shared_relu", train=True), PluginQuantizer().set_global(DQA()))
    with pytest.raises(UncalibratedQuantizer, match=r"input\.0"):
        convert_pt2e(prepared)


def test_output_objective_is_refused() -> None:
    """Its search needs weights that stand still."""
    quantizer = PluginQuantizer().set_global(NoisyQuant.official())
    with pytest.raises(UnsupportedCombination, match="objective='output'"):
        prepare_qat_pt2e(exported("shared_relu", train=True), quantizer)


def test_checkpoint_in_the_middle_of_training() -> None:
    """state_dict of a QAT model into a freshly prepared one: the same converted model."""
    quantizer = PluginQuantizer(weight_bits=4).set_global(DQA(bits=3))
    prepared = trained("shared_relu", quantizer)
    fresh = prepare_qat_pt2e(exported("shared_relu", train=True), quantizer)
    fresh.load_state_dict(prepared.state_dict())
    outputs = []
    for model in (fresh, copy.deepcopy(prepared), prepared):
        move_exported_model_to_eval(model)
        with torch.no_grad():
            outputs.append(convert_pt2e(model)(*inputs("shared_relu", 9)))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.slow
@pytest.mark.xdist_group("pt2e-batch-norms")  # see conftest.py
@pytest.mark.parametrize("weight_bits", [8, None])
def test_batch_norms(weight_bits: int | None) -> None:
    """torchao rewrites conv and batch norm for QAT and folds them after (only behind quantized weights)."""
    quantizer = PluginQuantizer(weight_bits=weight_bits).set_global(DQA(bits=4))
    prepared = trained("residual", quantizer)
    assert sites(prepared) == sites(prepare_pt2e(exported("residual"), quantizer))
    move_exported_model_to_eval(prepared)
    with torch.no_grad():
        expected = prepared(*inputs("residual", 9))
        converted = convert_pt2e(prepared)
        found = converted(*inputs("residual", 9))
    folded = not [node for node in converted.graph.nodes if "batch_norm" in str(node.target)]
    assert folded == (weight_bits is not None)
    # folding rounds differently: a value next to a tie may fall to the other side, so no exact equality in general
    step = float(dict(iter_quantizers(converted))["fc"].scale)
    assert (found - expected).abs().max() <= 2 * step
