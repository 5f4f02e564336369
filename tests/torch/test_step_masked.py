"""A layer with a mask for each step: which weights it uses and trains, how masks are learned, what it costs."""

import copy
import io

import pytest
import torch
from torch import nn

import deqfast as dq
from deqfast.nn import step_masked


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(masks=4, density=0.25, n=(12, 8), **options):
    return dq.nn.StepMasked(nn.Linear(*n), masks, density, generator=seeded(), **options)


def distinct(layer):
    return len({tuple(mask.flatten().tolist()) for mask in layer.masks}) == layer.count


@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("learn", ["fixed", "magnitude", "scores"])
def test_masks_are_distinct_and_of_exact_density(learn, density):
    layer = linear(6, density, learn=learn)
    assert layer.masks.dtype == torch.bool and layer.masks.shape == (6, 8, 12)
    assert layer.masks.flatten(1).sum(1).tolist() == [max(1, round(density * 96))] * 6
    assert distinct(layer)


def test_masks_are_distinct_where_there_are_hardly_enough():
    layer = linear(6, 0.5, n=(2, 2))
    assert distinct(layer) and layer.masks.flatten(1).sum(1).tolist() == [2] * 6
    with pytest.raises(ValueError, match="masks=7 cannot be distinct: there are 6 that keep 2 of 4 weights"):
        linear(7, 0.5, n=(2, 2))
    assert linear(3, 1.0).masks.all()


def test_a_seed_gives_the_same_masks():
    made = [dq.nn.StepMasked(nn.Linear(9, 9), 3, generator=seeded(s)).masks for s in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("learn", ["fixed", "magnitude", "scores"])
def test_linear_is_that_of_the_masked_weight_and_trains_what_is_kept(learn):
    layer = linear(learn=learn)
    x = torch.randn(5, 3, 12)
    for k in range(4):
        layer.zero_grad()
        y = layer(x, k)
        expected = x @ (layer.module.weight * layer.masks[k]).T + layer.module.bias
        assert torch.allclose(y, expected, atol=1e-6)
        y.square().sum().backward()
        grad = layer.module.weight.grad
        assert grad[layer.masks[k]].all() and not grad[~layer.masks[k]].any()
        assert layer.module.bias.grad.any()


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 2, "padding_mode": "circular", "groups": 2}], ids=str)
def test_conv2d(options):
    conv = nn.Conv2d(4, 6, 3, stride=2, **options)
    layer = dq.nn.StepMasked(conv, 3, 0.3, generator=seeded(), storage="auto").eval()
    x = torch.randn(2, 4, 9, 9)
    y = layer(x, 2)
    masked = copy.deepcopy(conv)
    masked.weight.data.mul_(layer.masks[2])
    assert torch.equal(y, masked(x))
    y.sum().backward()
    assert not conv.weight.grad[~layer.masks[2]].any() and conv.weight.grad.any()
    kept = int(layer.masks[2].sum())
    assert layer.multiply_adds(2) == kept == round(0.3 * conv.weight.numel())
    assert layer.multiply_adds(2, x.shape) == kept * y[:, 0].numel()


def test_multiply_adds_of_a_linear():
    layer = linear()
    assert layer.multiply_adds(1) == 24
    assert layer.multiply_adds(1, (5, 3, 12)) == 24 * 15


def test_magnitude_keeps_what_was_important_to_each_step():
    layer = linear(3, learn="magnitude")
    before, x = layer.masks.clone(), torch.randn(32, 12)
    summed = torch.zeros(2, 8, 12)
    for _ in range(2):
        for k in (0, 1):
            masked = (layer.module.weight * layer.masks[k]).detach().requires_grad_()
            loss = (x.roll(k, 1) @ masked.T + layer.module.bias.detach() - k).square().mean()
            summed[k] += torch.autograd.grad(loss, masked)[0].square()
            (layer(x.roll(k, 1), k) - k).square().mean().backward()
    assert torch.allclose(layer.importance[:2], summed, rtol=1e-4) and not layer.importance[2].any()
    layer.eval()
    layer(x, 0).sum().backward()  # an evaluation does not count
    assert torch.allclose(layer.importance[:2], summed, rtol=1e-4)
    layer.update_masks()
    importance = (layer.module.weight.abs() * summed.sqrt()).flatten(1)
    for k in (0, 1):
        assert set(importance[k].topk(24).indices.tolist()) == set(layer.masks[k].flatten().nonzero()[:, 0].tolist())
        assert not torch.equal(layer.masks[k], before[k])
    assert torch.equal(layer.masks[2], before[2])  # gave no gradient
    assert not layer.importance.any() and distinct(layer)


def test_masks_that_would_be_alike_are_set_apart_by_the_least():
    values = torch.rand(5, 20, generator=seeded())[:1].expand(5, 20)
    masks = step_masked._largest(values, 7)
    assert len({tuple(m.tolist()) for m in masks}) == 5 and (masks.sum(1) == 7).all()
    assert torch.equal(masks[0].nonzero()[:, 0], values[0].topk(7).indices.sort().values)
    assert [(m & ~masks[0]).sum().item() for m in masks] == [0, 1, 1, 1, 1]


def test_scores_learn_by_straight_through_gradients():
    layer, x = linear(learn="scores"), torch.randn(16, 12)
    masked = (layer.module.weight * layer.masks[1]).detach().requires_grad_()
    (g,) = torch.autograd.grad((x @ masked.T + layer.module.bias.detach()).square().sum(), masked)
    layer(x, 1).square().sum().backward()
    assert torch.allclose(layer.scores.grad[1], g * layer.module.weight.detach(), rtol=1e-4, atol=1e-5)
    assert not layer.scores.grad[[0, 2, 3]].any()


def test_scores_find_the_weights_that_a_step_needs():
    layer = dq.nn.StepMasked(nn.Linear(8, 8, bias=False), 2, 0.25, learn="scores", generator=seeded())
    layer.module.weight.requires_grad_(False).fill_(1.0)
    wanted = torch.zeros(2, 8, 8)
    wanted.flatten(1).scatter_(1, torch.rand(2, 64, generator=seeded(5)).topk(16, 1).indices, 1.0)
    optimizer, x = torch.optim.Adam([layer.scores], lr=0.05), torch.randn(256, 8)
    for _ in range(150):
        loss = sum((layer(x, k) - x @ wanted[k].T).square().mean() for k in (0, 1))  # masks change between passes alone
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.update_masks()
    assert (layer.masks == wanted.bool()).float().mean() > 0.95
    assert layer.masks.flatten(1).sum(1).tolist() == [16, 16]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_masks_follow_scores_through_a_fused_optimizer(optimizer, copied):
    layer = linear(learn="scores")
    layer(torch.randn(4, 12), 0)  # what it remembers of its scores is not copied
    layer = copy.deepcopy(layer) if copied else layer
    steps, before = optimizer([layer.scores], lr=10.0, fused=True), layer.masks.clone()
    version = layer.scores._version
    layer(torch.randn(4, 12), 2).square().sum().backward()
    steps.step()
    assert layer.scores._version == version  # or else the test tests nothing
    layer(torch.randn(4, 12), 1)
    assert not torch.equal(layer.masks, before)
    expected = step_masked._largest(layer.scores.detach().flatten(1), layer.kept)
    assert torch.equal(layer.masks.flatten(1), expected)


def test_scores_may_be_frozen_or_replaced():
    layer, x = linear(learn="scores"), torch.randn(4, 12)
    expected = layer(x, 1)
    frozen = copy.deepcopy(layer).requires_grad_(False)
    assert torch.equal(frozen(x, 1), expected)
    state = {name: value * 1.0 for name, value in layer.named_parameters()}
    assert torch.allclose(torch.func.functional_call(layer, state, (x, 1)), expected, atol=1e-6)


def test_kept_matrices_follow_a_fused_optimizer_without_training_mode():
    layer, x = linear(storage="sparse").eval(), torch.randn(4, 12)
    steps = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = layer(x, 0)
    layer(x, 0).square().sum().backward()
    steps.step()
    with torch.no_grad():
        assert torch.allclose(layer(x, 0), layer._dense(x, 0), atol=1e-6)
        assert not torch.allclose(layer(x, 0), before, atol=1e-3)


def test_two_passes_may_be_differentiated_one_after_the_other():
    layer, x = linear(learn="scores"), torch.randn(4, 12)
    first, second = layer(x, 0).sum(), layer(x, 1).sum()
    first.backward()
    layer(x, 2)  # masks are looked at again
    second.backward()
    assert layer.scores.grad[1].any()


def test_evaluation_follows_scores_that_were_loaded():
    first, second = linear(learn="scores"), linear(learn="scores")
    x = torch.randn(3, 12)
    with torch.no_grad():
        first.scores.copy_(torch.rand_like(first.scores))
        expected = first.eval()(x, 2)
        second.eval()(x, 2)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file))
        assert torch.equal(second(x, 2), expected)
        assert torch.equal(copy.deepcopy(first)(x, 2), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_sparse_storage(bias):
    layer = dq.nn.StepMasked(nn.Linear(12, 8, bias=bias), 3, 0.2, storage="sparse", generator=seeded()).eval()
    x = torch.randn(5, 2, 12)
    for k in range(3):
        with torch.no_grad():
            found, expected = layer(x, k), layer._dense(x, k)
            assert torch.allclose(found, expected, atol=1e-6) and found.shape == (5, 2, 8)
        held = layer._made[k, torch.sparse_csr][1]
        assert held.layout == torch.sparse_csr and held._nnz() == layer.multiply_adds(k)
    with torch.no_grad():
        layer.module.weight.mul_(2.0)
        assert torch.allclose(layer(x, 1), layer._dense(x, 1), atol=1e-6)  # made again
    with torch.inference_mode():
        assert torch.allclose(layer(x, 1), layer._dense(x, 1), atol=1e-6)
    assert layer(x, 1).requires_grad  # dense, where gradients are asked for
    layer.train()
    assert not layer._made
    assert copy.deepcopy(layer.eval())(x, 0).shape == (5, 2, 8)


@pytest.mark.parametrize("faster", [True, False])
def test_auto_measures_once_a_power_of_two_of_rows_and_keeps_the_faster(faster, monkeypatch):
    asked = []
    monkeypatch.setattr(step_masked, "_is_faster", lambda *ways: asked.append([way() for way in ways[:2]]) or faster)
    layer = linear(storage="auto").eval()
    with torch.no_grad():
        for rows in (5, 7, 8):
            x = torch.randn(rows, 12)
            for k in (0, 1, 1):
                assert torch.allclose(layer(x, k), layer._dense(x, k), atol=1e-6)
        assert layer(torch.randn(0, 12), 1).shape == (0, 8)
    layout = torch.sparse_csr if faster else torch.strided
    assert len(asked) == 3 and set(layer._made) == {(0, layout), (1, layout)}


@pytest.mark.parametrize("storage", ["dense", "sparse", "auto"])
def test_what_is_kept_follows_weight_and_masks(storage):
    layer, x = linear(storage=storage, learn="scores").eval(), torch.randn(5, 12)
    drawn = torch.rand_like(layer.scores)
    with torch.no_grad():
        for change in (lambda: layer.module.weight.mul_(2.0), lambda: layer.scores.copy_(drawn)):
            before = layer(x, 1)
            change()
            assert torch.allclose(layer(x, 1), layer._dense(x, 1), atol=1e-6)
            assert not torch.allclose(layer(x, 1), before, atol=1e-3)


def test_the_measurement_tells_fast_from_slow():
    def busy(size):
        return lambda: torch.ones(size, 200) @ torch.ones(200, 200)

    assert step_masked._is_faster(busy(1), busy(20_000), torch.device("cpu"))
    assert not step_masked._is_faster(busy(20_000), busy(1), torch.device("cpu"))


def test_auto_is_dense_where_there_is_no_sparse_product(monkeypatch):
    kept = step_masked.StepMasked._kept

    def none(self, layout, *a):
        if layout == torch.sparse_csr:
            raise RuntimeError("not implemented")
        return kept(self, layout, *a)

    monkeypatch.setattr(step_masked.StepMasked, "_kept", none)
    layer, x = linear(storage="auto").eval(), torch.randn(5, 12)
    with torch.no_grad():
        assert torch.equal(layer(x, 0), layer._dense(x, 0))


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"reversible": True, "damping": 0.2}], ids=str)
@pytest.mark.parametrize("learn", ["fixed", "magnitude", "scores"])
def test_in_an_unrolled_model(learn, options):
    layer = linear(4, n=(8, 8), learn=learn).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    z = dq.unroll(
        lambda z, x, step: torch.tanh(layer(z, step) + x), torch.ones_like(x), 4, (x,), **options, pass_step=True
    )
    z.square().sum().backward()
    weight = layer.module.weight.detach().requires_grad_()
    block = lambda z, k: torch.tanh(z @ (weight * layer.masks[k]).T + layer.module.bias.detach() + x)  # noqa: E731
    y = expected = torch.ones_like(x)
    for k in range(4):
        y = 0.8 * y + 0.2 * block(expected, k) if "reversible" in options else block(expected, k)
        expected = 0.8 * expected + 0.2 * block(y, k) if "reversible" in options else y
    assert torch.allclose(z, expected, rtol=1e-12)
    (grad,) = torch.autograd.grad(expected.square().sum(), weight)
    assert torch.allclose(layer.module.weight.grad, grad, rtol=1e-9, atol=1e-12)
    if learn == "magnitude":
        assert layer.importance.flatten(1).any(1).all()
    if learn == "scores":
        assert layer.scores.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("step", [4, -1, 100])
def test_a_step_beyond_the_bank_is_named(step):
    for call in (lambda layer: layer(torch.zeros(1, 12), step), lambda layer: layer.multiply_adds(step)):
        with pytest.raises(IndexError, match=f"step {step} is beyond the bank of 4 masks"):
            call(linear())


@pytest.mark.parametrize(
    ("module", "options", "error", "match"),
    [
        (nn.Conv1d(2, 2, 1), {}, TypeError, r"nn\.Linear or nn\.Conv2d, got Conv1d"),
        (torch.relu, {}, TypeError, "module must be"),
        (nn.LazyLinear(3), {}, TypeError, "has seen no input"),
        (nn.Linear(3, 3), {"density": 0}, ValueError, r"density must be in \(0, 1\], got 0"),
        (nn.Linear(3, 3), {"density": 1.2}, ValueError, r"density must be in \(0, 1\], got 1.2"),
        (nn.Linear(3, 3), {"masks": 0}, ValueError, "masks must be at least 1"),
        (nn.Linear(3, 3), {"learn": "score"}, ValueError, "did you mean 'scores'"),
        (nn.Linear(3, 3), {"storage": "csr"}, ValueError, "storage must be one of"),
        (nn.Conv2d(3, 3, 1), {"storage": "sparse"}, ValueError, "is for nn.Linear"),
    ],
)
# A lazy module says so.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_refusals(module, options, error, match):
    with pytest.raises(error, match=match):
        dq.nn.StepMasked(module, **{"masks": 2, **options})


def test_further_refusals():
    with pytest.raises(RuntimeError, match="stay as they are"):
        linear().update_masks()
    with pytest.raises(TypeError, match="step must be an int, got float"):
        linear()(torch.zeros(1, 12), 1.0)
    assert "masks=4, density=0.25, learn='fixed', storage='dense'" in repr(linear())
