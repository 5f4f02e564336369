"""The example of regulated dynamics: attacks on closed forms, the reduction, gradients, a quick run, its page."""

import importlib
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RADIUS = 0.07


@pytest.fixture
def load(monkeypatch):
    """Imports a file of examples/, as a script beside it would; leaves no names behind."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (EXAMPLES / f"{name}.py").exists():
            del sys.modules[name]


class Linear:
    """Two classes, logits (0, w x): within the ball, away from the box, the margin of label 0 falls by radius |w|_1."""

    def __init__(self, seed=0, count=12, pixels=64):
        generator = torch.Generator().manual_seed(seed)
        self.w = torch.randn(pixels, generator=generator)
        self.pixels = 0.3 + 0.4 * torch.rand(count, pixels, generator=generator)
        self.labels = torch.zeros(count, dtype=torch.long)
        self.bias = 0.0

    def __call__(self, x):
        out = x @ self.w + self.bias
        return torch.stack([torch.zeros_like(out), out], 1)

    def gain(self, near):
        return (near - self.pixels) @ self.w

    @property
    def best(self):
        return RADIUS * self.w.abs().sum()


def test_gradient_attacks_find_the_optimum_of_a_linear_classifier(load):
    attacks = load("attacks")
    for seed in range(3):
        f = Linear(seed)
        for near in (
            attacks.pgd(f, f.pixels, f.labels, RADIUS, 10),
            attacks.pgd(f, f.pixels, f.labels, RADIUS, 10, loss=attacks.margin),
            attacks.apgd(f, f.pixels, f.labels, RADIUS, 10, loss=attacks.margin),
            attacks.apgd(f, f.pixels, f.labels, RADIUS, 20, loss=attacks.margin, start=f.pixels - RADIUS * f.w.sign()),
        ):
            torch.testing.assert_close(f.gain(near), f.best.expand(12), rtol=1e-4, atol=1e-5)


def test_random_search_comes_near_that_optimum_without_gradients(load):
    attacks = load("attacks")
    f = Linear()
    shares = []
    for queries in (10, 200, 2000):
        near = attacks.square(lambda x: f(x.detach()), f.pixels, f.labels, RADIUS, queries)
        assert bool(((near - f.pixels).abs() <= RADIUS + 1e-6).all())
        shares.append(float((f.gain(near) / f.best).mean()))
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.9, shares
    with pytest.raises(ValueError, match="square image, got 63"):
        attacks.square(f, f.pixels[:, :63], f.labels, RADIUS)


def test_step_halves_where_it_is_too_large(load):
    """-|x - t|^2 has its top inside of the ball: steps of one size jump around it, halved ones arrive."""
    attacks = load("attacks")
    pixels, top = torch.full((4, 9), 0.5), torch.full((4, 9), 0.5) + RADIUS * torch.linspace(-0.9, 0.9, 9)

    def f(x):
        return torch.stack([(x - top).square().sum(1) + 100, torch.zeros(4)], 1)

    distance = {}
    labels = torch.zeros(4, dtype=torch.long)
    for name, attack in (("fixed", attacks.pgd), ("halving", attacks.apgd)):
        near = attack(f, pixels, labels, RADIUS, steps=60, loss=attacks.margin)
        distance[name] = float((near - top).abs().max())
    assert distance["halving"] < 0.1 * RADIUS < distance["fixed"], distance
    assert attacks.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_projection_is_the_nearest_point_of_ball_and_box(load):
    attacks = load("attacks")
    pixels = torch.tensor([[0.0, 0.5, 1.0, 0.95]])
    near = torch.tensor([[-1.0, 0.52, 2.0, 0.5]])
    torch.testing.assert_close(attacks.project(near, pixels, 0.1), torch.tensor([[0.0, 0.52, 1.0, 0.85]]))
    inside = pixels + torch.tensor([[0.05, -0.05, -0.1, 0.01]])
    torch.testing.assert_close(attacks.project(inside, pixels, 0.1), inside)


def test_the_worst_is_kept_and_standing_counts_each_sample_once(load):
    attacks = load("attacks")
    f = Linear()
    f.bias = -float((f.pixels @ f.w).max()) - 0.5 * float(f.best)  # some can be turned, some cannot
    can = (f.pixels @ f.w + f.bias + f.best) > 0
    assert 0 < int(can.sum()) < 12
    near = attacks.pgd(f, f.pixels, f.labels, RADIUS, 10)
    assert torch.equal(f(near).argmax(1) == 1, can)
    half = torch.where((torch.arange(12) % 2 == 0)[:, None], near, f.pixels)
    other = torch.where((torch.arange(12) % 2 == 1)[:, None], near, f.pixels)
    share = float((~can).double().mean())
    assert attacks.standing(f, [half, other], f.labels) == pytest.approx(share)
    assert attacks.accuracy(f, near, f.labels) == pytest.approx(share)


def small(load, scale=1.0):
    model = load("dynamics_model")
    torch.manual_seed(0)
    classifier = model.Classifier(12)
    with torch.no_grad():
        classifier.head.weight.mul_(3)
        classifier.cell.linear.weight.mul_(scale)
    return model, classifier.requires_grad_(False), torch.rand(9, 64)


def test_entropy_falls_and_pixels_stay_in_the_ball_and_the_box(load):
    model, classifier, pixels = small(load)
    defence = model.Defence(classifier)
    z, x = torch.rand(9, 12), pixels
    for _ in range(8):
        before = model.entropy(defence.read(z, x))
        x = defence.moved(x, z, pixels, 0.005)
        assert bool((model.entropy(defence.read(z, x)) < before).all())
    defence(pixels)
    assert len(defence.entropies) == model.ROUNDS
    fixed = model.Defence(classifier, rounds=1)
    fixed(pixels)  # its state is that of two evaluations
    assert float(fixed.entropies[0].mean()) < float(model.entropy(classifier.at(pixels, 3)).mean())
    assert bool(((defence.left - pixels).abs() <= model.REDUCTION_RADIUS + 1e-6).all())
    assert float(defence.left.min()) >= 0
    assert float(defence.left.max()) <= 1


def test_gradients_leave_the_values_of_the_reduction_as_they_are(load):
    model, classifier, pixels = small(load)
    plain = model.Defence(classifier)(pixels)
    assert not plain.requires_grad
    slopes = []
    for through in ("identity", "signs"):
        near = pixels.clone().requires_grad_()
        out = model.Defence(classifier, through)(near)
        torch.testing.assert_close(out.detach(), plain, rtol=1e-4, atol=1e-4)
        (slope,) = torch.autograd.grad(out.square().sum(), near)
        assert bool(slope.isfinite().all()) and float(slope.norm()) > 0
        slopes.append(slope)
    assert not torch.allclose(*slopes)


def test_solver_of_the_reduction_reaches_the_state_of_the_pixels_that_it_ends_at(load):
    """Its memory outlives pixels that move: with more rounds the state is the equilibrium of the last pixels."""
    model, classifier, pixels = small(load)
    defence = model.Defence(classifier, rounds=12)
    out = defence(pixels)
    torch.testing.assert_close(out, classifier.at(defence.left, 60), rtol=1e-3, atol=1e-3)


def test_gradient_of_a_state_is_exact_and_budgets_are_drawn(load):
    model, classifier, pixels = small(load)
    for state in (1, 2, 5):
        near = pixels[:2].double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, k=state: classifier.double().at(x, k), near, fast_mode=True)
    drawn = model.Budgets(True, 0)
    assert {drawn() for _ in range(200)} == set(range(1, model.LAST + 1))
    assert {model.Budgets(False, 0)() for _ in range(5)} == {model.LAST}


def test_training_lowers_its_loss(load):
    model = load("dynamics_model")
    torch.manual_seed(0)
    classifier = model.Classifier(16)
    pixels, labels = torch.rand(64, 64), torch.arange(64) % 10
    optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-2)

    def loss():
        generator = torch.Generator().manual_seed(1)
        return model.trades(classifier, pixels, labels, model.Budgets(True, 5), generator).item()

    before = loss()
    for epoch in range(15):
        model.train_pass(classifier, optimiser, (pixels, labels), model.Budgets(True, epoch), epoch)
    assert loss() < before - 0.01


def test_quick_run_writes_tables_a_picture_and_no_page(load, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    load("attacks")
    monkeypatch.setattr(sys, "argv", ["dynamics.py", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "dynamics.py"), run_name="__main__")
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "dynamics.json").read_text())
    assert record["quick"] and {row["random"] for row in record["rows"]} == {False, True}
    for row in record["rows"]:
        for kind in ("alone", "reduced"):
            assert row[kind]["worst"] <= min(row[kind][key] for key in ("pgd", "apgd", "square"))
        assert row["reduced"]["adaptive"] <= min(row["reduced"]["worst"], *row["through"].values())
        assert row["alone"]["pgd"] <= row["alone"]["clean"] and len(row["states"]) == 8
    for table in record["tables"].values():
        assert all(len(cells) == len(table["header"]) for cells in table["rows"])
    for met in record["targets"]:
        assert f"{'met   ' if met['met'] else 'MISSED'}  {met['what']}" in printed
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    make, page = script("make_dynamics"), tmp_path / "dynamics.md"
    page.write_text("# T\n<!-- dynamics:begin -->\nold\n<!-- dynamics:end -->\nrest\n")
    arguments = ["--results", str(tmp_path / "dynamics.json"), "--page", str(page)]
    with pytest.raises(SystemExit, match="nothing measured"):
        make.main(arguments)
    assert "old" in page.read_text()
    (tmp_path / "dynamics.json").write_text(json.dumps({**record, "quick": False}))
    make.main(arguments)
    text = page.read_text()
    assert "old" not in text and text.endswith("rest\n") and "`python examples/dynamics.py --seeds 1 " in text
    assert (tmp_path / "img" / "dynamics.png").is_file()


def test_targets_are_missed_where_one_seed_falls_short(load):
    dynamics = load("dynamics")

    def row(random, early, adaptive, entropies):
        states = [{"state": k + 1, "clean": 0.9, "pgd": early} for k in range(8)]
        kinds = {"alone": {"worst": 0.5}, "reduced": {"worst": 0.6, "adaptive": adaptive}}
        return {"random": random, "states": states, "entropy": {"clean": entropies}, **kinds}

    timed = [
        {"name": name, "seconds": 0.01, "ratio": ratio, "ratios": [ratio]}
        for name, ratio in (("deqfast Broyden", 1.0), ("torchdeq Broyden", 2.0), ("torchdeq plain iteration", 0.9))
    ]
    good = [row(False, 0.5, 0.55, [3, 2, 1]), row(True, 0.6, 0.55, [3, 2, 1])]
    bad = [row(False, 0.5, 0.55, [3, 2, 2]), row(True, 0.45, 0.5, [3, 2, 1])]
    faster = [{**t, "ratio": 1.5} if t["ratio"] < 1 else t for t in timed]
    assert [t["met"] for t in dynamics.targets(good, faster)] == [True] * 4
    found = dynamics.targets(good + bad, timed)
    assert [t["met"] for t in found] == [False] * 4
    assert found[0]["measured"] == "+10.0, -5.0 points" and found[1]["measured"] == "3 of 4"


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--hidden", "--queries", "--turns"])
def test_options_that_make_no_sense_are_refused(load, option, capsys):
    with pytest.raises(SystemExit):
        load("dynamics").parse_args([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
