"""``python -m deqfast.info`` tells the truth about this installation, and never fails."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import deqfast as dq
from deqfast import info, ops
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.native import extension as native

CPU = torch.device("cpu")
built = pytest.mark.skipif(native._C is None, reason="the extension is not built")


def run(*arguments, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "deqfast.info", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    for name in info.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_report_states_versions_threads_and_every_op():
    report = info.report()
    assert re.search(rf"^deqfast +{re.escape(dq.__version__)}$", report, re.MULTILINE)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", report, re.MULTILINE)
    assert re.search(rf"^threads +{torch.get_num_threads()}\b", report, re.MULTILINE)
    assert len(re.findall(r"^  every op .*yes$", report, re.MULTILINE)) == len(info.facts()["devices"])


@built
def test_report_says_how_the_extension_was_built_and_what_it_runs():
    report = info.report()
    build = native._C.build_info()
    assert re.search(rf"^native +{re.escape(build['version'])}, .*{re.escape(build['compiler'])}", report, re.MULTILINE)
    assert re.search(rf"^CPU kernels +{native._C.cpu_isa()} ", report, re.MULTILINE)
    assert 'cpu: backend="auto" is native' in re.sub(r"cpu \(.*?\):", "cpu:", report)


def test_report_agrees_with_what_the_solvers_do():
    (cpu, *_) = info.facts()["devices"]
    assert cpu["auto"] == ops.choose("auto", CPU).name
    for row in cpu["ops"].values():
        for backend, answer in row.items():
            assert answer == (ops.why_not(backend, CPU) or "yes")


def test_report_of_a_pure_python_install_says_that_native_is_not_built(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_IMPORT_ERROR", "No module named 'deqfast._C'")
    report = info.report()
    assert re.search(r"^native +not built: No module named", report, re.MULTILINE)
    assert re.search(r"^  native: no, .*not built", report, re.MULTILINE)
    assert info.facts()["devices"][0]["auto"] == "torch"


def test_every_reason_is_printed(monkeypatch):
    monkeypatch.setattr(ops, "why_not", lambda backend, device: None if backend == "reference" else f"{backend} is off")
    report = info.report()
    assert "  native: no, native is off" in report
    assert "  triton: no, triton is off" in report


def test_ops_have_rows_of_their_own_where_their_backends_differ():
    class Half(type(next(ops.backends()))):  # type: ignore[misc]
        name = "half"

        def __init__(self):
            self.steps = {AndersonWorkspace: ops.BoundStep}

        def why_not(self, device):
            return None

    ops.register(Half())
    try:
        report = info.report()
        facts = info.facts()["devices"][0]["ops"]
    finally:
        ops.unregister("half")
    assert "every op" not in report
    for op, mark in (("anderson_step", "yes"), ("broyden_step", "no"), ("joint_step", "yes")):
        assert re.search(rf"^  {op} .* {mark}$", report, re.MULTILINE)
        assert facts[op]["half"] == (mark if mark == "yes" else "it has no broyden_step")
    assert "  half: no, it has no broyden_step" in report


def test_command_prints_the_report_and_names_the_overrides_in_effect():
    printed = run(DEQFAST_BACKEND="reference", DEQFAST_UNHEARD_OF="1")
    assert re.search(r'backend="auto" is reference', printed)
    assert re.search(r"^  DEQFAST_BACKEND=reference +what", printed, re.MULTILINE)
    assert re.search(r"^  DEQFAST_UNHEARD_OF=1 +not read at run time", printed, re.MULTILINE)


def test_command_survives_overrides_that_cannot_be_followed():
    printed = run(DEQFAST_BACKEND="abacus", DEQFAST_CPU_ISA="sse9")
    assert "an error: DEQFAST_BACKEND must be one of" in printed
    assert native._C is None or "got 'sse9'" in printed


def test_command_prints_json_for_programs(capsys):
    info.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(info.facts()))
    assert found["devices"][0]["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()


def test_main_without_arguments_prints_the_report(capsys):
    info.main([])
    assert capsys.readouterr().out == info.report() + "\n"


def test_every_device_of_this_machine_has_a_table():
    expected = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    assert [device["device"] for device in info.facts()["devices"]] == expected
