"""report.html of an INT8 artifact: the sections in order, and how they look.

The page holds its own style and draws its own SVG: no network. It is well-formed XML too, so a
test can read it. What a file lacks is left out, or shown as a dash.
"""

from __future__ import annotations

from jexport.artifacts.report import findings, sections
from jexport.artifacts.report.markup import escape
from jexport.artifacts.report.reading import Facts


def render(quantization: Facts, parity: Facts, manifest: Facts) -> str:
    """One self-contained HTML page.

    quantization: quantization.json. parity: parity.json. manifest: manifest.json or what of it is
    known so far; `speed`, a list of {"precision", "texts_per_second"}, is shown where there is one.
    """
    reached = quantization.get("reached") is True
    title = escape(findings.title(manifest))
    parts = [
        ("Against the gates", sections.headline(quantization, parity)),
        ("How the work is done", sections.work(quantization)),
        ("Quality, size and speed", sections.trade(quantization, parity, manifest)),
        ("Queries and passages together", sections.pair(quantization)),
        ("Quality on the held-out texts", sections.held_out_groups(quantization)),
        ("Quality on the parity texts", sections.parity_groups(quantization, parity)),
        ("Quality against the share at higher precision", sections.curve(quantization)),
        ("What was tried", sections.tried(quantization)),
        ("Layer by layer", sections.matrices(quantization)),
        ("Texts used", sections.texts(quantization, parity)),
        ("Build it again", sections.command(quantization)),
    ]
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>\n" for name, content in parts if content
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\"/>\n"
        f"<title>Quantization of {title}</title>\n<style>{STYLE}</style></head>\n"
        f'<body><header><h1>{title}</h1>\n<p class="{"good" if reached else "bad"}">'
        f"{escape(findings.summary(quantization))}</p></header>\n<main>\n{body}</main>"
        "</body></html>\n"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --line: #d0d7de; --ground: #fff;
  --soft: #f4f6f8; --good: #1a7f37; --bad: #b3261e; --one: #0b62c4; --two: #b04a00;
  --three: #7a3fb0; --four: #0d7d74 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --dim: #a3adb8; --line: #3a424c;
  --ground: #12161b; --soft: #1b2128; --good: #56c271; --bad: #ff8a80; --one: #6cb2ff;
  --two: #f5a45d; --three: #c9a0f5; --four: #4fc9bd } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
.wide { overflow-x: auto; max-width: 100% } pre { overflow-x: auto; background: var(--soft);
  padding: .8rem } .wide:focus-visible, pre:focus-visible { outline: 2px solid var(--one) }
table { border-collapse: collapse; font-size: .9rem } .note { color: var(--dim);
  font-size: .9rem; margin: .5rem 0; max-width: 45rem } th, td { text-align: left;
  padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { color: var(--dim); font-weight: 500 } tbody th { font-weight: 500; min-width: 7rem }
td code { font-size: .8rem; overflow-wrap: anywhere }
@media (max-width: 40rem) { .many thead { display: none } .many, .many tbody { display: block }
  .many tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .4rem 0;
  border-bottom: 1px solid var(--line) } .many th, .many td { border: 0; padding: 0;
  overflow-wrap: anywhere } .many tbody th { flex-basis: 100% }
  .many td::before { content: attr(data-head) " "; color: var(--dim) } }
.n { font-variant-numeric: tabular-nums; white-space: nowrap }
.figures { display: grid; gap: 1rem 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 1rem 0; min-width: 0; max-width: 30rem } figcaption { color: var(--dim);
  font-size: .9rem; margin-bottom: .4rem } summary { cursor: pointer; padding: .3rem 0 }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--ink);
  font: 10px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
svg text.dim { fill: var(--dim) } .ground { fill: var(--ground) }
.mark { fill: var(--ground); stroke: var(--three); stroke-width: 1.5 } svg text.mark {
  fill: var(--three); stroke: none; font-weight: 600 } .small { width: 6.5rem }
svg.key { display: inline-block; width: .8em; height: .8em }
ul { padding-left: 1.2rem } ul.legend { padding-left: 0; list-style: none }
.grid { stroke: var(--line) } .link { stroke: var(--dim) }
.gate { stroke-dasharray: 4 3; stroke-width: 1.5 } .kept { stroke: var(--dim) }
line.cosine_mean, line.top10_overlap { stroke: var(--one) } line.cosine_p1 { stroke: var(--two) }
polyline { fill: none; stroke-width: 1.5; stroke: var(--one) }
polyline.cosine_p1 { stroke: var(--two) } circle { fill: var(--one); stroke: var(--one) }
circle.cosine_p1, circle.before { fill: var(--ground); stroke: var(--two); stroke-width: 1.5 }
.t0 { fill: var(--one) } .t1 { fill: var(--two) } .t2 { fill: var(--three) }
.t3 { fill: var(--four) } .t9 { fill: var(--dim) }
@media print { .wide { overflow: visible } }
"""
