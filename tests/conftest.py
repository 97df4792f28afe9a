"""What every test stands on: 8 pretend CPU devices, strict promotion, a compilation cache that outlives the run.

Without the 8 devices nothing here would mean anything, so their absence ends the run; no test is skipped for it.
Each pytest-xdist worker loads this file too and so gets the same settings.
"""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import jax
import pytest

from experiments import malloc
from experiments.config import Experiment
from experiments.data.contract import Dataset

DEVICES = 8
ROOT = Path(__file__).resolve().parent.parent

SETTINGS = {
    "jax_platforms": "cpu",  # a GPU's numbers and speed are for the benchmarks
    "jax_num_cpu_devices": DEVICES,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_compilation_cache_dir": str(ROOT / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}

# A job that a script starts in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What processes started by a test inherit. Promotion and the number of devices stay theirs to choose: they are the
# product as a user starts it.
INHERITED = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": SETTINGS["jax_compilation_cache_dir"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "MPLBACKEND": "Agg",
    # Machine code is not optimized: tests compile hundreds of programs and run each a few times (a third less CPU time).
    # 8 devices on fewer cores, and two workers at that: a late thread is load, not a deadlock.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_collective_call_warn_stuck_timeout_seconds=120 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
}


def _pretend_devices() -> str:
    """Applies SETTINGS; what is wrong with the devices afterwards, or an empty string."""
    try:
        for name, value in SETTINGS.items():
            jax.config.update(name, value)
        devices = jax.devices()
    except RuntimeError as error:
        return f"JAX refuses them: {error}"
    if len(devices) != DEVICES or {d.platform for d in devices} != {"cpu"}:
        return f"JAX has {len(devices)} device(s) of {devices[0].platform} instead: something used it before."
    return ""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--every N`: a run of one test in N."""
    parser.addoption(
        "--every",
        type=int,
        choices=range(1, 101),
        default=1,
        metavar="N",
        help="run about one test in N, always the same ones: a fast look at another Python or JAX",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what `--every` does. By the hash of a test's name, so that no parameter is left out altogether."""
    every = int(config.getoption("every") or 1)
    kept, left = [], []
    for item in items:
        (left if zlib.crc32(item.nodeid.encode()) % every else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def pytest_configure() -> None:
    """Sets the environment up before any test module is imported, or ends the run."""
    os.environ.update(INHERITED)
    # Kept memory pays for a program that runs often; here hundreds are compiled, each of which it would slow down.
    malloc.keep_freed_memory = lambda: True
    wrong = _pretend_devices()
    if wrong:
        pytest.exit(f"The tests need {DEVICES} pretend CPU devices. {wrong}", returncode=3)


# The first example of a property compiles, so a deadline would measure the compiler. CI draws the same
# examples each time.
hypothesis.settings.register_profile(
    "shardlab", deadline=None, print_blob=True, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("shardlab")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with small.py and its corpus, one for the tests of a file."""
    from tests.small import place

    return place(tmp_path_factory.mktemp("home")).parent


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in `home`."""
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Experiment], Dataset]:
    """A config's dataset, opened once."""
    cache, held = tmp_path_factory.mktemp("data"), {}

    def open_once(e: Experiment) -> Dataset:
        if e.data not in held:
            held[e.data] = e.data.open(cache)
        return held[e.data]

    return open_once
