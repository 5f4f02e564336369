"""The DEQ module: one line in a model, nothing kept, every option checked when it is built."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch

import deqfast as dq


class Cell(torch.nn.Module):
    def __init__(self, n=6):
        super().__init__()
        self.linear = torch.nn.Linear(n, n)
        torch.nn.init.normal_(self.linear.weight, std=0.2)

    def forward(self, z, x, shift=0.0):
        return torch.tanh(self.linear(z) + x + shift)


class CellWithInit(Cell):
    def init(self, x):
        return torch.full_like(x, 0.5)


def test_output_is_the_fixed_point_of_the_cell():
    deq, x = dq.DEQ(Cell(), rtol=1e-6), torch.randn(4, 6)
    z = deq(x)
    assert torch.allclose(z, deq.cell(z, x), atol=1e-5)
    assert torch.equal(z, dq.fixed_point(deq.cell, torch.zeros_like(x), (x,), rtol=1e-6).z)


def test_solve_gives_the_facts():
    deq, x = dq.DEQ(Cell(), rtol=1e-3, trace=True), torch.randn(4, 6)
    sol = deq.solve(x)
    assert isinstance(sol, dq.Solution) and sol.converged.all() and sol.trace.shape == (sol.nfe, 4)


def test_further_arguments_and_a_start_of_ones_own():
    deq, x = dq.DEQ(Cell(), rtol=1e-6), torch.randn(4, 6)
    assert not torch.allclose(deq(x, 0.7), deq(x))
    solved = deq(x).detach()
    assert deq.solve(x, z0=solved).nfe < deq.solve(x).nfe


def test_cell_may_choose_the_start():
    x = torch.randn(4, 6)
    starts = []
    deq = dq.DEQ(CellWithInit())
    deq.cell.register_forward_pre_hook(lambda module, args: starts.append(args[0].clone()))
    deq(x)
    assert torch.equal(starts[0], torch.full_like(x, 0.5))


def test_start_has_the_dtype_and_the_structure_of_x():
    assert dq.DEQ(lambda z, x: 0.5 * z + x)(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
    z = dq.DEQ(lambda z, x: (0.5 * z[0] + x[0], 0.5 * z[1] + z[0]))((torch.ones(2, 3), torch.ones(2, 3)))
    assert torch.allclose(z[1], torch.full((2, 3), 4.0), rtol=1e-3)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "backward", [None, dq.Implicit(solver="broyden"), dq.Phantom(3), dq.OneStep(), dq.Unroll()], ids=str
)
def test_gradients_in_training_and_in_evaluation_mode(mode, backward):
    deq, x = dq.DEQ(Cell(), backward=backward), torch.randn(4, 6, requires_grad=True)
    getattr(deq, mode)()
    deq(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in deq.parameters()) and x.grad.any()


def test_no_graph_under_no_grad_and_inference_mode():
    deq, x = dq.DEQ(Cell()), torch.randn(4, 6)
    expected = deq(x).detach()
    with torch.no_grad():
        assert not deq(x).requires_grad
    with torch.inference_mode():
        assert torch.allclose(deq(x), expected)
    assert not dq.DEQ(Cell(), backward="none")(x).requires_grad


def test_frozen_parameters_get_no_gradient():
    deq = dq.DEQ(Cell())
    deq.cell.linear.bias.requires_grad_(False)
    deq(torch.randn(4, 6)).sum().backward()
    assert deq.cell.linear.bias.grad is None and deq.cell.linear.weight.grad is not None


def test_trains():
    torch.manual_seed(0)
    model = torch.nn.Sequential(dq.DEQ(Cell()), torch.nn.Linear(6, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(64, 6)
    y = x[:, :1].sin() * x[:, 1:2]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_pickle_deepcopy_and_state_dict():
    deq, x = dq.DEQ(Cell(), solver=dq.Anderson(m=4), backward=dq.Phantom(2), rtol=1e-5), torch.randn(4, 6)
    deq(x).sum().backward()
    expected = deq(x)
    for other in (pickle.loads(pickle.dumps(deq)), copy.deepcopy(deq)):
        assert torch.equal(other(x), expected) and other.options == deq.options
    buffer = io.BytesIO()
    torch.save(deq.state_dict(), buffer)
    buffer.seek(0)
    fresh = dq.DEQ(Cell(), solver=dq.Anderson(m=4), backward=dq.Phantom(2), rtol=1e-5)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(x), expected)
    assert list(deq.state_dict()) == ["cell.linear.weight", "cell.linear.bias"]


def living_tensors() -> int:
    for _ in range(3):  # what is freed may free more
        gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_keeps_nothing_between_calls():
    deq, x = dq.DEQ(Cell()), torch.randn(4, 6)
    before = dict(vars(deq))
    deq(x).sum().backward()
    assert vars(deq) == before
    count = living_tensors()
    for _ in range(3):
        deq(x)
    assert living_tensors() <= count  # fewer, where another test's compiled frames are given up meanwhile


def test_repr_shows_the_options():
    text = repr(dq.DEQ(Cell(), solver=dq.Broyden(memory=9), rtol=1e-3))
    assert "solver=Broyden(memory=9" in text and "rtol=0.001" in text and "(cell): Cell(" in text


def test_threads_share_a_module():
    deq = dq.DEQ(Cell())
    inputs = [torch.randn(3, 6) for _ in range(4)]
    expected = [deq(x).detach() for x in inputs]
    results = [None] * 4

    def work(i):
        for _ in range(10):
            results[i] = deq(inputs[i])
            torch.autograd.grad(results[i].sum(), deq.cell.linear.weight)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: dq.DEQ(Cell(), f_solver="anderson"), TypeError, "unknown option 'f_solver'"),
        (lambda: dq.DEQ(3), TypeError, "cell must be callable, got int"),
        (lambda: dq.DEQ(Cell(), solver="newton"), ValueError, "solver must be one of"),
        (lambda: dq.DEQ(Cell(), rtol=-1.0), ValueError, "rtol"),
        (lambda: dq.DEQ(Cell(), atol="x"), TypeError, "atol"),
        (lambda: dq.DEQ(Cell(), max_iter=-1), ValueError, "max_iter"),
        (lambda: dq.DEQ(Cell(), max_iter=None), TypeError, "max_iter"),
        (lambda: dq.DEQ(Cell(), backward="ift"), ValueError, "backward"),
        (lambda: dq.DEQ(Cell(), returns="first"), ValueError, "returns"),
        (lambda: dq.DEQ(Cell(), callback=3), TypeError, "callback"),
        (lambda: dq.DEQ(Cell())(torch.zeros(2, 3, dtype=torch.int64)), TypeError, "give z0 or cell.init"),
        (lambda: dq.DEQ(Cell())("text"), TypeError, "give z0 or cell.init"),
    ],
)
def test_wrong_options_raise_before_any_work(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "foo"}, ValueError, "backend must be one of 'auto'"),
        ({"compact": "foo"}, TypeError, "compact must be a bool"),
        ({"trace": 1}, TypeError, "trace must be a bool"),
    ],
)
def test_choices_are_checked_when_the_module_is_built(options, error, message):
    with pytest.raises(error, match=message):
        dq.DEQ(lambda z, x: z, **options)


def test_options_that_change_afterwards_are_those_of_the_next_call():
    layer = dq.DEQ(lambda z, x: torch.tanh(0.9 * z + x), rtol=1e-6, warn=False)
    x = torch.randn(3, 5)
    assert layer.solve(x).nfe > 3
    layer.options["max_iter"] = 3
    assert layer.solve(x).nfe == 3
