"""Clients: the split is whole and uneven, budgets are kept, an update depends on nothing but what it is made from."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import data
import fusion
import model as models
import training

import deqfast as dq

OPTIONS = training.Options(clients=10, epochs=1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_gives_every_digit_to_one_client(seed):
    _, labels, _, _ = data.digits(seed)
    rows = data.dirichlet(labels.numpy(), 10, 0.5, seed)
    assert sorted(np.concatenate(rows)) == list(range(len(labels)))
    assert min(map(len, rows)) >= data.LEAST
    parts = data.split(seed, 10)
    assert sum(len(part.labels) + len(part.held_labels) for part in parts) == len(labels)
    assert all(len(part.held_labels) == (len(part.labels) + len(part.held_labels)) // 5 for part in parts)


def test_split_is_the_seeds_and_uneven():
    labels = data.digits(0)[1].numpy()
    once, again = (data.dirichlet(labels, 10, 0.5, 3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(once, data.dirichlet(labels, 10, 0.5, 4), strict=True))
    even = data.dirichlet(labels, 10, 1e6, 3)

    def largest_share(rows):  # of a client's digits, the most frequent label
        return np.mean([np.bincount(labels[r], minlength=10).max() / len(r) for r in rows])

    assert largest_share(once) > 0.25 > largest_share(even)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5, 0), "clients: expected at least 1, got 0"),
        ((10, 0.0, 0), "alpha: expected a positive number, got 0"),
        ((10, float("nan"), 0), "alpha: expected a positive number, got nan"),
        ((1000, 0.5, 0), "1000 of them cannot have 10 digits each"),
        ((10, 1e-3, 0), "no draw of 1000"),
    ],
)
def test_a_split_that_cannot_be_made_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.dirichlet(data.digits(0)[1].numpy(), *arguments)


@pytest.mark.parametrize("budget", [1, 4, 40])
def test_a_device_evaluates_f_no_more_than_it_affords(budget):
    model, calls, products = models.make("equilibrium", budget), 0, 0
    cell = model.cell.forward

    def counted(z, x):
        nonlocal calls
        calls += 1
        out = cell(z, x)
        if out.requires_grad:
            out.register_hook(count)
        return out

    def count(_):
        nonlocal products
        products += 1

    model.cell.forward = counted
    pixels = data.split(0, 10)[5].pixels[:32]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.GradientWarning)
        model(pixels).square().sum().backward()
    # One more of each attaches the gradient: f in the graph at the solution, and the product that goes to the weights.
    assert 1 <= calls <= budget + 1
    assert 1 <= products <= budget + 1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_stronger_device_solves_further():
    weights = training.initial(OPTIONS)
    updates = [training.train(weights, 5, 1, budget, OPTIONS) for budget in (2, 4, 40)]
    residuals = [u.residual for u in updates]
    assert residuals == sorted(residuals, reverse=True) and residuals[0] > 100 * residuals[2]
    assert residuals[2] <= 2 * models.RTOL
    assert [u.budget for u in updates] == [2, 4, 40]


@pytest.mark.parametrize("name", models.MODELS)
def test_an_update_is_the_same_bit_for_bit_wherever_it_is_made(name):
    options = training.Options(model=name, epochs=1)
    weights = training.initial(options)
    torch.manual_seed(1)
    once = training.train(weights, 3, 2, 8, options)
    torch.manual_seed(2)
    again = training.train(weights, 3, 2, 8, options)
    assert all(np.array_equal(once.weights[key], again.weights[key]) for key in weights)
    assert (once.residual, once.score, once.examples) == (again.residual, again.score, again.examples)
    later = training.train(weights, 3, 3, 8, options)
    assert any(not np.array_equal(once.weights[key], later.weights[key]) for key in weights)


def test_fused_weights_keep_the_bound_that_clients_keep():
    weights = training.initial(OPTIONS)
    updates = [training.train(weights, k, 1, data.budget(k), OPTIONS) for k in (0, 5, 9)]
    fused = fusion.fuse(updates, [1.0, 2.0, 3.0])
    for made in (*[u.weights for u in updates], fused):
        assert np.linalg.norm(made["cell.linear.weight"], 2) <= models.NORM_BOUND * (1 + 1e-5)


def test_models_have_the_sizes_that_are_compared():
    counts = {
        name: sum(a.size for a in training.initial(training.Options(model=name)).values()) for name in models.MODELS
    }
    assert counts == {"equilibrium": 16_426, "explicit": 81_706, "shallow": 7_210}


def test_an_explicit_network_with_tied_layers_walks_to_the_equilibrium():
    """It is the same network: the equilibrium is where its layers lead if they have the same weights."""
    torch.manual_seed(0)
    equilibrium, explicit = models.make("equilibrium", 40), models.Explicit(200)
    for name in ("inject", "head"):
        getattr(explicit, name).load_state_dict(getattr(equilibrium, name).state_dict())
    with torch.no_grad():
        for layer in explicit.layers:
            layer.weight.copy_(equilibrium.cell.linear.weight)
            layer.bias.zero_()
        pixels = data.split(0, 10)[5].pixels[:8]
        torch.testing.assert_close(explicit(pixels), equilibrium(pixels), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.bias"), "weights: expected"),
        (lambda w: w.update(other=np.zeros(1, np.float32)), "weights: expected"),
        (lambda w: w.update({"head.bias": np.zeros(3, np.float32)}), r"head.bias of shape \(10,\), got \(3,\)"),
    ],
)
def test_weights_of_another_architecture_are_refused(change, message):
    model = models.make("shallow", 1)
    weights = models.weights_of(model)
    change(weights)
    with pytest.raises(ValueError, match=message):
        models.load(model, weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.make("deep", 4), "model: expected one of equilibrium, explicit, shallow, got 'deep'"),
        (lambda: models.make("equilibrium", 0), "budget: expected at least 1 evaluation, got 0"),
        (lambda: training.Options(model="deep"), "model: expected one of"),
        (lambda: training.Options(rounds=0), "rounds: expected at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
