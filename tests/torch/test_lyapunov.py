"""Stable dynamics: a convex potential, and a field along which V decays in exact and in floating-point arithmetic."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils import parametrizations

import deqfast as dq

N = 6
DTYPES = [torch.float32, torch.float64]


class Field(torch.nn.Module):
    def __init__(self, n=N):
        super().__init__()
        self.linear = torch.nn.Linear(n, n)

    def forward(self, z, x, shift=0.0):
        return torch.tanh(self.linear(z) + x + shift)


def bowl(z):
    """A potential without a closed form; its minimum is not at 0."""
    return torch.logsumexp(torch.cat([z, -2 * z], 1), 1) + (z - 1).square().sum(1)


def flow(dtype=torch.float64, n=N, field=None, potential=None, **options):
    return dq.nn.LyapunovProjection(field or Field(n), potential or dq.nn.ICNN(n, hidden=(7, 5)), **options).to(dtype)


def random_states(count, dtype, n=N):
    """Of very different sizes, and x."""
    z = torch.randn(count, n, dtype=dtype) * torch.logspace(-3, 2, count, dtype=dtype)[:, None]
    return z, torch.randn(count, n, dtype=dtype)


def by_hand(module, z, x):
    """P as its docstring writes it, with autograd's gradient of V."""
    z = z.detach().requires_grad_()
    rise = module.potential(z) - module.potential(torch.zeros_like(z[:1]))
    width = module.width
    smooth = torch.where(rise < width, rise.clamp(min=0) ** 2 / (2 * width), rise - width / 2)
    v = smooth + module.eps * z.square().sum(1)
    (slope,) = torch.autograd.grad(v.sum(), z)
    rate = module.field(z, x).detach()
    excess = (slope * rate).sum(1) + module.alpha * v.detach()
    return v.detach(), slope, rate - slope * (excess.relu() / slope.square().sum(1))[:, None], excess


# ICNN


def test_icnn_is_convex_on_random_segments():
    torch.manual_seed(1)
    net = dq.nn.ICNN(N, hidden=(16, 16, 8)).double()
    a, b = 5 * torch.randn(2, 2000, N, dtype=torch.float64)
    t = torch.rand(2000, dtype=torch.float64)
    chord = (1 - t) * net(a) + t * net(b)
    on_it = net((1 - t)[:, None] * a + t[:, None] * b)
    assert (on_it - chord <= 1e-12 * (1 + chord.abs())).all()
    assert (chord - on_it > 1e-3).float().mean() > 0.5  # and not merely affine
    assert ((net.value_and_gradient(b)[1] - net.value_and_gradient(a)[1]) * (b - a)).sum(1).min() >= 0


def test_icnn_stays_convex_while_it_is_trained():
    """What it is pulled to is concave, so that its weights run to the edge; none turns negative, all still move."""
    net = dq.nn.ICNN(2, hidden=(8, 8)).double()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.1)
    z = torch.randn(256, 2, dtype=torch.float64)
    for _ in range(100):
        optimiser.zero_grad()
        (net(z) + z.square().sum(1)).square().mean().backward()
        assert all(raw.grad.abs().min() > 0 for raw in net.raw)
        optimiser.step()
    assert all((weight >= 0).all() for weight in net.path())
    middle = net((z[::2] + z[1::2]) / 2)
    assert (middle - (net(z[::2]) + net(z[1::2])) / 2).max() < 1e-12


def test_icnn_shape_and_gradients_of_every_order():
    net = dq.nn.ICNN(3, hidden=(4, 3)).double()
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert net(z).shape == (5,)
    names = [name for name, _ in net.named_parameters()]

    def run(z, *parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (z,))

    inputs = (z, *net.parameters())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("hidden", [(5,), (5, 4), (8, 8, 8)])
def test_icnn_closed_gradient_is_autograds(hidden):
    net = dq.nn.ICNN(N, hidden=hidden).double()
    z = torch.randn(9, N, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(net(z).sum(), z)
    with torch.no_grad():
        value, gradient = net.value_and_gradient(z)
    assert not gradient.requires_grad
    torch.testing.assert_close(value, net(z).detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


def test_icnn_with_another_activation():
    net = dq.nn.ICNN(N, hidden=(5, 4), activation=torch.nn.Softplus(beta=3)).double()
    z = torch.randn(9, N, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(net(z).sum(), z)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value, gradient = net.value_and_gradient(z)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(value, net(z).detach())


def test_icnn_refuses_what_it_cannot_be():
    for activation, word in (
        (torch.tanh, "convex"),
        (torch.nn.functional.gelu, "nondecreasing"),
        (torch.abs, "nondecr"),
    ):
        with pytest.raises(ValueError, match=word):
            dq.nn.ICNN(4, activation=activation)
    with pytest.raises(ValueError, match="at least one width"):
        dq.nn.ICNN(4, hidden=())
    with pytest.raises(ValueError, match="features must be at least 1"):
        dq.nn.ICNN(0)
    with pytest.raises(ValueError, match=r"z must be \(B, 4\).*got \(2, 5\)"):
        dq.nn.ICNN(4)(torch.zeros(2, 5))


# V


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("potential", [None, bowl])
def test_v_is_anchored_at_zero(dtype, potential):
    module = flow(dtype, potential=potential)
    z = torch.randn(5, N, dtype=dtype)
    z[2] = 0
    v, slope = module.value_and_gradient(z)
    assert v[2] == 0 and (slope[2] == 0).all()
    rest = torch.tensor([0, 1, 3, 4])
    assert (v[rest] >= module.eps * z[rest].square().sum(1)).all() and slope[rest].norm(dim=1).min() > 0


@pytest.mark.parametrize("width", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("potential", [None, bowl])
def test_v_its_gradient_and_the_projection_are_those_of_the_formula(width, potential):
    module = flow(alpha=0.7, width=width, eps=0.01, potential=potential)
    z, x = random_states(200, torch.float64)
    v, slope, projected, excess = by_hand(module, z, x)
    assert (excess > 0).any() and (excess < 0).any()
    got_v, got_slope = module.value_and_gradient(z)
    torch.testing.assert_close(got_v, v, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(got_slope, slope, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(module(z, x), projected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(module.lyapunov(z), v, rtol=1e-9, atol=1e-18)
    untouched = excess < 0
    assert torch.equal(module(z, x)[untouched], module.field(z, x)[untouched])


# The claim


@pytest.mark.parametrize("potential", [None, bowl])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 10.0])
def test_v_decays_at_its_rate_in_float32(alpha, potential):
    """dV/dt + alpha V <= 1e-6 (||grad V|| ||F|| + alpha V): of its own V in float32, dot products in float64."""
    module = flow(torch.float32, alpha=alpha, potential=potential)
    z, x = random_states(10_000, torch.float32)
    with torch.no_grad():
        v, slope = (t.double() for t in module.value_and_gradient(z))
        rate, projected = module.field(z, x).double(), module(z, x).double()
    scale = slope.norm(dim=1) * rate.norm(dim=1) + alpha * v
    excess = (slope * projected).sum(1) + alpha * v
    assert (excess <= 1e-6 * scale).all(), (excess / scale).max()
    before = (slope * rate).sum(1) + alpha * v
    assert (before > 1e-6 * scale).double().mean() > 0.2  # there was something to take away


def test_v_decays_for_the_v_of_float64_too():
    """The same states and P of float32, judged by V in float64: as well as float32 knows the rise of g above g(0)."""
    module = flow(torch.float32, alpha=0.5)
    z, x = random_states(10_000, torch.float32)
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        v, slope = exact.value_and_gradient(z.double())
        rate, projected = module.field(z, x).double(), module(z, x).double()
    scale = slope.norm(dim=1) * rate.norm(dim=1) + module.alpha * v
    excess = ((slope * projected).sum(1) + module.alpha * v) / scale
    assert excess[z.norm(dim=1) > 1].max() < 5e-5 and excess[z.norm(dim=1) > 0.1].max() < 1e-3


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15])
def test_no_square_of_the_gradient_vanishes_or_overflows(size):
    module = flow(torch.float32, potential=lambda z: z.abs().sum(1) * 0.0)
    z, x = size * torch.nn.functional.normalize(torch.randn(20, N)), torch.randn(20, N)
    projected = module(z, x)
    assert projected.isfinite().all()
    outward = (projected * z / size).sum(1)
    assert (outward <= 1e-6 * module.field(z, x).norm(dim=1)).all()


def test_zero_is_an_equilibrium_and_its_gradients_are_numbers():
    module = flow()
    z = torch.zeros(3, N, dtype=torch.float64)
    z[1] = 1.0
    z.requires_grad_()
    x = torch.randn(3, N, dtype=torch.float64)
    out = module(z, x)
    assert (out[[0, 2]] == 0).all() and out[1].abs().max() > 0
    (gz,) = torch.autograd.grad(out.square().sum(), z, create_graph=True)
    gz.square().sum().backward()
    assert gz.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_v_never_rises_along_small_euler_steps():
    """Where V is above what a step of this size resolves; the field alone does not make it fall."""
    module, alpha, step = flow(alpha=0.5), 0.5, 2e-3
    euler = module.as_map(step)
    z, x = torch.randn(64, N, dtype=torch.float64) * 3, torch.randn(64, N, dtype=torch.float64)
    free, history, freely = z, [], []
    with torch.no_grad():
        for _ in range(1000):
            history.append(module.lyapunov(z))
            freely.append(module.lyapunov(free))
            z, free = euler(z, x), free + step * module.field(free, x)
    v, without = torch.stack(history), torch.stack(freely)
    resolved = v > 1e-2
    assert resolved[0].sum() > 50 and resolved[-1].sum() > 20
    assert (v.diff(dim=0) <= 0)[resolved[:-1]].all()
    time = step * torch.arange(1000, dtype=torch.float64)[:, None]
    assert (v <= 1.01 * v[0] * torch.exp(-alpha * time))[resolved].all()
    assert (without.diff(dim=0) > 0)[:, resolved[0]].any(0).double().mean() > 0.3


# Gradients


@pytest.mark.parametrize("potential", [None, bowl])
def test_gradients_of_every_order(potential):
    torch.manual_seed(1)
    module = flow(n=3, alpha=0.5, potential=potential)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    *_, excess = by_hand(module, z, x)
    assert excess.abs().min() > 1e-4 and (excess > 0).any() and (excess < 0).any()  # away from the kink, on both sides
    rise = module.potential(z) - module.potential(torch.zeros_like(z[:1]))
    assert rise.abs().min() > 1e-2 and (rise - 1).abs().min() > 1e-2
    names = [name for name, _ in module.named_parameters()]

    def run(z, x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (z, x))

    inputs = (z, x, *module.parameters())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("potential", [None, bowl])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch loading its own
def test_grad_modes_and_transforms_agree(potential):
    module = flow(potential=potential)
    z, x = random_states(8, torch.float64)
    expected = module(z, x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = module(z.clone(), x)
            assert not got.requires_grad
            torch.testing.assert_close(got, expected)
    v = torch.randn_like(z)
    _, forward, *_ = torch.func.jvp(lambda z: module(z, x), (z,), (v,))
    _, pull, *_ = torch.func.vjp(lambda z: module(z, x), z)
    torch.testing.assert_close((pull(v)[0] * v).sum(), (forward * v).sum())
    one = torch.func.vmap(lambda z, x: module(z[None], x[None])[0])
    torch.testing.assert_close(one(z, x), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch loading its own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("potential", [None, bowl])
def test_compiled_into_one_graph(potential):
    module = flow(potential=potential)
    compiled = torch.compile(lambda z, x: 1.0 * module.as_map(0.1)(z, x), backend="aot_eager", fullgraph=True)
    z, x = random_states(8, torch.float64)
    z.requires_grad_()
    expected = module.as_map(0.1)(z, x)
    torch.testing.assert_close(compiled(z, x), expected)
    (got,) = torch.autograd.grad(compiled(z, x).square().sum(), z)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), z)[0])


def test_samples_do_not_see_each_other():
    module = flow()
    z, x = random_states(8, torch.float64)
    torch.testing.assert_close(torch.cat([module(z[i : i + 1], x[i : i + 1]) for i in range(8)]), module(z, x))


def test_state_of_several_dimensions():
    module = flow(alpha=0.5, field=lambda z, x: torch.tanh(z + x))
    image, x = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    wide = module(image, x)
    assert wide.shape == image.shape and module.value_and_gradient(image)[1].shape == image.shape
    torch.testing.assert_close(wide.flatten(1), module(image.flatten(1), x.flatten(1)))


@pytest.mark.parametrize("potential", [None, bowl])
def test_under_autocast_the_claim_holds(potential):
    module = flow(torch.float32, alpha=0.5, potential=potential)
    z, x = random_states(1000, torch.float32)
    dtypes = []
    module.field.register_forward_hook(lambda *call: dtypes.append(call[0].linear(call[1][0]).dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        projected = module(z, x)
        half = module(z.bfloat16(), x)
        rate = module.field(z, x).float()
    assert dtypes[0] == torch.bfloat16 and projected.dtype == torch.float32 and half.dtype == torch.bfloat16
    v, slope = module.value_and_gradient(z)
    excess = (slope.double() * projected.double()).sum(1) + module.alpha * v.double()
    assert (excess <= 1e-6 * (slope.norm(dim=1) * rate.norm(dim=1) + module.alpha * v)).all()


def test_training_under_autocast():
    module = flow(torch.float32)
    z, x = random_states(16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(z, x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.field.parameters())


# As the cell of a solve


def test_a_converged_solve_returns_the_anchor():
    """And has forgotten x; P is continuous at 0, for the field vanishes there."""
    W = torch.randn(N, N, dtype=torch.float64)
    module = flow(alpha=1.0, eps=0.1, field=lambda z, x: torch.tanh(z @ W) * x)
    z0, x = torch.randn(2, 8, N, dtype=torch.float64)
    sol = dq.fixed_point(module.as_map(0.05), z0, (x,), solver="picard", rtol=0, atol=1e-9, max_iter=3000)
    assert sol.converged.all() and sol.z.norm(dim=1).max() < 1e-6


@pytest.mark.parametrize("step", [0.1, 0.01])
def test_euler_steps_stall_around_the_anchor_where_the_field_does_not_vanish(step):
    module = flow(alpha=1.0, eps=0.1)
    z0, x = torch.randn(2, 8, N, dtype=torch.float64)
    sol = dq.fixed_point(
        module.as_map(step), z0, (x,), solver="picard", rtol=0, max_iter=int(60 / step), returns="last"
    )
    assert not sol.converged.any()
    assert sol.z.norm(dim=1).max() < 2 * step * module.field(0 * z0, x).norm(dim=1).max()


def test_deq_reads_a_state_at_a_finite_time():
    """The forward of some Euler steps by hand, and their gradients; it starts at x, for zeros would stay there."""
    module = flow(alpha=0.5)
    steps = 10
    layer = dq.DEQ(
        module.as_map(0.1),
        solver="picard",
        rtol=0,
        max_iter=steps + 1,
        returns="last",
        backward=dq.Unroll(),
        warn=False,
    )
    assert {id(p) for p in module.parameters()} == {id(p) for p in layer.parameters()}
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    by_loop = x
    for _ in range(steps):
        by_loop = by_loop + 0.1 * module(by_loop, x)
    torch.testing.assert_close(z, by_loop)
    inputs = (x, *module.parameters())
    got = torch.autograd.grad(z.square().sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(by_loop.square().sum(), inputs, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_field_may_choose_the_start():
    module = flow()
    module.field.init = lambda x: 2 * x
    assert torch.equal(module.as_map(0.1).init(torch.ones(1, N)), torch.full((1, N), 2.0))


def test_orthogonal_head():
    """As the paper has it: torch's parametrization keeps it orthogonal while it is trained."""
    module, head = flow(torch.float32), parametrizations.orthogonal(torch.nn.Linear(N, N))
    step, x = module.as_map(0.1), torch.randn(32, N)
    optimiser = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.05)
    start = head.weight.detach().clone()
    for _ in range(20):
        optimiser.zero_grad()
        (head(step(step(x, x), x)) - 1).square().mean().backward()
        optimiser.step()
    assert (head.weight @ head.weight.mT - torch.eye(N)).norm() < 1e-5
    assert (head.weight - start).norm() > 0.1


def test_saved_copied_and_pickled():
    module = flow()
    z, x = random_states(4, torch.float64)
    other = flow()
    other.load_state_dict(module.state_dict())
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(z, x), module(z, x))
    assert "alpha=1.0" in repr(module) and "step=0.1" in repr(module.as_map(0.1)) and "hidden=(7, 5)" in repr(module)


def test_options_that_cannot_be():
    field, potential = Field(), dq.nn.ICNN(N)
    for options, error, words in (
        ({"alpha": -0.1}, ValueError, "alpha must be finite and not negative, got -0.1"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"alpha": "fast"}, TypeError, "alpha must be a number"),
        ({"eps": 0.0}, ValueError, "eps must be above 0"),
        ({"width": 0}, ValueError, "width must be above 0"),
    ):
        with pytest.raises(error, match=words):
            dq.nn.LyapunovProjection(field, potential, **options)
    with pytest.raises(TypeError, match="field must be callable"):
        dq.nn.LyapunovProjection(None, potential)
    with pytest.raises(TypeError, match="potential must be callable"):
        dq.nn.LyapunovProjection(field, 3)
    with pytest.raises(ValueError, match="step must be above 0"):
        flow().as_map(0)


@pytest.mark.parametrize(
    ("field", "potential", "error", "words"),
    [
        (lambda z, x: z[:, :2], bowl, ValueError, r"field must return the shape of z, \(4, 6\), got \(4, 2\)"),
        (lambda z, x: (z, x), bowl, TypeError, "field must return a tensor, got tuple"),
        (lambda z, x: z, lambda z: z[:, :1], ValueError, r"a number a sample, \(4,\), got \(4, 1\)"),
        (lambda z, x: z, lambda z: z.sum(), ValueError, r"a number a sample, \(4,\), got \(\)"),
        (lambda z, x: z, lambda z: None, TypeError, "potential must return a tensor"),
        (lambda z, x: z, dq.nn.ICNN(5), ValueError, "made for 5 features, a sample of z has 6"),
    ],
)
def test_what_field_and_potential_return_is_checked(field, potential, error, words):
    module = dq.nn.LyapunovProjection(field, potential)
    with pytest.raises(error, match=words):
        module(torch.ones(4, N), torch.ones(4, N))


def test_state_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="at least two dimensions"):
        flow().value_and_gradient(torch.ones(N, dtype=torch.float64))
