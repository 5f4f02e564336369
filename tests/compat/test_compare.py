"""``dq.compare``: everybody solves the user's own problem to the same true residual, and the verdict is honest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deqfast as dq
from deqfast.compare import Comparison, Row, textbook
from deqfast.compare.__main__ import main
from deqfast.compare.case import Case
from deqfast.compare.precise import Precise, flat_gradient
from deqfast.compare.verdict import verdict

B, N = 8, 24
BUFFER = torch.empty(3, 4)
QUICK = {"rounds": 3, "seconds": 0.0}
TORCHDEQ = ("torchdeq.anderson", "torchdeq.broyden", "torchdeq.fixed_point_iter")


def layer(radius: float = 0.9, dtype: torch.dtype = torch.float32):
    W = torch.nn.Parameter(radius * torch.linalg.qr(torch.randn(N, N, dtype=dtype)).Q)
    x = torch.randn(B, N, dtype=dtype)
    return lambda z: torch.tanh(z @ W + x), torch.zeros(B, N, dtype=dtype), W, x


def plain(steps: int):
    def iterate(f, z0):
        z = z0
        for _ in range(steps):
            z = f(z)
        return z

    return iterate


@pytest.mark.parametrize("old", [*TORCHDEQ, "locuslab"])
def test_everybody_reaches_the_target_by_a_residual_measured_outside(old):
    if old in TORCHDEQ:
        pytest.importorskip("torchdeq")
    f, z0, *_ = layer()
    found = dq.compare(f, z0, old=old, rtol=1e-3, **QUICK)
    assert [row.old for row in found.rows] == [True, False, False, False]
    for row in found.rows:
        assert row.reached and row.residual <= 1e-3 and not row.failed
        assert row.evaluations == len(row.trace) and row.products > 0
        assert row.error < 2e-2 and row.gradient_error < 2e-2
        assert len(row.seconds) == len(row.step_seconds) == 3 and min(row.seconds) > 0
    assert found.reference.startswith("float64")
    assert (
        found.old.operations > 5 * found.rows[1].operations
    )  # the fused step is one call, and none of the dispatcher's


def test_who_returns_the_image_of_what_he_judged_is_not_made_to_do_more_than_others():
    pytest.importorskip("torchdeq")
    slope = torch.full((1, 2), 0.1)
    found = dq.compare(lambda z: slope * z + 1, torch.zeros(3, 2), old=TORCHDEQ[2], solvers=["picard"], **QUICK)
    assert found.target == 1e-4
    assert [row.evaluations for row in found.rows] == [4, 5]  # 1.111 has the residual 1e-4 after four applications
    assert found.old.residual <= 1e-4 < found.old.rtol


def test_residual_is_that_of_the_float64_map():
    f, z0, W, x = layer()
    case = Case(f, z0)
    precise = Precise(case, 1e-4)
    assert precise.name == "float64"
    z = plain(7)(f, z0).detach()
    wide = z.double()
    image = torch.tanh(wide @ W.detach().double() + x.double())
    expected = ((image - wide).norm(dim=1) / image.norm(dim=1)).max()
    assert precise.residual(z) == pytest.approx(float(expected), rel=1e-12)


def test_gradient_of_the_reference_is_the_exact_one():
    f, z0, W, x = layer()
    found = dq.compare(f, z0, old=plain(60), rtol=1e-5, loss=lambda z: z.sum(), **QUICK)
    V = W.detach().double().requires_grad_()
    z = z0.double()
    for _ in range(300):
        z = torch.tanh(z @ V + x.double())
    (exact,) = torch.autograd.grad(z.sum(), V)
    f32 = dq.fixed_point(f, z0, rtol=found.rows[1].rtol).z.sum()
    (ours,) = torch.autograd.grad(f32, W)
    expected = float((ours.double() - exact).norm() / exact.norm())
    assert found.rows[1].gradient_error == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    "f",
    [
        lambda z: BUFFER.copy_(0.5 * z + 1).clone(),
        lambda z: (0.5 * z + 1).float(),
        lambda z: torch.from_numpy(0.5 * z.numpy().astype("float32") + 1),
    ],
    ids=["in place", "casts", "numpy"],
)
def test_a_map_that_has_no_float64_is_judged_in_its_own_precision(f):
    found = dq.compare(f, torch.zeros(3, 4), old=plain(10), **QUICK)
    assert found.reference.startswith("float32")
    assert all(row.reached for row in found.rows)
    assert found.rows[0].residual == pytest.approx(2.0**-11, rel=1e-2)


def test_target_is_what_a_solver_of_the_users_own_reaches():
    f, z0, *_ = layer()
    found = dq.compare(f, z0, old=plain(12), params=[], **QUICK)
    z = plain(12)(f, z0)
    assert found.target == found.old.residual == pytest.approx(Precise(Case(f, z0), 1.0).residual(z))
    assert found.old.evaluations == 12 and found.old.rtol is None
    assert all(row.residual <= found.target for row in found.rows)
    assert found.old.products is None and not found.old.step_seconds  # params=[]


def test_a_solver_that_does_not_reach_it_is_marked_and_not_recommended():
    f, z0, *_ = layer()
    found = dq.compare(f, z0, old=plain(3), rtol=1e-5, **QUICK)
    assert not found.old.reached
    assert found.verdict.startswith("use deqfast")
    assert "iterate did not reach 1.0e-05" in found.verdict and "* iterate: did not reach" in str(found)
    found = dq.compare(lambda z: 3 * z + 1, z0, old=plain(60), solvers=["picard"], rtol=1e-6, **QUICK)
    assert found.best is None and found.verdict.startswith("no solver reached 1.0e-06")


def test_params_are_found_behind_args_and_closures():
    f, z0, W, _ = layer()
    scale = torch.ones((), requires_grad=True)
    case = Case(lambda z, s: s * f(z), z0, (2 * scale,))
    assert {id(p) for p in case.params} == {id(scale), id(W)}
    assert Case(lambda z: 0.5 * z, z0).params == []
    assert flat_gradient(2 * scale + 0 * W.sum(), [scale, W]).tolist() == [2.0] + [0.0] * N * N


def test_gradient_columns_are_left_out_where_there_is_nothing_to_differentiate():
    f, z0, W, _ = layer()
    W.requires_grad_(False)
    found = dq.compare(f, z0, old="locuslab", **QUICK)
    assert all(row.products is None and row.gradient_error is None and not row.step_seconds for row in found.rows)
    assert "forward solve" in found.verdict


def test_an_old_solver_without_gradient_is_compared_by_its_forward_solve():
    f, z0, *_ = layer()
    found = dq.compare(f, z0, old=torch.no_grad()(plain(40)), rtol=1e-3, **QUICK)
    assert found.old.products is None and found.rows[1].products > 0
    assert "gives no gradient" in found.verdict


def test_trees_and_torchdeq():
    pytest.importorskip("torchdeq")
    f, z0, W, _ = layer()
    found = dq.compare(lambda z: [f(z[1]), torch.tanh(z[0] @ W)], [z0, z0], rtol=1e-3, **QUICK)
    assert all(row.reached for row in found.rows)


def test_a_module_is_judged_in_float64_and_keeps_its_own_parameters():
    cell = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.GroupNorm(1, 3), torch.nn.Tanh())
    x = torch.randn(2, 3, 4, 4)
    found = dq.compare(lambda z, x: 0.5 * cell(z + x), torch.zeros_like(x), (x,), old="locuslab", **QUICK)
    assert found.reference.startswith("float64") and all(row.reached for row in found.rows)
    assert all(p.dtype == torch.float32 and p.grad is None for p in cell.parameters())
    assert all(row.gradient_error < 1e-2 for row in found.rows)


def test_complex_states():
    found = dq.compare(lambda z: 0.5j * z + 1, torch.zeros(2, 3, dtype=torch.complex64), old="locuslab", **QUICK)
    assert found.reference.startswith("complex128") and all(row.reached for row in found.rows)


def test_a_named_solver_that_cannot_solve_it_is_a_row_that_says_why():
    _, z0, W, x = layer()
    low = W.detach().bfloat16(), x.bfloat16()
    found = dq.compare(lambda z: torch.tanh(z @ low[0] + low[1]), z0.bfloat16(), old="locuslab", **QUICK)
    assert "not implemented for 'BFloat16'" in found.old.failed and not found.old.seconds
    assert found.verdict.startswith("use deqfast") and "NotImplementedError" in found.verdict
    assert "locuslab anderson *" in found.table() and all(row.reached for row in found.rows[1:])


def test_batch_dims_decide_which_sample_is_the_worst():
    f, z0, *_ = layer()
    each = dq.compare(f, z0, old=plain(6), **QUICK)
    one = dq.compare(f, z0, old=plain(6), batch_dims=0, **QUICK)
    assert one.target < each.target


def test_memory_and_operations_are_those_beside_f():
    f, z0, *_ = layer()
    found = dq.compare(f, z0, old=plain(12), params=[], solvers={"a": dq.Anderson(m=20), "p": "picard"}, **QUICK)
    assert [row.name for row in found.rows] == ["iterate", "a", "p"]
    own, anderson, picard = found.rows
    assert own.operations == 0 and own.memory == 3 * B * N * 4  # two images and a product
    assert anderson.memory - picard.memory >= 2 * 20 * B * N * 2  # a bfloat16 history


def row(name: str, ms: float, **more) -> Row:
    fields = {"reached": True, "evaluations": 10, "residual": 1e-4, "memory": 1, "trace": [1e-4]}
    return Row(name, **{**fields, "seconds": [1e-3 * ms * (1 + 0.01 * i) for i in range(5)], **more})


@pytest.mark.parametrize(
    ("rows", "begins"),
    [
        ([row("own", 10), row("A", 2), row("P", 5)], "use A: a forward solve is 5.0 times faster"),
        ([row("own", 10), row("A", 2, memory=9), row("P", 2.02)], "use P: "),  # as fast, and less memory
        ([row("own", 2), row("A", 10)], "keep your own, own: a forward solve takes 0.20 of the time of A"),
        ([row("own", 10), row("A", 9.8)], "keep your own, own, unless"),
        ([row("own", 10), row("A", 2, reached=False, residual=1e-2)], "keep your own, own: deqfast did not reach"),
        ([row("own", 1, reached=False, failed="RuntimeError: singular"), row("A", 2)], "use A: 10 evaluations, where"),
        ([row("own", 1, reached=False), row("A", 2, reached=False)], "no solver reached"),
    ],
)
def test_verdict(rows, begins):
    assert verdict(rows, 1e-4, 1e-5).startswith(begins)


def test_verdict_says_where_a_gradient_is_less_exact_and_solutions_differ():
    rows = [row("own", 10, gradient_error=1e-6, products=1), row("A", 2, gradient_error=1e-3, products=1, error=0.9)]
    text = verdict(rows, 1e-4, 1e-5)
    assert "less exact (1.0e-03 against 1.0e-06)" in text and "different solutions" in text
    assert "f itself is 1 % of own's" in text


def test_table_picture_and_plain_values(tmp_path):
    pytest.importorskip("matplotlib")
    f, z0, *_ = layer()
    found = dq.compare(f, z0, old="locuslab", rtol=1e-3, **QUICK)
    assert isinstance(found, Comparison)
    lines = str(found).splitlines()
    assert lines[2].split()[:2] == ["forward", "ms"] and found.verdict in lines
    assert sum(line.startswith(("locuslab", "deqfast ")) for line in lines) == 4
    found.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["name"] == "deqfast anderson"


def test_what_is_missing_is_named(monkeypatch):
    f, z0, *_ = layer()
    found = dq.compare(f, z0, old=plain(9), **QUICK)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'deqfast\[plot\]'"):
        found.plot()
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(ImportError, match=r"needs torchdeq: pip install torchdeq"):
        dq.compare(f, z0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"old": "anderson"}, ValueError, r"old must be one of .* did you mean 'torchdeq.anderson'"),
        ({"old": 3}, TypeError, "old must be callable, got int"),
        ({"old": lambda f, z0: {"result": z0}}, TypeError, "old must return z, structured like z0, got dict; let it"),
        ({"old": lambda f, z0: z0[0]}, TypeError, r"shaped like z0, expected \(8, 24\), got shape \(24,\)"),
        ({"f": lambda z: z[0]}, TypeError, "f must return z, shaped like z0"),
        ({"f": lambda z: torch.rand_like(z)}, ValueError, "nothing random inside"),
        ({"f": 1}, TypeError, "f must be callable"),
        ({"z0": [1.0]}, TypeError, "z0 must be a floating tensor or a tree of them, got list"),
        ({"args": 3}, TypeError, "args must be a tuple"),
        ({"loss": lambda z: z}, TypeError, r"loss\(z\) must be a tensor of one number, got shape"),
        ({"params": [torch.ones(1)]}, TypeError, "params must be tensors that require grad"),
        ({"solvers": []}, ValueError, "solvers must hold at least one"),
        ({"solvers": ["andersen"]}, ValueError, "did you mean 'anderson'"),
        ({"rtol": 0}, ValueError, "rtol must be above 0"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"max_iter": 2}, ValueError, "max_iter must be at least 4"),
        ({"old": "locuslab", "f": lambda z: (z[0],), "z0": (torch.ones(2, 2),)}, TypeError, "takes one tensor"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        dq.compare(**{"f": lambda z: 0.5 * z + 1, "z0": torch.zeros(B, N), "old": plain(9), **QUICK, **arguments})


def test_textbook_anderson_and_its_hook():
    f, z0, W, _ = layer(dtype=torch.float64)

    def solve(g, start):
        return textbook.anderson(g, start, lam=1e-12, max_iter=100, tol=1e-10)

    with torch.no_grad():
        z = solve(f, z0)
        assert (f(z) - z).norm() / f(z).norm() < 1e-9
    (found,) = torch.autograd.grad(textbook.differentiated(f, z, solve).sum(), W)
    (exact,) = torch.autograd.grad(dq.fixed_point(f, z0, rtol=1e-12).z.sum(), W)
    assert torch.allclose(found, exact, rtol=1e-6, atol=1e-8)


PROBLEM = """
import torch
def problem():
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    return {"f": lambda z, x: torch.cos(0.5 * z + x), "z0": torch.zeros(3, 4), "args": (x,)}
def pair(): return (lambda z: 0.5 * z + 1), torch.zeros(3, 4)
def mine(f, z0):
    z = z0
    for _ in range(8): z = f(z)
    return z
def typo(): return {"f": mine, "z": 1}
def half(): return {"f": mine}
def wrong(): return 3
def broken(): raise ValueError("a mistake of the user's")
number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_problem.py"
    path.write_text(PROBLEM)
    return path


def test_command_line(file, capsys):
    pytest.importorskip("matplotlib")
    quick = ["--rounds", "3", "--seconds", "0"]
    main(
        [f"{file}:problem", "--old", f"{file}:mine", "--out", "p.svg", "--json", "p.json", "--solver", "picard", *quick]
    )
    out = capsys.readouterr().out
    assert "mine " in out and "deqfast picard" in out and "deqfast anderson" not in out and "wrote p.svg" in out
    assert Path("p.svg").stat().st_size > 1000
    assert json.loads(Path("p.json").read_text())["verdict"] in out
    main([f"{file}:pair", "--old", "locuslab", "--rtol", "1e-3", *quick])
    assert "to a relative residual of 1.0e-03" in capsys.readouterr().out


def test_module_runs_by_name(file):
    command = [sys.executable, "-m", "deqfast.compare", "my_problem:pair", "--old", "my_problem:mine", "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deqfast broyden" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_problem"], "expected module:function, got 'my_problem'"),
        (["no_such_module:f"], "there is no module 'no_such_module' here"),
        (["no/such.py:f"], "there is no file no/such.py"),
        (["my_problem.py:probelm"], "has no 'probelm'; did you mean 'problem'"),
        (["my_problem.py:typo"], "unknown key 'z'; did you mean 'z0'"),
        (["my_problem.py:half"], "must return f and z0, got f"),
        (["my_problem.py:wrong"], r"must return (f, z0) or a dict of f, z0, args"),
        (["my_problem.py:number"], "must be a function, got int"),
        (["my_problem.py:pair", "--old", "torchdeq.andersen"], "did you mean 'torchdeq.anderson'"),
        (["my_problem.py:pair", "--old", "my_problem.py:nobody"], "has no 'nobody'"),
    ],
)
def test_command_line_refusals(file, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_mistake_in_the_users_function_keeps_its_traceback(file):
    with pytest.raises(ValueError, match="a mistake of the user's"):
        main(["my_problem.py:broken"])


def test_imported_when_asked_for_and_called_after_any_import():
    code = (
        "import sys, deqfast as dq; assert 'deqfast.compare' not in sys.modules\n"
        "assert dq.compare is sys.modules['deqfast.compare'] and callable(dq.compare) and dq.compat.scipy\n"
        "import deqfast.compare; from deqfast.compare import compare\n"
        "assert callable(dq.compare) and dq.compare.compare is compare and 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
