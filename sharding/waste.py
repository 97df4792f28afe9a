"""What `sharding.flow` saw of a step, told as findings: moves that carry too much, and products computed twice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from sharding.finding import Finding, Limits, human
from sharding.flow import Flow, Move, Product
from sharding.layout import Dims, Layouts
from sharding.ledger import sent_bytes
from sharding.region import Tap


def lower_bound(local: int, src: Dims, dst: Dims, sizes: Mapping[str, int]) -> int:
    """Bytes that a device must receive, on average, to go from one layout to another: its part there without what it has.

    `local`: bytes of its part under `src`. No algorithm sends less, since what one receives another has sent.
    """
    axes = list(dict.fromkeys(a for dim in (*src, *dst) for a in dim))
    parts = lambda dims: math.prod(sizes[a] for dim in dims for a in dim)
    kept, devices = 0.0, 0
    for place in itertools.product(*(range(sizes[a]) for a in axes)):
        at = dict(zip(axes, place, strict=True))
        both = 1.0
        for have, want in zip(src, dst, strict=True):
            (a, b), (c, d) = _interval(have, at, sizes), _interval(want, at, sizes)
            both *= max(0.0, min(b, d) - max(a, c))
        kept, devices = kept + both, devices + 1
    whole = local * parts(src)
    return round(whole / parts(dst) - whole * kept / devices)


def _interval(axes: Sequence[str], at: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[float, float]:
    """The part of a dim, within [0, 1), that the device at these coordinates holds."""
    index, n = 0, 1
    for axis in axes:
        index, n = index * sizes[axis] + at[axis], n * sizes[axis]
    return index / n, (index + 1) / n


def wasteful_moves(flow: Flow, layouts: Layouts, limits: Limits) -> Iterator[Finding]:
    """A finding for each op and axes whose moves send more than they must, together at least the limits."""
    found: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, Move, int]]] = {}
    for move in flow.moves:
        judged = _needed(move, layouts.sizes)
        if judged is not None and judged[1] < move.bytes:
            found.setdefault((move.source, move.op, move.axes), []).append((judged[0], move, judged[1]))
    least = max(limits.bytes, limits.traffic * flow.sent)
    for (source, op, axes), moves in found.items():
        has, needs = sum(m.bytes for _, m, _ in moves), sum(n for _, _, n in moves)
        if has - needs < least:
            continue
        over = " x ".join(f"{a} = {layouts.sizes[a]}" for a in axes)
        rules, sources, by = _rules(layouts, axes)
        why = max(moves, key=lambda one: one[1].bytes - one[2])[0]
        times = {m.kind: sum(x.times for _, x, _ in moves if x.kind == m.kind) for _, m, _ in moves}
        sends = " and ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in times.items())
        says = (
            f"{source} {op}: {_WHAT[why]} over {over}, which {by} uses: each device sends {human(has)} in {sends} of a step "
            f"where {human(needs)} would do."
        )
        yield Finding(
            "wasteful move",
            "warning",
            f"{source} {op}",
            axes,
            rules,
            sources,
            has,
            needs,
            "bytes",
            says,
            _CHANGE[why],
        )


_WHAT = {
    "again": "gathers an array again of which every device had just cut its part",
    "sliced": "gathers an array of which each device then keeps its own slice",
    "through": "gathers an array for one op alone and slices the result back",
    "summed": "sums an array on every device of which each then keeps its own slice",
    "equal": "moves an array that is equal on all the devices",
}
_CHANGE = {
    "again": "Two ops in a row need the dim whole and the rules split it between them: leave that dim of the activation whole "
    "in the rules, or split another that both ops can use (heads in place of head_dim).",
    "sliced": "Let the rules lay the source as the target wants it, or differ by whole axes only (an all-to-all).",
    "through": "The op needs the dim whole: leave that dim of the activation whole in the rules, or split another.",
    "summed": "Lay the result's dim out so that a reduce-scatter can leave the slices: the axis last on a dim that lies "
    "otherwise as the product left it.",
    "equal": "Leave the axis out of what is gathered or summed there.",
}


def _needed(move: Move, sizes: Mapping[str, int]) -> tuple[str, int] | None:
    """Why a move sends too much, and the bytes that would do in one step; None where it does not."""
    if move.equal:
        left = math.prod(sizes[a] for a in move.axes if a not in move.equal)
        return "equal", sent_bytes(move.kind, move.local, left) * move.times
    if move.again:
        return "again", 0
    if move.used or not move.slices:
        return None
    dim, axes, straight = move.slices[0]
    if any(other[:2] != (dim, axes) for other in move.slices):
        return None
    if move.kind == "all-reduce":
        over = math.prod(sizes[a] for a in move.axes if a in axes)
        rest = math.prod(sizes[a] for a in move.axes if a not in axes)
        sent = sent_bytes("reduce-scatter", move.local, over) + sent_bytes(
            "all-reduce", move.local // over, rest
        )
        return "summed", sent * move.times
    if not straight and not axes >= set(move.axes):
        return None
    first = [a for a in move.axes if a in axes]  # the slice's own order is not in the trace; a gather's is
    order = (*first, *(a for a in sizes if a in axes and a not in first))
    dims = max(dim, move.dim) + 1
    src: Dims = tuple(move.axes if d == move.dim else () for d in range(dims))
    dst: Dims = tuple(order if d == dim else () for d in range(dims))
    return ("sliced" if straight else "through"), lower_bound(move.local, src, dst, sizes) * move.times


def repeated_work(flow: Flow, layouts: Layouts, taps: Sequence[Tap], limits: Limits) -> Iterator[Finding]:
    """A finding for each axis whose devices repeat each other's products for more than the limit's part of the step."""
    total = sum(p.flops for p in flow.products)
    for axis, n in layouts.sizes.items():
        same = [p for p in flow.products if axis in p.repeats]
        has = sum(p.flops for p in same)
        needs = has // n
        if n == 1 or not has or has - needs <= limits.work * total:
            continue
        lines = _by_line(same)
        rules, sources, by = _rules(layouts, (axis,))
        share, listed = (
            f"{100 * has / total:.0f} %",
            [f"{k} ({100 * v / total:.0f} %)" for k, v in lines.items()],
        )
        listed = listed[:3] + [f"{len(listed) - 3} more"] * (len(listed) > 3)
        among = f" ({', '.join(listed)})" if len(lines) > 1 else ""
        if has == total:
            says = (
                f"{axis} = {n}: {by} splits no product of the step over it. All {n} devices compute the same "
                f"{human(has, 'FLOP', 1000)} of each step."
            )
            change = (
                f"Split the batch over it with a rule such as Rule(activation={{'batch': also({axis!r})}}), or set mesh axis "
                f"{axis} to 1."
            )
            kind, severity = "idle axis", "error"
        else:
            says = (
                f"{next(iter(lines))}: each of the {n} devices of {axis} computes the same "
                f"{human(has, 'FLOP', 1000)} of a step, {share} of its products{among}. "
                f"There {by} leaves no dim split over {axis}."
            )
            change = _split_change(axis, n, next(iter(lines)), layouts, taps)
            kind, severity = "repeated work", "warning"
        path = axis if kind == "idle axis" else next(iter(lines))
        yield Finding(kind, severity, path, (axis,), rules, sources, has, needs, "FLOPs", says, change)


def _by_line(products: Sequence[Product]) -> dict[str, int]:
    """`file:line op` -> FLOPs, the most first."""
    lines: dict[str, int] = {}
    for p in products:
        lines[f"{p.source} {p.op}"] = lines.get(f"{p.source} {p.op}", 0) + p.flops
    return dict(sorted(lines.items(), key=lambda kv: -kv[1]))


def _split_change(axis: str, n: int, line: str, layouts: Layouts, taps: Sequence[Tap]) -> str:
    """Which dims of a line's results could be split over the axis, or which one its op gathers."""
    made = {t.names: t for t in taps if t.source == line.rpartition(" ")[0]}
    whole = {t: layouts.activation(names) for names, t in made.items()}
    taken = {
        t: x.names[next(d for d, a in enumerate(x.dims) if axis in a)]
        for t, x in whole.items()
        if axis in x.axes
    }
    less = f"make mesh axis {axis} smaller and one that splits the batch larger."
    if taken and len(taken) == len(whole):
        ops = " and ".join(dict.fromkeys(f"{t.op} takes {name} whole" for t, name in taken.items()))
        return f"The rules split its result, but {ops}: split a dim that it can use split, or {less}"
    kept = {"batch", *(n for r in layouts.rules.chain for n in r.replicated)}
    free = {
        name: size
        for t, x in whole.items() if t not in taken
        for name, dims, size in zip(x.names, x.dims, t.shape, strict=True)
        if name not in kept and size % (n * math.prod(layouts.sizes[a] for a in dims)) == 0
    }  # fmt: skip
    if not free:
        return less.capitalize()
    could = ", ".join(f"{name} = {size}" for name, size in free.items())
    return f"Let a rule split {'one of ' * (len(free) > 1)}{could} over {axis} where it is used, or {less}"


def _rules(layouts: Layouts, axes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Calls and sources of the rules that place anything over these axes, and both in words."""
    placed = rules_of(layouts)
    pairs = list(dict.fromkeys(pair for a in axes for pair in placed.get(a, ())))
    words = " and ".join(f"{call} ({source})" for call, source in pairs) or "no rule"
    return tuple(c for c, _ in pairs), tuple(s for _, s in pairs), words


def rules_of(layouts: Layouts) -> dict[str, tuple[tuple[str, str], ...]]:
    """Axis -> (call, file:line) of each rule that split any array over it, in the chain's order."""
    every = [*layouts.asked.values(), *(p.optimizer for p in layouts.params.values())]
    used = {(r.axis, r.rule, r.source) for lies in every for r in lies.reasons}
    chain = [(r.call, r.source) for r in layouts.rules.chain]
    return {axis: tuple(pair for pair in chain if (axis, *pair) in used) for axis in layouts.sizes}
