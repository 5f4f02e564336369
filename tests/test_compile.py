"""A compiled model breaks its graph once a solve, compiles f, and gives what the eager one gives."""

import copy
import functools
import time
import warnings
from collections import Counter

import pytest
import torch

import deqfast as dq
from deqfast.compiled import get_eval_frame_callback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the compiler's own modules emit while they are imported
    import torch._dynamo
    import torch._inductor.compile_fx
    from torch._dynamo.utils import counters

# The tracer looks at .grad of whatever a graph receives, and hides the warning for that where it is no error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    assert get_eval_frame_callback() is None


class Recorder:
    """A backend that notes the operations of every graph, and how often it runs."""

    def __init__(self):
        self.graphs: list[tuple[str, ...]] = []
        self.runs: Counter[tuple[str, ...]] = Counter()

    def __call__(self, module, inputs):
        names = {"call_function": lambda n: n.target.__name__, "call_method": lambda n: n.target}
        key = tuple(names[n.op](n) for n in module.graph.nodes if n.op in names)
        self.graphs.append(key)

        def run(*args):
            self.runs[key] += 1
            return module.forward(*args)

        return run

    def about(self, name: str) -> list[tuple[str, ...]]:
        return [g for g in self.graphs if name in g]


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


class Cell(torch.nn.Module):
    def __init__(self, n=6):
        super().__init__()
        self.linear = torch.nn.Linear(n, n)
        torch.nn.init.normal_(self.linear.weight, std=0.2)
        self.eager_calls = 0

    def forward(self, z, x):
        if not torch.compiler.is_compiling():  # a constant while tracing, so that graphs leave it out
            self.eager_calls += 1
        return torch.tanh(self.linear(z) + x)


class Model(torch.nn.Module):
    """linear -> equilibrium -> linear."""

    def __init__(self, **options):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.cell = Cell()
        self.last = torch.nn.Linear(6, 2)
        self.options = options
        self.deq = dq.DEQ(self.cell, **options)

    def forward(self, x):
        return self.last(self.deq(torch.relu(self.first(x))))


class WithArgs(Model):
    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(dq.fixed_point(self.cell, torch.zeros_like(h), (h,), **self.options).z)


class WithKeywords(Model):
    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(dq.fixed_point(f=self.cell, z0=torch.zeros_like(h), args=(h,), **self.options).z)


class WithLambda(Model):
    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(dq.fixed_point(lambda z: self.cell(z, h), torch.zeros_like(h), **self.options).z)


class WithClosure(Model):
    def forward(self, x):
        h = torch.relu(self.first(x))
        weight = self.cell.linear.weight

        def f(z):
            return torch.tanh(z @ weight + 0.5 * h)

        return self.last(dq.fixed_point(f, torch.zeros_like(h), **self.options).z)


class WithPartial(Model):
    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(dq.fixed_point(functools.partial(self.cell, x=h), torch.zeros_like(h), **self.options).z)


class WithMethod(Model):
    def equation(self, z, h):
        return self.cell(z, h)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(dq.fixed_point(self.equation, torch.zeros_like(h), (h,), **self.options).z)


class WithOptionsMadeInside(Model):
    def forward(self, x):
        h = torch.relu(self.first(x))
        solver, backward = dq.Anderson(m=3), dq.Implicit(rtol=1e-5)
        solution = dq.fixed_point(
            self.cell, torch.zeros_like(h), (h,), solver=solver, backward=backward, **self.options
        )
        return self.last(solution.z)


class WithRoot(Model):
    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(dq.root(lambda z: self.cell(z, h) - z, torch.zeros_like(h), **self.options).z)


class WithSolution(Model):
    def forward(self, x):
        solution = self.deq.solve(torch.relu(self.first(x)))
        return self.last(solution.z * (solution.residual[:, None] < 1))


class Starting(Cell):
    def init(self, x):
        return torch.full_like(x, 0.5)


class WithInit(Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.cell = Starting()
        self.deq = dq.DEQ(self.cell, **options)


class Twice(Model):
    def forward(self, x):
        return self.last(self.deq(torch.cos(self.deq(torch.relu(self.first(x))))))


MODELS = [
    Model,
    WithArgs,
    WithKeywords,
    WithLambda,
    WithClosure,
    WithPartial,
    WithMethod,
    WithOptionsMadeInside,
    WithRoot,
    WithSolution,
    WithInit,
]


def results(model, x):
    """The output, and the gradients of everything that has one."""
    x = x.clone().requires_grad_()
    y = model(x)
    inputs = [x, *model.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)]


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


def assert_compiled_equals_eager(model, backend, x, **tolerance):
    expected = results(model, x)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        assert_same(results(compiled, x), expected, **tolerance)


# ---- the same results, with one graph break ----


@pytest.mark.parametrize("make", MODELS)
def test_a_compiled_model_breaks_once_and_equals_the_eager_one(make):
    model, recorder = make(rtol=1e-6), Recorder()
    assert_compiled_equals_eager(model, recorder, torch.randn(4, 6))
    assert graph_breaks() == 1
    inner = recorder.about("tanh")
    around = [g for g in recorder.graphs if g not in inner and g != ("full_like",)]
    assert len(inner) == 1 and len(around) == 2, recorder.graphs


@pytest.mark.parametrize("backward", [None, dq.Phantom(3), dq.OneStep(), dq.Unroll(), "none"], ids=str)
@pytest.mark.parametrize(("make", "backend"), [(Model, "aot_eager"), (WithClosure, "eager")])
def test_every_gradient_equals_the_eager_one(make, backend, backward):
    assert_compiled_equals_eager(make(backward=backward, rtol=1e-6), backend, torch.randn(4, 6))
    assert graph_breaks() == 1


@pytest.mark.parametrize("solver", ["broyden", "picard", dq.Anderson(m=3, type=1)], ids=str)
def test_every_solver_equals_the_eager_one(solver):
    assert_compiled_equals_eager(Model(solver=solver, rtol=1e-6, max_iter=300), "eager", torch.randn(4, 6))


@pytest.mark.parametrize("options", [{"compact": True}, {"trace": True}, {"callback": lambda k, state: None}], ids=str)
def test_options_of_the_loop_work(options):
    x = torch.randn(9, 6) * torch.logspace(-2, 2, 9)[:, None]
    assert_compiled_equals_eager(Model(rtol=1e-6, **options), "eager", x)


def test_modes_equal_the_eager_ones():
    model, x = Model(rtol=1e-5), torch.randn(4, 6)
    compiled = torch.compile(model, backend="eager")
    for training in (True, False):
        model.train(training)
        assert torch.equal(compiled(x), model(x))
        for mode in (torch.no_grad, torch.inference_mode, functools.partial(torch.autocast, "cpu", torch.bfloat16)):
            with mode():
                found, expected = compiled(x), model(x)
            assert torch.equal(found, expected) and found.dtype is expected.dtype
            assert found.requires_grad is expected.requires_grad


def test_inductor_agrees_within_rounding():
    x = torch.randn(4, 6)
    for model in (Model(rtol=1e-6), WithClosure(rtol=1e-6, backward=dq.Phantom(3))):
        assert_compiled_equals_eager(model, "inductor", x, rtol=1e-4, atol=1e-5)


def test_explain_finds_one_break_a_solve():
    x = torch.randn(4, 6)
    for model, solves in ((Model(), 1), (WithLambda(), 1), (Twice(), 2)):
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(x)
        assert len(found.break_reasons) == solves
        assert found.graph_count == solves + 2  # what lies around the solves, and f


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.deq = dq.DEQ(Cell(), rtol=1e-6)

    def forward(self, x):
        return torch.sin(self.deq(torch.cos(x)))


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


def test_fullgraph_says_why_it_cannot_be():
    for model in (Model(), WithLambda()):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"deqfast looks at data .* leave out fullgraph=True"):
            torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 6))


def test_a_solve_that_is_compiled_itself():
    deq, x, recorder = dq.DEQ(Cell(), rtol=1e-6), torch.randn(4, 6), Recorder()
    assert torch.equal(torch.compile(deq, backend=recorder)(x), deq(x))
    solve = torch.compile(dq.fixed_point, backend=recorder)
    assert torch.equal(solve(deq.cell, torch.zeros_like(x), (x,), rtol=1e-6).z, deq(x))
    assert recorder.graphs == recorder.about("tanh") and len(recorder.graphs) == 1


def test_a_solve_inside_f():
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.linear = dq.DEQ(Cell(), rtol=1e-7), torch.nn.Linear(6, 6)
            torch.nn.init.normal_(self.linear.weight, std=0.1)

        def forward(self, z, x):
            return torch.sin(self.linear(z) + self.inner(x + 0.1 * z))

    recorder, model = Recorder(), Model(rtol=1e-5)
    model.cell = Nested()
    model.deq = dq.DEQ(model.cell, rtol=1e-5)
    assert_compiled_equals_eager(model, recorder, torch.randn(4, 6), rtol=1e-4, atol=1e-5)
    assert recorder.about("tanh") and recorder.about("sin")


def test_trees_work():
    weight = 0.2 * torch.randn(6, 6)

    def model(x):
        def f(z, x):
            return {"a": torch.tanh(z["b"][0] @ weight + x), "b": [torch.tanh(z["a"] @ weight)]}

        z = dq.fixed_point(f, {"a": torch.zeros_like(x), "b": [torch.zeros_like(x)]}, (x,)).z
        return z["a"] + z["b"][0]

    x = torch.randn(4, 6)
    assert torch.equal(torch.compile(model, backend="aot_eager")(x), model(x))
    assert graph_breaks() == 1


# ---- f runs compiled, deqfast's loop does not ----


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


@pytest.mark.parametrize("compact", [False, True])
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


def test_double_backward():
    def penalty(model):
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(model.parameters()), allow_unused=True)

    model = Model(rtol=1e-6)
    assert_same(penalty(torch.compile(model, backend="eager")), penalty(model))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch loading its own
def test_forward_mode_inside_of_a_compiled_function():
    model = Model(rtol=1e-6)

    def derivative(x):
        return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]

    x = torch.randn(4, 6)
    torch.testing.assert_close(torch.compile(derivative, backend="eager")(x), derivative(x))


def test_f_may_write_to_its_input_return_it_or_use_one_buffer():
    weight, buffer = 0.2 * torch.randn(6, 6), torch.empty(4, 6)

    def writes(z, x):
        z.mul_(0.5).add_(x)
        return torch.tanh(z @ weight)

    def one_buffer(z, x):
        return torch.add(torch.tanh(z @ weight), x, out=buffer)

    def identity(z, x):
        return z

    for f in (writes, one_buffer, identity):

        def solve(x, f=f):
            return dq.fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-6, backward="none").z * 2

        x = torch.randn(4, 6)
        expected = solve(x)
        assert torch.equal(torch.compile(solve, backend="aot_eager")(x), expected), f


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


def test_throw_and_errors_of_f_pass_through_and_leave_the_compiler_as_it_was():
    recorder, x = Recorder(), torch.randn(4, 6)

    def broken(z, x):
        raise KeyError("mine")

    @functools.partial(torch.compile, backend=recorder)
    def model(x, f, **options):
        h = torch.cos(x)
        z = dq.fixed_point(f, torch.zeros_like(h), (h,), **options).z
        return torch.sin(z)

    cell = Cell()
    with pytest.raises(dq.ConvergenceError) as caught:
        model(x, cell, throw=True, max_iter=2)
    assert caught.value.solution.nfe == 2
    with pytest.raises(KeyError, match="mine"):
        model(x, broken)
    with pytest.raises(TypeError, match="f must be callable, got int"):
        model(x, 3)
    assert get_eval_frame_callback() is None
    expected = torch.sin(dq.fixed_point(cell, torch.zeros_like(x), (torch.cos(x),)).z)
    assert torch.equal(model(x, cell), expected)
    assert recorder.about("cos") and recorder.about("sin")


def test_the_eager_path_pays_less_than_a_microsecond():
    from deqfast import compiled

    def nothing(f, z0, args=(), *, solver=None, rtol=None):
        return f

    def fastest(function) -> float:
        best = float("inf")
        for _ in range(200):
            start = time.perf_counter()
            for _ in range(100):
                function(nothing, None, (), solver="anderson", rtol=1e-3)
            best = min(best, (time.perf_counter() - start) / 100)
        return best

    assert fastest(compiled.entry("f")(nothing)) - fastest(nothing) < 1e-6
