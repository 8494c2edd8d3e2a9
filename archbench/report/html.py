"""The report as one HTML page that asks for nothing: styles, script and figures are in it, and it works from a disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from archbench.report.contents import Contents

_HERE = Path(__file__).parent
_OPENING = re.compile(r"<svg\b[^>]*>", re.DOTALL)
_PREAMBLE = re.compile(r"^.*?(?=<svg\b)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>\s*", re.DOTALL)
_STYLE = re.compile(r"<style\b.*?</style>\s*", re.DOTALL)
_SIZE = re.compile(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"')
_PLACES = re.compile(r'\b(?:d|x|y)="[^"]*"|\btranslate\([^)]*\)')
_IDLE = re.compile(r"<!--.*?-->|^[ \t]+|\n(?=\s*\n)", re.DOTALL | re.MULTILINE)
_LONG_NUMBER = re.compile(r"(\.\d\d)\d+")
_PIXELS_PER_POINT = 96 / 72


def page(report: Contents, svgs: dict[str, str]) -> str:
    """The page. `svgs` maps the name of each figure to its SVG document."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    alt = {drawing.name: drawing.alt for drawing in report.drawings}
    return environment.get_template("page.html.j2").render(
        report=report,
        panel=None if report.panel is None else _embedded(report.panel),
        plots={name: inline_svg(svg, name, alt[name]) for name, svg in svgs.items()},
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "script.js").read_text(encoding="utf-8")),
    )


def _embedded(data: dict[str, object]) -> Markup:
    """Data for a script element, in which only `</` and `<!--` could end it."""
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def inline_svg(svg: str, name: str, alt: str) -> Markup:
    """An SVG document as an element of a page.

    Its ids get the figure's name in front, as all figures number theirs alike and a page may have each id once. Its
    style element would apply to the whole page; the page's own style sheet holds those two lines instead. Places are
    kept to a hundredth of a point, and what only people who read SVG need is left out: a page has a dozen figures.
    """
    size = _SIZE.search(svg)
    assert size, f"figure {name} has no viewBox"
    width, height = (float(length) * _PIXELS_PER_POINT for length in size.groups())
    body = _STYLE.sub("", _METADATA.sub("", _PREAMBLE.sub("", svg)))
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = _PLACES.sub(lambda place: _LONG_NUMBER.sub(r"\1", place.group(0)), body)
    body = _IDLE.sub("", body).replace("DejaVuSans", "g")  # ids of glyphs, thousands of them
    opening = (
        f'<svg viewBox="{size.group(0)[9:-1]}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(alt)}">'
    )
    return Markup(_OPENING.sub(lambda _: opening, body, count=1).strip())
