"""Solves that are saved by torch.distributed.checkpoint on some ranks and go on on others, as if nothing had been."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_maps import FORMS, Solve
from ranks import all_well, run_ranks

import deqfast as dq
from deqfast.ops.native import extension as native

pytestmark = [
    pytest.mark.skipif(native._C is None or native.EMULATED, reason="it is of the host's kernels, in the extension"),
    pytest.mark.host,
]

SIZES = (1, 2, 3)


def case(solver, form="Flat", B=3, N=40, dtype=torch.float64, at=6, more=None, background=False, **options):
    return {
        "solver": solver,
        "form": form,
        "B": B,
        "N": N,
        "dtype": dtype,
        "at": at,
        "more": more,
        "background": background,
        "options": {"rtol": 1e-5 if dtype == torch.float32 else 1e-9, "max_iter": 60, **options},
    }


CASES = {
    "anderson": case(dq.Anderson()),
    "anderson, few columns": case(dq.Anderson(m=3)),
    "type 2": case(dq.Anderson(type=2)),
    "mixes now and then": case(dq.Anderson(mix_every=2)),
    "broyden": case(dq.Broyden()),
    "broyden, few steps": case(dq.Broyden(memory=4)),
    "broyden, measured": case(dq.Broyden(scale="first_step")),
    "picard": case(dq.Picard(), max_iter=200),
    "float32": case(dq.Anderson(history_dtype=torch.float32), dtype=torch.float32),
    "bfloat16 history": case(dq.Anderson(), dtype=torch.float32),
    "float32, broyden": case(dq.Broyden(), dtype=torch.float32),
    "before the first evaluation": case(dq.Anderson(), at=0),
    "after one": case(dq.Anderson(), at=1),
    "after one, broyden": case(dq.Broyden(), at=1),
    "late": case(dq.Anderson(m=3), at=18),
    "all together": case(dq.Anderson(), stop="all"),
    "paused": case(dq.Anderson(), max_iter=6, more=60, resumable=True),
    "paused, broyden": case(dq.Broyden(), max_iter=6, more=60, resumable=True),
    "in the background": case(dq.Anderson(), background=True),
    "the whole state": case(dq.Anderson(), "OneSample", B=1, batch_dims=0),
    "images": case(dq.Anderson(), "Image"),
    "channels last": case(dq.Broyden(), "ChannelsLast"),
    "a tree": case(dq.Anderson(), "Tree"),
    "a tree, broyden": case(dq.Broyden(), "Tree"),
    "complex": case(dq.Anderson(), "Complex"),
    "batch": case(dq.Anderson(), "Rows", B=5),
    "batch, broyden": case(dq.Broyden(), "Rows", B=5),
    "batch, few numbers": case(dq.Anderson(m=4), "Rows", B=5, N=6),
    "batch, together": case(dq.Anderson(), "Rows", B=5, stop="consensus"),
}
# Scales are of 1,024 numbers that lie together on one rank: these go on where the cuts are the same.
SCALED = {
    "int8 history": case(dq.Anderson(history_dtype=torch.int8), dtype=torch.float32),
    "float16 history": case(dq.Anderson(history_dtype=torch.float16), dtype=torch.float32),
}

TINY = {"tiny": case(dq.Anderson(m=4), N=6)}  # so few numbers that a process alone keeps no products of columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """Of each number of ranks what its uninterrupted solves have come to."""
    cases = {**CASES, **SCALED, **TINY}
    found = {}
    for size in SIZES:
        given = {"cases": cases, "folder": str(folder), "timeout": 300}
        ranks = run_ranks(tmp_path_factory.mktemp("save"), "checkpoint_maps:save", size, **given)
        found[size] = dict(zip(cases, zip(*all_well(ranks), strict=True), strict=True))
    return found


@pytest.fixture(scope="module", params=SIZES)
def resumed(request, saved, folder, tmp_path_factory):
    """On so many ranks, every solve that those of each number have left."""
    size = request.param
    ranks = all_well(
        run_ranks(
            tmp_path_factory.mktemp("load"),
            "checkpoint_maps:load",
            size,
            cases=CASES,
            folder=str(folder),
            sources=SIZES,
            timeout=300,
        )
    )
    scaled = all_well(
        run_ranks(
            tmp_path_factory.mktemp("load"),
            "checkpoint_maps:load",
            size,
            cases=SCALED,
            folder=str(folder),
            sources=[size],
        )
    )
    return size, [{**a, **b} for a, b in zip(ranks, scaled, strict=True)]


def joined(given, ranks, field):
    """Of all ranks what is said of the whole."""
    values = [r[field] for r in ranks]
    if field == "z":
        return FORMS[given["form"]](given["N"]).join(values)
    return torch.cat(values) if given["form"] == "Rows" else values[0]


def flat(given, z):
    return FORMS[given["form"]](given["N"]).flat(z)


@pytest.mark.parametrize("source", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_a_solve_goes_on_as_if_it_had_not_been_interrupted(resumed, saved, source, name):
    size, ranks = resumed
    check(CASES[name], saved, ranks, name, source, size)


@pytest.mark.parametrize("name", SCALED)
def test_columns_with_scales_go_on_where_the_cuts_are_the_same(resumed, saved, name):
    size, ranks = resumed
    check(SCALED[name], saved, ranks, name, size, size)


def check(given, saved, ranks, name, source, size):
    through = saved[source][name]
    found = [r[name, source] for r in ranks]
    for field in ("steps", "status"):
        assert torch.equal(joined(given, found, field), joined(given, through, field)), field
    apart = given["form"] == "Rows" and "stop" not in given["options"]  # ranks make as many as their own samples need
    assert max(r["evaluations"] for r in found) == max(r["evaluations"] for r in through)
    assert apart or len({r["evaluations"] for r in found}) == 1
    assert {r["at"] for r in found} == {given["at"]}
    events = [
        {k: joined(given, [r["events"] for r in ranks], k) for k in ranks[0]["events"]} for ranks in (found, through)
    ]
    assert {k: v.tolist() for k, v in events[0].items()} == {k: v.tolist() for k, v in events[1].items()}
    z, right = (flat(given, joined(given, ranks, "z")) for ranks in (found, through))
    assert float((z - right).norm()) <= 1e5 * torch.finfo(given["dtype"]).eps * float(right.norm())
    if source == size:
        assert torch.equal(z, right)


def test_the_checkpoints_are_of_solves_underway(saved):
    """Else the test before would say nothing."""
    for name, given in CASES.items():
        for size in SIZES:
            assert max(r["evaluations"] for r in saved[size][name]) > given["at"] + (2 if given["background"] else 0)
    steps = joined(CASES["anderson"], saved[2]["anderson"], "steps")
    assert len(set(steps.tolist())) > 1


def test_without_a_process_group(tmp_path):
    """One process saves and takes up by the same calls."""
    for name in ("anderson", "broyden", "a tree"):
        solve = Solve(CASES[name], 0, 1)
        state = solve.run(solve.begin(), 6)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save({"solve": state}, checkpoint_id=tmp_path / name)
        other = solve.begin()
        dq.restore(other, tmp_path / name)
        z, right = (flat(CASES[name], solve.run(s).z) for s in (other, state))
        assert torch.equal(z, right) and other.nfe == state.nfe


WRONG = [
    (
        "anderson-2",
        "restore",
        {"solver": dq.Broyden()},
        "ValueError",
        r"saved with options Anderson\(.*, this state has Broyden",
    ),
    (
        "broyden-2",
        "restore",
        {"solver": dq.Anderson()},
        "ValueError",
        r"saved with options Broyden\(.*, this state has Anderson",
    ),
    ("anderson-3", "restore", {"solver": dq.Anderson(m=4)}, "ValueError", r"options Anderson\(m=10.*has Anderson\(m=4"),
    (
        "anderson-2",
        "restore",
        {"N": 41},
        "ValueError",
        r"layout one tensor: \(3, 40\).*this state has one tensor: \(3, 41\)",
    ),
    (
        "anderson-1",
        "restore",
        {"N": 30},
        "ValueError",
        r"layout one tensor: \(3, 40\).*this state has one tensor: \(3, 30\)",
    ),
    (
        "anderson-2",
        "restore",
        {"B": 4},
        "ValueError",
        r"layout one tensor: \(3, 40\).*this state has one tensor: \(4, 40\)",
    ),
    (
        "batch-2",
        "restore",
        {"B": 3, "form": "Flat"},
        "ValueError",
        r"layout one tensor: \(5, 40\).*has one tensor: \(3, 40\)",
    ),
    (
        "anderson-2",
        "restore",
        {"dtype": torch.float32},
        "ValueError",
        r"\(3, 40\) torch.float64.*\(3, 40\) torch.float32",
    ),
    (
        "images-2",
        "restore",
        {"form": "Flat"},
        "ValueError",
        r"layout one tensor: \(3, 5, 8\).*has one tensor: \(3, 40\)",
    ),
    ("anderson-2", "restore", {"form": "Tree"}, "ValueError", r"saved with layout one tensor"),
    ("broyden-2", "restore", {"options": {"max_iter": 50}}, "ValueError", "saved with columns 60, this state has 50"),
    (
        "anderson-2",
        "restore",
        {"restore": {"key": "other"}},
        "ValueError",
        "no solve can be read under 'other' of checkpoint",
    ),
    ("nowhere-2", "restore", {}, "ValueError", "no solve can be read under 'solve' of checkpoint"),
    (
        "int8 history-1",
        "restore",
        {},
        "ValueError",
        r"saved with scales of whole samples, this state has of parts \[13, 27\] along",
    ),
    (
        "tiny-1",
        "restore",
        {},
        "ValueError",
        "of samples of at most 8 numbers, which are spread over ranks in the one state",
    ),
    ("float16 history-1", "load", {}, "CheckpointException", "Size mismatch between saved .*solve.tensors.scales"),
    (
        "anderson-2",
        "load",
        {"solver": dq.Anderson(m=4)},
        "CheckpointException",
        "Size mismatch between saved .*solve.tensors",
    ),
    (
        "anderson-2",
        "load",
        {"solver": dq.Anderson(ridge=1e-3)},
        "ValueError",
        "saved with options .*ridge=None.*ridge=0.001",
    ),
]


def test_what_does_not_fit_is_told_to_every_rank(saved, folder, tmp_path):
    cases = {**CASES, **SCALED, **TINY, "nowhere": CASES["anderson"]}
    attempts = [(source, how, changes) for source, how, changes, _, _ in WRONG]
    ranks = run_ranks(tmp_path, "checkpoint_maps:refused", 2, cases=cases, folder=str(folder), attempts=attempts)
    for wrong, told in zip(WRONG, zip(*all_well(ranks), strict=True), strict=True):
        _, _, _, kind, words = wrong
        for name, said, as_before in told:
            assert name == kind and re.search(words, said, re.DOTALL), (wrong, said)
            assert as_before, wrong
        assert kind != "ValueError" or "Traceback" in told[0][1] or len({said for _, said, _ in told}) == 1


def test_what_is_wrong_on_one_rank_is_told_to_all(tmp_path):
    first, last = run_ranks(tmp_path, "checkpoint_maps:one_file_is_wrong", 2, case=CASES["anderson"])
    assert last[0] == "ValueError" and "saved with options Anderson(m=77)" in last[1]
    assert (
        first[0] == "RankError"
        and "on rank 1: ValueError: state_dict was saved with options Anderson(m=77)" in first[1]
    )
