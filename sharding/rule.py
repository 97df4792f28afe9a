"""Rules are values: what turns the names of an array's dims into mesh axes. No jax here.

A rule says, for a role, which axis splits which named dim. The roles of a parameter are nested, each starting from
the layout before it, so that going from one to the next only ever slices, and going back only ever gathers:

    compute    the parameter as the layer uses it                       Megatron splits here
    param      the parameter at rest, between uses                      FSDP / ZeRO-3 splits here
    gradient   its gradient, accumulated over micro-batches             ZeRO-2 splits here
    optimizer  the optimizer's state, and the update computed from it   ZeRO-1 splits here

and `activation` is every array that depends on the batch. Rules chain left to right with `|`; each sees the layout so
far and may only fill what is free.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sharding.axes import AXES, nearest
from sharding.errors import InputError
from sharding.order import Order

PARAM_ROLES = ("compute", "param", "gradient", "optimizer")
ROLES = (*PARAM_ROLES, "activation")


@dataclass(frozen=True)
class Split:
    """How one dim is to be split: over which axis, and what to do when dim or axis is taken already."""

    axis: str
    when_taken: str = "error"
    """"error": a taken dim or axis is a conflict. "also": a taken dim is split further by this axis, inside the split
    it has. "decline": the placement is left out, counted and explained. "also or decline": a taken dim is split further,
    a taken axis declines."""
    otherwise: str = ""
    """What else can be done where the dim does not divide: ends the error's paragraph."""

    def __post_init__(self) -> None:
        if self.when_taken not in ("error", "also", "decline", "also or decline"):
            raise InputError(
                f"Split.when_taken is {self.when_taken!r}; it is 'error', 'also', 'decline' or 'also or decline'."
            )


def also(axis: str) -> Split:
    """Split the dim over `axis` as well, inside whatever split earlier rules gave it (batch over data, then fsdp)."""
    return Split(axis, "also")


def if_free(axis: str) -> Split:
    """Split the dim over `axis` unless an earlier rule has used dim or axis in this array (sequence parallelism)."""
    return Split(axis, "decline")


def also_if_free(axis: str) -> Split:
    """Split the dim over `axis` as well, unless an earlier rule has used the axis in this array."""
    return Split(axis, "also or decline")


@dataclass(frozen=True)
class Ask:
    """What a rule sees of one array: its role, names, shape, and the axes that split each dim so far.

    `shape` is the global shape; None for activations, whose layout follows from their names alone.
    """

    path: str
    role: str
    names: tuple[str, ...]
    shape: tuple[int, ...] | None
    dims: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int] = field(hash=False)

    def size(self, axis: str) -> int:
        """Devices along `axis`; InputError for an axis that does not exist."""
        if axis not in self.sizes:
            raise InputError(
                f"A rule asks for an axis {axis!r}, which does not exist{nearest(str(axis), AXES)}. The axes "
                f"are {', '.join(AXES)}."
            )
        return self.sizes[axis]

    def local(self, dim: int) -> int:
        """Size of a dim on one device under the layout so far."""
        if self.shape is None:
            raise InputError(
                f"{self.path}: a rule asks for the shape of an activation, but activations are laid out by their names "
                f"alone. Name the dims to split, as in {{'batch': also('data')}}."
            )
        size = self.shape[dim]
        for axis in self.dims[dim]:
            size //= self.sizes[axis]
        return size


Placing = Mapping[str, "str | Split"] | Callable[[Ask], Mapping[str, "str | Split"]]


def first_dim(axis: str, never: tuple[str, ...] = ("layers",)) -> Callable[[Ask], Mapping[str, Split]]:
    """Placing that splits, over `axis`, the first dim that divides: an unsplit one if there is one, else further.

    The first, because gathering along the outermost dim concatenates whole blocks of memory. `layers` is never chosen:
    a scan over layers would have to gather the whole stack at once. An array without such a dim is left as it is, which
    `explain` names.
    """

    def place(ask: Ask) -> Mapping[str, Split]:
        n = ask.size(axis)
        fits = [d for d, name in enumerate(ask.names) if name not in never and ask.local(d) % n == 0]
        best = next((d for d in fits if not ask.dims[d]), next(iter(fits), None))
        return {} if best is None else {ask.names[best]: also(axis)}

    return place


@dataclass(frozen=True)
class Rule:
    """One rule: per role a mapping from names to axes, or a function of an `Ask` that returns such a mapping.

    A plain string is a claim (`{"mlp": "tensor"}`): a dim or axis that is taken already is then an error.
    """

    compute: Placing = field(default_factory=dict)
    param: Placing = field(default_factory=dict)
    gradient: Placing = field(default_factory=dict)
    optimizer: Placing = field(default_factory=dict)
    activation: Placing = field(default_factory=dict)
    replicated: tuple[str, ...] = ()
    """Names that this rule declares to stay whole, so that no other rule needs to know them."""
    order: Mapping[str, Order] = field(default_factory=dict)
    """Names whose positions lie in another order than they count in, such as {"length": ZigZag("context")}."""
    call: str = field(default="", init=False)
    """The expression that makes this rule, e.g. `fsdp(axis='fsdp')`; filled by `@rule`."""
    source: str = field(default="", init=False)
    """file:line of the rule's factory; filled by `@rule`."""

    def __post_init__(self) -> None:
        for role in ROLES:
            _check_placing(role, getattr(self, role))
        if not isinstance(self.replicated, tuple) or not all(isinstance(n, str) for n in self.replicated):
            raise InputError(
                f"Rule(replicated={self.replicated!r}): it is a tuple of the names that stay whole, as in "
                f"replicated=('embed',). Change it."
            )

    def __hash__(self) -> int:
        return hash((self.call, self.source))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and (self.call, self.source) == (other.call, other.source)

    def names(self) -> set[str]:
        """Every name that the rule's mappings and `replicated` speak of (functions speak of none)."""
        tables = (getattr(self, role) for role in ROLES)
        return {n for t in tables if not callable(t) for n in t} | set(self.replicated) | set(self.order)

    def place(self, ask: Ask) -> Mapping[str, Split]:
        """What this rule wants for one array: name -> Split."""
        placing: Placing = getattr(self, ask.role)
        wanted = placing(ask) if callable(placing) else {n: s for n, s in placing.items() if n in ask.names}
        if not isinstance(wanted, Mapping):
            raise InputError(
                f"Rule {self.call} ({self.source}) returns {wanted!r} for {ask.path}; it must return a mapping from names "
                f"to axes, an empty one for nothing."
            )
        splits = {n: s if isinstance(s, Split) else Split(s) for n, s in wanted.items()}
        for name, split in splits.items():
            if split.axis not in AXES:
                raise InputError(
                    f"Rule {self.call} ({self.source}) splits {name!r} over an axis {split.axis!r}, which does not "
                    f"exist{nearest(str(split.axis), AXES)}. The axes are {', '.join(AXES)}; a dim that "
                    f"several axes split is placed once by each rule, with also(axis)."
                )
            if name not in ask.names:
                raise InputError(
                    f"Rule {self.call} ({self.source}) wants to split a dim {name!r} of {ask.path or 'an array'}, whose "
                    f"dims are {' '.join(ask.names)}{nearest(str(name), ask.names)}."
                )
        return splits


def _check_placing(role: str, placing: object) -> None:
    """Refuse, with `InputError`, what is neither a mapping from names to axes nor a function."""
    meant = (
        f"a role is a mapping from names to axes, as in {role}={{'embed': 'fsdp'}}, or a function of an Ask"
    )
    if not isinstance(placing, Mapping):
        if not callable(placing):
            raise InputError(f"Rule({role}={placing!r}): {meant}. Change {role}.")
        return
    for name, axis in placing.items():
        if not isinstance(name, str) or not isinstance(axis, (str, Split)):
            raise InputError(
                f"Rule({role}={{{name!r}: {axis!r}}}): {meant}; a name is a text, and an axis a text, also(axis) or "
                f"if_free(axis). A dim that several axes split is placed once by each rule, with also(axis). Change {role}."
            )


@dataclass(frozen=True)
class Rules:
    """A chain of rules, applied left to right. `data() | fsdp()` makes one; its repr is that expression."""

    chain: tuple[Rule, ...] = ()

    def __or__(self, other: Rules) -> Rules:
        if not isinstance(other, Rules):
            raise InputError(
                f"Rules chain with other rules, as in data() | fsdp(); got {other!r}. Was a rule written without ()?"
            )
        return Rules(self.chain + other.chain)

    def __ror__(self, other: object) -> Rules:
        return self | other  # type: ignore[operator]  # reached only by what is no Rules: the same error

    def __repr__(self) -> str:
        return " | ".join(r.call for r in self.chain) or "Rules()"


def rule(factory: Callable[..., Rule]) -> Callable[..., Rules]:
    """Make a function that returns a `Rule` into a rule factory: its calls are `Rules` that know name and source line.

    Example, a whole rule file:

        @rule
        def tensor(axis: str = "tensor") -> Rule:
            split = {"mlp": axis, "heads": axis, "kv_heads": axis, "vocab": axis}
            return Rule(compute=split, activation=split)
    """

    @functools.wraps(factory)
    def make(*args: object, **kwargs: object) -> Rules:
        made = factory(*args, **kwargs)
        if not isinstance(made, Rule):
            raise InputError(
                f"{factory.__name__}, decorated with @rule, returns a {type(made).__name__}, but it must return a Rule. "
                f"A function that chains other rules needs no decorator."
            )
        bound = inspect.signature(factory).bind(*args, **kwargs)
        words = ", ".join([*map(repr, bound.args), *(f"{k}={v!r}" for k, v in bound.kwargs.items())])
        code = inspect.unwrap(factory).__code__
        object.__setattr__(made, "call", f"{factory.__name__}({words})")
        object.__setattr__(made, "source", f"{code.co_filename}:{code.co_firstlineno}")
        return Rules((made,))

    return make
