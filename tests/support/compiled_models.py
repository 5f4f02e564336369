"""Models with an equilibrium inside, a compiler's backend that takes notes, and comparisons with eager."""

import functools
import warnings
from collections import Counter

import torch

import deqfast as dq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the compiler's own modules emit while they are imported
    import torch._dynamo
    import torch._inductor.compile_fx
    from torch._dynamo.utils import counters as counters


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


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.deq = dq.DEQ(Cell(), rtol=1e-6)

    def forward(self, x):
        return torch.sin(self.deq(torch.cos(x)))
