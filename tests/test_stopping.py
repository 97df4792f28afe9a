"""Ctrl-C and SIGTERM: one process, and two that must leave at the same step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.stopping import StopRequest

ROOT = Path(__file__).resolve().parent.parent

LOOP = """
import signal, sys, time
from experiments.stopping import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with StopRequest(agree_every=5) as stop:
        print("ready", flush=True)
        for step in range(1, 100_000):
            time.sleep(PAUSE)
            if stop.reached(step):
                print("stopped by", stop.reached(step), flush=True)
                break
    print("restored", signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
except KeyboardInterrupt:
    print("interrupted at once", flush=True)
"""

TWO = """
import sys, time
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_enable_preemption_service", sys.argv[3] == "on")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
from experiments.stopping import StopRequest
with StopRequest(agree_every=5) as stop:
    for step in range(1, 1_000):
        time.sleep(0.02 + 0.005 * jax.process_index())
        reason = stop.reached(step)
        if step == 5:
            print("ready", flush=True)
        if reason:
            break
print("left", step, reason, stop.requested, flush=True)
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:  # Gloo, too, speaks on stdout
        if line == "ready\n":
            return
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_finish(number: signal.Signals) -> None:
    process = _start(LOOP.replace("PAUSE", "0.01"))
    _until_ready(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, f"stopped by {number.name}\nrestored True\n"), err
    assert f"{number.name}: stopping after this step" in err


def test_the_second_ctrl_c_leaves_at_once() -> None:
    process = _start(LOOP.replace("PAUSE", "60"))
    _until_ready(process)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping after this step" not in process.stderr.readline():
        assert time.monotonic() - start < 20
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "interrupted at once\n"), err


def test_remembers_the_first_signal_and_restores_the_handlers() -> None:
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with StopRequest(agree_every=1) as stop:
        assert stop.reached(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.requested, stop.reached(2)) == ("SIGTERM", "SIGTERM")
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_the_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopRequest(agree_every=1):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_says_that_only_the_main_thread_can_enter() -> None:
    said: list[str] = []

    def enter() -> None:
        with pytest.raises(RuntimeError) as caught, StopRequest(agree_every=1):
            pass
        said.append(str(caught.value))

    thread = threading.Thread(target=enter, name="elsewhere")
    thread.start()
    thread.join()
    assert "main thread" in said[0]
    assert "'elsewhere'" in said[0]


def test_refuses_an_interval_of_no_steps() -> None:
    with pytest.raises(ValueError, match="agree_every is 0"):
        StopRequest(agree_every=0)


@pytest.mark.parametrize(
    ("number", "service"),
    [
        (signal.SIGINT, "on"),
        (signal.SIGTERM, "on"),
        pytest.param(signal.SIGTERM, "off", marks=pytest.mark.slow),
    ],
)
def test_two_processes_leave_at_the_same_step(number: signal.Signals, service: str) -> None:
    """The signal goes to the second process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [_start(TWO, port, str(rank), service) for rank in range(2)]
    try:
        for process in processes:
            _until_ready(process)
        processes[1].send_signal(number)
        said = [process.communicate(timeout=30) for process in processes]
    finally:
        for process in processes:
            process.kill()
    left = [out.splitlines()[-1].split() for out, _ in said]
    assert [process.returncode for process in processes] == [0, 0], said
    assert left[0][:3] == left[1][:3] == ["left", left[0][1], number.name], said
    assert left[1][3] == number.name
