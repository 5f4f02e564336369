"""Kernels stay inside their memory: odd sizes, strides, rows and dtypes, each next to a poisoned neighbour.

``make sanitize`` runs this file on an instrumented build; without one, the guards around f's output are what it checks.
"""

import pytest
import torch

import deqfast as dq

pytestmark = pytest.mark.sanitize

SOLVERS = {
    "picard": dq.Picard(damping=0.9),
    "anderson": dq.Anderson(m=4),
    "anderson-1-mixing": dq.Anderson(m=4, type=1, mixing=0.9),
    "anderson-2-m1": dq.Anderson(m=1, type=2),
    "anderson-f16": dq.Anderson(m=4, history_dtype=torch.float16),
    "anderson-int8": dq.Anderson(m=4, history_dtype=torch.int8),
    "anderson-m20": dq.Anderson(m=20, evict="oldest"),
    "broyden": dq.Broyden(memory=3),
    "broyden-first-step": dq.Broyden(scale="first_step"),
}
SIZES = [(1, 1), (17, 3), (33, 8), (16, 9), (5, 31), (3, 33), (2, 63), (1, 1000), (2, 1025), (1, 70001)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that ends, and begins, where NaNs do."""
    n = torch.Size(shape).numel()
    memory = torch.full((n + 32,), torch.nan, dtype=dtype)
    inside = memory[16 : 16 + n]
    return inside.zero_().view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_dense_states_of_every_size(solver, dtype):
    for B, N in SIZES:
        a = torch.linspace(-0.9, 0.9, N, dtype=dtype)

        def f(z, a=a):
            out = guarded(tuple(z.shape), z.dtype)
            return out.copy_(a * z + 1)

        sol = dq.fixed_point(f, guarded((B, N), dtype), solver=SOLVERS[solver], max_iter=9, backend="native")
        assert bool(sol.z.isfinite().all())
        assert bool((sol.residual < 1).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_strided_outputs_trees_and_complex_numbers(solver):
    for C, H, W in ((1, 1, 1), (3, 5, 7), (8, 33, 33)):

        def f(z):
            image, rest = z["image"], z["rest"]
            out = (0.5 * image + 1).contiguous(memory_format=torch.channels_last)
            return {"image": out, "rest": (0.3 * rest + 1j).transpose(1, 2).contiguous().transpose(1, 2)}

        z0 = {"image": torch.zeros(3, C, H, W), "rest": torch.zeros(3, H, 5, dtype=torch.complex64)}
        sol = dq.fixed_point(f, z0, solver=SOLVERS[solver], max_iter=9, backend="native")
        assert bool((sol.residual < 0.1).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_that_stop_or_are_dropped(solver):
    for B, N in ((5, 3), (19, 40), (3, 2000)):
        rate = torch.linspace(0, 0.99, B)[:, None]
        rate[1] = torch.nan

        def f(z, rate):
            return rate * z + 1

        sol = dq.fixed_point(
            f, torch.zeros(B, N), (rate,), solver=SOLVERS[solver], compact=True, max_iter=40, backend="native"
        )
        assert int(sol.status[1]) == dq.Status.NON_FINITE
        assert bool(sol.converged[0])
