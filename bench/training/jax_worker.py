"""JAX's rows, in an interpreter of their own: `python jax_worker.py NET`; needs neither torch nor deqfast.

Every row is one jitted program for solve, loss and gradients. Reads names of rows and counts of calls from its input, a
line each, and answers with seconds a call; the empty line ends it. Between two lines nothing runs here, so that rows
take turns with those of another process.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools
import json
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import jaxopt
import lineax
import numpy as np
import optimistix
from nets import NETS, RTOL

LIMIT = 100
COLUMNS = 5
PACKAGES = ("jax", "jaxopt", "optimistix", "lineax")


def mlp(p, z, x):
    return jnp.tanh(z @ p["w"].T + p["b"] + x)


def conv(p, z, x):
    apply = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(apply(jax.nn.relu(apply(z, p["w"]) + p["b"]), p["v"]) + x)


def attention(p, z, x):
    q, k, v = z @ p["q"], z @ p["k"], z @ p["v"]
    return jnp.tanh(jax.nn.softmax(q @ k.mT / 8, axis=-1) @ v + z @ p["w"] + x)


MAPS = {"mlp": mlp, "conv": conv, "attention": attention}


def within(g, fz):
    """Which samples of (B, N) are within the tolerance."""
    return jnp.sum(g * g, 1) <= RTOL**2 * jnp.sum(fz * fz, 1)


def plain(f, z0):
    """Batched iteration; every sample stops at its own tolerance, the loop with the last one."""

    def body(carry):
        z, k, _ = carry
        fz = f(z)
        return fz, k + 1, jnp.all(within(fz - z, fz))

    z, k, _ = jax.lax.while_loop(lambda c: ~c[2] & (c[1] < LIMIT), body, (z0, 0, False))
    return z, k


def anderson(f, z0):
    """Batched Anderson mixing in difference form, written for one program.

    A ring of columns a sample, normal equations with a small relative ridge, Cholesky; the loop ends when every sample
    is within its tolerance, and returns f there.
    """
    batch, n = z0.shape
    columns = min(COLUMNS, n)

    def body(carry):
        z, k, _, dg, df, g_prev, f_prev = carry
        fz = f(z)
        g = fz - z
        slot = (k - 1) % columns
        keep = k > 0
        dg = jnp.where(keep, jax.lax.dynamic_update_index_in_dim(dg, g - g_prev, slot, 1), dg)
        df = jnp.where(keep, jax.lax.dynamic_update_index_in_dim(df, fz - f_prev, slot, 1), df)
        gram = jnp.einsum("bin,bjn->bij", dg, dg)
        diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
        # an empty column has a row of zeros: its diagonal becomes 1
        gram = gram + jax.vmap(jnp.diag)(jnp.where(diagonal > 0, 1e-7 * jnp.max(diagonal, 1, keepdims=True), 1.0))
        weights = jax.scipy.linalg.cho_solve(
            (jnp.linalg.cholesky(gram), True), jnp.einsum("bin,bn->bi", dg, g)[..., None]
        )
        done = jnp.all(within(g, fz))
        z_next = jnp.where(done, fz, fz - jnp.einsum("bi,bin->bn", weights[..., 0], df))
        return z_next, k + 1, done, dg, df, g, fz

    empty = jnp.zeros((batch, columns, n), z0.dtype)
    start = (z0, 0, False, empty, empty, z0, z0)
    z, k, *_ = jax.lax.while_loop(lambda c: ~c[2] & (c[1] < LIMIT), body, start)
    return z, k


def by_hand(solver, f, c):
    """The training step of a solver of this file, its backward by the same solver under a custom_vjp."""

    def flat(map_, shape):
        return lambda z: map_(z.reshape(shape)).reshape(shape[0], -1)

    def forward(p, x):
        z0 = jnp.zeros((x.shape[0], x.size // x.shape[0]), x.dtype)
        z, k = solver(flat(lambda z: f(p, z, x), x.shape), z0)
        z = z.reshape(x.shape)
        return (z, k), (p, x, z)

    def backward(kept, cotangent):
        p, x, z = kept
        g = cotangent[0]
        _, pull_z = jax.vjp(lambda z: f(p, z, x), z)
        u, _ = solver(flat(lambda u: pull_z(u)[0] + g, x.shape), g.reshape(x.shape[0], -1))
        _, pull = jax.vjp(lambda p: f(p, z, x), p)
        return *pull(u.reshape(x.shape)), None

    solve = jax.custom_vjp(lambda p, x: forward(p, x)[0])
    solve.defvjp(forward, backward)

    def loss(p, x):
        z, k = solve(p, x)
        return jnp.sum(c * z), (z, k)

    return loss


def with_jaxopt(f, c, tol, size):
    """jaxopt's Anderson on the batch as one problem, its linear solve by bicgstab: the fastest that it offers."""
    backward = functools.partial(jaxopt.linear_solve.solve_bicgstab, tol=RTOL, maxiter=LIMIT)

    def loss(p, x):
        solver = jaxopt.AndersonAcceleration(
            lambda z, p: f(p, z, x), history_size=COLUMNS, maxiter=LIMIT, tol=tol, ridge=1e-7 * size,
            implicit_diff=True, implicit_diff_solve=backward,
        )  # fmt: skip
        found = solver.run(jnp.zeros_like(x), p)
        return jnp.sum(c * found.params), (found.params, found.state.iter_num)

    return loss


def with_jaxopt_iteration(f, c, tol, size):
    """jaxopt's plain iteration, the backward as above."""
    backward = functools.partial(jaxopt.linear_solve.solve_bicgstab, tol=RTOL, maxiter=LIMIT)

    def loss(p, x):
        solver = jaxopt.FixedPointIteration(
            lambda z, p: f(p, z, x), maxiter=LIMIT, tol=tol, implicit_diff=True, implicit_diff_solve=backward
        )
        found = solver.run(jnp.zeros_like(x), p)
        return jnp.sum(c * found.params), (found.params, found.state.iter_num)

    return loss


def with_optimistix(f, c, tol, size):
    """optimistix's plain iteration, the only one it has for fixed points; GMRES behind its gradient.

    lineax's BiCGStab breaks down on these.
    """
    linear = lineax.GMRES(rtol=RTOL, atol=RTOL, max_steps=LIMIT, restart=LIMIT)

    def loss(p, x):
        found = optimistix.fixed_point(
            lambda z, p: f(p, z, x), optimistix.FixedPointIteration(rtol=RTOL, atol=RTOL), jnp.zeros_like(x), p,
            max_steps=LIMIT, adjoint=optimistix.ImplicitAdjoint(linear_solver=linear), throw=False,
        )  # fmt: skip
        return jnp.sum(c * found.value), (found.value, found.stats["num_steps"])

    return loss


def rows(f, c, z):
    """Losses by row name; ``z`` is the solution, whose size makes jaxopt's absolute tolerance a relative one."""
    tol, size = RTOL * float(jnp.linalg.norm(z)), float(jnp.sum(z * z))
    return {
        "JAX by hand, Anderson": by_hand(anderson, f, c),
        "JAX by hand, plain iteration": by_hand(plain, f, c),
        "jaxopt, Anderson": with_jaxopt(f, c, tol, size),
        "jaxopt, plain iteration": with_jaxopt_iteration(f, c, tol, size),
        "optimistix, plain iteration": with_optimistix(f, c, tol, size),
    }


def main(name: str) -> None:
    net = NETS[name]()
    f, x, c = MAPS[net.kind], jnp.asarray(net.x), jnp.asarray(net.c)
    p = {key: jnp.asarray(value) for key, value in net.params.items()}
    z = jnp.zeros_like(x)
    for _ in range(LIMIT):
        z = f(p, z, x)
    steps, facts = {}, {}
    for row, loss in rows(f, c, z).items():
        try:
            steps[row] = jax.jit(jax.value_and_grad(loss, has_aux=True))
            (_, (found, k)), grads = jax.block_until_ready(steps[row](p, x))
        except Exception as error:  # a rival that cannot is a row that says so
            facts[row] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            del steps[row]
            continue
        gap = np.asarray(f(p, found, x) - found, dtype=np.float64).reshape(x.shape[0], -1)
        own = np.asarray(f(p, found, x), dtype=np.float64).reshape(x.shape[0], -1)
        residual = np.linalg.norm(gap, axis=1) / np.linalg.norm(own, axis=1)
        gradient = {key: np.asarray(value, dtype=np.float64).ravel().tolist() for key, value in grads.items()}
        facts[row] = {"evaluations": int(k), "residual": float(residual.max()), "gradient": gradient}
    print(json.dumps({"rows": facts, "versions": {name: version(name) for name in PACKAGES}}), flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        row, count = line.rstrip("\n").split("\t")
        start = time.perf_counter()
        for _ in range(int(count)):
            jax.block_until_ready(steps[row](p, x))
        print((time.perf_counter() - start) / int(count), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
