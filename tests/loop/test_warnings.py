"""Every warning stands at the line that the user wrote."""

from __future__ import annotations

import linecache
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import deqfast as dq
from deqfast import graphs
from deqfast.warning import warn

Z = torch.zeros(3, 2)


def chain(z):  # each waits for the one behind it
    return 0.5 * torch.cat([z[1:], z[-1:]]) + torch.tensor([0.0, 0, 0, 0, 1])[:, None]


def hard_to_differentiate():
    W = torch.full((2, 2), 0.49, requires_grad=True)
    return dq.fixed_point(lambda z: z @ W + 1, Z, rtol=0.0, atol=1e-3, backward=dq.Implicit(max_iter=1)).z


def late(layer):
    return layer(torch.randn(3, 4))  # HERE layer


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = dq.DEQ(lambda z, x: torch.sin(3 * z) + x, solver="picard", max_iter=2)

    def forward(self, x):
        return self.layer(x)  # HERE module


def of_an_own_loop():
    state = dq.Anderson().init(torch.zeros(5, 2), rtol=1e-4)
    while not state.done:
        state.step(chain(state.z))  # HERE loop


def of_unroll():
    theta = torch.ones(1, requires_grad=True)
    dq.fixed_point(lambda z: chain(z) * theta, torch.zeros(5, 2), backward=dq.Unroll(), rtol=1e-4)  # HERE unroll


def of_a_step_size():
    x = torch.ones(3, 2)
    dq.joint_step_size(lambda z, x: 0.9 * z + x, lambda z, x: z.square().sum(1), Z, x, max_iter=2)  # HERE size


def of_a_joint_solve():
    chained = lambda z, x: chain(z) + 0 * x  # noqa: E731
    x, loss = torch.zeros(5, 2), lambda z, x: (z.square() + x.square()).sum(1)
    dq.joint_solve(chained, loss, x, x, step_size=0.1, damping=1.0, rtol=1e-4)  # HERE joint


CASES = {
    "layer": (lambda: late(dq.DEQ(lambda z, x: torch.sin(3 * z) + x, max_iter=2)), dq.ConvergenceWarning),
    "module": (lambda: Outer()(torch.randn(3, 4)), dq.ConvergenceWarning),
    "solve": (
        lambda: dq.fixed_point(chain, torch.zeros(5, 2), rtol=1e-4),  # HERE solve
        dq.CouplingWarning,
    ),
    "root": (
        lambda: dq.root(lambda z: chain(z) - z, torch.zeros(5, 2), rtol=1e-4),  # HERE root
        dq.CouplingWarning,
    ),
    "loop": (of_an_own_loop, dq.CouplingWarning),
    "unroll": (of_unroll, dq.CouplingWarning),
    "backward": (
        lambda: hard_to_differentiate().square().sum().backward(),  # HERE backward
        dq.GradientWarning,
    ),
    "size": (of_a_step_size, dq.GradientWarning),
    "joint": (of_a_joint_solve, dq.CouplingWarning),
    "mode": (
        lambda: dq.fixed_point(torch.cos, Z, mode="graph"),  # HERE mode
        graphs.ModeWarning,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_stands_at_the_line_of_the_user(case):
    torch.manual_seed(0)
    cause, category = CASES[case]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cause()
    found = [warning for warning in seen if warning.category is category]
    assert found, [str(warning.message) for warning in seen]
    for warning in found:
        assert warning.filename == __file__
        assert f"# HERE {case}" in linecache.getline(__file__, warning.lineno)


def test_filters_by_the_module_of_the_user_work():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=dq.CouplingWarning, module=re.escape(__name__))
        assert bool(dq.fixed_point(chain, torch.zeros(5, 2), rtol=1e-4).converged.all())


def test_a_thread_without_a_line_of_the_user_warns_all_the_same():
    with pytest.warns(dq.GradientWarning, match="far away") as seen:
        thread = threading.Thread(target=warn, args=("far away", dq.GradientWarning))
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_one_place_of_the_package_warns():
    package = Path(dq.__file__).parent
    told = [file.name for file in package.rglob("*.py") if re.search(r"\bwarnings\.warn", file.read_text())]
    assert told == ["warning.py"]
