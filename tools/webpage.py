"""Parts of a web page that loads nothing: escaped tables, folded parts, figures in the colours of the page."""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; media-src data:">
<title>{title}</title><style>
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --line: #d5dae0; --page: #fff; --box: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #3a424b; --page: #15181c; --box: #1f242a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page) }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere }
p { margin: .3rem 0; color: var(--soft); max-width: 50rem }
ul { list-style: none; padding: 0; margin: .7rem 0 } li { overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600; min-width: 5rem; max-width: 14rem; vertical-align: bottom } td { white-space: nowrap }
td:first-child { white-space: normal; min-width: 10.5rem; max-width: 22rem; overflow-wrap: anywhere }
pre { margin: .3rem 0; padding: .6rem .8rem; background: var(--box); border-radius: 6px; font-size: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
details { margin: .6rem 0 } summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere }
.grid { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
figure { margin: .5rem 0; min-width: 0 } figcaption { font-weight: 600; overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto; fill: currentColor } svg text { font-family: inherit !important }
.wide svg { min-width: 40rem } video { width: 100% }
.key { display: inline-block; width: 1.6rem; margin-right: .5rem; vertical-align: middle; border-top: 3px solid }
</style></head><body>"""


class Html(str):
    """Text that is HTML already: what is none is escaped."""


def cell(value: object) -> Html:
    """The value as HTML."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """In a box of its own, which scrolls where the page is narrower."""
    lines = [f"<tr>{''.join(f'<td>{cell(x)}</td>' for x in row)}</tr>\n" for row in rows]
    top = "".join(f"<th>{cell(x)}</th>" for x in head)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{"".join(lines)}</tbody></table></div>'


def bullets(lines: Iterable[object]) -> str:
    return f"<ul>{''.join(f'<li>{cell(line)}</li>' for line in lines)}</ul>"


def grid(figures: Iterable[str]) -> str:
    """Figures, as HTML, side by side as far as the page is wide."""
    return f'<div class="grid">{"".join(figures)}</div>'


def folded(title: str, content: str) -> str:
    """A line that opens the content, which is HTML."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def svg(figure: Figure, title: str) -> str:
    """A figure as an element of the page, in the page's ink, with ids of its own."""
    out = io.StringIO()
    with rc_context({"svg.hashsalt": title}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=none)
    body = re.sub(r"<style.*?</style>|<g id=\"[^\"]*\"", lambda m: "<g" * m[0].startswith("<g"), out.getvalue())
    box = re.search(r'viewBox="[^"]*"', body)[0]
    body = body[body.index("<defs>") :].replace("xlink:href", "href").replace("#000000", "currentColor")
    return f'<svg role="img" aria-label="{escape(title)}" {box}>{body}'


def document(title: str, parts: Iterable[str]) -> str:
    """The page, with its title as heading."""
    top = HEAD.replace("{title}", escape(title))
    return "\n".join([top, f"<h1>{escape(title)}</h1>", *parts, "</body></html>\n"])
