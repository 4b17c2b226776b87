"""The check on the data-free proxy: covariances of real inputs, and the merge they would give."""

import pytest
import torch

from optmerge_core.benchmark.experiments.inputs import input_covariances, ridge, share_of_energy


def test_covariances_are_of_the_inputs_of_each_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    X, mask = torch.randn(5, 7, 3), torch.rand(5, 7) < 0.7
    found = input_covariances(model, {"in": "0", "out": "2"}, {"input": X}, mask)
    X = X[mask]
    rows = X.double()
    torch.testing.assert_close(found["in"], rows.T @ rows / rows.square().sum())
    hidden = torch.relu(model[0](X)).double()
    torch.testing.assert_close(found["out"], hidden.T @ hidden / hidden.square().sum())
    assert not model[0]._forward_pre_hooks


def test_shares_of_energy_by_hand():
    covariance = torch.diag(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))
    second = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 1.0]])
    found = share_of_energy(covariance, second, 1)
    assert found == pytest.approx((0.2, 0.7, 1 / 3))


def test_ridge_without_shrinking_solves_the_least_squares_problem():
    torch.manual_seed(1)
    tau, inputs = torch.randn(3, 4, 6).double(), torch.randn(3, 20, 6).double()
    G = [x.T @ x / x.square().sum() for x in inputs]
    merged = ridge(tau, G, shrink=0.0)
    gradient = sum((merged - t) @ g for t, g in zip(tau, G, strict=True))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    torch.testing.assert_close(ridge(tau[:1], G[:1]), tau[0])  # one expert comes back
    torch.testing.assert_close(ridge(tau, G, shrink=1e9), tau.sum(0), atol=1e-6, rtol=1e-6)
    order = torch.tensor([2, 0, 1])
    permuted = ridge(tau[order], [G[i] for i in order])
    torch.testing.assert_close(permuted, ridge(tau, G))
