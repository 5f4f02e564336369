"""The file of a round is the old one or the new one, holds what was put in, and is of this run."""

import dataclasses
import os

import checkpoint
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 0
    rounds: int = 2


WEIGHTS = {"cell.linear.weight": np.float32([[0.1, -0.2], [3e-39, 4]]), "head.bias": np.float32([1])}
HISTORY = [{"round": 1, "accuracy": 0.1 + 0.2, "left_out": {"client 3": "it failed"}}]


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "made" / "a.npz"
    checkpoint.save(path, WEIGHTS, HISTORY, Options())
    weights, history = checkpoint.load(path, Options())
    assert history == HISTORY and weights.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        assert weights[name].dtype == array.dtype and np.array_equal(weights[name], array)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_save_that_is_cut_off_leaves_the_round_before(where, tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    checkpoint.save(path, WEIGHTS, HISTORY, Options())
    before = path.read_bytes()

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, where, cut)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"other": np.zeros(3)}, [], Options())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]


def test_resuming_without_a_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume from"):
        checkpoint.load(tmp_path / "none.npz", Options())


@pytest.mark.parametrize("content", [b"", b"no archive", "half"])
def test_a_file_that_is_none_is_refused(content, tmp_path):
    path = tmp_path / "a.npz"
    checkpoint.save(path, WEIGHTS, HISTORY, Options())
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    with pytest.raises(ValueError, match="is no checkpoint of this example"):
        checkpoint.load(path, Options())


def test_a_foreign_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="is no checkpoint of this example"):
        checkpoint.load(tmp_path / "a.npz", Options())


def test_a_checkpoint_of_other_options_is_refused_by_name(tmp_path):
    path = tmp_path / "a.npz"
    checkpoint.save(path, WEIGHTS, HISTORY, Options(seed=1))
    with pytest.raises(ValueError, match=r"seed: .* is of a run with 1, this one has 0"):
        checkpoint.load(path, Options(seed=0))
    assert checkpoint.load(path, Options(seed=1, rounds=9))[1] == HISTORY
