"""Drawing with matplotlib to SVG inside an HTML page: themed by CSS variables, equal bytes for equal data."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

# Colours are drawn as stand-ins and become CSS variables, so that one drawing serves light and dark pages.
ROLES = (
    "ink",
    "muted",
    "grid",
    "federated",
    "alone",
    "pooled",
    "start",
    "up",
    "down",
    "worst",
    "folded",
    "late",
    "dropped",
    "unavailable",
    "refused",
    "failed",
)
COLOUR = {role: f"#0b{index:02x}a7" for index, role in enumerate(ROLES)}

_SIZE = (5.0, 2.9)  # inches: 360 x 209 units, so that text of 9 units is legible on a phone and on a desk
_RC = {
    "svg.fonttype": "none",  # text stays text: searchable, and read aloud
    "svg.hashsalt": "fedpeft",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the layout is the same everywhere
    "font.size": 9,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": COLOUR["muted"],
    "axes.labelcolor": COLOUR["muted"],
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "path.simplify": True,
}


def draw(name: str, alt: str, paint: Callable[[Any], None], height: float | None = None) -> str:
    """Paint one pair of axes and return an `<svg>` element for an HTML page.

    Args:
        name: unique within the page; prefixes every id.
        alt: the drawing in words, for those who cannot see it.
        paint: draws on a matplotlib `Axes`.
        height: in inches; default that of all charts.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # Where the font lacks a script only the layout's width estimate is rough: the browser has glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(_SIZE[0], height or _SIZE[1]), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    return _for_page(target.getvalue(), name, alt)


def _for_page(svg: str, name: str, alt: str) -> str:
    """Make a stand-alone SVG an element among others: no global style, no repeated ids, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sid="', f' id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    box = re.search(r'viewBox="([^"]+)"', svg)
    opening = f'<svg viewBox="{box.group(1) if box else ""}" role="img" aria-label="{escape(alt)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    for role, colour in COLOUR.items():
        svg = svg.replace(colour, f"var(--{role})")
    return re.sub(r"\n\s*", "\n", svg)
