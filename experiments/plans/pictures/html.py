"""HTML and SVG elements as text, in which everything that is not markup already is escaped by the one place that makes them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})


class Html(str):
    """Text that is markup: only `el`, `join` and `raw` make it."""

    __slots__ = ()


Inside = str | Iterable[str]


def raw(text: str) -> Html:
    """Our own constant text as markup: style sheets and path data, never what a user named."""
    return Html(text)


def text_of(inside: Inside) -> str:
    """Text escaped, markup as it is, any of them one after the other."""
    if isinstance(inside, Html):
        return inside
    if isinstance(inside, str):
        return html.escape(inside, quote=True)
    return "".join(map(text_of, inside))


def el(name: str, /, *inside: Inside, **attributes: object) -> Html:
    """An element. Attributes: a trailing underscore is left out (`class_`), others stand for hyphens; None leaves one out,
    and numbers are written short.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(number(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{''.join(map(text_of, inside))}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Parts one after the other."""
    return Html("".join(map(text_of, parts)))


def number(value: object) -> str:
    """A value as an attribute has it: numbers with two digits behind the point at most."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Inside]], caption: str = "", foot: Sequence[Inside] = ()
) -> Html:
    """A table that scrolls in its own box; columns whose head begins with > are flush right."""
    right = [h.startswith(">") for h in heads]
    kind = lambda at: "n" if right[at] else None
    cells = lambda row, name: [el(name, c, class_=kind(i)) for i, c in enumerate(row)]
    head = el(
        "tr", *(el("th", h.removeprefix(">"), class_=kind(i), scope="col") for i, h in enumerate(heads))
    )
    body = [el("tr", *cells(row, "td")) for row in rows]
    parts = [el("caption", caption)] if caption else []
    parts += [el("thead", head), el("tbody", *body)]
    if foot:
        parts.append(el("tfoot", el("tr", *cells(foot, "td"))))
    return el(
        "div",
        el("table", *parts),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def details(summary: Inside, *inside: Inside) -> Html:
    """What is folded until it is asked for; open in print."""
    return el("details", el("summary", summary), *inside)


def section(title: str, *inside: Inside, note: Inside = "") -> Html:
    """A part of the page under a heading."""
    name = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
    return el("section", el("h2", title), el("p", note, class_="note") if note else "", *inside, id=name)


def document(title: str, style: str, *inside: Inside) -> str:
    """A whole page that needs nothing from anywhere."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", raw(style)),
    )
    return f"<!doctype html>\n{el('html', head, el('body', *inside), lang='en')}\n"
