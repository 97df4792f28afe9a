"""Checkpoints: what restores is what was saved, on any mesh; whatever is not whole is no checkpoint."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.checkpoint_folder import SEAL, missing, seal
from experiments.checkpoints import CheckpointStore, sealed_steps
from sharding.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
META = {"config": "0f3a", "seed": 7, "corpus": "9c", "versions": {"jax": jax.__version__}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.float32))


def _mesh(data: int, fsdp: int) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _abstract(mesh: Mesh, width: int = 16, half: Any = jnp.bfloat16) -> dict[str, Any]:
    """A training state: parameters of two dtypes, all that adamw keeps of them, a key, a count."""
    params = {
        "embed": {"w": jax.ShapeDtypeStruct((8, width), jnp.float32)},
        "layers": {"scale": jax.ShapeDtypeStruct((width,), half)},
    }
    state = {
        "params": params,
        "optimizer": jax.eval_shape(OPTIMIZER.init, params),
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        layout = P(*(["data", "fsdp"] if len(leaf.shape) == 2 else [None] * len(leaf.shape)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, layout))

    return jax.tree.map(place, state)


def _filled(abstract: Any, seed: int) -> Any:
    """Random bits in every array, so NaNs, infinities and denormals too."""
    random = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        bits = random.bytes(int(np.prod(leaf.shape)) * leaf.dtype.itemsize)
        return jax.device_put(np.frombuffer(bits, leaf.dtype).reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(fill, abstract)


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@contextlib.contextmanager
def _store(folder: Path, keep: int = 3) -> Iterator[CheckpointStore]:
    with CheckpointStore(folder, keep) as store:
        yield store


@pytest.fixture(scope="module")
def abstract() -> Any:
    return _abstract(_mesh(2, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, abstract: Any) -> Path:
    """A folder with steps 10 and 20, closed; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with _store(folder) as store:
        for step in (10, 20):
            store.save(step, _filled(abstract, step), META)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_every_bit_comes_back(saved: Path, abstract: Any) -> None:
    with _store(saved) as store:
        assert (store.latest(), store.steps(), store.notes) == (20, [10, 20], [])
        state, meta = store.restore(None, abstract)
        assert store.meta(10)["step"] == 10
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert any(isinstance(leaf, optax.EmptyState) for leaf in state["optimizer"])
    for leaf, asked in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.dtype, leaf.sharding) == (asked.dtype, asked.sharding)
    assert _bits(state) == _bits(_filled(abstract, 20))
    assert {key: meta[key] for key in META} == META
    assert meta["step"] == 20
    assert meta["tree"]["params/layers/scale"] == [[16], "bfloat16"]
    assert meta["tree"]["optimizer/1/0/mu/embed/w"] == [[8, 16], "float32"]


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (1, 1), (2, 1)])
def test_another_mesh_gets_the_same_bits(saved: Path, abstract: Any, data: int, fsdp: int) -> None:
    other = _abstract(_mesh(data, fsdp))
    with _store(saved) as store:
        state, _ = store.restore(10, other)
    assert _bits(state) == _bits(_filled(abstract, 10))
    assert state["params"]["embed"]["w"].sharding == other["params"]["embed"]["w"].sharding


def _refusal(folder: Path, asked: Any, step: int | None = None) -> str:
    with _store(folder) as store, pytest.raises(InputError) as caught:
        store.restore(step, asked)
    return str(caught.value)


def test_another_models_checkpoint_is_refused(saved: Path) -> None:
    asked = _abstract(_mesh(2, 4), width=32)
    asked["params"]["head"] = asked["params"].pop("layers")
    said = _refusal(saved, asked)
    assert "step 20" in said
    assert "of another model" in said
    assert "asked for but not in the checkpoint: params/head/scale" in said
    assert "in the checkpoint but not asked for: params/layers/scale" in said
    assert "params/embed/w [8, 16] against [8, 32]" in said


def test_another_dtype_is_refused_and_not_cast(saved: Path) -> None:
    said = _refusal(saved, _abstract(_mesh(2, 4), half=jnp.float16))
    assert "dtypes" in said
    assert "params/layers/scale bfloat16 against float16" in said
    assert "shapes" not in said
    assert "not in the checkpoint" not in said


def test_an_array_without_a_sharding_is_refused(saved: Path, abstract: Any) -> None:
    asked = abstract | {"key": jax.ShapeDtypeStruct((2,), jnp.uint32)}
    assert "sharding for every array; key have none" in _refusal(saved, asked)


def test_no_such_step_and_nothing_at_all(saved: Path, tmp_path: Path, abstract: Any) -> None:
    assert "there is no such step" in _refusal(saved, abstract, 15)
    assert "[10, 20]" in _refusal(saved, abstract, 15)
    assert "no sealed checkpoint" in _refusal(tmp_path / "new", abstract)


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    """Big enough that the files are still being written while the next steps overwrite what was saved."""
    mesh = _mesh(2, 4)
    shapes = {"split": ((2048, 2048), P("data", "fsdp")), "whole": ((512, 1024), P())}
    abstract = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, layout))
        for name, (shape, layout) in shapes.items()
    }
    state = {
        name: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding)
        for name, leaf in abstract.items()
    }
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1.0, s), donate_argnums=0).lower(abstract).compile()
    in_flight = []
    with _store(tmp_path, keep=4) as store:
        for number in range(4):
            store.save(number, state, {})
            for _ in range(5):
                state = update(state)
            jax.block_until_ready(state)
            in_flight.append(number not in store.steps())
        assert any(in_flight)
        for number in range(4):
            restored, _ = store.restore(number, abstract)
            for leaf in jax.tree.leaves(restored):
                np.testing.assert_array_equal(np.asarray(leaf), 1.0 + 5 * number)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    state = {"x": jnp.arange(8)}
    with _store(tmp_path, keep=2) as store:
        for step in (1, 2, 5, 9):
            assert store.save(step, state, {}) > 0
            assert store.has(step)
        store.wait()
        assert (store.steps(), store.latest()) == ([5, 9], 9)
        store.save(3, state, {})  # a run gone back: the step just saved is never the one removed
        store.wait()
        assert store.steps() == [3, 9]
        assert list((tmp_path / "deleting").iterdir()) == []
        with pytest.raises(InputError, match="step 9 is already saved"):
            store.save(9, state, {})
        store.save(2, state, {})  # removed before, so free again
    assert sealed_steps(tmp_path) == [2, 9]


DAMAGE = {
    "never sealed": lambda step: (step / SEAL).unlink(),
    "an empty directory": lambda step: (shutil.rmtree(step), step.mkdir()),
    "seal cut short": lambda step: (step / SEAL).write_text((step / SEAL).read_text()[:40]),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no meta": lambda step: shutil.rmtree(step / "meta"),
    "an array file gone": lambda step: max((step / "state" / "d").iterdir()).unlink(),
    "an array file cut short": lambda step: os.truncate(max((step / "state").glob("ocdbt*/d/*")), 10),
    "another step's directory": lambda step: (
        shutil.rmtree(step),
        shutil.copytree(step.parent / "10", step),
    ),
}


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_refused_with_what_to_do(copy: Path, abstract: Any, part: float) -> None:
    path = max((copy / "20" / "state").glob("ocdbt*/d/*"), key=lambda p: p.stat().st_size)
    held = bytearray(path.read_bytes())
    held[int(part * len(held))] ^= 0x10
    path.write_bytes(held)
    with _store(copy) as store:
        assert store.latest() == 20
        with pytest.raises(
            InputError, match=rf"{path.name} has other bytes.*Move the folder .*20 away .* step 10"
        ):
            store.restore(20, abstract)
        assert _bits(store.restore(10, abstract)[0]) == _bits(_filled(abstract, 10))


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_incomplete_step_is_set_aside(copy: Path, abstract: Any, damage: str) -> None:
    DAMAGE[damage](copy / "20")
    assert missing(copy / "20")
    with _store(copy) as store:
        assert store.latest() == 10
        assert len(store.notes) == 1
        assert store.notes[0].startswith("set aside step 20 as set-aside/20: ")
        assert (copy / "set-aside" / "20").is_dir()
        state, _ = store.restore(None, abstract)
        assert _bits(state) == _bits(_filled(abstract, 10))
        store.save(20, _filled(abstract, 21), META)
    with _store(copy) as store:
        assert (store.latest(), store.notes) == (20, [])


def test_a_step_damaged_under_an_open_store_is_set_aside_when_saved_again(copy: Path, abstract: Any) -> None:
    with _store(copy) as store:
        store.restore(20, abstract)
        (copy / "20" / SEAL).unlink()
        assert store.latest() == 10
        assert not store.has(20)
        store.save(20, _filled(abstract, 20), META)
        store.wait()
        assert store.latest() == 20
        assert store.notes == ["set aside step 20 as set-aside/20: it was never sealed"]


def test_leftovers_of_a_killed_save_and_a_killed_deletion_go(copy: Path, abstract: Any) -> None:
    shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp")
    (copy / "deleting").mkdir(exist_ok=True)
    shutil.move(copy / "10", copy / "deleting" / "10")
    (copy / "deleting" / "10" / SEAL).unlink()
    with _store(copy) as store:
        assert store.notes == ["removed the unfinished save 30.orbax-checkpoint-tmp"]
        assert (store.steps(), store.latest()) == ([20], 20)
        store.save(30, _filled(abstract, 30), META)
    assert sealed_steps(copy) == [20, 30]
    assert not list((copy / "deleting").iterdir())


def test_files_that_are_whole_in_size_but_unreadable_are_reported(copy: Path, abstract: Any) -> None:
    target = copy / "20" / "state" / "_METADATA"
    target.write_bytes(bytes(target.stat().st_size))
    seal(copy / "20", 20)  # as if they had been written so
    said = _refusal(copy, abstract)
    assert "step 20" in said
    assert "cannot be read" in said
    assert "[10]" in said


@contextlib.contextmanager
def _unprivileged() -> Iterator[None]:
    """Without root's power to write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_refused_at_once() -> None:
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "run"
        folder.mkdir()
        os.chmod(above, 0o755)
        os.chmod(folder, 0o555)
        with _unprivileged(), pytest.raises(InputError, match=rf"{folder}.* cannot be written: Permission"):
            CheckpointStore(folder, 1)
        assert list(folder.iterdir()) == []


def test_bad_folders_and_policies_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        CheckpointStore(tmp_path / "file" / "checkpoints", 1)
    with pytest.raises(InputError, match="keep is 0"):
        CheckpointStore(tmp_path, 0)
    with pytest.raises(InputError, match=r"s3://.*only folders"):
        CheckpointStore("s3://bucket/run", 1)
    with _store(tmp_path / "run"), pytest.raises(InputError, match="open in another run"):
        CheckpointStore(tmp_path / "run", 1)


def test_a_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with _store(Path("run/checkpoints")) as store:
        monkeypatch.chdir("/")
        store.save(1, {"x": jnp.arange(4)}, {})
    assert sealed_steps(tmp_path / "run" / "checkpoints") == [1]


def test_a_disk_error_in_the_background_is_raised_and_the_next_save_works(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: the kernel refuses the write itself."""
    noise = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    state = {"x": jnp.asarray(noise)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with _store(tmp_path) as store:
        store.save(1, state, {})
        store.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            store.save(2, state, {})
            with pytest.raises(InputError, match=r"step 2 could not be written.*\[1\], are as they were"):
                store.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert (store.latest(), store.has(2)) == (1, False)
        store.save(2, state, {})
        store.wait()
        assert store.latest() == 2


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4095))
    with _store(tmp_path) as store, pytest.raises(InputError, match=r"4,096 bytes and .* 4,095 bytes free"):
        store.save(1, {"x": jnp.zeros(1024, jnp.float32)}, {})
    assert sealed_steps(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "meta", "said"),
    [
        ({"x": np.zeros(2)}, {}, r"x \(ndarray\)"),
        ({"x": jnp.zeros(2), "lr": 0.1}, {}, r"lr \(float\)"),
        ({}, {}, "at least one array"),
        ({"a/b": jnp.zeros(2)}, {}, "'a/b' cannot be a key"),
        ({1: jnp.zeros(2), "1": jnp.ones(2)}, {}, "distinct paths|keys"),
        ({"x": jnp.zeros(2)}, {"at": Path("x")}, "must be JSON"),
        ({"x": jnp.zeros(2)}, {"loss": float("nan")}, "must be JSON"),
        ({"x": jnp.zeros(2)}, {"step": 3}, r"meta\['step'\] disagrees"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, state: Any, meta: Any, said: str) -> None:
    with _store(tmp_path) as store, pytest.raises((InputError, ValueError), match=said):
        store.save(1, state, meta)
    assert sealed_steps(tmp_path) == []


SAVING = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
from experiments.checkpoints import CheckpointStore
with CheckpointStore(sys.argv[1], 1) as store:
    first = (store.latest() or 0) + 1
    for step in range(first, 100_000):
        store.save(step, {"x": jnp.full((256, 256), step), "step": jnp.int32(step)}, {})
        print(step, flush=True)
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("delay", [0.31, pytest.param(0.83, marks=pytest.mark.slow)])
def test_a_killed_run_loses_no_sealed_step(tmp_path: Path, delay: float) -> None:
    """Kill -9 while steps are saved and deleted one after the other; until then it must have been silent."""
    place = NamedSharding(_mesh(1, 8), P())
    asked = {
        "x": jax.ShapeDtypeStruct((256, 256), jnp.int32, sharding=place),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=place),
    }
    process = _start(SAVING, str(tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    second = process.stdout.readline()  # so the first one is sealed
    time.sleep(delay)
    process.kill()
    out, err = process.communicate()
    last = int(re.findall(r"^\d+$", second + out, re.M)[-1])
    assert err == ""
    with _store(tmp_path, keep=1) as store:
        newest = store.latest()
        assert newest is not None
        assert newest >= last - 1
        state, meta = store.restore(None, asked)
    assert (int(state["step"]), meta["step"]) == (newest, newest)
    np.testing.assert_array_equal(np.asarray(state["x"]), newest)


TWO = """
import sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
from jax.sharding import NamedSharding, PartitionSpec as P
from experiments.checkpoints import CheckpointStore
place = NamedSharding(jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), P("data"))
rows = np.arange(64, dtype=np.float32).reshape(8, 8)
with CheckpointStore(sys.argv[1], 1) as store:
    for step in (1, 2):
        x = jax.make_array_from_callback((8, 8), place, lambda index: rows[index] + step)
        store.save(step, {"x": x}, {})
    store.wait()
    newest = store.latest()
    state, meta = store.restore(None, {"x": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=place)})
    right = all(np.array_equal(s.data, rows[s.index] + 2) for s in state["x"].addressable_shards)
    print(f"\\nresult {newest} {meta['step']} {right}", flush=True)
"""


def _both(code: str, folder: Path) -> list[tuple[str, str]]:
    """What two processes that meet print: standard output and error of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [_start(code, str(folder), port, str(rank)) for rank in range(2)]
    try:
        return [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path: Path) -> None:
    said = _both(TWO, tmp_path)
    assert ["result 2 2 True" in out for out, _ in said] == [True, True], said
    place = NamedSharding(_mesh(1, 8), P("fsdp"))
    with _store(tmp_path) as store:
        assert (store.steps(), store.notes) == ([2], [])
        state, _ = store.restore(2, {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place)})
    np.testing.assert_array_equal(np.asarray(state["x"]), np.arange(64).reshape(8, 8) + 2)


READ = (
    TWO[: TWO.index("rows =")]
    + """
import experiments.checkpoint_folder as on_disk
from sharding.errors import InputError
hashed, sha256 = [], on_disk._sha256
on_disk._sha256 = lambda path: (hashed.append(str(path)), sha256(path))[1]
with CheckpointStore(sys.argv[1], 9) as store:
    for step in store.steps():
        try:
            said = sorted(store.meta(step)["tree"])
        except InputError as error:
            said = str(error)
        print(f"\\n{step}: {said}", flush=True)
print("hashed", hashed)
"""
)


@pytest.mark.parametrize("smallest", [True, False])
def test_two_processes_read_every_file_once_and_refuse_the_same_step_together(
    smallest: bool, copy: Path
) -> None:
    """The damage lies in a file that one of the two reads: the other would wait for it in Orbax."""
    flipped = (min if smallest else max)((copy / "20" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    held = bytearray(flipped.read_bytes())
    held[len(held) // 2] ^= 1
    flipped.write_bytes(held)
    said = _both(READ, copy)
    told = [[line for line in out.splitlines() if line[:4] in ("10: ", "20: ")] for out, _ in said]
    assert told[0] == told[1], said
    assert "params/embed/w" in told[0][0]
    assert f"{flipped.name} has other bytes than were sealed. Move the folder" in told[0][1]
    read = [ast.literal_eval(out.partition("hashed ")[2]) for out, _ in said]
    assert all(read), "each has its share"
    whole = {str(p) for item in ("state", "meta") for p in (copy / "10" / item).rglob("*") if p.is_file()}
    both = [path for paths in read for path in paths]
    assert len(both) == len(set(both)), "no file is read twice"
    assert whole <= set(both)
