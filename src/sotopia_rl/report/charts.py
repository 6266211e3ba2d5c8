"""Charts as inline SVG: no library, no network, colours from the page's style sheet.

Every function returns markup that is safe to put into the page: text and attributes are escaped here.
Axes have round ticks; what a reader may want to read off exactly is in `data-` attributes that `page.js`
shows on hover and with the arrow keys, and in a title for those who see no picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One series. `style` is a class of the style sheet: `line`, `faint`, `dots`, `cloud`, `dashed`."""

    label: str
    points: Sequence[Point]
    style: str = "line"
    colour: int = 0
    """Place in the page's palette."""


@dataclass(frozen=True)
class Chart:
    """A titled picture with the names of its series."""

    title: str
    svg: Markup
    names: Sequence[tuple[int, str]] = ()
    """(place in the palette, label), where there are several."""


@dataclass(frozen=True)
class Span:
    """A value with its interval, one mark of a forest plot."""

    value: float
    low: float | None
    high: float | None
    style: str
    label: str


def _tag(name: str, *content: str, **attributes: object) -> Markup:
    """An element; attribute names are given with `_` for `-` and a trailing `_` dropped."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, Markup("").join(content))  # noqa: S704  own names


def round_ticks(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten.

    Args:
        whole: Whole numbers only.
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short form for an axis: `0.02`, `1.5`, `12k`."""
    if value != 0 and (abs(value) >= 10_000 or abs(value) < 0.001):
        return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.0e}"
    return f"{round(value, 4):g}"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = abs(high) * 0.1 or 1.0
        return low - margin, high + margin
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    whole_x: bool = False,
    diagonal: bool = False,
    described: str = "",
    width: int = 340,
    height: int = 200,
) -> Markup:
    """Lines over a common x axis; `y` titles the chart, so that labels are never turned sideways.

    Args:
        y_range: Ends of the y axis, as far as the values stay between them.
        whole_x: x counts something.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return Markup("")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high = _y_ends([y for _, y in points], y_range)
    x = _Scale(x_low, x_high, 44, width - 12)
    y = _Scale(y_low, y_high, height - 34, 10)
    parts = [*_axes(x, y, x_label, width, height, whole_x=whole_x)]
    if diagonal:
        low, high = max(x_low, y_low), min(x_high, y_high)
        parts.append(_tag("line", x1=x(low), y1=y(low), x2=x(high), y2=y(high), class_="diagonal"))
    parts += [_drawn(line, x, y) for line in lines]
    parts.append(_tag("line", x1=0, y1=10, x2=0, y2=height - 34, class_="cursor"))
    shown = [
        {"label": line.label, "colour": line.colour, "points": [[px, py, x(px), y(py)] for px, py in line.points]}
        for line in lines
        if line.style in ("line", "dashed")
    ]
    last = described or "; ".join(f"{line.label} ends at {number(line.points[-1][1])}" for line in lines if line.points)
    to_read_off = {"tabindex": 0, "data_x": x_label, "data_lines": json.dumps(shown, separators=(",", ":"))}
    return _tag(
        "svg",
        _tag("title", escape(f"{title}: {last}")),
        *parts,
        viewBox=f"0 0 {width} {height}",
        class_="chart",
        role="img",
        aria_label=f"{title}: {last}",
        **(to_read_off if shown else {}),
    )


def _y_ends(values: Sequence[float], natural: tuple[float, float] | None) -> tuple[float, float]:
    if natural is not None:
        return min(natural[0], *values), max(natural[1], *values)
    return _padded(values) if any(values) else (0.0, 1.0)


def _axes(x: _Scale, y: _Scale, x_label: str, width: int, height: int, *, whole_x: bool) -> Iterator[Markup]:
    for value in round_ticks(y.low, y.high, 5):
        yield _tag("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid")
        yield _tag("text", escape(number(value)), x=x.start - 6, y=y(value) + 3.5, class_="tick end")
    for value in round_ticks(x.low, x.high, 5, whole=whole_x):
        yield _tag("text", escape(number(value)), x=x(value), y=height - 19, class_="tick middle")
    yield _tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis")
    yield _tag("text", escape(x_label), x=(x.start + width - 12) / 2, y=height - 4, class_="tick middle label")


def _drawn(line: Line, x: _Scale, y: _Scale) -> Markup:
    colour = f"c{line.colour % 6}"
    if line.style in {"dots", "cloud"} or len(line.points) == 1:
        radius = 2.4 if line.style == "cloud" else 3.2
        dots = [_tag("circle", cx=x(px), cy=y(py), r=radius) for px, py in line.points]
        return _tag("g", *dots, class_=f"dots {line.style} {colour}")
    path = " ".join(f"{x(px)},{y(py)}" for px, py in line.points)
    return _tag("polyline", points=path, class_=f"{line.style} {colour}")


def forest(spans: Sequence[Span], *, reach: float, ticks: bool = False, width: int = 220) -> Markup:
    """Marks with intervals around a zero line, on a scale from `-reach` to `reach`.

    Args:
        ticks: Write the scale below, for the row that carries it.
    """
    row = 14
    height = row * len(spans) + (20 if ticks else 6)
    x = _Scale(-reach, reach, 8, width - 8)
    bottom = row * len(spans) + 4
    parts = [
        _tag("line", x1=x(value), x2=x(value), y1=2, y2=bottom, class_="zero" if value == 0 else "grid")
        for value in sorted({0.0, *round_ticks(-reach, reach)})
    ]
    for place, span in enumerate(spans):
        middle = 3 + row * (place + 0.5)
        parts.append(_tag("g", *_mark(span, x, middle, reach), class_=f"span {span.style}"))
    if ticks:
        parts += [
            _tag(
                "text",
                escape(f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"),
                x=x(value),
                y=height - 4,
                class_="tick middle",
            )
            for value in round_ticks(-reach, reach)
        ]
    label = "; ".join(span.label for span in spans)
    return _tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="forest", role="img", aria_label=label)


def _mark(span: Span, x: _Scale, middle: float, reach: float) -> Iterator[Markup]:
    def inside(value: float) -> float:
        return x(min(max(value, -reach), reach))

    yield _tag("title", escape(span.label))
    if span.low is not None and span.high is not None:
        yield _tag("line", x1=inside(span.low), x2=inside(span.high), y1=middle, y2=middle, class_="whisker")
    yield _tag("circle", cx=inside(span.value), cy=middle, r=3.8)


MAX_NAMED = 32
"""Rows of a strip that still have their names beside them."""


def strip(values: Sequence[tuple[str, float]], *, title: str, width: int = 340) -> Markup:
    """One dot per name on a line from zero, from the smallest value above to the largest below."""
    if not values:
        return Markup("")
    named = len(values) <= MAX_NAMED
    row = 15.0 if named else max(2.0, 400 / len(values))
    bottom = row * len(values) + 6
    low, high = _padded([0.0, *(value for _, value in values)])
    x = _Scale(low, high, 132 if named else 10, width - 10)
    parts = [
        _tag("line", x1=x(v), x2=x(v), y1=2, y2=bottom, class_="zero" if v == 0 else "grid")
        for v in sorted({0.0, *round_ticks(low, high)})
    ]
    for place, (name, value) in enumerate(values):
        middle = round(3 + row * (place + 0.5), 1)
        side = "c0" if value > 0 else "c1" if value < 0 else "c5"
        mark = [
            _tag("title", escape(f"{name}: {value:+.2f}")),
            _tag("line", x1=x(0), x2=x(value), y1=middle, y2=middle, class_="stem"),
            _tag("circle", cx=x(value), cy=middle, r=3.4 if named else min(3.0, row)),
        ]
        parts.append(_tag("g", *mark, class_=f"dots {side}"))
        if named:
            parts.append(_tag("text", escape(_middle(name)), x=124, y=middle + 3.5, class_="tick end"))
    parts += [
        _tag(
            "text",
            escape(f"{v:+g}".replace("-", "\N{MINUS SIGN}") if v else "0"),
            x=x(v),
            y=bottom + 14,
            class_="tick middle",
        )
        for v in round_ticks(low, high)
    ]
    better = sum(value > 0 for _, value in values)
    described = f"{title}: above zero in {better} of {len(values)}"
    size = f"0 0 {width} {bottom + 18:g}"
    return _tag("svg", *parts, viewBox=size, class_="chart strip", role="img", aria_label=described)


def slopes(systems: Sequence[tuple[str, float, float]], *, title: str, width: int = 340, height: int = 220) -> Markup:
    """Each system's mean when it samples (left) and when it plays greedily (right), joined by a line."""
    values = [v for _, left, right in systems for v in (left, right)]
    low, high = _padded(values)
    height = max(height, 54 + LABEL_GAP * len(systems))
    y = _Scale(low, high, height - 30, 24)
    left_x, right_x = 128.0, width - 128.0
    parts = [
        _tag("text", "sampled", x=left_x, y=height - 8, class_="tick middle"),
        _tag("text", "greedy", x=right_x, y=height - 8, class_="tick middle"),
    ]
    at_left = _apart([y(left) for _, left, _ in systems], y.start)
    at_right = _apart([y(right) for _, _, right in systems], y.start)
    for place, (name, left, right) in enumerate(systems):
        colour = f"c{place % 6}"
        parts += [
            _tag("polyline", points=f"{left_x},{y(left)} {right_x},{y(right)}", class_=f"line {colour}"),
            _tag(
                "g",
                _tag("circle", cx=left_x, cy=y(left), r=4),
                _tag("circle", cx=right_x, cy=y(right), r=4),
                class_=f"dots {colour}",
            ),
            _tag("text", escape(f"{_short(name)} {left:.2f}"), x=left_x - 10, y=at_left[place] + 4, class_="name end"),
            _tag("text", escape(f"{right:.2f} {_short(name)}"), x=right_x + 10, y=at_right[place] + 4, class_="name"),
        ]
    described = "; ".join(f"{name}: {left:.2f} sampled, {right:.2f} greedy" for name, left, right in systems)
    return _tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        class_="chart slopes",
        role="img",
        aria_label=f"{title}. {described}",
    )


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _middle(name: str) -> str:
    """At most 20 characters, with both ends: codenames often differ in the last ones."""
    return name if len(name) <= 20 else f"{name[:12]}…{name[-7:]}"


LABEL_GAP = 15


def _apart(places: Sequence[float], lowest: float) -> list[float]:
    """Label positions moved so that no two are closer than `LABEL_GAP`, and none is below `lowest` (a larger y)."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + LABEL_GAP)
    for i in reversed(order):
        moved[i] = min(moved[i], lowest)
        lowest = moved[i] - LABEL_GAP
    return moved
