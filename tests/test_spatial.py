"""Spatial splits: windows over split positions compute what one device computes, and send the halo and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sharding.windows
from sharding.axes import MeshShape
from sharding.errors import InputError
from sharding.ledger import flops
from sharding.merge import add, merge
from sharding.params import param, zeros
from sharding.partitioner import Auto, Manual, Partitioner
from sharding.rule import Rules, also
from sharding.rules.context import context
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.spatial import spatial
from sharding.spatial import convolution, halo, locally_connected, pool, windows
from tests.support import Named, Through, assert_like_one_device, custom, departure, placements

BOUND = 4e-6
"""float32, relative to a leaf's largest entry: some 30 roundings."""
EXACT = 1e-13
"""float64 likewise."""
PARTITIONERS = [Manual(), Auto()]
IMAGE = "batch height width channels"
MESH = MeshShape(data=2, context=2, tensor=2)
RANDOM = np.random.default_rng(11)

Call = Callable[..., Any]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def mesh(**sizes: int) -> MeshShape:
    """A mesh of all 8 devices; those that no axis needs compute the same."""
    return MeshShape(replica=-1, **sizes).resolve(8)


def both_dims(height: str = "context", width: str = "data") -> Rules:
    """An image cut into tiles: rows over one axis, columns over another."""
    return spatial(height) | custom(compute={"width": width}, activation={"width": width})


def twice(outer: str = "data", inner: str = "context") -> Rules:
    """Rows over two axes."""
    return custom(activation={"height": also(outer)}) | custom(activation={"height": also(inner)})


# halo


def borrowed_here(before: int, after: int, x: np.ndarray, parts: int) -> np.ndarray:
    """What each of `parts` devices holds after a halo along dim 1, one after the other."""
    padded = np.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
    n = x.shape[1] // parts
    return np.concatenate([padded[:, i * n : (i + 1) * n + before + after] for i in range(parts)], axis=1)


@pytest.mark.parametrize(
    "rules",
    [spatial(), twice(), twice("context", "data")],
    ids=["one axis", "two axes", "in the other order"],
)
@pytest.mark.parametrize(
    ("before", "after"), [(1, 1), (0, 2), (2, 0), (0, 0), (3, 5), (17, 9)], ids=lambda n: str(n)
)
def test_a_halo_holds_the_neighbours_rows_and_zeros_at_the_edges(
    rules: Rules, before: int, after: int
) -> None:
    # Shards of 4 or 2 rows: the wider halos reach across one shard, several, and all of them.
    x = normal(2, 8, 3, 2)
    parts = 2 if rules == spatial() else 4
    over = mesh(data=2, context=2) if parts == 4 else mesh(context=2)
    call = lambda p, i: halo(i["x"], IMAGE, "height", before, after)
    found = Through(call, {}, {"x": (IMAGE, x)}, IMAGE, rules, over).value()
    np.testing.assert_array_equal(found, borrowed_here(before, after, x, parts))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (5, 7)])
def test_the_gradient_of_a_halo_is_its_transpose(before: int, after: int) -> None:
    """<halo(x), y> = <x, gradient for y>, and the gradient adds up every copy of a row; in double, exactly."""
    x = RANDOM.integers(-8, 8, (2, 8, 3, 2)).astype(np.float64)
    call = lambda p, i: halo(i["x"], IMAGE, "height", before, after)
    with jax.enable_x64(True):
        through = Through(call, {}, {"x": (IMAGE, x)}, IMAGE, spatial(), mesh(context=4))
        found = through.value_and_gradients()
    weigh = np.random.default_rng(1).normal(size=found[""].shape)
    rows = borrowed_here(before, after, np.broadcast_to(np.arange(1, 9)[None, :, None, None], x.shape), 4)
    want = np.stack([np.where(rows == r + 1, weigh, 0).sum(1) for r in range(8)], axis=1)
    assert found["x"].dtype == np.float64
    assert departure(found["x"], want) < EXACT
    assert np.isclose((found[""] * weigh).sum(), (x * found["x"]).sum(), rtol=EXACT)


def test_a_halo_of_another_arrays_dim_is_refused() -> None:
    with pytest.raises(InputError, match="halo of 1 before and -1 after along 'height'"):
        halo(jnp.zeros((2, 2)), "batch height", "height", 1, -1)
    with pytest.raises(InputError, match="dims batch height"):
        halo(jnp.zeros((2, 2)), "batch height", "width", 1, 1)


# convolution

KERNEL = "kernel_height kernel_width channels embed"
OUT = "batch height width embed"
CONVOLUTION = f"{IMAGE}, {KERNEL} -> {OUT}"


def by_hand(x: np.ndarray, w: np.ndarray, stride: int, padding: str) -> np.ndarray:
    """A convolution by its definition, in float64; padded as TensorFlow's "SAME" is."""
    x, w, k = x.astype(np.float64), w.astype(np.float64), w.shape[:2]
    if padding == "same":
        count = [-(-n // stride) for n in x.shape[1:3]]
        zeros = [max((m - 1) * stride + s - n, 0) for m, s, n in zip(count, k, x.shape[1:3], strict=True)]
        x = np.pad(x, [(0, 0), *((z // 2, z - z // 2) for z in zeros), (0, 0)])
    rows, columns = ((n - s) // stride + 1 for n, s in zip(x.shape[1:3], k, strict=True))
    made = np.zeros((len(x), rows, columns, w.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + k[0], j * stride : j * stride + k[1]]
            made[:, i, j] = np.einsum("bhwc,hwcf->bf", window, w)
    return made


def conv(
    kernel: tuple[int, int] = (3, 3), stride: int = 1, padding: str = "same", size: tuple[int, int] = (8, 8)
) -> tuple[Call, dict[str, Named], dict[str, Named], str]:
    """Arguments of `check`: a convolution of 4 images with 4 channels into 6."""
    call = lambda p, x: convolution(CONVOLUTION, x["x"], p["w"], stride, padding)  # type: ignore[arg-type]
    return call, {"w": (KERNEL, normal(*kernel, 4, 6))}, {"x": (IMAGE, normal(4, *size, 4))}, OUT


CASES = {
    "3x3": conv(),
    "5x3": conv((5, 3)),
    "even": conv((4, 2)),
    "stride 2": conv((3, 3), 2),
    "patches": conv((2, 2), 2, "valid"),
    "sparse": conv((1, 1), 2),
    "wider than a shard": conv((7, 7)),
}
SPLITS = {
    "spatial": (spatial(), mesh(context=4)),
    "two axes": (twice(), mesh(data=2, context=2)),
    "two axes in the other order": (twice("context", "data"), mesh(data=2, context=2)),
    "tiles": (both_dims(), MeshShape(data=2, context=4)),
    "data spatial fsdp": (data() | fsdp() | spatial(), MeshShape(data=2, fsdp=2, context=2)),
    "channels": (data() | spatial() | custom(activation={"channels": "tensor"}), MESH),
    "channels of both": (
        data() | spatial() | custom(activation={"channels": "tensor"}, compute={"channels": "tensor"}),
        MESH,
    ),
    "filters": (
        data() | spatial() | custom(activation={"embed": "tensor"}, compute={"embed": "tensor"}),
        MESH,
    ),
    "both sides": (data() | spatial() | custom(activation=lambda ask: {ask.names[-1]: "tensor"}), MESH),
}


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_is_its_definition(case: str) -> None:
    call, params, inputs, out = CASES[case]
    kernel, stride = params["w"][1], {"stride 2": 2, "patches": 2, "sparse": 2}.get(case, 1)
    want = by_hand(inputs["x"][1], kernel, stride, "valid" if case == "patches" else "same")
    assert departure(Through(call, params, inputs, out).value(), want) < BOUND


QUICK = {("3x3", split) for split in SPLITS} | {(case, "data spatial fsdp") for case in CASES}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize(
    ("case", "split"),
    [
        pytest.param(case, split, marks=() if (case, split) in QUICK else pytest.mark.slow)
        for case in CASES
        for split in SPLITS
    ],
)
def test_a_convolution_for_chosen_splits(case: str, split: str, partitioner: Partitioner) -> None:
    assert_like_one_device(*CASES[case], *SPLITS[split], partitioner)


DRAWN = (
    lambda p, x: convolution(CONVOLUTION, x["x"], p["w"]),
    {"w": (KERNEL, normal(8, 8, 8, 8))},
    {"x": (IMAGE, normal(8, 8, 8, 8))},
    OUT,
)


@settings(max_examples=12)
@given(
    rules=placements([IMAGE, OUT], [KERNEL], ("data", "context", "tensor")),
    partitioner=st.sampled_from(PARTITIONERS),
)
def test_a_convolution_for_any_layouts(rules: Rules, partitioner: Partitioner) -> None:
    try:
        assert_like_one_device(*DRAWN, rules, MESH, partitioner)
    except InputError as error:
        assert "splits a dim of the kernel's windows" in str(error)  # noqa: PT017 (any other is a failure)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
def test_in_double_a_convolution_is_exact_to_rounding(partitioner: Partitioner) -> None:
    def wide(named: dict[str, Named]) -> dict[str, Named]:
        return {k: (n, a.astype(np.float64)) for k, (n, a) in named.items()}

    call, params, inputs, out = CASES["5x3"]
    with jax.enable_x64(True):
        split = SPLITS["both sides"]
        assert_like_one_device(call, wide(params), wide(inputs), out, *split, partitioner, bound=EXACT)


def refusal(call: Call, params: dict[str, Named], inputs: dict[str, Named], out: str, *split: Any) -> str:
    with pytest.raises(InputError) as caught:
        Through(call, params, inputs, out, *split).value()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_windows_that_do_not_lie_as_the_positions_do_are_refused() -> None:
    split = spatial(), mesh(context=4)
    said = refusal(*conv(padding="valid"), *split)
    assert "make 6 of height = 8, which context splits into 4 parts" in said
    assert "Make height a multiple of 4 and take padding='same'" in said
    assert "a multiple of 16" in refusal(*conv(stride=4), *split)
    assert "window of 9 along height does not fit into its 8" in refusal(*conv((9, 1), 1, "valid"))
    assert "padding 'some'" in refusal(*conv(padding="some"))
    assert "stride 0" in refusal(*conv(stride=0))
    zigzag = context() | custom(activation={"embed": "tensor"})
    text = "batch length channels, kernel_length channels embed -> batch length embed"
    call = lambda p, x: convolution(text, x["x"], p["w"])
    named = (
        {"w": ("kernel_length channels embed", normal(3, 4, 6))},
        {"x": ("batch length channels", normal(4, 16, 4))},
    )
    assert "lay its positions in the order ZigZag" in refusal(
        call, *named, "batch length embed", zigzag, mesh(context=2, tensor=2)
    )
    assert_like_one_device(
        call,
        *named,
        "batch length embed",
        context(order="contiguous"),
        mesh(context=2),
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("batch height width channels -> batch height width channels", "after a comma, of a kernel"),
        (f"{IMAGE}, kernel_height kernel_width embed -> {OUT}", "3 names but 4 dims"),
        (f"{IMAGE}, kernel_height kernel_width embed channels -> {OUT}", "was declared as"),
        (
            f"{IMAGE}, {KERNEL} -> batch height embed",
            "the result the examples, the positions and the new dim",
        ),
        (f"{IMAGE}, {KERNEL} -> {IMAGE}", "one dim that is summed over"),
    ],
)
def test_a_text_that_is_no_convolution_is_refused(spec: str, said: str) -> None:
    call = lambda p, x: convolution(spec, x["x"], p["w"])
    assert said in refusal(call, *CASES["3x3"][1:])


# windows and locally connected

UNTIED = "height width kernel_height kernel_width channels embed"
LOCAL = (
    lambda p, x: locally_connected(f"{IMAGE}, {UNTIED} -> {OUT}", x["x"], p["w"]),
    {"w": (UNTIED, normal(8, 8, 3, 3, 4, 6))},
    {"x": (IMAGE, normal(4, 8, 8, 4))},
    OUT,
)


def test_a_local_layer_with_one_kernel_everywhere_is_a_convolution() -> None:
    kernel, x = normal(3, 3, 4, 6), LOCAL[2]
    for stride in (1, 2):
        call = lambda p, i, s=stride: locally_connected(f"{IMAGE}, {UNTIED} -> {OUT}", i["x"], p["w"], s)
        n = 8 // stride
        everywhere = {"w": (UNTIED, np.broadcast_to(kernel, (n, n, *kernel.shape)).copy())}
        found = Through(call, everywhere, x, OUT).value()
        assert departure(found, by_hand(x["x"][1], kernel, stride, "same")) < BOUND


LOCAL_SPLITS = {k: SPLITS[k] for k in ("spatial", "tiles", "data spatial fsdp", "channels", "both sides")}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("split", LOCAL_SPLITS)
def test_a_local_layer_for_chosen_splits(split: str, partitioner: Partitioner) -> None:
    assert_like_one_device(*LOCAL, *LOCAL_SPLITS[split], partitioner)


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
def test_windows_are_the_positions_that_they_cover(partitioner: Partitioner) -> None:
    names = "batch height width kernel_height kernel_width channels"
    call = lambda p, x: windows(x["x"], IMAGE, {"height": 3, "width": 2}, stride=2)
    arguments = call, {}, {"x": (IMAGE, normal(4, 8, 8, 4))}, names
    padded = np.pad(arguments[2]["x"][1], [(0, 0), (0, 1), (0, 0), (0, 0)])
    want = np.stack([padded[:, i : i + 7 : 2, j::2] for i in range(3) for j in range(2)], axis=3)
    np.testing.assert_array_equal(Through(*arguments).value(), want.reshape(4, 4, 4, 3, 2, 4))
    assert_like_one_device(*arguments, *SPLITS["tiles"][:1], mesh(data=2, context=2), partitioner)


def test_a_kernel_without_its_positions_is_no_local_layer() -> None:
    call = lambda p, x: locally_connected(f"{IMAGE}, {KERNEL} -> {OUT}", x["x"], p["w"])
    assert "it lacks height, width" in refusal(call, CASES["3x3"][1], LOCAL[2], OUT)


# pool, merge, add

POOLS = {"average": np.mean, "max": np.max}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("kind", POOLS)
def test_pooling_tiles_the_image(kind: str, partitioner: Partitioner) -> None:
    x = normal(4, 8, 6, 4)
    call = lambda p, i: pool(i["x"], IMAGE, {"height": 2, "width": 3}, kind)  # type: ignore[arg-type]
    want = POOLS[kind](x.reshape(4, 4, 2, 2, 3, 4), axis=(2, 4))
    assert departure(Through(call, {}, {"x": (IMAGE, x)}, IMAGE).value(), want) < BOUND
    assert_like_one_device(
        call, {}, {"x": (IMAGE, x)}, IMAGE, both_dims(), mesh(data=2, context=4), partitioner
    )


def test_a_pool_that_crosses_devices_is_refused() -> None:
    call = lambda p, i: pool(i["x"], IMAGE, {"height": 4})
    said = refusal(call, {}, {"x": (IMAGE, normal(4, 8, 8, 4))}, IMAGE, spatial(), mesh(context=4))
    assert "windows of 4 do not tile height = 8, which context splits into 4 parts" in said
    with pytest.raises(InputError, match="kind 'median'"):
        pool(jnp.zeros((2, 4)), "batch height", {"height": 2}, "median")  # type: ignore[arg-type]


STREAM = "batch length channels"
SEQUENCE = (
    lambda p, x: add(merge(x["x"], f"{IMAGE} -> {STREAM}"), STREAM, p["places"]),
    {"places": ("length channels", normal(32, 4))},
    {"x": (IMAGE, normal(8, 8, 4, 4))},
    STREAM,
)
SEQUENCES = {
    "length as height": (data() | spatial() | context(order="contiguous"), MESH),
    "zig-zag": (data() | spatial() | context(), MESH),
    "rows become examples": (
        spatial("data") | custom(activation=lambda ask: {} if "height" in ask.names else {"batch": "data"}),
        mesh(data=4),
    ),
    "fewer rows than parts": (
        both_dims("context", "tensor")
        | custom(activation={"length": also("context")})
        | custom(activation={"length": also("tensor")})
        | custom(activation={"length": also("data")}),
        MESH,
    ),
    "width split": (custom(activation={"width": "context", "length": "context"}), mesh(context=4)),
    "places at rest": (
        data() | fsdp() | spatial("tensor") | context("tensor"),
        MeshShape(data=2, fsdp=2, tensor=2),
    ),
}


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=["manual", "auto"])
@pytest.mark.parametrize("case", SEQUENCES)
def test_an_image_becomes_a_sequence_row_after_row(case: str, partitioner: Partitioner) -> None:
    want = SEQUENCE[2]["x"][1].reshape(8, 32, 4) + SEQUENCE[1]["places"][1]
    np.testing.assert_array_equal(Through(*SEQUENCE).value(), want)
    assert_like_one_device(*SEQUENCE, *SEQUENCES[case], partitioner)


def test_where_the_sequence_lies_as_the_image_nothing_moves() -> None:
    assert Through(*SEQUENCE, *SEQUENCES["length as height"]).traced() == []


def test_an_axis_that_would_split_nothing_any_more_is_refused() -> None:
    said = refusal(*SEQUENCE, spatial(), mesh(context=4))
    assert (
        "context splits the image (batch height/context width channels) and nothing of what it becomes"
        in said
    )
    with pytest.raises(InputError, match="two neighbours replaced"):
        merge(jnp.zeros((2, 2, 2, 2)), f"{IMAGE} -> batch channels length")
    with pytest.raises(InputError, match="some of those, in their order"):
        add(jnp.zeros((2, 2)), "batch length", param("length batch", (2, 2), zeros))


# what it sends


def halo_bytes(x: Named, name: str, parts: int, rows: int) -> int:
    """Bytes that a device sends for a halo of `rows` rows of a dim that is split into `parts`: closed form."""
    sizes = dict(zip(x[0].split(), x[1].shape, strict=True))
    return 4 * rows * math.prod(n for other, n in sizes.items() if other != name)


@pytest.mark.parametrize("layer", ["convolution", "locally connected"])
@pytest.mark.parametrize("height", [8, 32, 64])
def test_the_halo_is_all_that_is_sent_and_does_not_grow_with_the_image(layer: str, height: int) -> None:
    x = {"x": (IMAGE, np.zeros((4, height, 8, 4), np.float32))}
    call, params = LOCAL[0], {"w": (UNTIED, np.zeros((height, 8, 5, 3, 4, 6), np.float32))}
    if layer == "convolution":
        call, params = DRAWN[0], {"w": (KERNEL, np.zeros((5, 3, 4, 6), np.float32))}
    found = Through(call, params, x, OUT, spatial(), mesh(context=4)).traced()
    assert {(c.kind, c.axes) for c in found} == {("permute", ("context",))}
    assert sum(c.bytes for c in found) == halo_bytes(x["x"], "height", 4, 4) == 4 * 4 * 4 * 8 * 4


def test_tiles_send_their_edges_and_corners() -> None:
    x = normal(4, 16, 16, 4)
    found = Through(
        *DRAWN[:1], CASES["3x3"][1], {"x": (IMAGE, x)}, OUT, both_dims(), mesh(data=2, context=4)
    ).traced()
    sent = {axis: sum(c.bytes for c in found if c.axes == (axis,)) for axis in ("data", "context")}
    assert sent == {
        "context": 4 * 2 * 4 * 8 * 4,
        "data": 4 * 2 * 4 * (4 + 2) * 4,
    }  # the columns with the rows borrowed


def test_a_wide_halo_sends_what_it_holds_and_no_more() -> None:
    x = np.zeros((2, 8, 3, 2), np.float32)
    call = lambda p, i: halo(i["x"], IMAGE, "height", 3, 5)
    found = Through(call, {}, {"x": (IMAGE, x)}, IMAGE, spatial(), mesh(context=4)).traced()
    assert [c.shape[1] for c in found] == [2, 1, 2, 2, 1]
    assert sum(c.bytes for c in found) == 4 * 2 * (3 + 5) * 3 * 2


def test_flops_of_a_convolution_are_counted_forward_and_backward() -> None:
    call, params, inputs, _ = CASES["3x3"]
    values = {k: jnp.array(a) for k, (_, a) in {**params, **inputs}.items()}
    loss = lambda v: jnp.sum(call({"w": v["w"]}, {"x": v["x"]}))
    products = 4 * 8 * 8 * 3 * 3 * 4 * 6
    assert flops(jax.make_jaxpr(loss)(values)) == 2 * products
    assert flops(jax.make_jaxpr(jax.grad(loss))(values)) == 3 * 2 * products
    half = lambda v: jnp.sum(CASES["stride 2"][0]({"w": v["w"]}, {"x": v["x"]}))
    assert flops(jax.make_jaxpr(half)(values)) == 2 * products // 4
    assert flops(jax.make_jaxpr(jax.grad(half))(values)) == 3 * 2 * products // 4


# planted faults


def _no_rows(x: Any, at: int, axes: Any, wanted: int, side: int) -> list[Any]:
    return [jnp.zeros_like(jax.lax.slice_in_dim(x, 0, wanted, axis=at))] if wanted else []


def _own_rows(x: Any, at: int, axes: Any, wanted: int, side: int) -> list[Any]:
    return [jax.lax.slice_in_dim(x, 0, wanted, axis=at)] if wanted else []


@pytest.mark.parametrize("fault", [_no_rows, _own_rows])
@pytest.mark.parametrize("arguments", [CASES["3x3"], LOCAL], ids=["convolution", "locally connected"])
def test_a_halo_that_is_not_the_neighbours_departs(
    fault: Any, arguments: tuple[Any, Any, Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding.windows, "_from", fault)
    with pytest.raises(AssertionError):
        assert_like_one_device(*arguments, *SPLITS["spatial"])


def test_a_halo_from_the_wrong_side_departs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sharding.windows._from
    monkeypatch.setattr(
        sharding.windows, "_from", lambda x, at, axes, wanted, side: right(x, at, axes, wanted, -side)
    )
    with pytest.raises(AssertionError):
        assert_like_one_device(*CASES["3x3"], *SPLITS["spatial"])
