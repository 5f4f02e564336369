"""The ops behind torch.library are sound operators, do what the eager loop does, and check what they are given."""

import copy
import subprocess
import sys

import pytest
import torch

import deqfast as dq
from deqfast import ops
from deqfast.ops import library
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.codes import Int
from deqfast.ops.layout import Layout
from deqfast.ops.workspace import Stopping, Workspace, untile

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPS = {"anderson": torch.ops.deqfast.anderson_step, "broyden": torch.ops.deqfast.broyden_step}
CASES = [
    pytest.param(dq.Anderson(m=3), [(1, 1)], F64, id="anderson-one-number"),
    pytest.param(dq.Anderson(), [(5, 7)], F32, id="anderson-default"),
    pytest.param(dq.Anderson(m=4, type=2), [(17, 63)], F32, id="anderson-type-2"),
    pytest.param(dq.Anderson(m=2, type=1, mixing=0.5, evict="oldest"), [(3, 4), (3, 2, 3)], F64, id="anderson-tree"),
    pytest.param(dq.Anderson(m=5, history_dtype=torch.int8), [(2, 1025)], BF16, id="anderson-int8"),
    pytest.param(dq.Anderson(m=3, history_dtype=F16), [(4, 31)], F16, id="anderson-float16"),
    pytest.param(dq.Anderson(m=2), [(2, 6)], torch.complex64, id="anderson-complex"),
    pytest.param(dq.Picard(damping=0.7), [(3, 5)], F32, id="picard"),
    pytest.param(dq.Broyden(memory=4), [(1, 1)], F32, id="broyden-one-number"),
    pytest.param(dq.Broyden(memory=6, scale="first_step"), [(5, 63)], F64, id="broyden-scaled"),
    pytest.param(dq.Broyden(memory=3), [(3, 4), (3, 2, 3)], BF16, id="broyden-tree"),
    pytest.param(dq.Broyden(memory=2), [(1, 1 << 16)], F32, id="broyden-gram"),
]


def f(leaves):
    return [torch.tanh(0.9 * t.flip(-1)) + 0.1 for t in leaves]


def op_of(ws: Workspace):
    return OPS["broyden" if hasattr(ws.method, "memory") else "anderson"]


def begin(solver, shapes, dtype, steps=0) -> tuple[Workspace, list | None]:
    """A workspace `steps` eager steps into a solve, and f at the previous iterate; all its memory is defined."""
    z0 = [torch.randn(shape, dtype=dtype) for shape in shapes]
    ws = solver.workspace(Layout(z0), Stopping(1e-6, max_iter=50))
    for name, t in ws.tensors().items():
        if name != "reals":
            t.zero_()
    for x, t in zip(ws.x[0], z0, strict=True):
        x.copy_(t)
    update, previous = ops.choose("auto", torch.device("cpu")).bind(ws), None
    for _ in range(steps):
        fx = f(ws.x[ws.cur])
        update(fx, previous, None, None)
        previous, ws.cur = fx, 1 - ws.cur
    return ws, previous if solver.uses_previous else None


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("solver", "shapes", "dtype"), CASES)
def test_op_passes_opcheck(solver, shapes, dtype, steps):
    ws, previous = begin(solver, shapes, dtype, steps)
    args = library.arguments(ws, f(ws.x[ws.cur]), previous)
    done = torch.library.opcheck(op_of(ws).default, args)
    assert set(done.values()) == {"SUCCESS"}
    assert len(done) == 4


@pytest.mark.parametrize(("solver", "shapes", "dtype"), CASES)
def test_op_equals_the_eager_step_bit_for_bit(solver, shapes, dtype):
    ws, previous = begin(solver, shapes, dtype)
    eager = twin(ws)
    update = ops.choose("auto", torch.device("cpu")).bind(eager)
    for _ in range(7):
        fx = f(ws.x[ws.cur])
        (running,) = op_of(ws)(*library.arguments(ws, fx, previous)).tolist()
        assert running == update(fx, previous, None, None)
        for own in (ws, eager):
            own.cur = 1 - own.cur
        previous = fx if solver.uses_previous else None
        assert_same_bits(ws, eager)


def twin(ws: Workspace) -> Workspace:
    """The same workspace in other memory."""
    other = copy.copy(ws)
    for name, value in vars(ws).items():
        if isinstance(value, torch.Tensor):
            setattr(other, name, value.clone())
    other.x = tuple([t.clone() for t in leaves] for leaves in ws.x)  # type: ignore[assignment]
    other.saved = [t.clone() for t in ws.saved]
    return other


def assert_same_bits(a: Workspace, b: Workspace) -> None:
    """Of every sample; what pads the last tile is nobody's."""
    theirs = b.tensors()
    for name, t in a.tensors().items():
        same = [own_samples(name, t, a), own_samples(name, theirs[name], a)]
        assert torch.equal(*(torch.cat([u.reshape(-1)]).view(torch.uint8) if u.numel() else u for u in same)), name


def own_samples(name: str, t, ws: Workspace):
    B = ws.layout.B
    if name in ("ints", "reals"):
        return t[:, :B]
    tiled = isinstance(ws, AndersonWorkspace) and name in ("matrix", "gram", "norms", "ages")
    return untile(t, B) if tiled and t.numel() else t


@pytest.mark.parametrize("solver", [dq.Anderson(m=3), dq.Broyden(memory=5)])
def test_op_follows_dropped_samples(solver):
    ws, previous = begin(solver, [(4, 6)], F32, steps=2)
    ws.ints[0, 1] = dq.Status.CONVERGED
    eager = twin(ws)
    rows = torch.tensor([0, -1, 1, 2], dtype=torch.int32)
    fx = f([ws.x[ws.cur][0][[0, 2, 3]]])
    running = op_of(ws)(*library.arguments(ws, fx, previous, rows))
    assert int(running) == 3
    ops.choose("auto", torch.device("cpu")).bind(eager)(fx, previous, rows, None)
    assert_same_bits(ws, eager)


def test_strided_outputs_of_f_are_read_in_place():
    ws, _ = begin(dq.Anderson(m=3), [(3, 4)], F32)
    other = twin(ws)
    (fx,) = f(ws.x[0])
    wide = torch.full((3, 9), torch.nan)
    wide[:, 1::2] = fx
    op_of(ws)(*library.arguments(ws, [fx]))
    op_of(ws)(*library.arguments(other, [wide[:, 1::2]]))
    assert torch.equal(ws.x[1][0], other.x[1][0])


def test_empty_batch_returns_no_running_sample():
    ws, _ = begin(dq.Anderson(m=2), [(0, 4)], F32)
    assert op_of(ws)(*library.arguments(ws, [torch.empty(0, 4)])).tolist() == [0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("solver", [dq.Anderson(m=3), dq.Broyden(memory=5)])
@pytest.mark.filterwarnings("default")  # what torch.compile itself imports
def test_compiled_loop_traces_through_the_op_and_gives_the_eager_bits(solver, backend):
    def three_steps(args, f_at):
        args, running = list(args), []
        x, x_prev = f_at
        for _ in range(3):
            fx = [torch.tanh(0.9 * args[x][0].flip(-1)) + 0.1]
            running.append(op(fx, *args[1:]))
            if solver.uses_previous:
                args[1] = fx
            args[x], args[x_prev] = args[x_prev], args[x]
        return args[x][0], torch.cat(running)

    ws, _ = begin(solver, [(5, 7)], F32)
    other = twin(ws)
    op = op_of(ws)
    at = (4, 5) if solver.uses_previous else (2, 3)
    expected = three_steps(library.arguments(ws, []), at)
    torch._dynamo.reset()
    compiled = torch.compile(three_steps, fullgraph=True, backend=backend)
    found = compiled(library.arguments(other, []), at)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert_same_bits(ws, other)


@pytest.mark.filterwarnings("default")  # what torch.compile itself imports
def test_inductor_calls_the_op():
    def step(args, z):
        fx = [torch.tanh(0.9 * z.flip(-1)) + 0.1]
        running = torch.ops.deqfast.anderson_step(fx, *args[1:])
        return args[5][0] - z, running

    ws, _ = begin(dq.Anderson(m=3), [(5, 7)], F32)
    other = twin(ws)
    expected = step(library.arguments(ws, []), ws.x[0][0].clone())
    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True)(library.arguments(other, []), other.x[0][0].clone())
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)  # inductor's tanh is not libm's


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_cuda_tensors_reach_the_implementation_of_cpu_tensors(op):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has(op.default.name(), key) for key in ("CPU", "CUDA", "Meta"))


def test_op_refuses_tensors_that_require_gradients():
    ws, _ = begin(dq.Anderson(m=2), [(2, 3)], F32)
    args = library.arguments(ws, [torch.ones(2, 3, requires_grad=True)])
    with pytest.raises(RuntimeError, match="anderson_step makes no gradients, but f requires them: detach it"):
        torch.ops.deqfast.anderson_step(*args)
    with torch.no_grad():
        torch.ops.deqfast.anderson_step(*args)


def test_op_counts_as_a_change_of_what_it_writes_to():
    ws, _ = begin(dq.Anderson(m=2), [(2, 3)], F32)
    fx = f(ws.x[0])
    before = [t._version for t in (*ws.tensors().values(), *fx)]
    torch.ops.deqfast.anderson_step(*library.arguments(ws, fx))
    after = [t._version for t in (*ws.tensors().values(), *fx)]
    assert all(b > a for a, b in zip(before[:-1], after[:-1], strict=True))
    assert after[-1] == before[-1]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, [torch.zeros(2, 4)], "f must have the shape of x"),
        (1, [torch.zeros(2, 3, dtype=F64)], "f_prev must have the dtype of x"),
        (2, torch.tensor([0, 2], dtype=torch.int32), "f_rows: expected rows from -1 to 1, got 0 to 2"),
        (2, torch.tensor([0, 1]), "f_rows: expected contiguous"),
        (5, [torch.zeros(3, 2).T], "x_prev: expected .* with strides"),
        (6, [], "saved: expected 1 tensors as in x, got 0"),
        (7, torch.zeros(15, 16, dtype=torch.int32), "ints: expected"),
        (8, torch.zeros(8, 16, dtype=F64), "reals: expected"),
        (9, torch.zeros(2, 2, 2, 4), "history: expected"),
        (9, torch.zeros(2, 2, 2), "history: expected"),
        (9, torch.zeros(2, 2, 2, 3, dtype=F64), "history: torch.float64 needs a float64 state"),
        (10, torch.zeros(2, 2, 2, 1), "scales: expected"),
        (11, torch.zeros(1, 2, 2, 15), "matrix: expected"),
        (14, torch.zeros(1, 2, 16), "ages: expected"),
    ],
)
def test_anderson_step_names_the_argument_that_does_not_fit(position, wrong, message):
    ws, _ = begin(dq.Anderson(m=2), [(2, 3)], F32)
    args = list(library.arguments(ws, f(ws.x[0]), f(ws.x[0])))
    args[position] = wrong
    before = ws.ints.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.deqfast.anderson_step(*args)
    assert torch.equal(ws.ints, before)


def test_broyden_step_names_the_argument_that_does_not_fit():
    ws, _ = begin(dq.Broyden(memory=2), [(2, 3)], F32)
    args = list(library.arguments(ws, f(ws.x[0])))
    args[7] = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=r"history: expected .B, memory, N. with at least 2 steps"):
        torch.ops.deqfast.broyden_step(*args)


def test_registering_loads_no_compiler():
    code = (
        "import sys, torch; before = set(sys.modules); import deqfast.ops.library; new = set(sys.modules) - before; "
        "print([m for m in new if m.startswith(('torch._dynamo', 'torch._inductor', 'sympy', 'triton'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("rows", [[-100000000, 1], [-2, 0], [0, 2], [-1, 1]])
@pytest.mark.parametrize("solver", [dq.Anderson(m=3), dq.Broyden()])
def test_rows_that_do_not_lie_in_f_are_refused(solver, rows):
    state = solver.init(torch.zeros(2, 4), rtol=1e-4)
    given = library.arguments(state.ws, [torch.ones(2, 4)], f_rows=torch.tensor(rows, dtype=torch.int32))
    op = torch.ops.deqfast.broyden_step if isinstance(solver, dq.Broyden) else torch.ops.deqfast.anderson_step
    with pytest.raises(ValueError, match="f_rows: "):
        op(*given)


def test_rows_of_samples_that_have_stopped_may_be_dropped():
    state = dq.Anderson(m=3).init(torch.zeros(2, 4), rtol=1e-4)
    state.ws.int_row(Int.STATUS)[0] = dq.Status.CONVERGED
    given = library.arguments(state.ws, [torch.ones(1, 4)], f_rows=torch.tensor([-1, 0], dtype=torch.int32))
    assert int(torch.ops.deqfast.anderson_step(*given)) == 1


def test_memory_on_another_device_is_refused_by_name():
    with pytest.raises(ValueError, match="ints: expected a tensor on cpu, where x is, got one on meta"):
        library._expect("ints", torch.zeros(16, 16, device="meta"), (16, 16), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize(
    "solver", [dq.Anderson(m=4), dq.Anderson(m=4, type=2), dq.Broyden(memory=4), dq.Picard()], ids=str
)
def test_op_makes_the_steps_of_a_solve_on_every_backend(solver, backend, monkeypatch):
    if ops.why_not(backend, torch.device("cpu")) is not None:
        pytest.skip(f"the {backend} backend is not there")
    monkeypatch.setenv("DEQFAST_BACKEND", backend)
    x = torch.randn(4, 12)
    cell = lambda z: torch.tanh(0.9 * z.roll(1, -1) + x)  # noqa: E731
    state = solver.init(torch.zeros(4, 12), rtol=1e-6, max_iter=9)
    ws = solver.init(torch.zeros(4, 12), rtol=1e-6, max_iter=9).ws
    previous, running = None, torch.tensor([4])
    while not state.done:
        fx = cell(ws.x[ws.cur][0])
        running = op_of(ws)(*library.arguments(ws, [fx], previous))
        previous, ws.cur = [fx] if solver.uses_previous else None, 1 - ws.cur
        state.step(cell(state.z))
        assert torch.allclose(ws.x[ws.cur][0], state.z, rtol=1e-4, atol=1e-5)
    assert int(running) == 0
    assert torch.equal(ws.int_row(Int.STEPS), state.steps)
    assert torch.equal(ws.int_row(Int.COUNT), state.ws.int_row(Int.COUNT))


def test_op_refuses_a_mix_that_the_columns_do_not_allow():
    ws, previous = begin(dq.Anderson(m=4), [(3, 20)], torch.float32)
    arguments = list(library.arguments(ws, f(ws.x[ws.cur]), previous))
    at = len(arguments) - len(ws.stopping) - 2
    for mix_every in (0, -1, 4):
        arguments[at] = mix_every
        with pytest.raises(ValueError, match=f"mix_every: expected 1 to 2, got {mix_every}"):
            op_of(ws)(*arguments)
