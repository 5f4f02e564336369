"""The Triton kernels of the joint step in Triton's interpreter; see triton_conformance.py."""

from __future__ import annotations

import pytest
import test_joint_finish as finish
import test_joint_map as joint_map
import test_joint_step as joint
import torch
from interpreter import patch_once
from joint_step import PROJECTIONS, start

from deqfast.ops.codes import BLOCKS

patch_once()
# NumPy warns of what is masked out afterwards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("B", "nz", "nx"), [(2, 33, 9), (1, 1, 1)])
def test_joint_map_agrees_with_float64(B, nz, nx, projection):
    options = PROJECTIONS[projection]
    joint_map.check_map(start(B, nz, nx, center=options.get("center", False)), "triton", **options)


@pytest.mark.parametrize("dtype", [F64, BF16, F16, torch.complex64], ids=str)
@pytest.mark.parametrize("projection", ["none", "normalised-l2", "linf-box"])
def test_joint_map_agrees_for_all_dtypes(dtype, projection):
    options = PROJECTIONS[projection]
    joint_map.check_map(start(2, 40, 17, dtype=dtype, center=options.get("center", False)), "triton", **options)


@pytest.mark.parametrize(("nz", "nx"), [(8195, 64), (3, 8195), (5, 0)])
def test_joint_map_agrees_where_programs_share_a_sample(nz, nx):
    options = PROJECTIONS["normalised-l2" if nx else "none"]
    joint_map.check_map(start(1, nz, nx, center=bool(nx)), "triton", **options)


@pytest.mark.parametrize(
    ("assert_that", "arguments"),
    [
        (joint_map.test_trees_are_read_in_any_memory_order, ("normalised-l2",)),
        (joint_map.test_narrower_values_are_read, (F32, BF16)),
        (joint_map.test_expanded_value_is_read, ()),
        (joint_map.test_stopped_samples_are_left_alone, (40,)),
        (joint_map.test_sample_is_unaffected_by_a_neighbour_that_is_no_number, (torch.nan, "normalised-l2")),
        (joint_map.test_sample_is_unaffected_by_a_neighbour_that_is_no_number, (torch.inf, "linf-box")),
        (joint_map.test_sample_has_the_same_bits_in_any_batch, (40, 9)),
        (joint_map.test_sample_has_the_same_bits_in_any_batch, (5, 4100)),
        (joint.test_empty_batch, ()),
        (joint.test_step_of_trees_agrees, ()),
        (joint.test_blocks_left_out_move_to_their_mapped_value, (("z", "mu"),)),
        (joint.test_sample_stops_when_every_block_is_within_its_tolerance, (6, BLOCKS)),
        (joint.test_sample_stops_when_every_block_is_within_its_tolerance, (6, ("z",))),
        (joint.test_sample_stops_when_every_block_is_within_its_tolerance, (9000, ("z",))),
        (joint.test_absolute_tolerance_of_a_block, ()),
        (joint.test_sample_that_is_no_number_in_one_block_stops_alone, (BLOCKS,)),
    ],
    ids=lambda part: part.__name__ if callable(part) else str(part),
)
def test_claim_about_the_joint_step_of_every_backend_holds(assert_that, arguments):
    assert_that(*arguments, "triton")


@pytest.mark.parametrize("returns", ["best", "last", "cost"])
@pytest.mark.parametrize(
    ("accelerate", "dtype", "safeguard"),
    [(("z", "mu"), F32, True), (("z", "mu", "x"), F64, True), (("mu",), BF16, False)],
    ids=lambda part: "-".join(part) if isinstance(part, tuple) else str(part),
)
def test_every_verdict_at_the_end_of_a_joint_step(accelerate, dtype, safeguard, returns):
    finish.assert_every_verdict(accelerate, dtype, safeguard, returns, "triton")


@pytest.mark.parametrize("returns", ["best", "cost"])
def test_end_of_a_joint_step_where_programs_share_a_sample(returns):
    finish.assert_as_the_oracle(17, (9001, 40_003), returns, 1, "triton")
    finish.assert_as_the_oracle(301, (5, 0), returns, 1, "triton")


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_cost_that_is_no_number_stops_its_sample(bad):
    finish.assert_nothing_is_said_without_a_cost("triton")
    finish.assert_cost_stops_its_sample(bad, 20, "triton")


@pytest.mark.parametrize("solver", ["mixed", "type-2-int8", "picard"])
def test_joint_step_agrees_with_float64(solver):
    joint.check_step(joint.SOLVERS[solver], start(2, 33, 9), "triton", steps=4)
