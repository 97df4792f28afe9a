"""Casts that a model makes by itself: room for what they round, and for nothing else, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array, lax

import sharding.proof.double
import sharding.step
from experiments.config import Experiment
from experiments.data.stdlib import Stdlib
from experiments.verified_tables import print_verified
from sharding.axes import MeshShape
from sharding.ops import cross_entropy, einsum, embed, positions, rms_norm
from sharding.params import Entry, normal, ones, param
from sharding.partitioner import Auto, Manual
from sharding.proof.budget import Budget
from sharding.proof.double import narrowed, unit, widely
from sharding.proof.trial import Ready
from sharding.rule import Rules, also
from sharding.rules.data import data
from tests.support import custom
from tests.verified import Opened, judged, only, small

CONTEXT = MeshShape(context=2)
LENGTH = 32
ANGLES = np.exp(1j * np.linspace(0.1, 1.5, 16)).astype(np.complex64)


def split_positions() -> Rules:
    return data() | custom(activation={"length": also("context")})


def _turned(x: Array) -> Array:
    """Pairs of float32 features turned as complex numbers by angles that are constants."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = lax.complex(pairs[..., 0], pairs[..., 1]) * jnp.asarray(ANGLES)[None, None]
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


class Words(nnx.Module):
    """A bag of bytes with learned positions, cast by itself: `metric` on the way to a metric, `main` on the way to all."""

    def __init__(self, at: str, metric: str, main: str):
        row = {"tokens": "int32", "labels": "int32", "weights": "float32"}
        self.inputs = {name: Entry("batch length", (LENGTH,), dtype) for name, dtype in row.items()}
        self.at, self.metric, self.main = at, metric, main
        self.table = param("vocab embed", (256, 32), normal(1.0))
        self.places = param("length embed", (LENGTH, 32), normal(0.1))
        self.norm = param("embed", (32,), ones)
        self.out = param("embed vocab", (32, 256), normal(0.2))

    def loss(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Sums of the loss and, with `metric`, of an entropy."""
        x = embed(self.table, batch["tokens"], "batch length")
        at, places = positions(x, "batch length embed"), self.places.get_value()
        if self.at == "arange":  # the fault of docs/verify.md
            at = jnp.arange(x.shape[1])
        if self.at == "stopped" and x.shape[1] < LENGTH:
            places = lax.stop_gradient(places)
        x = rms_norm(x + places[at][None], self.norm, "batch length embed")
        x = x.astype(self.main).astype(x.dtype) if self.main else x
        x = _turned(x).astype(x.dtype) if self.at == "turned" else x
        logits = einsum("batch length embed, embed vocab -> batch length vocab", x, self.out)
        nats = cross_entropy(logits, batch["labels"], "batch length vocab") * batch["weights"]
        sums = {
            "loss": einsum("batch length ->", nats),
            "weight": einsum("batch length ->", batch["weights"]),
        }
        if self.metric:
            sums["entropy"] = einsum("batch length ->", nats.astype(self.metric)).astype(nats.dtype)
        return sums


@dataclass(frozen=True)
class WordsConfig:
    """`at`: how positions are made. `metric`, `main`: the types that are cast to."""

    at: str = "positions"
    metric: str = ""
    main: str = ""

    def build(self) -> Words:
        """The model."""
        return Words(self.at, self.metric, self.main)


def words(seed: int = 0, accumulate: int = 1, **model: str) -> Experiment:
    e = replace(small("transformer", split_positions()), model=WordsConfig(**model), accumulate=accumulate)
    return replace(e, data=Stdlib(length=LENGTH), seed=seed)


@pytest.mark.parametrize(
    ("seed", "dtype", "x64"),
    [(0, "bfloat16", False), (1, "float32", True), *(
        pytest.param(s, d, x, marks=pytest.mark.slow) for s in range(1, 5) for d, x in (("bfloat16", False), ("float32", True))
        if (s, x) != (1, True)
    )],
)  # fmt: skip
def test_a_metrics_cast_is_no_departure(seed: int, dtype: str, x64: bool, opened: Opened) -> None:
    made = judged(words(seed, metric=dtype), opened, x64=x64)
    assert only(made).verdict == "agrees", only(made)
    assert made.within == {"loss": dtype}


@pytest.mark.parametrize(
    ("seed", "accumulate"), [(0, 2), (1, 1), *(pytest.param(s, 2, marks=pytest.mark.slow) for s in (1, 2, 3))]
)
def test_a_metrics_cast_hides_no_gradient_in_whatever_scan_it_stands(
    seed: int, accumulate: int, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    e = words(seed, accumulate, metric="bfloat16")
    assert only(judged(e, opened)).verdict == "agrees"
    real = sharding.step.TrainStep._reduce
    monkeypatch.setattr(sharding.step.TrainStep, "_reduce", lambda *given: real(*given) * 1.02)
    d = only(judged(e, opened)).departure
    assert d is not None
    assert d.phase == "gradient", d
    assert d.looks.startswith("1.02 times the right values, as every gradient is"), d


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_a_metric_that_is_wrong_itself_departs_beside_its_cast(
    seed: int, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    real = sharding.step.TrainStep._finished

    def planted(self: Any, sums: Any, norm: Array) -> Any:
        scale, metrics = real(self, sums, norm)
        return scale, metrics if self.split.mesh is None else {**metrics, "entropy": metrics["entropy"] * 2}

    monkeypatch.setattr(sharding.step.TrainStep, "_finished", planted)
    d = only(judged(words(seed, metric="bfloat16"), opened)).departure
    assert d is not None
    assert d.what == "the metric entropy of the first update"


SEEDS = [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("at", "phase", "what"),
    [("arange", "forward", "rms_norm"), ("stopped", "gradient", "the gradient of places")],
)
def test_a_fault_of_a_small_gradient_departs_beside_a_cast(
    at: str, phase: str, what: str, seed: int, opened: Opened
) -> None:
    """It is a fraction of the largest gradient, and real: the cast moves it by little."""
    d = only(judged(words(seed, at=at, main="bfloat16"), opened, CONTEXT, Manual(), steps=3)).departure
    assert d is not None
    assert d.phase == phase, d
    assert d.what.startswith(what), d


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_split_agrees_beside_a_cast(seed: int, opened: Opened) -> None:
    made = judged(words(seed, main="bfloat16"), opened, CONTEXT, Manual(), steps=4)
    assert only(made).verdict == "agrees", only(made)
    assert made.within["gradient"] == "bfloat16"


def test_a_right_split_of_complex_numbers_agrees_beside_a_cast(opened: Opened) -> None:
    made = judged(words(at="turned"), opened, by=Auto())
    assert only(made).verdict == "agrees", only(made)
    assert made.within["gradient"] == "float32"


@dataclass(frozen=True)
class Gathered:
    """Adam every other update, on the mean of two gradients: the two branches of a `cond` must have one type."""

    def largest_norm(self) -> float:
        """At which gradients are clipped."""
        return 1.0

    def schedule(self, steps: int) -> Any:
        """The learning rate of each update."""
        return lambda _: 1e-2

    def build(self, steps: int, matrices: Any = None) -> Any:
        """The optax transformation."""
        return optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()


def test_an_optimizer_is_traced_at_the_types_of_its_own_state(opened: Opened) -> None:
    made = judged(replace(words(), optimizer=Gathered()), opened)
    assert only(made).verdict == "agrees", only(made)
    assert not made.casts_unmeasured
    assert set(made.within) <= {"parameter", "optimizer"}
    assert made.within["optimizer"] == "float32"


@pytest.mark.parametrize("when", ["traced", "run"])
def test_without_the_run_that_measures_casts_they_have_no_room(
    when: str, monkeypatch: pytest.MonkeyPatch, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Any:
        raise TypeError("no rule\nfor it")

    real = Ready.run
    if when == "traced":
        monkeypatch.setattr(sharding.proof.double, "_made", refuse)
    else:
        monkeypatch.setattr(Ready, "run", lambda self, *given: (refuse if self.wide else real)(self, *given))
    said = (
        "The step casts to bfloat16 by itself, but one device in double could not run without these casts: nothing is allowed "
        "for what they round, so that what departs may be their rounding alone (TypeError: no rule for it)."
    )
    e = words(metric="bfloat16")
    made = judged(e, opened)
    assert (made.casts_unmeasured, made.within) == (said, {})
    assert made.to_json()["casts_unmeasured"] == said
    worst = only(made).worst
    assert worst["gradient"].share < 1
    assert not any(c.casts for c in worst.values())
    print_verified(made, 1.0)
    assert capsys.readouterr().out.count(said) == 1
    monkeypatch.undo()
    room = judged(e, opened)
    assert room.casts_unmeasured == room.to_json()["casts_unmeasured"] == ""
    assert room.within == {"loss": "bfloat16"}
    assert only(room).worst["gradient"] == worst["gradient"]


# What a step casts by itself is left out, wherever it stands.


@jax.custom_vjp
def _backward(x: Array) -> Array:
    return x


_backward.defvjp(lambda x: (x, None), lambda _, out: (out.astype(jnp.float16).astype(out.dtype),))


@jax.custom_jvp
def _forward(x: Array) -> Array:
    return jnp.tanh(x.astype(jnp.float16)).astype(x.dtype)


@_forward.defjvp
def _(x: Any, t: Any) -> Any:
    return _forward(x[0]), t[0] * 0.5


def _own(x: Array) -> Array:
    return x.astype(jnp.bfloat16).astype(x.dtype)


def _added(x: Array) -> Array:
    at = jnp.array([0, 1, 1, 3])
    return jnp.zeros((5, 8), jnp.bfloat16).at[at].add(x[:4].astype(jnp.bfloat16)).astype(x.dtype)


def _preferred(x: Array) -> Array:
    return lax.dot_general(x, x.T, (((1,), (0,)), ((), ())), preferred_element_type=jnp.bfloat16).astype(
        x.dtype
    )


def _complex(x: Array) -> Array:
    """Complex numbers of two float32, made of rounded ones."""
    return lax.complex(_single(x), _single(jnp.sin(x)))


def _exactly(x: Array) -> Array:
    return lax.complex(x, jnp.sin(x))


def _scanned(c: Array, x: Array) -> Array:
    """A linear recurrence over complex numbers, one position after another."""
    return lax.scan(lambda c, u: (c * (0.5 + 0.5j) + u, c.imag), c, x)[1]


def _linear(z: Array) -> Array:
    """A linear recurrence over complex numbers, all positions at once."""
    factors = jnp.full(z.shape, 0.5 + 0.25j, z.dtype)
    return lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (factors, z))[1].imag


def _filtered(x: Array, by: Any) -> Array:
    return jnp.fft.irfft(jnp.fft.rfft(x) * by, 8)


def _system(x: Array) -> Array:
    return x @ x.T + 6 * jnp.eye(6, dtype=x.dtype)


def _single(x: Array) -> Array:
    return _own(x).astype(jnp.float32)


def _conjugate(x: Array) -> Array:
    return jax.scipy.sparse.linalg.cg(_system(x), x[:, 0], maxiter=3)[0]


PLACES: dict[str, tuple[Callable[[Array], Any], Callable[[Array], Any]]] = {
    "scan": (
        lambda x: lax.scan(lambda c, _: (_own(jnp.sin(c)), None), x, None, length=3)[0],
        lambda x: jnp.sin(jnp.sin(jnp.sin(x))),
    ),
    "while": (
        lambda x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, _own(s[1] * 1.1)), (0, lax.stop_gradient(x)))[1] * x,
        lambda x: lax.stop_gradient(x) * 1.1 * 1.1 * x,
    ),
    "cond": (
        lambda x: lax.cond(jnp.sum(x) > 0, lambda x: _own(x * 3), lambda x: x, jnp.abs(x)),
        lambda x: jnp.abs(x) * 3,
    ),
    "jit": (lambda x: jax.jit(_own)(x) ** 2, lambda x: x**2),
    "checkpoint": (lambda x: jax.checkpoint(lambda x: jnp.sin(_own(x)))(x), jnp.sin),
    "a backward pass": (lambda x: _backward(jnp.sin(x)), jnp.sin),
    "a derivative": (lambda x: _forward(x), lambda x: jnp.tanh(lax.stop_gradient(x)) + 0.5 * (x - lax.stop_gradient(x))),
    "scatter": (_added, lambda x: jnp.zeros((5, 8), x.dtype).at[jnp.array([0, 1, 1, 3])].add(x[:4])),
    "a product": (_preferred, lambda x: x @ x.T),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7) * x, lambda x: x * x),
    "complex numbers": (
        lambda x: (_complex(x) * ANGLES[None, :8]).real.astype(x.dtype),
        lambda x: (_exactly(x) * ANGLES[None, :8].astype(complex)).real,
    ),
    "a complex type": (
        lambda x: jnp.square(lax.complex(_own(x), x)).astype(jnp.complex64).imag.astype(x.dtype),
        lambda x: jnp.square(lax.complex(x, x)).imag,
    ),
    "a transform": (
        lambda x: _filtered(_single(x), ANGLES[None, :5]),
        lambda x: _filtered(x, ANGLES[None, :5].astype(complex)),
    ),
    "a complex scan": (
        lambda x: _scanned(jnp.zeros(8, jnp.complex64), _complex(x)),
        lambda x: _scanned(jnp.zeros(8, complex), _exactly(x)),
    ),
    "a complex associative scan": (lambda x: _linear(_complex(x)), lambda x: _linear(_exactly(x))),
    "a linear system": (
        lambda x: jnp.linalg.solve(_system(_single(x)), _single(x)),
        lambda x: jnp.linalg.solve(_system(x), x),
    ),
    "an inverse": (lambda x: jnp.linalg.inv(_system(_single(x))), lambda x: jnp.linalg.inv(_system(x))),
    "a determinant": (
        lambda x: jnp.linalg.slogdet(_system(_single(x)))[1],
        lambda x: jnp.linalg.slogdet(_system(x))[1],
    ),
    "conjugate gradients": (lambda x: _conjugate(_single(x)), _conjugate),
    "a type between": (lambda x: jnp.sort(_own(x).astype(jnp.float32), -1).astype(x.dtype), lambda x: jnp.sort(x, -1)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_cast_is_left_out_wherever_it_stands(place: str) -> None:
    casting, without = PLACES[place]
    total = lambda function: jax.value_and_grad(lambda x: jnp.sum(function(x).astype(x.dtype) * 1.7))
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)))
        found, want = (jax.jit(f)(x) for f in (widely(total(casting)), total(without)))
        rounded = jax.jit(total(casting))(x)
        assert narrowed(jax.make_jaxpr(total(casting))(x).jaxpr)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-15)
    assert (
        max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in zip(rounded, want, strict=True))
        > 1e-5
    )


def test_a_narrower_complex_type_is_a_cast() -> None:
    with jax.enable_x64(True):
        z = jnp.ones(4, complex)
        cast = jax.make_jaxpr(lambda z: z.astype(jnp.complex64))(z)
        assert narrowed(cast.jaxpr) == {"complex64"}
        assert narrowed(jax.make_jaxpr(lambda z: z.astype(complex) * 2)(z).jaxpr) == frozenset()
    assert unit("complex64") == unit("float32")


def test_what_is_narrow_from_the_start_is_not_widened() -> None:
    """Random bits, and what integers make: the same numbers, so that the two differ by casts alone."""

    def drawn(x: Array) -> Array:
        noise = jax.random.uniform(jax.random.key(0), x.shape, jnp.float32)
        waves = jnp.cos(jnp.arange(8, dtype=jnp.float32))
        return x * noise.astype(x.dtype) + waves.astype(x.dtype)[None]

    with jax.enable_x64(True):
        x = jnp.ones((4, 8))
        np.testing.assert_array_equal(jax.jit(widely(drawn))(x), jax.jit(drawn)(x))


# The room of an array is what the casts make of that array.


def test_an_array_that_the_casts_move_has_room_and_others_have_none() -> None:
    exact = {"moved": np.linspace(-1, 1, 64), "still": np.linspace(-1, 1, 64)}
    wide = {**exact, "moved": exact["moved"] * (1 + 2**-9)}
    found = {p: x * 1.01 for p, x in exact.items()}
    made = Budget(64, casts=("bfloat16",)).compare("gradient", found, exact, exact, wide=wide)
    assert {c.path: (c.departs, c.casts) for c in made} == {"moved": (False, "bfloat16"), "still": (True, "")}
    zeros = {p: x * 0 for p, x in exact.items()}
    assert all(
        c.departs for c in Budget(64, casts=("bfloat16",)).compare("gradient", zeros, exact, exact, wide=wide)
    )


def test_a_gradient_that_is_nothing_but_their_rounding_is_too_coarse_to_judge() -> None:
    exact, wide = {"w": np.linspace(-1, 1, 64)}, {"w": np.linspace(-0.3, 0.3, 64)}
    (zeros,) = Budget(64, casts=("bfloat16",)).compare(
        "gradient", {"w": exact["w"] * 0}, exact, exact, wide=wide
    )
    assert zeros.coarse
    assert not zeros.departs


def test_of_several_types_an_array_has_the_room_of_the_one_that_moves_it() -> None:
    exact = {"fine": np.linspace(-1, 1, 64), "coarse": np.linspace(-1, 1, 64)}
    wide = {
        "fine": exact["fine"] * (1 + unit("float32")),
        "coarse": exact["coarse"] * (1 + unit("bfloat16") / 9),
    }
    made = Budget(64, casts=("bfloat16", "float32")).compare("gradient", exact, exact, exact, wide=wide)
    assert {c.path: c.casts for c in made} == {"fine": "float32", "coarse": "bfloat16"}
