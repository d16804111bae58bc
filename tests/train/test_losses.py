"""Losses on tensors against the statement in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from semkv_deploy.train import losses, reference


@pytest.fixture
def draw() -> Any:
    torch.manual_seed(3)
    return torch.randn


def test_kd_and_ce(draw):
    teacher, student, weight = draw(5, 11), draw(5, 11), torch.tensor([1.0, 0.0, 4.0, 1.0, 1.0])
    target = torch.tensor([0, 10, 3, 4, 3])
    expected = reference.kd(teacher.tolist(), student.tolist(), weight.tolist())
    assert losses.kd(teacher, student, weight).item() == pytest.approx(expected, rel=1e-5)
    assert losses.kd(teacher, teacher + 3, weight).item() == pytest.approx(0, abs=1e-6)
    expected = reference.ce(student.tolist(), target.tolist(), weight.tolist())
    assert losses.ce(student, target, weight).item() == pytest.approx(expected, rel=1e-5)


def test_attn_and_reg(draw):
    teacher, student = draw(1, 2, 4, 3).softmax(-1) * 0.7, draw(1, 2, 4, 3).softmax(-1) * 0.02
    earlier = torch.tensor([[[False, False, False], [True, False, False], [True, True, False], [True, True, True]]])
    statement = [each[0].tolist() for each in (teacher, student, earlier)]
    assert losses.attn(teacher, student, earlier).item() == pytest.approx(reference.attn(*statement), rel=1e-4)
    assert losses.attn(teacher, teacher * 0.1, earlier).item() == pytest.approx(0, abs=1e-6)
    expected = reference.reg(statement[1], statement[2], 0.02)
    assert expected > 0
    assert losses.reg(student, earlier, 0.02).item() == pytest.approx(expected, abs=1e-7)
    assert losses.reg(teacher, earlier, 0.02).item() == 0


def test_match(draw):
    teacher, student, weight = draw(5, 7), draw(5, 7), torch.tensor([1.0, 0.0, 4.0, 1.0, 1.0])
    expected = reference.match(teacher.tolist(), student.tolist(), weight.tolist())
    assert losses.match(teacher, student, weight).item() == pytest.approx(expected, rel=1e-5)
    assert losses.match(teacher, torch.zeros_like(teacher), weight).item() == pytest.approx(1)


def test_mass_of_segments(draw):
    weights, turn = draw(2, 3, 4, 6).softmax(-1), torch.tensor([[-1, 0, 0, 1, 2, -2], [-1, -1, 0, 1, 1, 1]])
    mass = losses.segment_mass(weights, turn, 3)
    for row in range(2):
        for number in range(3):
            expected = weights[row, :, :, turn[row] == number].sum(-1)
            assert torch.allclose(mass[row, :, :, number], expected)
