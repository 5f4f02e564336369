"""What `make check-cuda` says of a kernel, from what ptxas and cuobjdump print; no GPU needed."""

from __future__ import annotations

import shutil

import pytest
import resources

pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not installed")

MIX = "_ZN7deqfast4cuda10mix_kernelIffNS0_4Bf16ELi1EEEvNS0_6ParamsIXT2_EEE"  # <float, float, Bf16, 1>
LOG = """ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    0 bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, {shared} bytes smem
"""
LISTING = """arch = sm_90
\t\tFunction : {name}
        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;      /* 0x0 */
        /*0010*/              @!P0 LDG.E.64 R8, desc[UR6][R2.64] ;       /* 0x0 */
        /*0020*/              @P1  STG.E{width} desc[UR6][R2.64], R4 ;   /* 0x0 */
"""


def faults(width=".128.STRONG.GPU", spilled=0, shared=16):
    found = resources.used(LOG.format(name=MIX, spilled=spilled, shared=shared))
    resources.accesses(iter(LISTING.format(name=MIX, width=width).splitlines()), found)
    kernels = list(found.values())
    resources.described(kernels)
    assert (kernels[0].family, kernels[0].registers) == ("mix_kernel", 96)
    return list(resources.faults(kernels))


def test_a_kernel_that_moves_whole_tiles_has_no_fault():
    assert faults() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": ""}, "no STG of 16 bytes"),
        ({"width": ".64"}, "no STG of 16 bytes"),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 2048}, "2048 bytes of shared memory of its own"),
    ],
)
def test_what_must_not_be_is_said(change, said):
    (found,) = faults(**change)
    assert found.startswith(f"mix_kernel<float, float, Bf16, 1> (sm_90): {said}")


def test_the_table_goes_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{resources.MARKS[0]}\nold\n{resources.MARKS[1]}\nafter\n")
    resources.write(page, ["| a |"], "13.0")
    text = page.read_text()
    assert "old" not in text and "| a |" in text and text.startswith("before\n") and text.endswith("after\n")
