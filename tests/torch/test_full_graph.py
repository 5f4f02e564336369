"""A layer as one operation of a graph gives what the eager layer and unrolled autograd give."""

import copy

import pytest
import torch
from compiled_models import Cell, Recorder, graph_breaks

import deqfast as dq

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


class Model(torch.nn.Module):
    def __init__(self, cell=None, **options):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 1)
        self.layer = dq.nn.FullGraph(dq.DEQ(Cell() if cell is None else cell, rtol=1e-12, **options))
        self.double()

    def forward(self, x):
        return self.last(self.layer(torch.sin(self.first(x))))

    def unrolled(self, x):
        x = torch.sin(self.first(x))
        z = torch.zeros_like(x)
        for _ in range(200):
            z = self.layer.layer.cell(z, x)
        return self.last(z)


def gradients(run, model, x):
    x = x.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def batch(n=4):
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_values_and_gradients_are_those_of_the_eager_layer_and_of_unrolled_autograd(backend, solver):
    model = Model(solver=solver)
    found = gradients(torch.compile(model, backend=backend, fullgraph=True), model, batch())
    for expected in (gradients(model, model, batch()), gradients(model.unrolled, model, batch())):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert graph_breaks() == 0


def test_a_training_step_of_many_sizes_ends_with_a_dynamic_graph():
    model, recorder = Model(), Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    for n in (4, 7, 9, 2, 12, 3, 8):
        torch.testing.assert_close(
            gradients(compiled, model, batch(n)), gradients(model, model, batch(n)), rtol=1e-8, atol=1e-10
        )
    assert len(recorder.graphs) == 2, recorder.graphs  # a fixed size, and any


def test_one_call_is_one_solve_and_one_backward_one_evaluation_with_a_graph():
    model = Model()
    cell = model.layer.layer.cell
    run = torch.compile(model, backend="inductor", fullgraph=True)
    gradients(run, model, batch())
    cell.eager_calls = 0
    with torch.no_grad():
        model(batch())
    loop, cell.eager_calls = cell.eager_calls, 0
    gradients(run, model, batch())
    assert cell.eager_calls == loop + 1


def test_updates_of_parameters_and_copies_are_seen():
    model = Model()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(batch())
    with torch.no_grad():
        model.layer.layer.cell.linear.weight.mul_(0.5)
    torch.testing.assert_close(run(batch()), model(batch()), rtol=1e-10, atol=1e-12)
    twin = copy.deepcopy(model)
    assert twin.layer.key != model.layer.key
    with torch.no_grad():
        twin.layer.layer.cell.linear.weight.zero_()
    twin_run = torch.compile(twin, backend="aot_eager", fullgraph=True)
    found = gradients(twin_run, twin, batch())
    torch.testing.assert_close(found, gradients(twin, twin, batch()), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(run(batch()), model(batch()), rtol=1e-10, atol=1e-12)


def test_a_cell_that_is_compiled_itself():
    model = Model()
    compiled = Model(torch.compile(Cell(), backend="aot_eager"))
    cell = compiled.layer.layer.cell._orig_mod
    for mine, other in zip(compiled.parameters(), model.parameters(), strict=True):
        mine.data.copy_(other.data)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    found = gradients(run, compiled, batch())
    assert cell.eager_calls == 1  # that of the backward solve
    torch.testing.assert_close(found, gradients(model, model, batch()), rtol=1e-8, atol=1e-10)


def test_frozen_parameters_get_no_gradient():
    model = Model()
    frozen = model.layer.layer.cell.linear.weight.requires_grad_(False)
    torch.compile(model, backend="aot_eager", fullgraph=True)(batch()).sum().backward()
    assert frozen.grad is None
    assert model.layer.layer.cell.linear.bias.grad.abs().sum() > 0


def test_a_layer_alone_and_several_in_one_graph():
    layers = torch.nn.Sequential(*(dq.nn.FullGraph(dq.DEQ(Cell(), rtol=1e-10)) for _ in range(3))).double()
    for model in (layers, layers[0]):
        found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), layers[:1], batch())
        torch.testing.assert_close(found, gradients(model, layers[:1], batch()), rtol=1e-6, atol=1e-8)
        assert graph_breaks() == 0


def test_a_cell_that_makes_gradients_of_its_own():
    class Energy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(0.2 * torch.randn(6, 6))

        def forward(self, z, x):
            with torch.enable_grad():
                z = z if z.requires_grad else z.detach().requires_grad_()
                energy = torch.cos(z @ self.weight).sum() + (z * x).sum()
                return 0.3 * torch.autograd.grad(energy, z, create_graph=True)[0]

    model = Model(Energy())
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model, batch())
    torch.testing.assert_close(found, gradients(model, model, batch()), rtol=1e-8, atol=1e-10)


def test_what_the_graph_cannot_see_is_refused():
    hidden = torch.randn(6, dtype=torch.float64, requires_grad=True)

    class Closure(torch.nn.Module):
        def forward(self, z, x):
            return torch.tanh(0.2 * z + x) * torch.sigmoid(hidden)

    run = torch.compile(Model(Closure()), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"none of its parameters nor arguments.*pass it through args"):
        run(batch()).sum().backward()


def test_second_derivatives_are_right_outside_of_a_graph():
    model, x = Model(), batch(2).requires_grad_()

    def first(x):
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]

    expected = torch.autograd.grad(model.unrolled(x).sum(), x, create_graph=True)[0].square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(first(x).square().sum(), x), torch.autograd.grad(expected, x), rtol=1e-7, atol=1e-9
    )


def test_autocast_and_trees_are_refused_in_a_graph():
    layer = dq.nn.FullGraph(dq.DEQ(Cell()))
    run = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="cannot be compiled under autocast"):
        run(torch.randn(4, 6))
    with pytest.raises(Exception, match="takes tensors alone in a compiled graph"):
        run(torch.randn(4, 6), (1.0,))


def test_wrong_layers_are_named():
    with pytest.raises(TypeError, match=r"layer must be a dq.DEQ, got Linear"):
        dq.nn.FullGraph(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"nn.Module.*got function"):
        dq.nn.FullGraph(dq.DEQ(lambda z, x: z + x))
    with pytest.raises(TypeError, match=r"got Phantom"):
        dq.nn.FullGraph(dq.DEQ(Cell(), backward=dq.Phantom(2)))


@pytest.mark.parametrize("kind", ["module", "function"])
def test_an_f_that_was_compiled_itself_has_an_eager_backward_solve(kind):
    """Its compiled backward would make the gradients of all parameters at every vjp."""
    cell, x = Cell().double(), batch()
    given = torch.compile(cell if kind == "module" else lambda z, x: cell(z, x), backend="aot_eager")
    solved = dq.fixed_point(given, torch.zeros_like(x), (x,), rtol=1e-12)
    assert cell.eager_calls == 1  # the evaluation whose graph the backward solve uses
    expected = dq.fixed_point(cell, torch.zeros_like(x), (x,), rtol=1e-12)
    leaves = list(cell.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(solved.z.sum(), leaves), torch.autograd.grad(expected.z.sum(), leaves)
    )
