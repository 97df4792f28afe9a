"""The difference of two plans as one page of HTML: no network, no script, the same bytes for the same plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.plans.diff_words import (
    amount_text,
    changed_bytes,
    changed_text,
    figure_text,
    how_moved,
    layouts,
    mesh_words,
    not_in,
    shapes,
)
from experiments.plans.pictures.arrays import definitions, draw
from experiments.plans.pictures.blocks import shape_of
from experiments.plans.pictures.html import Html, details, document, el, join, section, table
from experiments.plans.pictures.look import STYLE
from experiments.plans.words import axes_text

if TYPE_CHECKING:
    from experiments.explanation import Line
    from experiments.plans.compared import MovedArray, PlanDifference, Side
    from experiments.plans.figures import Figure, Traffic

DRAWN = 36
"""Arrays drawn in the open; the others are folded."""


def difference_page(told: PlanDifference) -> str:
    """The page of a difference."""
    names = f"{told.a.name} on {told.a.target}, {told.b.name} on {told.b.target}"
    head = el(
        "header",
        el("h1", "Two plans"),
        el("p", f"What B has otherwise than A. Equal: {told.same}.", class_="note"),
    )
    sides = el("div", _side("A", told.a), _side("B", told.b), class_="cards")
    if told.empty:
        body = [
            el("p", el("strong", "The two plans are equal: same arrays, same bytes, same modelled time."))
        ]
    else:
        body = [_time(told), _memory(told), _traffic(told), _arrays(told), _purposes(told), _missing(told)]
    return document(f"Two plans: {names}", STYLE, head, el("main", sides, *body))


def _side(name: str, side: Side) -> Html:
    kind = {True: "card good", False: "card bad", None: "card"}[side.verdict.fits]
    word = {True: "fits", False: "does not fit", None: "no verdict"}[side.verdict.fits]
    return el(
        "div",
        el("h3", f"{name}: {side.name} on {side.target}"),
        el("div", word, class_="big"),
        el("p", side.verdict.says),
        el("p", f"{side.devices}; mesh {mesh_words(side.mesh)}"),
        el("p", "rules ", el("code", " | ".join(side.rules) or "none")),
        el("p", side.bottleneck, class_="dim"),
        class_=kind,
    )


def _time(told: PlanDifference) -> Html:
    return section("Modelled time", _figures(told.time)) if told.time else join(())


def _memory(told: PlanDifference) -> Html:
    return section("Memory of a device", _figures(told.memory)) if told.memory else join(())


def _figures(rows: Sequence[Figure]) -> Html:
    body = [
        [
            r.what,
            r.said,
            figure_text(r.a, r.unit),
            figure_text(r.b, r.unit),
            _signed(changed_text(r.a, r.b, r.unit), r.unit),
        ]
        for r in rows
    ]
    return table(["what", "from", ">A", ">B", ">B - A"], body)


def _signed(text: str, unit: str = "bytes") -> Html:
    """More bytes and seconds in red, less in green; more of what is wanted the other way round."""
    good = "+" if unit in ("share", "a second") else "-"
    return el("span", text, class_=None if text[:1] not in "+-" else "down" if text[:1] == good else "up")


def _traffic(told: PlanDifference) -> Html:
    if not told.traffic:
        return join(())
    body = [
        [
            axes_text(r.axes),
            r.kind,
            r.said,
            amount_text(r.a),
            amount_text(r.b),
            _bar(r, told.traffic),
            _signed(changed_bytes(r)),
        ]
        for r in told.traffic
    ]
    heads = ["over", "kind", "from", ">A", ">B", "", ">B - A"]
    return section(
        "What moves", table(heads, body), note="What each device sends in one step, in how many collectives."
    )


def _bar(r: Traffic, rows: Sequence[Traffic]) -> Html:
    """The bytes of both, A above B, to the scale of all rows."""
    most = max(max(x.a or (0, 0), x.b or (0, 0), key=lambda t: t[1])[1] for x in rows) or 1
    wide = [110 * (amount[1] if amount else 0) / most for amount in (r.a, r.b)]
    bars = [
        el("rect", x=0, y=1 + 8 * i, width=w, height=7, fill=f"var(--{('rest', 'predicted')[i]})")
        for i, w in enumerate(wide)
    ]
    return el("svg", *bars, width=112, height=17, viewBox="0 0 112 17", role="img", aria_label="A above B")


def _purposes(told: PlanDifference) -> Html:
    if not told.ops:
        return join(())
    body = [
        [
            el("code", r.op),
            r.phase,
            axes_text(r.axes),
            r.kind,
            amount_text(r.a),
            amount_text(r.b),
            _signed(changed_bytes(r)),
        ]
        for r in told.ops
    ]
    heads = ["op", "phase", "over", "kind", ">A", ">B", ">B - A"]
    first = table(heads, body[:20])
    rest = [details(f"{len(body) - 20} more", table(heads, body[20:]))] if len(body) > 20 else []
    return section("What they are for", first, *rest, note="Predicted, by the op that asks for them.")


def _arrays(told: PlanDifference) -> Html:
    """Each array as it lies in either plan, and the rule that made the difference."""
    if not told.arrays:
        return join(())
    defined = _patterns(told)
    alike: dict[object, list[MovedArray]] = {}
    for m in told.arrays:
        key = (
            m.path,
            *(x and shape_of(x, ()) for x in (m.a, m.b)),
            tuple(w for w in how_moved(m) if "in use" not in w),
        )
        alike.setdefault(key, []).append(m)
    figures = [_move(told, each) for each in alike.values()]
    first = el("div", *figures[:DRAWN], class_="moves")
    rest = (
        [details(f"{len(figures) - DRAWN} more", el("div", *figures[DRAWN:], class_="moves"))]
        if figures[DRAWN:]
        else []
    )
    body = [
        [el("code", f"{m.kind} {m.path}"), shapes(m), *(el("code", x) for x in layouts(m, told.a.mesh, told.b.mesh)),
         figure_text(m.bytes[0], "bytes"), figure_text(m.bytes[1], "bytes"), _signed(changed_text(*m.bytes, "bytes")),
         "; ".join(how_moved(m))]
        for m in told.arrays
    ]  # fmt: skip
    heads = ["array", "shape", "layout in A", "layout in B", ">A", ">B", ">B - A", "because"]
    note = f"{len(told.arrays)} lie otherwise; left as in A, right as in B."
    return section(
        "Arrays that moved",
        defined,
        first,
        *rest,
        details("All of them as a table", table(heads, body)),
        note=note,
    )


def _move(told: PlanDifference, each: Sequence[MovedArray]) -> Html:
    """Arrays of one path that moved alike (a parameter, its gradient, its state), from the first plan to the second."""
    first = each[0]
    a, b = (_picture(line, side) for line, side in ((first.a, told.a), (first.b, told.b)))
    rows = [
        el("div", f"{m.kind}{_copies(m)}: {figure_text(m.bytes[0], 'bytes')} -> {figure_text(m.bytes[1], 'bytes')} ",
           _signed(changed_text(*m.bytes, "bytes")))
        for m in each
    ]  # fmt: skip
    why = [el("div", words) for words in dict.fromkeys(w for m in each for w in how_moved(m))]
    caption = el("figcaption", el("b", first.path), el("div", shapes(first)), *dict.fromkeys(rows), *why)
    return el(
        "figure",
        el("span", a, el("span", "→", aria_label="becomes"), b, class_="pair"),
        caption,
        class_="move",
    )


def _copies(m: MovedArray) -> str:
    line = m.b or m.a
    return f" of {line.source.rpartition('/')[2]}" if line and line.source else ""


def _picture(line: Line | None, side: Side) -> Html:
    if line is None:
        return el(
            "svg",
            el("text", "not there", x=22, y=60, class_="t"),
            width=150,
            height=112,
            viewBox="0 0 150 112",
        )
    return draw(shape_of(line, side.orders), side.mesh, side_of(side.mesh))


def side_of(mesh: Mapping[str, int]) -> str:
    """What tells the stripes of one mesh from those of another on the same page."""
    return "-".join(f"{a}{n}" for a, n in mesh.items())


def _patterns(told: PlanDifference) -> Html:
    """The stripes of both plans' blocks; of plans on the same mesh once."""
    shapes_of: dict[str, tuple[Mapping[str, int], list[Line]]] = {}
    found = []
    for side, lines in ((told.a, [m.a for m in told.arrays]), (told.b, [m.b for m in told.arrays])):
        shapes_of.setdefault(side_of(side.mesh), (side.mesh, []))[1].extend(x for x in lines if x)
    for name, (mesh, lines) in shapes_of.items():
        found.append(definitions([shape_of(x, ()) for x in lines], mesh, name))
    return join(found)


def _missing(told: PlanDifference) -> Html:
    words = not_in(told)
    return section("Besides", el("ul", *(el("li", x) for x in words))) if words else join(())
