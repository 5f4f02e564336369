"""The penalty is the norm it estimates; the spectral radius is right where power iteration is not."""

import math
import warnings

import pytest
import torch

import deqfast as dq

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_penalty_estimates_the_squared_norm_per_number():
    A = torch.randn(6, 6, dtype=F64)
    z = torch.randn(3, 6, dtype=F64)
    got = dq.jacobian_penalty(lambda z: z @ A, z, probes=4000, generator=generator())
    expected = A.square().sum() / 6
    assert got.shape == () and abs(float(got / expected) - 1) < 0.05


def test_penalty_of_one_probe_is_locuslabs():
    W = torch.randn(5, 5, dtype=F64)
    z = torch.randn(3, 5, dtype=F64, requires_grad=True)
    fz = torch.tanh(z @ W)
    v = torch.randn(3, 5, dtype=F64, generator=generator(3))
    expected = torch.autograd.grad(fz, z, v)[0].norm().square() / z.numel()
    got = dq.jacobian_penalty(lambda z: torch.tanh(z @ W), z.detach(), generator=generator(3))
    assert torch.allclose(got, expected)


def test_penalty_is_differentiable_in_parameters_and_state():
    W = torch.randn(4, 4, dtype=F64, requires_grad=True)
    z = torch.randn(2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda W, z: dq.jacobian_penalty(lambda z, W: torch.tanh(z @ W), z, 2, args=(W,), generator=generator()), (W, z)
    )
    dq.jacobian_penalty(lambda z: torch.tanh(z @ W), z.detach()).backward()
    assert W.grad.any() and z.grad is None


def test_penalty_on_an_attached_solution():
    W = (torch.randn(4, 4, dtype=F64) * 0.3).requires_grad_()
    x = torch.randn(2, 4, dtype=F64)

    def loss(W):
        z = dq.fixed_point(lambda z, W: torch.tanh(z @ W + x), torch.zeros_like(x), (W,), rtol=1e-13, max_iter=200).z
        return dq.jacobian_penalty(lambda z: torch.tanh(z @ W + x), z, generator=generator())

    assert torch.autograd.gradcheck(loss, (W,))


def test_penalty_without_gradients_trees_and_complex_numbers():
    with torch.no_grad():
        assert not dq.jacobian_penalty(torch.tanh, torch.randn(2, 3)).requires_grad
    z = (torch.randn(2, 3, dtype=F64), torch.randn(2, 2, dtype=torch.complex128))
    got = dq.jacobian_penalty(lambda z: (2 * z[0], 3j * z[1]), z, probes=1200, generator=generator())
    assert abs(float(got) / ((4 * 3 + 9 * 4) / 7) - 1) < 0.05


def rotations(n, radius):
    angles = torch.rand(n // 2, dtype=F64, generator=generator()) * 3
    blocks = [
        torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=F64) for a in angles.tolist()
    ]
    return radius * torch.block_diag(*blocks)


MATRICES = {
    "rotation": rotations(2, 0.9),
    "ten rotations of one modulus": rotations(20, 0.95),
    "random": torch.randn(40, 40, dtype=F64, generator=generator(1)) / 40**0.5,
    "symmetric with a pair of signs": torch.diag(torch.tensor([1.5, -1.5, 0.3, 0.1], dtype=F64)),
    "triangular far from normal": torch.triu(torch.full((20, 20), 0.4, dtype=F64), 1)
    + torch.diag(torch.linspace(0.1, 0.8, 20, dtype=F64)),
    "nilpotent": torch.diag(torch.ones(2, dtype=F64), 1),
    "zero": torch.zeros(5, 5, dtype=F64),
    "identity": torch.eye(30, dtype=F64),
    "one number": torch.tensor([[-0.7]], dtype=F64),
}


@pytest.mark.parametrize("name", MATRICES)
def test_spectral_radius(name):
    A = MATRICES[name]
    expected = torch.linalg.eigvals(A).abs().max()
    got = dq.spectral_radius(lambda z: z @ A.T, torch.randn(3, len(A), dtype=F64), vectors=40, generator=generator())
    tolerance = 1e-4 if name == "nilpotent" else 1e-7  # eigenvalues of a Jordan block are roots of the rounding
    assert got.shape == (3,) and (got - expected).abs().max() < tolerance


def test_spectral_radius_of_a_larger_matrix_is_close():
    for seed in range(2):
        A = torch.randn(120, 120, dtype=F64, generator=generator(seed)) / 120**0.5
        got = dq.spectral_radius(lambda z: z @ A.T, torch.randn(2, 120, dtype=F64), generator=generator())  # noqa: B023
        assert (got / torch.linalg.eigvals(A).abs().max() - 1).abs().max() < 0.05


def test_torchdeq_power_method_misses_a_complex_pair():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        power_method = pytest.importorskip("torchdeq.loss").power_method
    # Eigenvalues 0.9 exp(+-i a), but not normal: the norm ratio of a power iteration never settles.
    A = 0.9 * torch.tensor([[1.2, -2.0], [0.8, -0.5]], dtype=F64)
    expected = torch.linalg.eigvals(A).abs().max()
    ours = dq.spectral_radius(lambda z: z @ A.T, torch.randn(1, 2, dtype=F64))
    estimates = []
    for steps in range(40, 46):
        z = torch.ones(1, 2, dtype=F64, requires_grad=True)
        estimates.append(float(power_method(z @ A.T, z, n_iters=steps)[1]))
    assert abs(ours - expected) < 1e-12
    assert max(abs(e - float(expected)) for e in estimates) > 0.1


def test_samples_are_their_own():
    scale = torch.tensor([0.1, torch.nan, 2.0], dtype=F64)
    A = MATRICES["random"]
    got = dq.spectral_radius(lambda z: (z @ A.T) * scale[:, None], torch.ones(3, 40, dtype=F64), vectors=40)
    radius = torch.linalg.eigvals(A).abs().max()
    assert torch.allclose(got[::2], radius * scale[::2]) and got[1].isnan()


def test_generator_makes_it_repeatable():
    A = torch.randn(100, 100) / 10
    z = torch.randn(2, 100)
    a, b = (dq.spectral_radius(lambda z: z @ A, z, cycles=1, generator=generator(5)) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float32
    a, b = (dq.jacobian_penalty(lambda z: z @ A, z, generator=generator(5)) for _ in range(2))
    assert torch.equal(a, b)


def test_trees_complex_states_no_grad_and_args():
    z = {"a": torch.randn(2, 3, dtype=F64), "b": torch.randn(2, 2, dtype=torch.complex128)}
    with torch.no_grad():
        got = dq.spectral_radius(lambda z, s: {"a": 0.2 * z["a"], "b": s * z["b"]}, z, args=(0.7j,))
    assert torch.allclose(got, torch.full((2,), 0.7, dtype=F64))
    assert not got.requires_grad


def test_at_a_solution_it_tells_how_plain_iteration_will_do():
    W = torch.randn(16, 16, dtype=F64) * 0.15
    x = torch.randn(2, 16, dtype=F64)

    def f(z):
        return torch.tanh(z @ W + x)

    z = dq.fixed_point(f, torch.zeros_like(x), rtol=1e-13).z
    radius = dq.spectral_radius(f, z)
    trace = dq.fixed_point(f, z + 1e-3, solver="picard", rtol=1e-10, max_iter=200, trace=True).trace
    rate = (trace[9] / trace[0]) ** (1 / 9)
    assert ((rate - radius).abs() < 0.15).all()


def test_map_that_does_not_depend_on_z():
    assert not dq.spectral_radius(torch.ones_like, torch.randn(2, 3)).any()
    assert dq.jacobian_penalty(torch.ones_like, torch.randn(2, 3)) == 0
    assert dq.spectral_radius(torch.cos, torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: dq.jacobian_penalty(torch.cos, torch.ones(1, 1), 0), ValueError, "probes must be at least 1, got 0"),
        (lambda: dq.jacobian_penalty(torch.cos, torch.ones(1, 1), 1.5), TypeError, "probes must be an int, got float"),
        (lambda: dq.jacobian_penalty(3, torch.ones(1, 1)), TypeError, "f must be callable"),
        (lambda: dq.jacobian_penalty(torch.cos, torch.ones(1, dtype=torch.int64)), TypeError, "z must be float64"),
        (lambda: dq.spectral_radius(torch.cos, torch.ones(1, 1), vectors=0), ValueError, "vectors must be at least 1"),
        (lambda: dq.spectral_radius(torch.cos, torch.ones(1, 1), cycles=None), TypeError, "cycles must be an int"),
        (lambda: dq.spectral_radius(lambda z: z[:, :1], torch.ones(1, 2)), ValueError, r"f\(z\) must have the shape"),
    ],
)
def test_wrong_calls_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("call", [dq.spectral_radius, dq.jacobian_penalty])
def test_inference_mode_is_refused_not_taken_for_a_map_without_a_jacobian(call):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        call(lambda z: 2 * z, torch.ones(1, 3))


@pytest.mark.parametrize("call", [dq.spectral_radius, dq.jacobian_penalty])
def test_args_that_are_not_a_tuple_are_refused(call):
    with pytest.raises(TypeError, match=r"args must be a tuple, got Tensor; write args=\(x,\)"):
        call(lambda z, x: 2 * z + x, torch.ones(2, 3), args=torch.ones(2, 3))
