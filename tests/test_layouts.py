"""Layouts: roles nest, conflicts and typos are errors that say what to change, every array's shards make it whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from sharding.axes import AXES, NAMES
from sharding.errors import InputError
from sharding.layout import Layout, Layouts, local_shape
from sharding.moves import common
from sharding.rule import PARAM_ROLES, Rules, also, if_free
from sharding.rules.data import data
from sharding.rules.fsdp import fsdp
from sharding.rules.hsdp import hsdp
from sharding.rules.replicated import replicated
from sharding.rules.sequence import sequence
from sharding.rules.tensor import tensor
from sharding.rules.zero1 import zero1
from sharding.rules.zero2 import zero2
from tests.support import custom

ONES = dict.fromkeys(AXES, 1)


def layouts(rules: Rules, **sizes: int) -> Layouts:
    return Layouts(rules, {**ONES, **sizes})


def test_each_strategy_splits_the_role_it_is_known_for() -> None:
    cases = {
        data: ("", "", "", ""),
        zero1: ("", "", "", "data"),
        zero2: ("", "", "data", "data"),
        fsdp: ("", "fsdp", "fsdp", "fsdp"),
        hsdp: ("", "fsdp", "fsdp", "fsdp"),
        tensor: ("tensor",) * 4,
        lambda: tensor() | fsdp() | zero1(): ("tensor", "fsdp tensor", "fsdp tensor", "data fsdp tensor"),
    }
    for make, expected in cases.items():
        roles = layouts(make(), data=2, fsdp=2, tensor=2).param("w", ("embed", "mlp"), (8, 16)).roles()
        assert tuple(" ".join(sorted(x.axes)) for x in roles.values()) == expected, make
        assert tuple(roles) == PARAM_ROLES


def test_batch_is_split_over_data_and_then_fsdp_inside() -> None:
    lies = layouts(data() | fsdp() | tensor(), data=2, fsdp=2, tensor=2).activation(
        ("batch", "length", "mlp")
    )
    assert lies.text() == "batch/data/fsdp length mlp/tensor"
    assert lies.spec() == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert [(r.axis, r.rule) for r in lies.reasons] == [
        ("data", "data()"),
        ("fsdp", "fsdp()"),
        ("tensor", "tensor()"),
    ]


def test_sequence_declines_where_tensor_was_first_and_says_so() -> None:
    both = layouts(tensor() | sequence(), tensor=2)
    assert both.activation(("batch", "length", "embed")).text() == "batch length/tensor embed"
    wide = both.activation(("batch", "length", "mlp"))
    assert wide.text() == "batch length mlp/tensor"
    assert wide.declined == ("sequence() left length whole: tensor() uses 'tensor' for mlp",)
    with pytest.raises(InputError, match=r"axis 'tensor', which rule sequence\(\)"):
        layouts(sequence() | tensor(), tensor=2).activation(("batch", "length", "mlp"))


def test_also_splits_in_the_order_of_the_chain() -> None:
    for first, second in itertools.permutations(("data", "fsdp", "replica"), 2):
        rules = custom(activation={"batch": also(first)}) | custom(activation={"batch": also(second)})
        assert layouts(rules, data=2, fsdp=2, replica=2).activation(("batch",)).dims == ((first, second),)


def test_if_free_declines_a_taken_dim_as_well_as_a_taken_axis() -> None:
    rules = custom(activation={"batch": "data"}) | custom(activation={"batch": if_free("fsdp")})
    lies = layouts(rules, data=2, fsdp=2).activation(("batch",))
    assert lies.dims == (("data",),)
    assert len(lies.declined) == 1


def test_axes_of_one_device_split_nothing_but_keep_their_claim() -> None:
    one = layouts(data() | fsdp() | tensor()).param("w", ("embed", "mlp"), (7, 5))
    assert all(x.dims == ((), ()) for x in one.roles().values())
    assert {r.axis for r in one.optimizer.reasons} == {"fsdp", "tensor"}
    with pytest.raises(InputError, match="two rules for the dim mlp"):
        layouts(tensor() | tensor("context")).param("w", ("embed", "mlp"), (7, 5))


REFUSED: dict[str, tuple[Rules, dict[str, int], tuple[str, ...]]] = {
    "two rules for one dim": (
        tensor() | custom(compute={"mlp": "context"}),
        {"tensor": 2, "context": 2},
        ("two rules for the dim mlp", "tensor()", "drawn({", "also('context')"),
    ),
    "one axis twice in an array": (
        custom(compute={"embed": "tensor"}) | tensor(),
        {"tensor": 2},
        ("mlp over axis 'tensor'", "already uses for embed", "if_free('tensor')"),
    ),
    "one axis twice, by also": (
        fsdp() | fsdp(),
        {"fsdp": 2},
        ("already uses", "another axis"),
    ),
    "a dim that does not divide": (
        tensor(),
        {"tensor": 3},
        ("mlp = 16 into 3 parts", "tensor=3", "Set mesh axis tensor to 2 or make mlp a multiple of 3"),
    ),
    "a dim that does not divide further": (
        tensor() | custom(param={"mlp": also("data")}),
        {"tensor": 4, "data": 8},
        (
            "mlp = 16 into 32 parts",
            "tensor=4 x data=8",
            "Set mesh axis data to 4 or make mlp a multiple of 32",
        ),
    ),
    "an axis that does not exist": (
        custom(compute={"mlp": "tensr"}),
        {},
        ("splits 'mlp' over an axis 'tensr'", "nearest: 'tensor'"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_parameter_that_cannot_be_laid_out_is_refused_with_the_rule_and_its_line(case: str) -> None:
    rules, sizes, words = REFUSED[case]
    with pytest.raises(InputError) as caught:
        layouts(rules, **sizes).param("block.w", ("embed", "mlp"), (8, 16))
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert any(r.source in text for r in rules.chain), text


def test_names_must_fit_the_dims_and_be_known() -> None:
    with pytest.raises(InputError, match=r"2 names \(embed mlp\) for 1 dims"):
        layouts(data()).param("w", ("embed", "mlp"), (8,))
    with pytest.raises(InputError, match=r"w has a dim named 'embd'.*nearest: 'embed'"):
        layouts(data()).param("w", ("embd",), (8,))
    with pytest.raises(InputError, match=r"an activation \(batch lenght\).*nearest: 'length'"):
        layouts(data()).activation(("batch", "lenght"))


def test_a_models_own_name_is_declared_by_a_rule() -> None:
    for rules in (replicated("wavelet"), custom(compute={"wavelet": "tensor"})):
        lies = layouts(rules, tensor=2).param("w", ("wavelet", "embed"), (8, 8))
        assert lies.compute.names == ("wavelet", "embed")
    with pytest.raises(InputError, match="replicated\\('wavelt'\\)"):
        layouts(replicated("wavelet")).param("w", ("wavelt",), (8,))


def _asked(rules: Rules, **sizes: int) -> Layouts:
    made = layouts(rules, **sizes)
    made.param("w", ("embed", "mlp"), (8, 16))
    made.activation(("batch", "embed"))
    return made


def test_what_no_array_uses_is_refused() -> None:
    _asked(data() | tensor(), data=2, tensor=2).check_used()
    with pytest.raises(InputError, match=r"Rule sequence\(.* is used by no array"):
        _asked(data() | sequence("context"), data=2).check_used()
    with pytest.raises(InputError, match=r"Mesh axis fsdp has 4 devices.*Set mesh axis fsdp to 1"):
        _asked(data() | tensor(), data=2, fsdp=4).check_used()
    with pytest.raises(InputError, match=r"speaks of a name 'mpl' that no array has.*nearest: 'mlp'"):
        _asked(custom(compute={"mpl": "tensor", "mlp": "tensor"}), tensor=2).check_used()
    with pytest.raises(InputError, match=r"speaks of a name 'mpl'.*nearest: 'mlp'"):
        _asked(data() | replicated("mpl"), data=2).check_used()


def test_a_rule_whose_every_placement_was_declined_is_used_by_no_array() -> None:
    rules = tensor() | custom(activation={"mlp": if_free("context")})
    made = layouts(rules, tensor=2)
    made.activation(("batch", "mlp"))
    made.param("w", ("embed", "mlp"), (8, 16))
    with pytest.raises(InputError, match=r"Rule _drawn.* is used by no array"):
        made.check_used()


# What hypothesis draws: chains of the repo's rules and of drawn ones, for arrays and meshes of any size.

SHIPPED = st.sampled_from(
    [
        data(),
        zero1(),
        zero2(),
        fsdp(),
        hsdp(),
        tensor(),
        sequence(),
        fsdp("context"),
        zero1("expert"),
        tensor("context"),
    ]
)
PLACINGS = st.sampled_from([str, also, if_free])


@st.composite
def drawn_rules(draw: Any) -> Rules:
    def table() -> dict[str, Any]:
        names = draw(
            st.lists(st.sampled_from(["batch", "length", "embed", "mlp", "heads"]), max_size=2, unique=True)
        )
        return {n: draw(PLACINGS)(draw(st.sampled_from(AXES))) for n in names}

    return custom(**{role: table() for role in (*PARAM_ROLES, "activation")})


CHAINS = st.lists(st.one_of(SHIPPED, drawn_rules()), min_size=1, max_size=4)
MESHES = st.fixed_dictionaries({a: st.sampled_from([1, 1, 2, 3, 4]) for a in AXES})
ARRAYS = st.lists(
    st.tuples(st.sampled_from(sorted(NAMES)), st.sampled_from([1, 2, 3, 6, 8, 12, 24, 64, 96])),
    min_size=1,
    max_size=4,
    unique_by=lambda d: d[0],
)


def _sound(lies: Layout, sizes: dict[str, int]) -> None:
    assert len(set(lies.axes)) == len(lies.axes), "one axis splits one dim"
    assert all(sizes[a] > 1 for a in lies.axes)
    told = [(r.name, r.axis) for r in lies.reasons if r.size > 1]
    assert sorted(told) == sorted((n, a) for n, dim in zip(lies.names, lies.dims, strict=True) for a in dim)


@given(chain=CHAINS, sizes=MESHES, array=ARRAYS)
def test_whatever_is_laid_out_is_sound(
    chain: list[Rules], sizes: dict[str, int], array: list[tuple[str, int]]
) -> None:
    names, shape = tuple(n for n, _ in array), tuple(n for _, n in array)
    rules = Rules(tuple(r for rules in chain for r in rules.chain))
    made = Layouts(rules, sizes)
    try:
        _sound(made.activation(names), sizes)
        roles = list(made.param("w", names, shape).roles().values())
    except InputError:  # refused, as the tests above want it; any other error fails
        return
    for lies in roles:
        _sound(lies, sizes)
        parts = [math.prod(sizes[a] for a in dim) for dim in lies.dims]
        assert all(n % k == 0 for n, k in zip(shape, parts, strict=True))
        local = local_shape(shape, lies.dims, sizes)
        assert tuple(n * k for n, k in zip(local, parts, strict=True)) == shape
    for less, more in itertools.pairwise(roles):
        assert all(common(a, b) == len(a) for a, b in zip(less.dims, more.dims, strict=True)), "roles nest"
        assert set(less.reasons) <= set(more.reasons)


@given(chain=CHAINS, sizes=MESHES, array=ARRAYS, leading=st.integers(0, 1))
def test_dropping_a_stacked_dim_keeps_the_rest(
    chain: list[Rules], sizes: dict[str, int], array: list[tuple[str, int]], leading: int
) -> None:
    names, shape = tuple(n for n, _ in array), tuple(n for _, n in array)
    try:
        lies = Layouts(Rules(tuple(r for c in chain for r in c.chain)), sizes).param("w", names, shape)
    except InputError:
        return
    for role, cut in lies.drop(leading).roles().items():
        assert cut.names == names[leading:]
        assert cut.dims == lies.roles()[role].dims[leading:]
