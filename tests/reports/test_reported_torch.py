"""What users have reported of equilibria within torch: dtypes, trees, memory, transforms, checkpoints, files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from problems import ACCELERATED, ONE_OF_EACH
from torch import nn
from torch.utils.checkpoint import checkpoint

import deqfast as dq

F64 = torch.float64
TIGHT = {"rtol": 1e-12, "max_iter": 500}


def close(a, b, tolerance=1e-8):
    wide = torch.complex128 if b.is_complex() else F64
    return float((a.detach().to(wide) - b.detach().to(wide)).norm()) <= tolerance * float(b.detach().norm())


def matrix(N=6, norm=0.7, dtype=F64):
    A = torch.randn(N, N, dtype=dtype)
    return (norm * A / torch.linalg.matrix_norm(A, 2)).requires_grad_()


def affine(z, W, x):
    return z @ W + x


def solved(W, x):
    """The fixed point of ``affine``."""
    return x @ torch.linalg.inv(torch.eye(len(W), dtype=W.dtype) - W)


def settled(W, x):
    """The fixed point of z -> tanh(z W + x) in float64, with the graph of 300 plain iterations."""
    z = torch.zeros_like(x)
    for _ in range(300):
        z = torch.tanh(z @ W + x)
    return z


class Cell(nn.Module):
    """tanh(z W + x)."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.W = nn.Parameter(matrix(norm=0.9).detach().to(dtype))

    def forward(self, z, x):
        return torch.tanh(z @ self.W + x)


# ---- dtypes ----


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_autocast_gives_value_and_gradient_to_the_digits_of_its_dtype(solver):
    """Under autocast the solver itself is rounded, or backward() outside of the context makes other numbers."""
    layer, x = dq.DEQ(Cell(torch.float32), solver=solver, rtol=2e-2), torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = layer.solve(x)
    assert sol.z.dtype == torch.float32 and sol.converged.all()
    found = torch.autograd.grad(sol.z.sum(), (layer.cell.W, x))
    W, wide = layer.cell.W.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    z = settled(W, wide)
    assert close(sol.z, z, 0.05)
    for got, right in zip(found, torch.autograd.grad(z.sum(), (W, wide)), strict=True):
        assert got.dtype == torch.float32 and close(got, right, 0.1)


@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_half_precision_state_has_the_digits_of_its_dtype(dtype, tolerance, solver):
    """A state in half precision overflows inside of the solver, or is never within a tolerance of float32."""
    W, x = matrix(norm=0.5), 3 * torch.randn(4, 6, dtype=F64)
    narrow = [t.detach().to(dtype).requires_grad_() for t in (W, x)]
    sol = dq.fixed_point(affine, torch.zeros(4, 6, dtype=dtype), tuple(narrow), solver=solver)
    assert sol.z.dtype == dtype and sol.converged.all()
    z = solved(W, x)
    assert close(sol.z, z, tolerance)
    (got,) = torch.autograd.grad(sol.z.sum(), narrow[0])
    assert close(got, torch.autograd.grad(z.sum(), W)[0], 2 * tolerance)


def test_numbers_that_overflow_half_precision_when_squared_are_solved():
    """float16 states of 1000 and more: norms are infinite, and nothing converges."""
    b = torch.tensor([[3000.0, -1000.0], [1e-3, 2e-3]], dtype=torch.float16)
    sol = dq.fixed_point(lambda z: 0.5 * z + b, torch.zeros_like(b))
    assert sol.converged.all()
    for row, right in zip(sol.z, 2 * b.double(), strict=True):
        assert close(row, right, 0.01)


@pytest.mark.parametrize("solver", ACCELERATED)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_state_and_its_gradient(dtype, solver):
    """Acceleration of complex states drops a conjugate: it is left out elsewhere (patrick-kidger/optimistix#217)."""
    tolerance = 1e-4 if dtype == torch.complex64 else 1e-8
    W, x = matrix(dtype=torch.complex128), torch.randn(3, 6, dtype=torch.complex128, requires_grad=True)
    narrow = [t.detach().to(dtype).requires_grad_() for t in (W, x)]
    z0 = torch.zeros(3, 6, dtype=dtype)
    sol = dq.fixed_point(affine, z0, tuple(narrow), solver=solver, rtol=tolerance / 100, max_iter=300)
    right = solved(W, x)
    assert sol.converged.all() and close(sol.z, right, tolerance)
    weight = torch.arange(18, dtype=F64).view(3, 6)
    found = torch.autograd.grad((weight * sol.z.abs().square()).sum(), narrow)
    for a, b in zip(found, torch.autograd.grad((weight * right.abs().square()).sum(), (W, x)), strict=True):
        assert close(a, b, 20 * tolerance)


# ---- trees, memory, shapes ----


@pytest.mark.parametrize("returned", [tuple, list])
@pytest.mark.parametrize("given", [tuple, list])
def test_state_of_two_parts_may_come_back_as_tuple_or_list(given, returned):
    """ADMM and networks of several scales have a state of several tensors (deep_equilibrium_inverse#5)."""
    W, x = matrix(), torch.randn(3, 6, dtype=F64, requires_grad=True)

    def f(z):
        u, v = z
        return returned([v @ W + x, 0.5 * u])

    sol = dq.fixed_point(f, given([torch.zeros(3, 6, dtype=F64)] * 2), **TIGHT)
    u = solved(0.5 * W, x)
    assert type(sol.z) is given and close(sol.z[0], u) and close(sol.z[1], 0.5 * u)
    (got,) = torch.autograd.grad((sol.z[0] + 3 * sol.z[1]).cos().sum(), x)
    assert close(got, torch.autograd.grad((2.5 * u).cos().sum(), x)[0])


def test_state_that_is_a_dict_of_scales():
    """Scales of different shape that feed each other, as in MDEQ; only one of them is in the loss."""
    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    up = torch.tensor([[0.3, 0.1, 0.2, -0.2], [0.0, 0.4, -0.1, 0.1]], dtype=F64)

    def f(z):
        return {"fine": z["coarse"] @ up + x, "coarse": z["fine"] @ up.T + 0.3 * z["coarse"]}

    sol = dq.fixed_point(f, {"fine": torch.zeros(2, 4, dtype=F64), "coarse": torch.zeros(2, 2, dtype=F64)}, **TIGHT)
    coarse = solved(0.3 * torch.eye(2, dtype=F64) + up @ up.T, x @ up.T)
    assert close(sol.z["coarse"], coarse) and close(sol.z["fine"], coarse @ up + x)
    (got,) = torch.autograd.grad(sol.z["coarse"].square().sum(), x)
    assert close(got, torch.autograd.grad(coarse.square().sum(), x)[0])


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_channels_last_is_kept_and_is_as_right(solver):
    """A solver that flattens its state makes every convolution convert it back."""
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=F64)
    conv.weight.data *= 0.3 / float(conv.weight.detach().abs().sum((1, 2, 3)).max())
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    seen = []

    def f(z, x):
        seen.append(z.is_contiguous(memory_format=torch.channels_last))
        return conv(z) + x

    last = x.to(memory_format=torch.channels_last)
    sol = dq.fixed_point(f, torch.zeros_like(last), (last,), solver=solver, **TIGHT)
    assert sol.z.is_contiguous(memory_format=torch.channels_last) and all(seen)
    (got,) = torch.autograd.grad(sol.z.square().sum(), conv.weight)
    z = x
    for _ in range(60):
        z = conv(z) + x
    assert close(sol.z, z) and close(got, torch.autograd.grad(z.square().sum(), conv.weight)[0])


STARTS = {
    "transposed": lambda: torch.zeros(6, 3, dtype=F64).T,
    "expanded": lambda: torch.zeros(1, 6, dtype=F64).expand(3, 6),
    "strided": lambda: torch.zeros(3, 12, dtype=F64)[:, ::2],
    "reversed": lambda: torch.zeros(3, 6, dtype=F64).flip(0),
    "inference": lambda: torch.inference_mode()(torch.zeros)(3, 6, dtype=F64),
}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_start_that_is_not_contiguous_is_read_and_left_as_it_is(solver, name):
    """view() of a start that is no block of memory raises; an expanded one is written to through all of its rows."""
    W, x = matrix().detach(), torch.randn(3, 6, dtype=F64)
    z0 = STARTS[name]()
    sol = dq.fixed_point(affine, z0, (W, x), solver=solver, **TIGHT)
    assert sol.converged.all() and close(sol.z, solved(W, x)) and not z0.any()


def test_wrong_start_or_output_is_named():
    """A wrong shape broadcasts, and something converges; an integer start truncates."""
    x = torch.randn(3, 6)
    wrong = [
        (lambda z: z, torch.zeros(3, dtype=torch.int64), TypeError, "z0"),
        (lambda z: z, [1.0, 2.0], TypeError, "z0"),
        (lambda z: z, torch.tensor(1.0), ValueError, "batch"),
        (lambda z: x[:1], torch.zeros(3, 6), ValueError, r"f\(z\)"),
        (lambda z: x.sum(1, keepdim=True), torch.zeros(3, 6), ValueError, r"f\(z\)"),
        (lambda z: x.double(), torch.zeros(3, 6), (TypeError, ValueError), r"f\(z\)"),
        (lambda z: None, torch.zeros(3, 6), (TypeError, ValueError), r"f\(z\)"),
        (lambda z: (z, z), torch.zeros(3, 6), (TypeError, ValueError), r"f\(z\)"),
    ]
    for f, z0, error, message in wrong:
        with pytest.raises(error, match=message):
            dq.fixed_point(f, z0)
    with pytest.raises(ValueError, match=r"g\(z\) must have the shape of z0"):
        dq.root(lambda z: z.sum(1, keepdim=True), torch.zeros(3, 6))


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_map_that_writes_into_its_argument(solver):
    """f that works in place corrupts the history of the solver, or the graph of the gradient."""
    W, x = matrix(), torch.randn(3, 6, dtype=F64, requires_grad=True)

    def f(z):
        return (z.mul_(0.5) if not z.requires_grad else z * 0.5).add_(x)

    sol = dq.fixed_point(f, torch.zeros(3, 6, dtype=F64), solver=solver, **TIGHT)
    assert close(sol.z, 2 * x)
    (got,) = torch.autograd.grad(sol.z.sum(), x)
    assert close(got, torch.full_like(got, 2.0))
    buffer = torch.empty(3, 6, dtype=F64)
    W, x = W.detach(), x.detach()
    z0 = torch.zeros_like(buffer)
    sol = dq.fixed_point(lambda z: torch.addmm(x, z, W, out=buffer), z0, solver=solver, backward="none", **TIGHT)
    assert sol.converged.all() and close(sol.z, solved(W, x))


# ---- randomness ----


def test_one_mask_of_dropout_a_call_has_an_equilibrium_and_one_an_evaluation_has_none():
    """Dropout draws another mask at every evaluation: no fixed point, and a gradient of yet another mask."""
    layer, x = dq.DEQ(Cell(), warn=False, max_iter=200), torch.randn(8, 6, dtype=F64)
    mask = nn.functional.dropout(torch.ones(8, 6, dtype=F64), 0.3)
    W = layer.cell.W
    z = dq.fixed_point(lambda z: torch.tanh((mask * z) @ W + x), torch.zeros_like(x), **TIGHT).z
    (got,) = torch.autograd.grad(z.sum(), W)
    right = torch.zeros_like(x)
    for _ in range(300):
        right = torch.tanh((mask * right) @ W + x)
    assert close(z, right) and close(got, torch.autograd.grad(right.sum(), W)[0])
    sol = dq.fixed_point(
        lambda z: torch.tanh(nn.functional.dropout(z, 0.3) @ W + x), torch.zeros_like(x), max_iter=200, backward="none"
    )
    assert not sol.converged.any()


def test_a_solve_draws_no_random_number():
    """Seeds no longer reproduce a run in which the number of evaluations depends on the data."""
    layer, x = dq.DEQ(Cell(), **TIGHT), torch.randn(3, 6, dtype=F64)
    torch.manual_seed(7)
    layer(x).sum().backward()
    drawn = torch.rand(5)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(5))


# ---- transforms, checkpoints, compilers ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own forward mode
def test_func_grad_and_jvp_are_right_and_jacrev_says_what_to_do():
    """vmap and jacrev over a solver raise from the depth of torch, or give the first sample's number of iterations.

    rtqichen/torchdiffeq#217, martenlienen/torchode#32, google/jaxopt#198.
    """
    W, x = matrix(), torch.randn(3, 6, dtype=F64)

    def layer(x):
        return dq.fixed_point(affine, torch.zeros(3, 6, dtype=F64), (W.detach(), x), **TIGHT).z

    def right(x):
        return solved(W.detach(), x)

    got = torch.func.grad(lambda x: layer(x).cos().sum())(x)
    assert close(got, torch.func.grad(lambda x: right(x).cos().sum())(x))
    t = torch.randn(3, 6, dtype=F64)
    for a, b in zip(torch.func.jvp(layer, (x,), (t,)), torch.func.jvp(right, (x,), (t,)), strict=True):
        assert close(a, b)
    with pytest.raises(NotImplementedError, match="dim 0 of z0"):
        torch.func.jacrev(layer)(x)
    with pytest.raises(NotImplementedError, match="dim 0 of z0"):
        torch.func.vmap(layer)(x.expand(2, 3, 6))
    # What it says to do: the six rows of a Jacobian are six samples.
    repeated = x[:1].expand(6, 6).clone().requires_grad_()
    z = dq.fixed_point(affine, torch.zeros(6, 6, dtype=F64), (W.detach(), repeated), **TIGHT).z
    (rows,) = torch.autograd.grad(z, repeated, torch.eye(6, dtype=F64))
    assert close(rows, torch.autograd.functional.jacobian(lambda x: right(x[None])[0], x[0]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_a_solve_changes_no_gradient(reentrant):
    """Checkpointing around or inside a layer with a backward of its own breaks (pytorch/pytorch#24005)."""
    layer, x = dq.DEQ(Cell(), **TIGHT), torch.randn(3, 6, dtype=F64, requires_grad=True)
    W = layer.cell.W
    right = torch.autograd.grad(settled(W, x).square().sum(), (W, x))
    z = checkpoint(lambda x: layer(x) * 1.0, x, use_reentrant=reentrant)
    z.square().sum().backward()
    assert close(z, settled(W, x)) and close(W.grad, right[0]) and close(x.grad, right[1])
    if reentrant:  # torch has no vjps of such a node, which a backward solve is made of
        return
    inside = dq.fixed_point(lambda z: checkpoint(layer.cell, z, x, use_reentrant=False), 0 * x.detach(), **TIGHT).z
    for got, exact in zip(torch.autograd.grad(inside.square().sum(), (W, x)), right, strict=True):
        assert close(got, exact)


def test_compiled_map_gives_the_same_values_and_gradients():
    """A compiled f is compiled anew at each evaluation, or its gradient is refused."""
    torch._dynamo.reset()
    cell, x = Cell(), torch.randn(3, 6, dtype=F64, requires_grad=True)
    compiled = torch.compile(cell, backend="eager")
    z = dq.fixed_point(compiled, torch.zeros(3, 6, dtype=F64), (x,), **TIGHT).z
    found = torch.autograd.grad(z.square().sum(), (cell.W, x))
    right = settled(cell.W, x)
    torch._dynamo.reset()
    assert close(z, right)
    for a, b in zip(found, torch.autograd.grad(right.square().sum(), (cell.W, x)), strict=True):
        assert close(a, b)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of torch.distributed's own
def test_distributed_data_parallel_reduces_the_gradient_of_an_equilibrium(tmp_path):
    """Hooks of DistributedDataParallel fire for a part of the parameters, or twice, in a backward of one's own."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, x = dq.DEQ(Cell(), **TIGHT), torch.randn(3, 6, dtype=F64)
        parallel = nn.parallel.DistributedDataParallel(layer)
        W = layer.cell.W
        (right,) = torch.autograd.grad(settled(W, x).square().sum(), W)
        for _ in range(2):
            W.grad = None
            parallel(x).square().sum().backward()
            assert close(W.grad, right)
    finally:
        dist.destroy_process_group()


# ---- files ----


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_layer_is_restored_from_its_state_dict_and_by_pickle():
    """torch.load refuses a layer's checkpoint since weights_only=True is the default."""
    layer, x = dq.DEQ(Cell(), solver=dq.Broyden(), **TIGHT), torch.randn(3, 6, dtype=F64)
    z = layer(x)
    assert close(z, settled(layer.cell.W, x)) and list(layer.state_dict()) == ["cell.W"]
    other = dq.DEQ(Cell(), solver=dq.Broyden(), **TIGHT)
    assert not torch.equal(other(x), z)
    other.load_state_dict(through_a_file(layer.state_dict()))
    for same in (other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(same(x), z)


@pytest.mark.parametrize("solver", [dq.Anderson(), dq.Broyden(), dq.Picard()], ids=lambda s: type(s).__name__)
def test_solve_that_was_cut_off_goes_on_from_a_file_as_if_it_had_not_been(solver):
    """A long solve is killed and starts again from its last iterate, without its history."""
    W, x = matrix(norm=0.95).detach(), torch.randn(3, 6, dtype=F64)
    states = [solver.init(torch.zeros(3, 6, dtype=F64), **TIGHT) for _ in range(2)]
    for _ in range(6):
        states[0].step(affine(states[0].z, W, x))
    states[1].load_state_dict(through_a_file(states[0].state_dict()))
    for state in states:
        while not state.done:
            state.step(affine(state.z, W, x))
    assert torch.equal(states[0].z, states[1].z) and states[0].nfe == states[1].nfe
    assert close(states[1].z, solved(W, x))
