"""The modelled step on a line of time: compute and collectives on lanes, and one layer unfolded.

The model sums ops and collectives by what they are, not one after the other, so a slot shows its compute first and then what
its collectives take beyond what is hidden behind it; slots are the layers of a pass, equally long, and what is outside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.plans.pictures.html import Html, el, join, raw
from experiments.plans.pictures.look import AXIS_COLOURS
from experiments.plans.words import axes_text, duration, percent

if TYPE_CHECKING:
    from experiments.plans.planned import Plan
    from sharding.price.timing import CollectiveTime, Modelled, OpTime

HIGH, WIDE = 24.0, 1000.0
"""Of a lane and of the whole line, units of the drawing."""
SINGLE = 120
"""Layers up to which each has a slot of its own."""
ROWS = 12
"""Rows of an unfolded layer; the rest is one."""
PRODUCTS = ("product", "convolution")
ORDER = (
    ("forward", True),
    ("forward", False),
    ("backward", False),
    ("backward", True),
    ("update", True),
    ("update", False),
)
"""(phase, in layers): the loss stands between the passes, so what is outside the layers does too."""


@dataclass(frozen=True)
class Slot:
    """A part of the step that is drawn as one: a layer of a pass, or what is outside the layers."""

    phase: str
    layers: int
    products: float
    other: float
    moved: dict[tuple[str, ...], float]
    """Axes -> seconds of collectives."""
    hidden: float
    """Of them, seconds beside compute, of this slot or of those before it."""

    @property
    def seconds(self) -> float:
        """Of the slot."""
        return self.products + self.other + sum(self.moved.values()) - self.hidden


def slots(m: Modelled) -> list[Slot]:
    """The step's slots in their order; all layers of one depth in a pass are one slot still."""
    told = sum(c.hidden for c in m.moved)
    behind = m.hidden / told if told else 0.0  # of all that could be hidden, what the model lets be
    made = []
    for phase, inside in ORDER:
        depths = sorted(
            {x.layers for x in (*m.ops, *m.moved) if x.phase == phase and bool(x.layers) == inside}
        )
        for depth in depths:
            ops = [o for o in m.ops if (o.phase, o.layers) == (phase, depth)]
            moved = [c for c in m.moved if (c.phase, c.layers) == (phase, depth)]
            by_axes: dict[tuple[str, ...], float] = {}
            for c in moved:
                by_axes[c.axes] = by_axes.get(c.axes, 0.0) + (c.seconds or 0.0)
            products = _sum(o for o in ops if o.kind in PRODUCTS)
            other = _sum(o for o in ops if o.kind not in PRODUCTS)
            hidden = sum(c.hidden for c in moved) * behind
            made.append(Slot(phase, depth, products, other, by_axes, hidden))
    return made


def _sum(ops: Iterable[OpTime]) -> float:
    return sum(o.seconds or 0.0 for o in ops)


def timeline(plan: Plan) -> Html:
    """The whole step, then a layer of each pass."""
    m = plan.modelled
    if m is None or not m.step:
        return join(())
    found = slots(m)
    total = sum(s.seconds for s in found) / (1 - m.bubble)
    if not total:
        return join(())
    lanes = tuple(dict.fromkeys(axes for c in m.moved if c.seconds for axes in (c.axes,)))
    lanes = tuple(sorted(lanes, key=lambda axes: -sum(s.moved.get(axes, 0.0) for s in found)))
    seen = [a for a in lanes if sum(s.moved.get(a, 0.0) for s in found) > total / 1000]
    rows = [("compute", _compute(found, total)), *((axes_text(a), _lane(found, total, a)) for a in seen)]
    cells: list[Html] = [el("span"), _phases(found, total, m.bubble)]
    for name, drawing in rows:
        cells += [el("span", name, class_="name"), drawing]
    keys = [_key("var(--product)", "products"), _key("var(--other)", "other ops")]
    left = [axes_text(a) for a in lanes if a not in seen]
    words = f"Not drawn: less than a thousandth of the step over {', '.join(left)}." if left else ""
    return join([
        el("div", *cells, class_="lanes"),
        el("p", *keys, el("span", "a collective has the colour of its first axis", class_="dim")),
        el("p", words, class_="note") if words else "",
        _unfolded(m),
    ])  # fmt: skip


def _key(colour: str, words: str) -> Html:
    return el("span", el("i", style=f"color:{colour}"), el("span", words), class_="key")


def _phases(found: Sequence[Slot], total: float, bubble: float) -> Html:
    spans = []
    for s in found:
        where = f"{s.layers} layers" if s.layers else "outside the layers" if s.phase != "update" else ""
        words = f"{s.phase}{', ' if where else ''}{where}: {duration(s.seconds)}"
        spans.append(el("span", words, style=f"width:{100 * s.seconds / total:.2f}%", title=words))
    if bubble:
        words = f"bubble {percent(bubble)}"
        spans.append(el("span", words, style=f"width:{100 * bubble:.2f}%", title=words))
    return el("span", *spans, class_="phases")


def _singles(found: Sequence[Slot]) -> list[tuple[float, Slot, float]]:
    """(start, slot, share of it) of each layer, in seconds; of very many layers all as one."""
    made, at = [], 0.0
    for s in found:
        count = s.layers if 0 < s.layers <= SINGLE else 1
        for _ in range(count):
            made.append((at, s, 1 / count))
            at += s.seconds / count
    return made


def _box(start: float, seconds: float, total: float) -> str:
    """A rectangle's path data; nothing for nothing."""
    wide = seconds / total * WIDE
    return f"M{start / total * WIDE:.2f} 3h{wide:.2f}v{HIGH - 6:g}h-{wide:.2f}z" if wide > 0 else ""


def _strip(*inside: Html) -> Html:
    base = el("rect", x=0, y=3, width=WIDE, height=HIGH - 6, fill="var(--panel)")
    return el(
        "svg",
        base,
        *inside,
        viewBox=f"0 0 {WIDE:g} {HIGH:g}",
        preserveAspectRatio="none",
        height=HIGH,
        width="100%",
    )


def _compute(found: Sequence[Slot], total: float) -> Html:
    each = _singles(found)
    products = "".join(_box(at, s.products * k, total) for at, s, k in each)
    other = "".join(_box(at + s.products * k, s.other * k, total) for at, s, k in each)
    return _strip(
        el("path", d=raw(products), fill="var(--product)"), el("path", d=raw(other), fill="var(--other)")
    )


def _lane(found: Sequence[Slot], total: float, axes: tuple[str, ...]) -> Html:
    """Collectives over these axes, after those over the axes of the slot before them."""
    data = []
    for at, s, k in _singles(found):
        before = 0.0
        for other, seconds in s.moved.items():
            if other == axes:
                data.append(_box(at + (s.products + s.other - s.hidden + before) * k, seconds * k, total))
            before += seconds
    return _strip(el("path", d=raw("".join(data)), fill=AXIS_COLOURS.get(axes[0], "var(--modelled)")))


def _unfolded(m: Modelled) -> Html:
    """One layer of each pass as a cascade, the longest part first."""
    depths = sorted({x.layers for x in (*m.ops, *m.moved) if x.layers})
    parts = {(phase, depth): _steps(m, phase, depth) for depth in depths for phase in ("forward", "backward")}
    scale = max((sum(s for _, s, _ in each) for each in parts.values()), default=0.0)
    blocks = []
    for (phase, depth), each in parts.items():
        if each and scale:
            title = f"One of {depth} layers, {phase}: {duration(sum(s for _, s, _ in each))}"
            blocks.append(el("div", el("h3", title), _cascade(each, scale)))
    note = "Ops of one kind together, the longest first, collectives after them: the model knows no order within a layer."
    return join([el("div", *blocks, class_="two"), el("p", note, class_="note")]) if blocks else join(())


Step = tuple[str, float, str]
"""Words, seconds in one layer, colour."""


def _steps(m: Modelled, phase: str, depth: int) -> list[Step]:
    ops: list[OpTime] = [o for o in m.ops if (o.phase, o.layers) == (phase, depth) and o.seconds]
    moved: list[CollectiveTime] = [c for c in m.moved if (c.phase, c.layers) == (phase, depth) and c.seconds]
    rows = [(f"{o.op or 'no named op'}, {o.kind} {o.dtype}", (o.seconds or 0.0) / depth,
             "var(--product)" if o.kind in PRODUCTS else "var(--other)") for o in ops]  # fmt: skip
    rows += [(f"{c.kind} over {axes_text(c.axes)} for {c.op or 'no named op'}", (c.seconds or 0.0) / depth,
              AXIS_COLOURS.get(c.axes[0], "var(--modelled)")) for c in moved]  # fmt: skip
    if len(rows) <= ROWS + 1:
        return rows
    kept = sorted(sorted(range(len(rows)), key=lambda i: -rows[i][1])[:ROWS])
    left = [rows[i] for i in range(len(rows)) if i not in kept]
    return [*(rows[i] for i in kept), (f"{len(left)} more", sum(s for _, s, _ in left), "var(--rest)")]


def _cascade(rows: Sequence[Step], scale: float) -> Html:
    cells, at = [], 0.0
    for words, seconds, colour in rows:
        style = f"left:{100 * at / scale:.2f}%;width:{100 * seconds / scale:.2f}%;background:{colour}"
        cells += [
            el("span", words, class_="lab"),
            el("span", el("span", class_="fill", style=style), class_="track"),
            el("span", duration(seconds), class_="val"),
        ]
        at += seconds
    return el("div", *cells, class_="bars")
