"""What XLA emits is what the trace predicts: kind, axes, number and bytes of every collective, for every rule and many
compositions; and each encoding in which XLA writes groups and loops is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.axes import MeshShape
from sharding.ledger import collectives, per_axis
from sharding.mesh import device_mesh
from sharding.module.compiled import (
    BETWEEN_SLICES,
    NOWHERE,
    Emitted,
    across_islands,
    axes_of,
    axes_of_pairs,
    compiled_collectives,
    trips,
)
from sharding.module.differences import differences
from sharding.module.hlo import Module, Shape, module_of, read_module
from sharding.module.repeated import repeated
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.expert import expert
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.sequence import sequence
from sharding.rules.spatial import spatial
from sharding.rules.tensor import tensor
from sharding.rules.tensor2d import tensor2d
from sharding.rules.ulysses import ulysses
from sharding.rules.zero1 import zero1
from sharding.rules.zero2 import zero2
from tests.support import make_step, model_configs

MODELS = model_configs()
SCANNED = dataclasses.replace(MODELS["transformer"], loop="scan", layers=3, remat="full")
KEPT = dataclasses.replace(SCANNED, remat="none")
EIGHT = MeshShape(data=2, fsdp=2, tensor=2)
CASES: dict[str, tuple[Any, Rules, MeshShape]] = {
    "data": (MODELS["transformer"], data(), MeshShape(data=8)),
    "zero1": (MODELS["transformer"], zero1() | tensor(), MeshShape(data=4, tensor=2)),
    "zero2": (MODELS["transformer"], zero2(), MeshShape(data=8)),
    "fsdp": (MODELS["transformer"], fsdp(), MeshShape(fsdp=8)),
    "hsdp": (MODELS["transformer"], hsdp("replica"), MeshShape(replica=2, fsdp=4)),
    "scanned fsdp tensor sequence": (SCANNED, data() | fsdp() | tensor() | sequence(), EIGHT),
    "tensor2d": (MODELS["transformer"], data() | tensor2d(), EIGHT),
    "ring": (KEPT, data() | context(), MeshShape(data=2, context=4)),
    "all-to-all": (MODELS["transformer"], data() | ulysses(), MeshShape(data=2, context=4)),
    "expert": (MODELS["moe"], data() | expert(), MeshShape(data=2, expert=4)),
    "perceptron": (MODELS["mlp"], data() | fsdp() | tensor(), EIGHT),
    "spatial": (MODELS["convnet"], data() | spatial(), MeshShape(data=2, context=4)),
    "vision": (MODELS["vit"], data() | fsdp() | tensor(), EIGHT),
}
QUICK = ("hsdp", "scanned fsdp tensor sequence", "all-to-all", "expert")


@pytest.fixture(autouse=True)
def lines_of_today() -> Iterator[None]:
    """A module from the compilation cache may have the lines and names of another day's code."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


def lowered(config: Any, rules: Rules, mesh: MeshShape, by: Partitioner = Manual()) -> tuple[Any, Any]:  # noqa: B008
    """The jaxpr and the compiled module of one update."""
    step = make_step(config, rules, mesh, by)
    lies = step.batch_shardings()
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies[k])
        for k, x in step.abstract_batch(16).items()
    }
    traced = step.step.trace(step.abstract_state(), batch)
    return traced.jaxpr, module_of(traced.lower().compile())


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_what_is_compiled_is_what_was_traced(case: str) -> None:
    config, rules, mesh = CASES[case]
    jaxpr, module = lowered(config, rules, mesh)
    predicted, found = (
        per_axis(collectives(jaxpr, mesh.sizes())),
        per_axis(compiled_collectives(module, mesh.sizes())),
    )
    assert predicted
    assert found == predicted


@pytest.mark.slow
def test_of_a_ring_that_is_computed_again_xla_does_once_what_is_asked_for_twice() -> None:
    """Two permutations a layer: keys and values begin the same round in the pass computed again and in its gradient."""
    mesh = MeshShape(data=2, context=4)
    jaxpr, module = lowered(SCANNED, data() | context(), mesh)
    predicted, found = collectives(jaxpr, mesh.sizes()), compiled_collectives(module, mesh.sizes())
    again = repeated(jaxpr, mesh.sizes())
    assert {(c.kind, c.times) for c in again} == {("permute", SCANNED.layers)}
    assert len(again) == 2
    (one,) = differences(predicted, found, again)
    assert (one.name, one.kind, one.predicted[0] - one.compiled[0]) == (
        "repeated",
        "permute",
        2 * SCANNED.layers,
    )
    assert {d.name for d in differences(predicted, found)} == {""}


def test_a_collective_that_nobody_traced_is_seen() -> None:
    """The same rules under XLA's partitioner on CPU: whole gradients over both axes, and no reduce-scatter."""
    _, rules, mesh = CASES["hsdp"]
    _, module = lowered(MODELS["transformer"], rules, mesh, Auto())
    found = per_axis(compiled_collectives(module, mesh.sizes()))
    assert not any("reduce-scatter" in kinds for kinds in found.values())
    assert (
        found["replica", "fsdp"]["all-reduce"][1] > found.get(("replica",), {}).get("all-reduce", (0, 0))[1]
    )


def test_a_collective_has_the_line_and_the_op_that_asked_for_it() -> None:
    *_, mesh = CASES["hsdp"]
    jaxpr, module = lowered(*CASES["hsdp"])
    asked = lambda found: {(x.kind, x.source, x.op) for x in found}
    traced = asked(collectives(jaxpr, mesh.sizes()))
    seen = asked(compiled_collectives(module, mesh.sizes()))
    assert seen <= traced
    assert {kind for kind, _, _ in traced - seen} <= {"all-reduce"}  # several in one keep one line


# Loops.


def module_for(call: Any, *shapes: tuple[int, ...]) -> Module:
    """The module of a function of arrays split over eight devices."""
    mesh = device_mesh(MeshShape(data=8))
    place = NamedSharding(mesh, PartitionSpec("data"))
    run = jax.shard_map(call, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    given = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in shapes]
    return module_of(jax.jit(run).lower(*given).compile())


def shifted(x: Array) -> Array:
    return lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]) * 2.0


def test_loops_in_loops_multiply() -> None:
    def call(x: Array) -> Array:
        inner = lambda x, _: (shifted(x), None)
        return lax.scan(lambda x, _: (lax.scan(inner, x, None, length=5)[0] + 1.0, None), x, None, length=3)[
            0
        ]

    (found,) = compiled_collectives(module_for(call, (64, 4)), MeshShape(data=8).sizes())
    assert (found.kind, found.axes, found.times, found.bytes) == ("permute", ("data",), 15, 15 * 8 * 4 * 4)


def test_a_loops_trips_are_read_from_its_condition_where_nothing_is_noted() -> None:
    module = module_for(lambda x: lax.scan(lambda x, _: (shifted(x), None), x, None, length=7)[0], (64, 4))
    loops = [
        (c, i) for c in module.computations.values() for i in c.instructions.values() if i.opcode == "while"
    ]
    ((computation, loop),) = loops
    assert json.loads(loop.config)["known_trip_count"]["n"] == "7"
    assert trips(module, computation, loop) == 7
    for unread in (b"", b"\x08\x01"):
        assert trips(module, computation, dataclasses.replace(loop, config=unread)) == 7


def test_a_loop_that_depends_on_data_counts_once() -> None:
    grown = lambda x: lax.while_loop(lambda x: lax.pmax(jnp.max(x), "data") < 100.0, shifted, x)
    found = compiled_collectives(module_for(grown, (64, 4)), MeshShape(data=8).sizes())
    assert {(x.kind, x.times) for x in found} == {("permute", 1), ("all-reduce", 1)}


# Groups, in each encoding: bytes written by hand as xla.HloModuleProto has them.


def varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = b""
    while n > 0x7F:
        out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
    return out + bytes([n])


def message(*fields: tuple[int, int | str | bytes | Iterable[int]]) -> bytes:
    """A protobuf message: whole numbers, texts and messages, packed numbers."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            held = raw if isinstance(raw, bytes) else b"".join(map(varint, raw))
            out += varint(number << 3 | 2) + varint(len(held)) + held
    return out


def groups(*rows: tuple[int, ...]) -> list[bytes]:
    return [message((1, row)) for row in rows]


FSDP = ((0, 1, 2, 3), (4, 5, 6, 7))
IOTA = message((1, 4), (2, 2), (3, (2, 4)), (4, (1, 0)))
MESH = message(*((1, message((1, a), (2, n))) for a, n in (("replica", 2), ("fsdp", 4))))
TURNED = message(
    *((1, message((1, a), (2, n))) for a, n in (("x", 2), ("y", 4))), (3, message((1, (2, 4)), (2, (0, 1))))
)
SWAPPED = message(
    *((1, message((1, a), (2, n))) for a, n in (("x", 4), ("y", 2))), (3, message((1, (2, 4)), (2, (1, 0))))
)
ENCODED: dict[str, tuple[list[tuple[int, bytes]], tuple[str, ...]]] = {
    "listed": ([(49, g) for g in groups(*FSDP)], ("fsdp",)),
    "a device list": ([(87, message(*((1, g) for g in groups(*FSDP))))], ("fsdp",)),
    "counted in a device list": ([(87, message((2, IOTA)))], ("replica",)),
    "counted": ([(92, IOTA)], ("replica",)),
    "axes of a mesh": ([(93, message((1, MESH), (2, message((1, 1)))))], ("fsdp",)),
    "two axes of a mesh": (
        [(93, message((1, MESH), (2, message((1, 0))), (2, message((1, 1)))))],
        ("replica", "fsdp"),
    ),
    "an axis of a mesh whose devices are turned": (
        [(93, message((1, TURNED), (2, message((1, 0)))))],
        ("replica",),
    ),
    "an axis of a mesh whose devices are swapped": (
        [(93, message((1, SWAPPED), (2, message((1, 0)))))],
        ("fsdp",),
    ),
    "part of an axis": (
        [(93, message((1, MESH), (2, message((1, 1), (2, message((1, 2), (2, 2)))))))],
        NOWHERE,
    ),
    "all": ([], ("replica", "fsdp")),
    "others": ([(49, g) for g in groups((0, 1), (2, 3), (4, 5), (6, 7))], NOWHERE),
}
SIZES = {"replica": 2, "fsdp": 4}


@pytest.mark.parametrize("how", ENCODED)
def test_groups_are_read_in_every_encoding(how: str) -> None:
    fields, axes = ENCODED[how]
    shape = message((2, 11), (3, (16, 2)))
    given = message((1, "x"), (2, "parameter"), (3, shape), (35, 1))
    reduced = message((1, "r"), (2, "all-reduce"), (3, shape), (35, 2), (36, (1,)), (26, 7), *fields)
    computation = message((1, "main"), (2, given), (2, reduced), (5, 9), (6, 2))
    (found,) = compiled_collectives(read_module(message((1, "m"), (3, computation), (6, 9))), SIZES)
    assert found.axes == axes
    n = found.devices
    assert found.bytes == 2 * 16 * 2 * 4 * (n - 1) // n


def test_a_permutation_is_over_the_axes_along_which_it_moves() -> None:
    """Also where it leaves devices out, as at the edge of an image or in a gather written as permutations."""
    around = [(i, (i + 1) % 4) for i in range(4)]
    assert axes_of_pairs(around, SIZES) == ("fsdp",)
    assert axes_of_pairs([(0, 3), (4, 7)], SIZES) == ("fsdp",)
    assert axes_of_pairs([(0, 4)], SIZES) == ("replica",)
    assert axes_of_pairs([(1, 6), (2, 2)], SIZES) == ("replica", "fsdp")
    assert axes_of_pairs([(5, 5)], SIZES) == ()


def test_groups_are_axes_whatever_their_order() -> None:
    sizes = {"replica": 2, "data": 1, "fsdp": 2, "tensor": 2}
    places = np.arange(8).reshape(2, 1, 2, 2)
    turned = places.transpose(2, 1, 3, 0).reshape(2, -1)
    assert axes_of(tuple(tuple(int(i) for i in row[::-1]) for row in turned), sizes) == ("replica", "tensor")


@pytest.mark.parametrize(
    ("dtype", "each"), [(1, 1), (2, 1), (8, 4), (11, 4), (12, 8), (16, 2), (20, 1), (15, 8), (21, 0.5)]
)
def test_bytes_of_each_type(dtype: int, each: float) -> None:
    computation = message((2, message((2, "x"), (3, message((2, dtype), (3, (6,)))), (35, 1))), (5, 1))
    held = read_module(message((3, computation), (6, 1))).computations[1].instructions[1].shape
    assert held.bytes == 6 * each
    assert Shape("", (), (held, held)).bytes == 12 * each


def instruction(at: int, opcode: str, shape: bytes, *operands: int, **more: Any) -> tuple[int, bytes]:
    """An instruction of the computation that it is put into."""
    fields = [(2, opcode), (3, shape), (35, at), (36, operands)]
    fields += [(38, (more["calls"],))] if "calls" in more else []
    fields += [(68, message((1, message((1, "chain_id"), (2, more["chain"])))))] if "chain" in more else []
    fields += [(9, more["parameter"])] if "parameter" in more else []
    return (2, message((1, more.get("name", f"{opcode}.{at}")), *fields))


def read(*computations: tuple[int, list[tuple[int, Any]]], last: int) -> list[Emitted]:
    """The collectives of computations by number; the one with number 9 is run, its last instruction `last`."""
    made = [(3, message(*body, (5, at), (6, last if at == 9 else 2))) for at, body in computations]
    return compiled_collectives(read_module(message(*made, (6, 9))), SIZES)


ARRAY = message((2, 11), (3, (16, 2)))


@pytest.mark.parametrize("chains", [("3", "3"), ("3", "4")])
def test_an_asynchronous_fusion_repeats_its_collective_in_each_part(chains: tuple[str, str]) -> None:
    """What has one chain is one collective; channels are no help, since many collectives have channel 1."""
    bodies = [
        (at, [instruction(1, "parameter", ARRAY), instruction(2, "all-reduce", ARRAY, 1, chain=chain)])
        for at, chain in zip((3, 4), chains, strict=True)
    ]
    calls = [
        instruction(k, "fusion", ARRAY, 1, calls=at, name=f"all-reduce-scatter.{k}")
        for k, at in ((4, 3), (5, 4))
    ]
    found = read(*bodies, (9, [instruction(1, "parameter", ARRAY), *calls]), last=5)
    assert [(x.kind, x.times, x.overlapped) for x in found] == [("reduce-scatter", 1, True)] * len(
        set(chains)
    )


@pytest.mark.parametrize(
    ("called", "kind"), [("all-reduce-scatter.1", "reduce-scatter"), ("add.1", "all-reduce")]
)
def test_a_tpus_reduce_scatter_is_known_by_the_computation_that_a_fusion_calls(
    called: str, kind: str
) -> None:
    body = [(1, called), instruction(1, "parameter", ARRAY), instruction(2, "all-reduce", ARRAY, 1)]
    call = instruction(4, "fusion", ARRAY, 1, calls=3, name="fusion.7")
    (found,) = read((3, body), (9, [instruction(1, "parameter", ARRAY), call]), last=4)
    assert found.kind == kind


def test_arrays_laid_end_to_end_for_one_reduction_are_its_parts() -> None:
    """As a GPU's compiler does, where the reduction stands in a computation that runs beside others."""
    flat = lambda n: message((2, 11), (3, (n,)))
    joined = [instruction(1, "parameter", flat(3)), instruction(2, "concatenate", flat(8), 1, 3)]
    joined.append(instruction(3, "parameter", flat(5), parameter=1))
    inside = [instruction(1, "parameter", flat(8)), instruction(2, "all-reduce", flat(8), 1)]
    main = [
        instruction(1, "parameter", flat(3)),
        instruction(2, "parameter", flat(5), parameter=1),
        instruction(3, "fusion", flat(8), 1, 2, calls=4),
        instruction(5, "async-start", flat(8), 3, calls=3),
    ]
    found = read((4, joined), (3, inside), (9, main), last=5)
    assert [(x.shape, x.instruction) for x in found] == [((3,), "all-reduce.2"), ((5,), "all-reduce.2")]


def scheduled(between: str) -> Emitted:
    """A gather that starts, something else, and its end, in the order of the schedule."""
    main = [
        instruction(1, "parameter", ARRAY),
        instruction(2, "all-gather-start", ARRAY, 1),
        instruction(3, "all-gather-done", ARRAY, 2),
        instruction(4, between, ARRAY, 1),
    ]
    order = message((1, message((1, 9), (2, message((1, (1, 2, 4, 3)))))))
    made = message((3, message(*main, (5, 9), (6, 3))), (6, 9), (7, order))
    (found,) = compiled_collectives(read_module(made), SIZES)
    return found


def test_what_tpu_slices_exchange_is_over_the_axes_across_them() -> None:
    """Each slice has a module for its own devices: groups count these, and a host carries what goes between."""
    told = message((1, message((1, BETWEEN_SLICES), (2, "ALL_REDUCE"))))
    within = message(
        (1, "r"), (2, "all-reduce"), (3, ARRAY), (35, 2), (36, (1,)), (49, groups((0, 1, 2, 3))[0])
    )
    between = message((1, "s"), (2, "send"), (3, ARRAY), (35, 3), (36, (2,)), (68, told))
    body = [instruction(1, "parameter", ARRAY), (2, within), (2, between)]
    assignment = message((1, 1), (2, 4))
    made = message((3, message(*body, (5, 9), (6, 3))), (6, 9), (15, assignment))
    inside, across = compiled_collectives(read_module(made), SIZES)
    assert (inside.axes, inside.devices, across.axes, across.devices) == (("fsdp",), 4, ("replica",), 2)
    assert across.bytes == 16 * 2 * 4
    parts = across_islands({"replica": 2, "data": 1, "fsdp": 4}, 4)
    assert parts == {"replica": 2, "data": 1, "fsdp": 2}


def test_a_collective_is_overlapped_where_work_is_scheduled_before_its_end() -> None:
    assert scheduled("dot").overlapped
    assert not scheduled("bitcast").overlapped
