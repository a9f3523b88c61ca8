"""The average of weights. That of the official code is checked in parity/."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marval_rl.trainers.optimization import ExponentialMovingAverage


def scalar_model(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_updates_by_hand():
    model = scalar_model(1.0)
    average = ExponentialMovingAverage(model, 0.9, warmup=False)
    for value, expected in ((2.0, 1.1), (3.0, 1.29), (0.0, 1.161)):
        nn.init.constant_(model.weight, value)
        average.update(model)
        assert average.module.weight.item() == pytest.approx(expected)


def test_warmup_follows_the_model_at_first_and_ends_at_the_decay():
    model = scalar_model(0.0)
    average = ExponentialMovingAverage(model, 0.5)
    nn.init.constant_(model.weight, 1.0)
    expected = 0.0
    for update in range(1, 20):
        average.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay)
        assert average.module.weight.item() == pytest.approx(expected)
    assert (1 + 1) / (10 + 1) < 0.5 < (1 + 19) / (10 + 19)  # both sides of the limit were visited


def test_the_average_is_a_copy_that_is_not_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    average = ExponentialMovingAverage(model, 0.9)
    before = [p.clone() for p in average.module.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(a, b) for a, b in zip(before, average.module.parameters(), strict=True))
    assert not any(p.requires_grad for p in average.module.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in average.module.modules())
    average.update(model)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\)"):
        ExponentialMovingAverage(nn.Linear(1, 1), decay)
