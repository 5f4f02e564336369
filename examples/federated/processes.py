"""The same app in processes of their own: a SuperLink and SuperNodes on this machine's loopback, nothing encrypted.

    python examples/federated/processes.py --clients 2 --rounds 2 --checkpoint out/federated.npz

This is how it would run on several machines, but for `--insecure` and the addresses: there, give certificates. Whatever
happens, the processes are ended, and what they said is in the folder of the logs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import data
import telemetry_off  # noqa: F401  of the processes that start here too

HERE = Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"


def run(folder: Path, budgets: Sequence[int], config: dict[str, object], limit_s: float = 300) -> str:
    """Run the app with a client a budget; what the server printed.

    Args:
        folder: of logs and of Flower's own files; made if it is not there.
        budgets: the iteration budget of each client.
        config: options of the run, those of pyproject.toml where they are not given.
        limit_s: after so many seconds all processes are ended and TimeoutError is raised.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit_s
    ports = free_ports(1 + len(budgets))
    link = f"{LOOPBACK}:{ports[0]}"
    # Flower's own file: where `flwr run` finds the SuperLink that it is told by name.
    (folder / "config.toml").write_text(f'[superlink.loopback]\naddress = "{link}"\ninsecure = true\n')
    plain = ["--insecure", "--host", LOOPBACK, "--port"]
    with contextlib.ExitStack() as started:
        command = ["flower-superlink", *plain, str(ports[0]), "--disable-runtime-dependency-installation"]
        started.enter_context(process(command, folder))
        wait_for(ports[0], end)
        for k, (budget, port) in enumerate(zip(budgets, ports[1:], strict=True)):
            node = f"partition-id={k} num-partitions={len(budgets)} budget={budget}"
            command = ["flower-supernode", *plain, str(port), "--superlink", link, "--node-config", node]
            started.enter_context(process(command, folder, f"supernode-{k}"))
        given = {"clients": len(budgets), **config}
        run_config = " ".join(f"{key}={toml(value)}" for key, value in given.items())
        command = ["flwr", "run", str(HERE), "loopback", "--stream", "--run-config", run_config]
        task = started.enter_context(process(command, folder))
        try:
            code = task.wait(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the run did not end within {limit_s:g} s; see the logs in {folder}") from None
    said = (folder / "flwr.log").read_text()
    if code != 0 or "\nfinished: " not in said:  # Flower ends with 0 where the server has failed
        raise RuntimeError(f"the run failed, flwr ended with {code}: {said[-2000:]}")
    return said


@contextlib.contextmanager
def process(command: Sequence[str], folder: Path, name: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program of Flower's beside this Python, with a log of its own, ended with all that it started."""
    program = shutil.which(command[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise FileNotFoundError(f"{command[0]} is not installed: pip install 'deqfast[federated]'")
    # The programs that Flower starts are found beside this Python too; deqfast is whose this process has.
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(program).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path and path != str(HERE)),
        "FLWR_HOME": str(folder),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    with (folder / f"{name or command[0]}.log").open("wb") as log:
        started = subprocess.Popen(
            [program, *command[1:]], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            yield started
        finally:
            end(started)


def end(started: subprocess.Popen[bytes], patience_s: float = 10) -> None:
    """Ask the process to end, then all that it has started without asking: some of it is in groups of its own."""
    family = descendants(started.pid)
    if started.poll() is None:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(timeout=patience_s)
    started.kill()
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.wait()


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines())}
    found = [pid]
    for known in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((LOOPBACK, 0))
        return [s.getsockname()[1] for s in sockets]


def wait_for(port: int, end: float) -> None:
    """Until something listens there."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
            return
        if time.monotonic() > end:
            raise TimeoutError(f"nothing listens at {LOOPBACK}:{port}")
        time.sleep(0.2)


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float)) else f"'{value}'"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=2, help="processes beside the server")
    parser.add_argument("--rounds", type=int, default=2, help="rounds")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/federated_processes.npz"), help="of every round")
    parser.add_argument("--resume", action="store_true", help="go on after the checkpoint's round")
    parser.add_argument("--logs", type=Path, default=Path("out/federated_processes"), help="folder of the logs")
    args = parser.parse_args()
    config = {"rounds": args.rounds, "checkpoint": args.checkpoint.resolve(), "resume": args.resume}
    said = run(args.logs, [data.budget(k) for k in range(args.clients)], config)
    print("\n".join(line for line in said.splitlines() if line.startswith("round ")))


if __name__ == "__main__":
    main()
