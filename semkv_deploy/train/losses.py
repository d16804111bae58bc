"""SONIC's losses on tensors; `train.reference` states each of them in plain loops.

The paper names distillation, attention guidance, reconstruction and a regulariser, and gives no equation that could be
read; these are our completion. `match` is ours: Attention Matching's objective (arXiv 2602.16284), learned instead of
fitted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-6
"""Attention mass is taken for this at least before its logarithm is."""


def kd(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows, weighted, of KL(teacher || student) in nats; logits `[n,V]`, weights `[n]`."""
    expected, got = F.log_softmax(teacher.float(), -1), F.log_softmax(student.float(), -1)
    return _mean(F.kl_div(got, expected, reduction="none", log_target=True).sum(-1), weight)


def ce(student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows, weighted, of -log p(target) in nats; logits `[n,V]`, tokens and weights `[n]`."""
    return _mean(F.cross_entropy(student.float(), target, reduction="none"), weight)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=SMALLEST)


def segment_mass(weights: Tensor, turn: Tensor, turns: int) -> Tensor:
    """Attention that each turn's rows get: weights `[B,Hq,Q,K]`, the keys' turns `[B,K]` -> `[B,Hq,Q,turns]`."""
    member = F.one_hot(turn.clamp(min=0), turns) * (turn >= 0)[..., None]
    return torch.einsum("bhqk,bkt->bhqt", weights, member.to(weights.dtype))


def attn(teacher: Tensor, student: Tensor, earlier: Tensor) -> Tensor:
    """KL over earlier turns of how attention to them is shared, teacher against student; a mean over queries and heads.

    Args:
        teacher, student: `[B,Hq,Q,turns]` mass on bodies, and on their Nexus rows.
        earlier: `[B,Q,turns]` bool, which turns are finished for a query; queries without any are left out.
    """
    asked = earlier[:, None]
    expected, got = (_shared(mass, asked) for mass in (teacher, student))
    kl = (expected.exp() * (expected - got)).masked_fill(~asked, 0).sum(-1)
    return _mean(kl, earlier.any(-1)[:, None].expand_as(kl).to(kl.dtype))


def _shared(mass: Tensor, asked: Tensor) -> Tensor:
    """Logarithms of the shares of what is asked for."""
    mass = mass.float().clamp(min=SMALLEST).masked_fill(~asked, 0)
    return (mass / mass.sum(-1, keepdim=True).clamp(min=SMALLEST)).clamp(min=SMALLEST).log()


def reg(student: Tensor, earlier: Tensor, floor: float) -> Tensor:
    """Mean over queries and heads of max(0, floor - attention to all Nexus rows); shapes as for `attn`."""
    short = (floor - student.float().sum(-1)).clamp(min=0)
    return _mean(short, earlier.any(-1)[:, None].expand_as(short).to(short.dtype))


def match(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Squared error of a layer's attention outputs `[n,H]`, weighted by row `[n]`, over the teacher's squared size."""
    wrong = ((student.float() - teacher.float()).square().sum(-1) * weight).sum()
    return wrong / (teacher.float().square().sum(-1) * weight).sum().clamp(min=SMALLEST)
