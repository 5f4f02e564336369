"""The example of masks: what it counts, what its models compute, what it writes, and what its page is made of."""

import json
import math
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

import masks_data
import masks_measure
import masks_report
from masks_model import Cell, Kind, Model, Task, equal_width

import deqfast as dq

ROOT = Path(__file__).parents[2]
TASK, TEXT = Task(64, 10), Task(40, 40, sequence=True)
WAYS = ("tied", "masked", "one mask", "untied", "implicit", "phantom", "penalised")


@pytest.fixture(scope="module")
def digits():
    return masks_data.load_digits(0, "cpu")


def test_multiply_adds_are_those_of_what_is_kept():
    kind = Kind("tied", width=20, depth=5)
    ends = 64 * 20 + 20 * 10
    assert Model(kind, TASK, 0).multiply_adds(5) == (5 * 400, 5 * 400 + ends)
    for way in ("masked", "one mask"):
        model = Model(kind.but(way=way, density=0.25), TASK, 0)
        assert model.multiply_adds(5) == (5 * 100, 5 * 100 + ends)
    assert Model(kind.but(way="implicit"), TASK, 0).multiply_adds(7.5)[0] == 7.5 * 400
    narrow = equal_width(kind, TASK)
    assert Model(kind.but(way="untied"), TASK, 0).multiply_adds(5)[0] == 5 * narrow**2
    assert Model(kind, TEXT, 0).multiply_adds(5) == (5 * 2 * 400, 5 * 2 * 400 + 20 * 40)


def test_multiply_adds_are_counted_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    for kind in (Kind("tied", 24, 4), Kind("untied", 24, 4)):
        model = Model(kind, TASK, 0)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(3, 64))
        assert counter.get_total_flops() == 2 * 3 * model.multiply_adds(4)[1]


@pytest.mark.parametrize("task", [TASK, TEXT], ids=["pixels", "text"])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_untied_has_as_many_parameters(task, width):
    tied, untied = (Model(Kind(way, width), task, 0).parameters_used() for way in ("tied", "untied"))
    w = equal_width(Kind("untied", width), task) + 1  # one more would be more than there are
    wider = 6 * w**2 * (2 if task.sequence else 1) + (40 * w if task.sequence else 65 * w) + task.outputs * (w + 1)
    assert untied <= tied < wider


def test_masked_cell_is_the_block_with_its_masks_and_keeps_the_scale():
    cell = Cell(Kind("masked", 64, 3, 0.25), 64, False, torch.Generator().manual_seed(1))
    z, x = torch.randn(2, 5, 64)
    layer = cell.layers[0]
    for k in range(3):
        assert torch.allclose(cell(z, x, k), torch.tanh(z @ (layer.module.weight * layer.masks[k]).T + x), atol=1e-6)
    kept = layer.module.weight[layer.masks[0]]
    assert kept.square().sum().item() == pytest.approx(64 * 64 / (3 * 64), rel=0.1)  # of nn.Linear's, all of them


def test_a_sequence_looks_back_and_never_ahead():
    torch.manual_seed(0)
    model = Model(Kind("tied", 16, 3), TEXT, 0).eval()
    text = torch.randint(40, (2, 10))
    changed = text.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 40
    apart = (model(text) - model(changed)).abs().amax((0, 2)) > 0
    assert apart.tolist() == [False] * 6 + [True] * 4  # itself and K later ones, of which there are three


@pytest.mark.parametrize("sequence", [False, True])
def test_projection_makes_f_contract(sequence):
    cell = Cell(Kind("implicit", 32), 32, sequence, torch.Generator().manual_seed(0))
    with torch.no_grad():
        cell.layers[0].weight.mul_(10.0)
    cell.project(steps=100)
    z = torch.randn(1, 12, 32, dtype=torch.float64)
    cell = cell.double()
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, torch.zeros_like(z)), torch.zeros_like(z))
    norm = torch.linalg.matrix_norm(jacobian.reshape(12 * 32, 12 * 32), 2)  # tanh's slope is 1 at 0
    assert 0.5 < norm <= 0.96


@pytest.mark.parametrize("way", WAYS)
def test_every_model_learns(way, digits):
    found = masks_measure.run(Kind(way, 32, 4, density=0.5 if "mask" in way else 1.0), digits, 60, 0)
    assert found["accuracy"] > 0.6 and found["bits"] < math.log2(10)
    assert found["seconds"] > 0 and found["peak"] > 128 * 32 * 4
    assert found["evaluations"] == 4 if way in WAYS[:4] else 1 < found["evaluations"] <= 41


def test_masks_that_are_learned_move(digits):
    for learn in ("magnitude", "scores"):
        model = Model(Kind("masked", 32, 4, 0.25, learn), TASK, 0)
        (layer,) = model.masked_layers()
        before = layer.masks.clone()
        for _ in masks_measure.updates_of(model, digits, 20, 0):
            pass
        assert not torch.equal(layer.masks, before)
        assert layer.masks.sum((1, 2)).tolist() == [256] * 4


def test_peak_memory_grows_with_the_steps_unless_they_are_reversed(digits):
    found = masks_measure.memory_by_depth(digits, 64, (4, 32))
    assert found["every step"][1] - found["every step"][0] == 28 * 128 * 64 * 4  # a state a step
    assert found["reversible"][1] == found["reversible"][0] < found["every step"][1]


def test_torchdeq_answers_as_deqfast_does():
    pytest.importorskip("torchdeq")
    inputs = torch.rand(8, 64)
    for way in ("implicit", "phantom"):
        models = [Model(Kind(way, 24, solver=s), TASK, 0) for s in ("deqfast", "ridge, broyden")]
        losses = [model.loss(inputs, torch.arange(8)) for model in models]
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-3)
        grads = [torch.autograd.grad(m.loss(inputs, torch.arange(8)), m.inject.weight)[0] for m in models]
        assert torch.allclose(grads[0], grads[1], rtol=0.05, atol=1e-4)


def test_where_sparse_overtakes_dense_is_interpolated():
    assert masks_measure.overtakes((0.5, 0.25, 0.1), (2.0, 1.5, 1.2)) is None
    assert masks_measure.overtakes((0.5, 0.25, 0.1), (0.9, 0.5, 0.2)) == 0.5
    assert masks_measure.overtakes((0.4, 0.1), (2.0, 0.5)) == pytest.approx(0.2)


def test_reversible_row_is_exact_in_float64_and_tells_of_a_missed_start():
    exact = masks_measure.reversibility(torch.float64, 20, 0.3, 32, "cpu")
    assert exact["gradient"] < 1e-10 and exact["drift"] < 1e-8 and not exact["warned"]
    poor = masks_measure.reversibility(torch.float32, 100, 0.3, 32, "cpu")
    assert poor["warned"] and poor["drift"] > 1e-3


def test_photographs_of_test_and_training_do_not_overlap():
    first = masks_data.load_photographs(0, "cpu", 200, 100)
    assert first.inputs.shape == (200, 64) and first.test_inputs.shape == (100, 64)
    assert first.labels.bincount().tolist() == [20] * 10 and first.inputs.abs().max() <= 1
    again, other = (masks_data.load_photographs(s, "cpu", 200, 100) for s in (0, 1))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    textured = first.test_inputs[first.test_inputs.std(1) > 0.02]
    assert len(textured) > 50 and torch.cdist(textured, first.inputs).min() > 0


def test_text_asks_for_the_next_character():
    data = masks_data.load_text(0, "cpu")
    assert torch.equal(data.test_inputs.flatten()[1:], data.test_labels.flatten()[:-1])
    assert data.inputs.max() < data.task.inputs and data.inputs.shape[1] == masks_data.LENGTH


def test_interval_is_students():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = [1.0, 2.0, 4.0, 4.5, 7.0]
    mean, half = masks_report.interval(values)
    expected = scipy_stats.t.interval(0.95, 4, mean, scipy_stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected, rel=1e-3)
    assert masks_report.interval([3.0]) == (3.0, 0.0)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run of seconds, with the sweep."""
    for package in ("matplotlib", "torchdeq"):
        pytest.importorskip(package)
    out, threads, arguments = tmp_path_factory.mktemp("masks"), torch.get_num_threads(), sys.argv
    script = ROOT / "examples" / "masks.py"
    options = ["--sweep", "--updates", "3", "--seeds", "1"]
    sys.argv = [str(script), *options, "--width", "16", "--largest", "128", "--device", "cpu", "--out", str(out)]
    try:
        with warnings.catch_warnings():
            runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        sys.argv = arguments
    return out


def test_short_run_writes_every_table_and_a_picture(quick):
    record = json.loads((quick / "masks.json").read_text())
    for data in ("digits", "photographs", "text"):
        header, rows = masks_report.main_table(record, data)
        assert {row[0] for row in rows} >= {"weight-tied", "masked 0.25", "DEQ, implicit", "DEQ, implicit, by torchdeq"}
        assert all(len(row) == len(header) for row in rows)
    assert [len(row) for row in masks_report.differences(record)[1]] == [4] * 5
    tables = masks_report.sweep_tables(record)
    assert len(tables) == 8 and all(len(row) == len(header) for header, rows in tables for row in rows)
    density = next(table for table in tables if table[0][0] == "digits: density")
    assert density[0][1:] == ["0.05", "0.1", "0.25", "0.5", "1"]
    assert {t["what"].split(":")[0] for t in record["targets"]} >= {"digits", "photographs", "text"}
    assert all(run["block"] > 0 and math.isfinite(run["bits"]) for run in record["runs"])
    assert (quick / "masks.png").read_bytes().startswith(b"\x89PNG")


def test_page_is_filled_from_a_run_with_the_sweep(quick, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from make_masks import main

    shutil.copy(ROOT / "docs" / "masks.md", tmp_path / "masks.md")
    main(["--results", str(quick), "--docs", str(tmp_path)])
    text = (tmp_path / "masks.md").read_text()
    assert "--sweep --updates 3 --seeds 1" in text and "| DEQ, implicit, by torchdeq |" in text
    assert (tmp_path / "img" / "masks.png").is_file() and (tmp_path / "data" / "masks.json").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match="nothing measured"):
        main(["--results", str(empty), "--docs", str(empty)])


def test_page_is_what_its_script_makes_of_its_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from make_masks import main

    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "docs" / "masks.md", tmp_path)
    shutil.copy(ROOT / "docs" / "data" / "masks.json", tmp_path / "data")
    main(["--results", str(tmp_path / "none"), "--docs", str(tmp_path)])
    assert (tmp_path / "masks.md").read_text() == (ROOT / "docs" / "masks.md").read_text()


def test_the_masked_layer_is_the_librarys():
    (layer,) = Model(Kind("masked", 16, 3, 0.5), TASK, 0).masked_layers()
    assert isinstance(layer, dq.nn.StepMasked) and layer.count == 3
