"""Routing as named ops: each token chooses experts, takes a slot at each, is sent there and comes back.

The choice is a token's own. Slots are given out a row of the batch at a time (the groups of GShard, Lepikhin et al. 2020,
arXiv:2006.16668, section 3.2) in order of position: which tokens an expert drops depends on no mesh, and no token depends
on a later one. Sending is a gather of tokens into slots where they are, then one all-to-all, which `Region.move` finds in
the layouts of `expert batch slots embed` and of a token; coming back is the same way in reverse. Experts come first
because products with their matrices are taken expert by expert: any other order is transposed around each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax, nn

from sharding.errors import InputError
from sharding.layout import Dims
from sharding.ops import back
from sharding.ordered import natural, ordered
from sharding.region import Region, current, tap, value
from sharding.relayout import finish, vary, varying
from sharding.scope import named
from sharding.slots import collect, inverse, one_hot, spread

Gates = Literal["all", "chosen"]
TOKENS = ("batch", "length")
SCORES = ("batch", "length", "routes")
TOKEN = ("batch", "length", "embed")
SLOTS = ("expert", "batch", "slots", "embed")
MULTIPLE = 8
"""Slots of an expert are a multiple of this, so that axes can split them."""


@dataclass(frozen=True)
class Route:
    """The experts that each token chose. Arrays lie as `batch length` does, with the choices of a token last."""

    experts: Array
    """int32 `batch length` and choices, the highest score first; of equal scores the expert of the lower number."""
    gates: Array
    """Like `experts`: what each chosen expert's output is multiplied by."""
    present: Array
    """bool `batch length`: False is padding, which no expert gets."""
    count: int
    """Experts there are."""


@named
def top_k(
    scores: Array, k: int, present: Array, gates: Gates = "chosen", bias: nnx.Param | None = None
) -> Route:
    """The `k` experts with the highest score of each token; scores: `batch length routes`, float32 or wider.

    gates: the softmax of the scores over "all" experts (Fedus et al. 2021, arXiv:2101.03961, eq. 2), or over those that a
    token has "chosen" (Shazeer et al. 2017, arXiv:1701.06538, eq. 3). present: bool `batch length`, False for padding. bias:
    `routes`, added to the scores for the choice alone (Wang et al. 2024, arXiv:2408.15664). Raises InputError for a k that is
    not from 1 to the number of experts.
    """
    region = current()
    if region is not None and region.manual:
        scores = region.move(scores, region.dims(SCORES), (*region.dims(TOKENS), ()))
    count = scores.shape[-1]
    if not 1 <= k <= count:
        raise InputError(f"top_k is to choose {k} of {count} experts. Choose at least 1 and at most {count}.")
    judged = lax.stop_gradient(scores)
    if bias is not None:
        own = lax.stop_gradient(_everywhere(region, bias)).astype(scores.dtype)
        judged = judged + own.reshape((1,) * (scores.ndim - 1) + (-1,))
    experts = lax.top_k(judged, k)[1].astype(jnp.int32)
    taken = one_hot(experts, count, scores.dtype)
    of = nn.softmax(scores, axis=-1) if gates == "all" else scores
    own = jnp.sum(
        taken * of[..., None, :], axis=-1
    )  # a product, since the gradient of a look-up is a scatter
    return Route(experts, own if gates == "all" else nn.softmax(own, axis=-1), present, count)


def chosen(route: Route) -> Array:
    """`batch length routes`, in the dtype of the gates: 1 where a token that is present chose the expert, else 0."""
    region = current()
    own = jnp.where(route.present[..., None], route.experts, -1)
    made = one_hot(own, route.count, route.gates.dtype).sum(axis=-2)
    return made if region is None else back(made, " ".join(SCORES), (*region.dims(TOKENS), ()))


@dataclass(frozen=True)
class Seats:
    """Which token sits in which slot. Arrays hold whole rows in their natural order; slots only those of this device."""

    place: Array
    """int32 (batch, length, choices): the slot, counted over all experts, of each choice; the number of slots for none."""
    choice: Array
    """int32 (batch, experts x slots): the choice, counted over a row, that sits there; the number of choices for none."""
    gates: Array
    """(batch, length, choices)."""
    kept: Array
    """(batch, length, choices), bool: whether a choice has a slot, here or on another device."""
    present: Array
    """(batch, length), bool."""
    experts: int
    home: Dims
    """Layout of `expert batch slots embed` where the tokens are: all experts, and the slots of this device."""


def slots_of(length: int, k: int, experts: int, factor: float) -> int:
    """Slots of one expert for one row: k x length tokens in equal shares, times `factor`, up to a multiple of 8."""
    return MULTIPLE * math.ceil(math.ceil(length * k * factor / experts - 1e-9) / MULTIPLE)


@named
def seat(route: Route, factor: float) -> Seats:
    """Give each choice a slot at its expert, in order of position, while there are any; beyond that it is dropped.

    factor: slots of an expert as a multiple of its equal share of a row's choices. Raises InputError where the slots are
    split into parts that are not equal.
    """
    if not 0 < factor < math.inf:
        raise InputError(f"The capacity factor is {factor}; it must be a finite number above 0.")
    region = current()
    home = _home(region)
    split = frozenset(home[2])
    experts, gates = (_whole_rows(region, x, home, split) for x in (route.experts, route.gates))
    present = _whole_rows(region, route.present.astype(jnp.int32), home, split) > 0
    _, length, k = experts.shape
    each = slots_of(length, k, route.count, factor)
    taken = one_hot(jnp.where(present[..., None], experts, -1), route.count, jnp.int32)
    here = jnp.sum(taken, axis=2, dtype=jnp.int32)
    before = jnp.cumsum(here, axis=1, dtype=jnp.int32) - here
    rank = jnp.sum(taken * before[:, :, None, :], axis=-1, dtype=jnp.int32)
    kept = present[..., None] & (rank < each)
    mine, first = _part(region, each, home)
    rank = rank - first
    inside = kept & (rank >= 0) & (rank < mine)
    place = jnp.where(inside, experts * mine + rank, route.count * mine)
    choice = inverse(place, route.count * mine)
    return Seats(place, choice, gates, kept, present, route.count, home)


@named
def dispatch(x: Array, seats: Seats) -> Array:
    """Tokens `batch length embed` at their experts: `expert batch slots embed`, an empty slot zero. One all-to-all."""
    region = current()
    home = seats.home
    if region is not None:
        x = _whole_rows(region, x, home, frozenset(home[2]), TOKEN)
        x = vary(x, varying(seats.place)) if region.manual else x
    made = spread(x, seats.place, seats.choice)
    made = made.reshape(made.shape[0], seats.experts, -1, made.shape[-1]).swapaxes(0, 1)
    return tap("dispatch", SLOTS, _between(region, made, home, away=True))


@named
def combine(y: Array, seats: Seats) -> Array:
    """The experts' results `expert batch slots embed` back at their tokens, `batch length embed`: of each token the sum over
    its choices, weighed by their gates. A dropped choice adds nothing.
    """
    region = current()
    home = seats.home
    y = _between(region, y, home, away=False)
    y, gates = y.swapaxes(0, 1).reshape(y.shape[1], -1, y.shape[-1]), seats.gates
    if region is not None and region.manual:
        union = varying(y) | varying(seats.place)
        y, gates = vary(y, union), vary(gates, union)
    made = collect(y, gates, seats.place, seats.choice)
    if region is None or not region.manual:
        return tap("combine", TOKEN, back(made, "batch length embed", ()))
    wanted = region.dims(TOKEN)
    if wanted[1]:
        made = ordered(region, made, 1, "length")
    return tap("combine", TOKEN, finish(made, home[2], (home[1], (), home[3]), wanted))


def dropped(seats: Seats) -> Array:
    """`batch length`: the share of a token's choices that found no slot; 0 for padding."""
    share = 1 - jnp.mean(seats.kept.astype(seats.gates.dtype), axis=-1)
    share = lax.stop_gradient(jnp.where(seats.present, share, jnp.zeros((), share.dtype)))
    return back(share, "batch length", (seats.home[1], ()))


# how they lie


def _home(region: Region | None) -> Dims:
    """Layout of tokens in slots before they leave: rows of the batch as tokens lie, experts whole."""
    if region is None:
        return ((), (), (), ())
    batch, _, embed = region.dims(TOKEN)
    slots = tuple(a for a in region.dims(SLOTS)[2] if a not in batch)
    return ((), batch, slots, tuple(a for a in embed if a not in slots))


def _everywhere(region: Region | None, x: nnx.Param) -> Array:
    """A parameter, whole on every device."""
    array = value(x)
    if region is None or region.mesh is None:
        return array
    rest, whole = region.param(x).param.dims, ((),) * array.ndim
    return region.move(array, rest, whole) if region.manual else region.constrain(array, whole)


def _whole_rows(
    region: Region | None, x: Array, home: Dims, stays: frozenset[str], names: tuple[str, ...] = TOKENS
) -> Array:
    """An array of tokens with the whole length of each row here, in its natural order."""
    if region is None:
        return x
    rest = x.ndim - 2
    width = home[3:] if names == TOKEN else ((),) * rest
    dst = (home[1], (), *width)
    if not region.manual:
        return region.constrain(x, dst)
    src = (*region.dims(TOKENS), *(region.dims(names)[2:] if names == TOKEN else ((),) * rest))
    return natural(region, region.move(x, src, dst, stays), 1, "length")


def _part(region: Region | None, each: int, home: Dims) -> tuple[int, Any]:
    """How many slots of an expert are on this device, and the number of the first."""
    if region is None or not region.manual or not home[2]:
        return each, 0
    parts = lax.axis_size(home[2])
    if each % parts:
        raise InputError(
            f"The rules split the {each} slots of an expert into {parts} parts ({' x '.join(home[2])}), which does not "
            f"divide. Choose another capacity factor, or let those axes be a divisor of {each}."
        )
    return each // parts, (lax.axis_index(home[2]) * (each // parts)).astype(jnp.int32)


def _between(region: Region | None, x: Array, home: Dims, away: bool) -> Array:
    """Slots brought from where the tokens are to where the experts are, or back."""
    if region is None:
        return x
    there = region.dims(SLOTS)
    src, dst = (home, there) if away else (there, home)
    return region.move(x, src, dst) if region.manual else region.constrain(region.constrain(x, src), dst)
