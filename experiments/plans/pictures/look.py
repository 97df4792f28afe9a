"""The look of a plan's page: one style sheet for screens light and dark, phones and paper, and the colours of devices."""

from __future__ import annotations

from sharding.axes import AXES

AXIS_COLOURS: dict[str, str] = dict(
    zip(AXES, ("#7a62b8", "#b7860b", "#2f6fb7", "#1f8a66", "#b8528e", "#2b95ad", "#c8571b"), strict=True)
)
"""Each mesh axis has one colour through the whole page, after Okabe and Ito's palette; readable on white and on black."""

SHADES = (("#a9cfee", "#4f97ce"), ("#fbcb93", "#ee8a2e"), ("#a5ddb9", "#45ae78"), ("#e3c0e8", "#b06fc0"))
"""Hues of devices, light to dark, as the figures of splits have them."""


def device_colour(device: int, devices: int) -> str:
    """A device's own colour: four hues, and as many shades as it takes."""
    light, dark = SHADES[device % len(SHADES)]
    share = (device // 4) / max(1, -(-devices // 4) - 1)
    mixed = (round(a + (b - a) * share) for a, b in zip(_rgb(light), _rgb(dark), strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


STYLE = """
:root{--bg:#fff;--ink:#1b2230;--dim:#5a6475;--line:#dde2e9;--panel:#f5f7fa;--cut:#fff;
--predicted:#4b63c9;--manual:#12807c;--auto:#b86a00;--modelled:#8a4fa8;--good:#15803d;--bad:#c02626;--warn:#a15c00;
--product:#5b6fd6;--other:#a9b6ee;--rest:#d5dbe4}
@media (prefers-color-scheme:dark){:root{--bg:#11141a;--ink:#e7eaf0;--dim:#9ca6b5;--line:#2c333e;--panel:#191e26;--cut:#11141a;
--predicted:#8296f0;--manual:#3fb8b0;--auto:#e59a3c;--modelled:#c08be0;--good:#4ac27a;--bad:#f27878;--warn:#e0a04a;
--product:#7f92f2;--other:#4a5694;--rest:#353d4a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1.5rem 1.25rem 4rem;max-width:74rem;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.6rem 0 .3rem;padding-top:.7rem;border-top:1px solid var(--line)}
h3{font-size:.95rem;margin:1.4rem 0 .4rem}
p{margin:.3rem 0 .7rem;max-width:60rem}
.note,figcaption,.dim{color:var(--dim);font-size:.86rem}
code,.mono{font:.92em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:.15rem 1.4rem;margin:.4rem 0 1rem;padding:0;list-style:none;font-size:.9rem}
.facts b{font-weight:500;color:var(--dim);margin-right:.4rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:.8rem;margin:1rem 0}
.card{background:var(--panel);border:1px solid var(--line);border-left:4px solid var(--dim);border-radius:6px;
padding:.75rem .95rem}
.card h3{margin:0;font-size:.8rem;font-weight:600;color:var(--dim)}
.card .big{font-size:1.5rem;font-weight:650;line-height:1.25;overflow-wrap:anywhere}
.card p{margin:.2rem 0 0;font-size:.9rem}.card ul{margin:.4rem 0 0;padding-left:1.1rem;font-size:.86rem}
.good{border-left-color:var(--good)}.good .big{color:var(--good)}
.bad{border-left-color:var(--bad)}.bad .big{color:var(--bad)}
.time{border-left-color:var(--modelled)}
.said{display:inline-block;font-size:.72rem;font-weight:600;line-height:1.35;padding:0 .4rem;border-radius:3px;border:1px solid;
vertical-align:.1em;white-space:nowrap}
.predicted{color:var(--predicted)}.manual{color:var(--manual)}.auto{color:var(--auto)}.modelled{color:var(--modelled)}
.scroll{overflow-x:auto;margin:.5rem 0 1rem}
table{border-collapse:collapse;font-size:.85rem;min-width:min(100%,30rem)}
caption{text-align:left;font-weight:600;padding:.2rem 0 .4rem;white-space:nowrap}
th,td{text-align:left;vertical-align:top;padding:.22rem .9rem .22rem 0;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--dim);white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.n:last-child,th.n:last-child{padding-right:0}
tfoot td{font-weight:650;border-bottom:0}
td code{overflow-wrap:normal}td svg{max-width:none}.one{white-space:nowrap}
.unnamed{color:var(--bad);font-weight:650}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--dim);font-size:.88rem;padding:.2rem 0}
.bars{display:grid;grid-template-columns:minmax(8rem,auto) minmax(0,1fr) minmax(5.5rem,auto);gap:.22rem .7rem;
align-items:center;font-size:.85rem;margin:.5rem 0 1rem}
.bars .head{grid-column:1/-1;font-weight:600;margin-top:.65rem}
.bars .val{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.track{position:relative;height:1.05rem;background:var(--panel);border-radius:2px}
.fill{position:absolute;top:0;bottom:0;min-width:1px;background:currentColor}
.fill+.fill{border-left:1px solid var(--cut)}
.p0{opacity:1}.p1{opacity:.76}.p2{opacity:.56}.p3{opacity:.4}.p4{opacity:.27}
.cap{position:absolute;top:-4px;bottom:-4px;border-left:2px solid var(--bad)}
.key{display:inline-flex;align-items:center;gap:.35rem;margin:0 1rem .2rem 0;font-size:.82rem}
.key i{width:.8rem;height:.8rem;border-radius:2px;background:currentColor;display:inline-block;flex:none}
.key span{color:var(--dim)}.dot{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;background:currentColor;
margin-right:.35rem;vertical-align:-.08em}
.panels{display:flex;flex-wrap:wrap;gap:1.2rem 1.6rem;align-items:flex-start;margin:.6rem 0}
figure{margin:0;max-width:100%}
.panels figcaption{max-width:17rem}
figure b{font-weight:600}
svg{max-width:100%;height:auto;display:block;overflow:visible}
svg text{font:10px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--ink)}
svg .t{fill:var(--dim)}svg .b{font-weight:650}
.arrays{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.6rem,1fr));gap:1.1rem .9rem;margin:.7rem 0 1.2rem}
.arrays figcaption{font-size:.78rem;line-height:1.35;color:var(--dim);overflow-wrap:anywhere}
.arrays figcaption b{display:block;color:var(--ink);font-size:.82rem}
.arrays svg{max-width:none;width:150px;height:112px}
.arrays svg text{font-size:9px}
.lanes{display:grid;grid-template-columns:minmax(4.5rem,auto) minmax(0,1fr);gap:0 .7rem;font-size:.82rem;align-items:stretch;
margin:.5rem 0}
.lanes .name{display:flex;align-items:center;height:24px;white-space:nowrap}
.lanes .phases{display:flex;grid-column:2;font-size:.78rem;color:var(--dim)}
.lanes .phases span{border-left:1px solid var(--line);padding-left:.25rem;overflow:hidden;white-space:nowrap;
text-overflow:ellipsis}
.lanes svg{width:100%}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 2.2rem}
.moves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,33rem),1fr));gap:1.1rem 2rem;margin:.7rem 0}
.move{display:flex;align-items:flex-start;gap:.7rem;flex-wrap:wrap}
.pair{display:flex;align-items:center;gap:.2rem}
.move svg{width:150px;height:112px;max-width:none}
.move figcaption{flex:1 1 11rem;font-size:.8rem;line-height:1.4;color:var(--dim);overflow-wrap:anywhere}
.move figcaption b{color:var(--ink)}
.up{color:var(--bad)}.down{color:var(--good)}
@media (max-width:34rem){body{padding:1rem .8rem 3rem}.bars{grid-template-columns:minmax(0,1fr) auto;grid-auto-flow:dense}
td:first-child{min-width:7.5rem}
.bars .track{grid-column:1/-1}
.bars .lab{grid-column:1}
.bars .val{grid-column:2}
.bars>.track{margin-bottom:.35rem}.card .big{font-size:1.3rem}}
@media print{body{max-width:none;padding:0;font-size:11px}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
figure,.card,tr,.bars>*{break-inside:avoid}h2,h3{break-after:avoid}tfoot{display:table-row-group}
.scroll{overflow:visible}summary{display:none}
details::details-content{content-visibility:visible;block-size:auto}}
"""
