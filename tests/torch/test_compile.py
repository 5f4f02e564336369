"""A compiled model breaks its graph once a solve, compiles f, and gives what the eager one gives."""

import functools

import pytest
import torch
from compiled_models import (
    MODELS,
    Cell,
    Model,
    Recorder,
    WithClosure,
    WithLambda,
    assert_compiled_equals_eager,
    assert_same,
    graph_breaks,
)

import deqfast as dq
from deqfast.compiled import get_eval_frame_callback  # type: ignore[attr-defined]

# The tracer looks at .grad of whatever a graph receives, and hides the warning for that where it is no error.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


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


@pytest.mark.parametrize("options", [{"compact": True}, {"trace": True}, {"callback": lambda *_: None}], ids="-".join)
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
    model.cell = Nested()  # type: ignore[assignment]
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


def test_f_may_take_keywords_and_the_entries_of_a_tuple():
    def f(a, b, *, scale):
        return torch.tanh(b) * scale, torch.tanh(a) + 1

    def solve(z0, scale):
        return dq.fixed_point(f, (z0, z0), kwargs={"scale": scale}, unpack=True).z

    recorder, z0 = Recorder(), torch.randn(4, 6)
    found = torch.compile(solve, backend=recorder)(z0, 0.5)
    assert_same(list(found), list(solve(z0, 0.5)))
    assert len(recorder.about("tanh")) == 1, recorder.graphs
