"""What a compiled model compiles: f and what lies around the solve, once, and nothing of the loop."""

import copy
import functools

import pytest
import torch
from compiled_models import (
    Block,
    Cell,
    Model,
    Recorder,
    Twice,
    WithInit,
    WithLambda,
    WithMethod,
    WithPartial,
    WithRoot,
    assert_compiled_equals_eager,
    assert_same,
    graph_breaks,
    results,
)

import deqfast as dq

# The tracer looks at .grad of whatever a graph receives, and hides the warning for that where it is no error.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def test_explain_finds_one_break_a_solve():
    x = torch.randn(4, 6)
    for model, solves in ((Model(), 1), (WithLambda(), 1), (Twice(), 2)):
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(x)
        assert len(found.break_reasons) == solves
        assert found.graph_count == solves + 2  # what lies around the solves, and f


def test_a_solve_in_a_submodule_ends_the_graphs_of_both():
    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.last = torch.nn.Linear(6, 6), Block(), torch.nn.Linear(6, 6)

        def forward(self, x):
            return self.last(self.block(self.first(x)))

    recorder = Recorder()
    assert_compiled_equals_eager(Blocks(), recorder, torch.randn(4, 6))
    assert recorder.graphs == [("linear",), ("cos",), ("linear", "add", "tanh"), ("sin",), ("linear",)]


def test_a_sequential_model_works():
    """Torch compiles no loop that a graph break falls into, so only what lies inside of its modules."""
    recorder = Recorder()
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), Block(), torch.nn.Linear(6, 6))
    assert_compiled_equals_eager(model, recorder, torch.randn(4, 6))
    assert {("cos",), ("linear", "add", "tanh"), ("sin",)} <= set(recorder.graphs)


@pytest.mark.parametrize("make", [Model, WithLambda, WithPartial, WithMethod, WithRoot])
def test_every_evaluation_of_the_loop_runs_the_graph_of_f(make):
    model, recorder, x = make(rtol=1e-6), Recorder(), torch.randn(4, 6)
    with torch.no_grad():
        model(x)
        nfe, model.cell.eager_calls = model.cell.eager_calls, 0
        torch.compile(model, backend=recorder)(x)
    (graph,) = recorder.about("tanh")
    assert recorder.runs[graph] == nfe > 3
    assert model.cell.eager_calls == 0


def test_the_graph_of_an_implicit_gradient_is_eager():
    """A compiled one could not be differentiated twice, and each vjp would make the gradients of the parameters."""
    model, x = Model(), torch.randn(4, 6)
    torch.compile(model, backend="aot_eager")(x)
    assert model.cell.eager_calls == 1


@pytest.mark.parametrize("backward", [dq.Phantom(3), dq.Unroll()], ids=str)
def test_the_graph_of_an_explicit_gradient_is_compiled(backward):
    model, x = Model(backward=backward), torch.randn(4, 6)
    results(torch.compile(model, backend="aot_eager"), x)
    assert model.cell.eager_calls == 0


def test_a_start_of_the_cell_is_compiled():
    recorder = Recorder()
    torch.compile(WithInit(), backend=recorder)(torch.randn(4, 6))
    assert ("full_like",) in recorder.graphs


def test_a_compiled_training_step_compiles_nothing_of_the_backward_solve():
    model, recorder, x = Model(rtol=1e-6), Recorder(), torch.randn(4, 6)
    twin = copy.deepcopy(model)

    def step(model):
        loss = model(x).square().sum()
        loss.backward()
        return loss

    compiled = torch.compile(step, backend=recorder)
    for _ in range(2):
        assert torch.equal(compiled(model), step(twin))
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert len(recorder.graphs) == 4, recorder.graphs  # before, f, after, the loss


def test_an_own_loop_compiles_f_alone():
    cell, recorder, x = Cell(), Recorder(), torch.randn(4, 6)

    def loop(x):
        state = dq.Anderson(m=3).init(torch.zeros_like(x), rtol=1e-6)
        with torch.no_grad():
            while not state.done:
                state.step(cell(state.z, x))
        return state.z.clone()

    expected, cell.eager_calls = loop(x), 0
    assert torch.equal(torch.compile(loop, backend=recorder)(x), expected)
    assert recorder.graphs == recorder.about("tanh") and len(recorder.graphs) == 1
    assert cell.eager_calls == 0


def test_measures_of_the_jacobian_are_left_alone():
    model, recorder, x = Model(rtol=1e-6), Recorder(), torch.randn(4, 6)

    def loss(x, generator):
        z = model.deq(x)
        penalty = dq.jacobian_penalty(model.cell, z, args=(x,), generator=generator)
        return torch.exp(penalty + dq.spectral_radius(model.cell, z, args=(x,), generator=generator).sum())

    compiled = torch.compile(loss, backend=recorder)
    found, expected = compiled(x, torch.Generator().manual_seed(1)), loss(x, torch.Generator().manual_seed(1))
    assert torch.equal(found, expected)
    weight = model.cell.linear.weight
    assert_same(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))
    assert len(recorder.about("tanh")) == 1


# ---- no recompilation without need ----


def test_fresh_functions_are_compiled_once():
    model, recorder = WithLambda(), Recorder()
    compiled = torch.compile(model, backend=recorder)

    @functools.partial(torch.compile, backend=recorder)
    def solve(f, x):
        return dq.fixed_point(f, torch.zeros_like(x), (x,)).z.sin()

    for i in range(20):
        x = torch.randn(4, 6)
        compiled(x)
        solve(lambda z, x: 0.5 * torch.cos(z) + x, x)
        if i == 0:
            before = len(recorder.graphs)
    assert len(recorder.graphs) == before == 6, recorder.graphs
    assert graph_breaks() == 2


def test_many_layers_and_solvers_share_the_graph_of_f():
    recorder, x = Recorder(), torch.randn(4, 6)
    solvers = ["anderson", "broyden", "picard", *(dq.Anderson(m=m) for m in range(1, 10))]
    model = torch.nn.Sequential(*[dq.DEQ(Cell(), solver=solver) for solver in solvers])
    compiled = torch.compile(model, backend=recorder)
    assert torch.equal(compiled(x), model(x))
    before = len(recorder.graphs)
    compiled(x)
    assert before == len(recorder.graphs) <= 2, recorder.graphs


@pytest.mark.parametrize("compact", [False, (True,)])
def test_changing_shapes_end_with_a_dynamic_graph(compact):
    model, recorder = Model(rtol=1e-6, compact=compact), Recorder()
    compiled = torch.compile(model, backend=recorder)
    for n in (4, 7, 1, 9, 2, 12, 3, 8, 5, 11, 6, 10):
        x = torch.randn(n, 6) * torch.logspace(-2, 1, n)[:, None]
        assert_same(results(compiled, x), results(model, x))
    # A fixed size, any size, and one, on which torch specialises; the rows that compact= gathers require no gradient.
    assert len(recorder.about("tanh")) <= (6 if compact else 3), recorder.graphs
    assert len(recorder.graphs) - len(recorder.about("tanh")) <= 6, recorder.graphs


# ---- what cannot be compiled runs eagerly, errors are the same ----


def test_graphs_that_write_every_output_to_the_same_memory():
    """As recorded CUDA graphs do."""

    def backend(module, inputs):
        kept: list[torch.Tensor] = []

        def run(*args):
            outputs = module.forward(*args)
            if not kept:
                kept.extend(torch.empty_like(t) for t in outputs)
            return tuple(k.copy_(t) for k, t in zip(kept, outputs, strict=True))

        return run

    x = torch.randn(4, 6)
    for solver in ("anderson", "broyden", "picard", dq.Anderson(m=4, mixing=0.7)):
        model = Model(rtol=1e-6, solver=solver, max_iter=300)
        with torch.no_grad():
            found, expected = torch.compile(model, backend=backend)(x), model(x)
            assert torch.equal(found, expected), solver
        torch._dynamo.reset()
