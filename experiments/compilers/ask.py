"""The real compilers, asked from a machine that has none of their devices: what XLA makes of a config's step for a target.

The TPU compiler comes with libtpu, the GPU compiler with jax's CUDA plugin (without NVIDIA's own packages); both are extras.
Each compilation is a process of its own (`experiments.compilers.child`), since a process can be one platform's only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from experiments.compilers.step import Compiled, Memory, Refusal
from experiments.compilers.versions import missing
from sharding.errors import InputError

if TYPE_CHECKING:
    from sharding.price.target import Target

ROOT = Path(__file__).resolve().parents[2]
Tell = Callable[[str], None]

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # nothing is run, and a device that is there is left alone
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask Google Cloud's metadata server which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its own lock guards a TPU, of which none is used here
}
"""Of the process that compiles, besides what this one has."""
FLAGS = {"gpu": ("--xla_gpu_autotune_level=0",)}
"""Platform -> XLA flags: autotuning would run kernels."""


def compile_for(
    path: Path,
    overrides: Sequence[str],
    target: Target,
    partitioner: Literal["", "manual", "auto"] = "",
    tell: Tell = lambda text: None,
    limit: float = math.inf,
) -> Compiled:
    """What the target's compiler makes of the step of CONFIG `path` with command-line `overrides`; the mesh must fit it.

    partitioner: whose the step is to be, "" as the config says. `tell` hears one line for each stage and when it waits for
    another process that has the TPU compiler. After `limit` seconds of compiling the answer is a refusal that says so.
    Raises InputError where the compiler is missing, for a config that does not fit, and where the process is killed.
    """
    lacking = missing(target)
    if lacking:
        raise InputError(f"{target.text} cannot be compiled for here: {lacking}.")
    job = {
        "path": str(Path(path).resolve()),
        "overrides": list(overrides),
        "target": target.text,
        "partitioner": partitioner,
    }
    with _turn(target.platform, tell), _child(job, target.platform) as (process, pipe, errors):
        told = _heard(process, pipe, tell, limit)
        if "compiled" in told:
            return Compiled.from_json(told["compiled"])
        if "refused" in told:
            raise InputError(told["refused"])
        if "late" in told:
            late = Refusal(f"no result within {limit:g} s")
            by = "auto" if partitioner == "auto" else "manual"
            return Compiled(target.text, by, {}, (), (), (), None, late, {}, {})
        code = process.wait()
        errors.seek(0)
        words = errors.read().decode("utf-8", "replace")
    if code == -signal.SIGKILL:
        raise InputError(
            f"The process that compiled for {target.text} died of SIGKILL, which is how a machine whose memory is used up ends "
            f"a process: plan for fewer devices or a smaller model, or where there is more."
        )
    if code < 0:
        raise InputError(
            f"The {target.platform} compiler itself died of {signal.Signals(-code).name} on this step for {target.text}: a "
            f"fault of the compiler. Its last words: {' '.join(words.split())[-300:]}. Take another mesh, rules or partitioner."
        )
    raise RuntimeError(f"compiling for {target.text} ended with exit code {code}:\n{words[-4000:]}")


def _heard(process: subprocess.Popen[bytes], pipe: int, tell: Tell, limit: float) -> dict[str, Any]:
    """The last message of the process, its stages being told; {} where it ended without one."""
    end, rest = time.monotonic() + limit, b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return {"late": True}
            if not selector.select(timeout=min(left, 0.5)):
                continue
            said = os.read(pipe, 1 << 16)
            if not said:
                return {}
            *lines, rest = (rest + said).split(b"\n")
            for message in map(json.loads, lines):
                if "at" not in message:
                    return message
                tell(message["at"])


@contextlib.contextmanager
def _child(job: Mapping[str, Any], platform: str) -> Iterator[tuple[subprocess.Popen[bytes], int, IO[bytes]]]:
    """The process that compiles; ended for good on the way out, whatever the way."""
    reads, writes = os.pipe()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        place = Path(folder) / "job.json"
        place.write_text(json.dumps(job), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.compilers.child", str(place), str(writes)],
            stdin=subprocess.PIPE,  # it leaves when this closes
            stdout=errors,
            stderr=errors,
            pass_fds=(writes,),
            env=environment(platform),
            start_new_session=True,  # a Ctrl-C in the terminal is ours to answer: a compiler does not hear it
        )
        os.close(writes)
        try:
            yield process, reads, errors
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
            os.close(reads)


def environment(platform: str) -> dict[str, str]:
    """Of the process that compiles for a platform."""
    made = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | ENVIRONMENT
    path = os.environ.get("PYTHONPATH", "")
    made["PYTHONPATH"] = os.pathsep.join([*filter(None, path.split(os.pathsep)), str(ROOT)])
    made["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS.get(platform, ())]).strip()
    return made


@contextlib.contextmanager
def _turn(platform: str, tell: Tell) -> Iterator[None]:
    """Wait until no other process of this user compiles for TPUs: each takes gigabytes, and libtpu is meant for one."""
    if platform != "tpu":
        yield
        return
    place = Path(tempfile.gettempdir()) / f"shardlab-tpu-compiler-{os.getuid()}.lock"
    held = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        waits = False
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits:
                    who = os.pread(held, 20, 0).decode(errors="replace").strip()
                    tell(f"waiting for the TPU compiler, which process {who or '?'} has")
                waits = True
                time.sleep(0.2)
        os.truncate(held, 0)
        os.pwrite(held, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(held)  # and with it the lock


__all__ = ["Compiled", "Memory", "Refusal", "compile_for", "environment", "missing"]
