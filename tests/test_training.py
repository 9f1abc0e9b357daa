"""The loop's own parts: the loss of labels, the rate of a step, and which images are drawn."""

import numpy as np
import pytest
import torch

from probe.score.metrics import find
from probe.train import loss, training


def test_labels_that_are_missing_have_no_loss():
    logits = torch.randn(4, 3, requires_grad=True)
    y = np.array([[1, 0, np.nan]] * 4)
    total, weight = loss.loss_of(logits, y, torch.ones(3))
    total.backward()
    assert float(weight) == 8
    assert (logits.grad[:, 2] == 0).all() and (logits.grad[:, :2] != 0).all()


def test_rates_warm_up_and_fall():
    how = training.Training(epochs=10, warmup=5, schedule="cosine")
    rates = [training.rate(how, step, 10) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(np.diff(rates[5:]) <= 0)
    assert rates[-1] < 0.01
    assert training.rate(training.Training(), 10**6, 10) == 1


def test_sampling_and_weights_balance_classes():
    y = np.array([0] * 90 + [1] * 10)
    task = training.Task(None, np.arange(100), np.arange(0), y, 2, find("accuracy", "multiclass"))
    how = training.Training(batch_size=1000, balance="sampling")
    drawn = np.concatenate([y[b] for e in range(50) for b in training.batches_of(task, how, e, 1)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    weights = loss.class_weights(y, 2, "weights")
    assert weights.tolist() == pytest.approx([100 / 180, 5.0])
