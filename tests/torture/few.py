"""A few methods that stand for all, where a case is expensive."""

from __future__ import annotations

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant

FEW: tuple[Method, ...] = (
    Direct(bits=4),
    Direct(bits=8, symmetric=False, qparams="dynamic"),
    Direct(bits=3, clip=0.99, qparams="dynamic"),
    DQA(bits=3),
    DQA(bits=3, qparams="dynamic", granularity="channel"),
    NoisyQuant(bits=5, amplitude=0.4),
    DenseSparse(bits=3, density=0.05),
    DenseSparse(bits=4, qparams="dynamic"),
)
