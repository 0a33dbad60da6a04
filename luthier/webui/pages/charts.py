"""Curves as charts that look the same in both themes."""

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import Handler, box, label_for, slider, switch
from luthier.webui.watch import Point, smoothed

COLORS = ("#3b82d0", "#d97706", "#2a9d6f", "#b4508f", "#7c6bd6", "#c2483f", "#5c8a1e", "#0e8fa8")
MOST_SMOOTHING = 0.99
PIXELS = 400
"""About so wide is a line."""
_GRAY = "#8a8f98"


def options(title: str, series: Mapping[str, Sequence[Point]], *, is_log: bool, smoothing: float) -> dict[str, Any]:
    """`series`: name -> points. With smoothing, the points themselves stay visible behind the line."""
    lines = []
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        if smoothing:
            lines.append(_line(name, points, color, opacity=0.25))
        lines.append(_line(name, smoothed(points, smoothing), color))
    axis = {"axisLine": {"lineStyle": {"color": _GRAY}}, "axisLabel": {"color": _GRAY, "hideOverlap": True}}
    grid = {"splitLine": {"lineStyle": {"color": _GRAY, "opacity": 0.2}}}
    return {
        "animation": False,
        "aria": {"enabled": True},
        "title": {"text": title, "textStyle": {"color": _GRAY, "fontSize": 13, "fontWeight": 600}, "left": 4, "top": 4},
        "grid": {"left": 8, "right": 16, "top": 36, "bottom": 8, "containLabel": True},
        "tooltip": {"trigger": "axis", "confine": True},
        "legend": {"show": len(series) > 1, "right": 8, "top": 4, "textStyle": {"color": _GRAY}, "type": "scroll"}
        | ({"left": "35%"} if len(series) > 1 else {}),
        "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", **axis, "splitLine": {"show": False}},
        "yAxis": {"type": "log" if is_log else "value", "scale": True, **axis, **grid},
        "series": lines,
    }


def _line(name: str, points: Sequence[Point], color: str, opacity: float = 1.0) -> dict[str, Any]:
    return {
        "type": "line",
        "name": name,
        "data": tuple(points),  # NiceGUI watches each list for changes, and leaves tuples alone
        "showSymbol": len(points) == 1,
        "lineStyle": {"width": 1.5, "opacity": opacity},
        "itemStyle": {"color": color, "opacity": opacity},
    }


def can_be_log(series: Mapping[str, Sequence[Point]]) -> bool:
    return all(value > 0 for points in series.values() for _, value in points)


def _ends(series: Mapping[str, Sequence[Point]]) -> dict[str, int]:
    return {name: points[-1][0] for name, points in series.items() if points}


def view_settings(frame: Frame, *, is_log: bool, smoothing: float, on_log: Handler, on_smoothing: Handler) -> None:
    """How curves are drawn. `on_log` gets whether the axis is logarithmic, `on_smoothing` a weight."""
    with box("span", "pair"):
        switch("log-scale", is_log, lambda value: on_log(value == "true"))
        label_for("log-scale", frame.say("curves.log"))
    with box("span", "pair"):
        label_for("smoothing", frame.say("curves.smoothing"))
        slider("smoothing", smoothing, MOST_SMOOTHING, lambda value: on_smoothing(float(value)))


class Chart:
    """One chart on a page. Its place keeps its size, whatever it shows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.element = ui.echart({}, renderer="svg").classes("chart")
        self.element.props["role"] = "img"
        self.element.props["aria-label"] = name
        self._ends: dict[str, int] = {}
        """Curve -> its last step that is drawn."""

    def follow(self, series: Mapping[str, Sequence[Point]], *, is_log: bool, smoothing: float) -> None:
        """Draw again if a line has grown by a pixel: a long curve would cost the browser much for nothing."""
        ends = _ends(series)
        grown = (end - self._ends.get(name, 0) for name, end in ends.items())
        if any(not 0 <= by < ends[name] / PIXELS for name, by in zip(ends, grown, strict=True)):
            self.draw(series, is_log=is_log, smoothing=smoothing)

    def draw(self, series: Mapping[str, Sequence[Point]], *, is_log: bool = False, smoothing: float = 0.0) -> None:
        drawn = options(self.name, series, is_log=is_log and can_be_log(series), smoothing=smoothing)
        self._ends = _ends(series)
        self.element.options.clear()
        self.element.options.update(drawn)
        self.element.update()
