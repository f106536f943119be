"""The charts of a report, by Altair: Vega-Lite specifications, drawn in the reader's browser.

Text and axes take the page's own colour, so that they can be read in light, in dark and on paper. Series differ in colour
(Okabe and Ito's, which colour-blind people can tell apart) and in dashes or shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#B8A800")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_HEIGHT = 340
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "view": {"stroke": None},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "#888",
        "tickColor": "#888",
        "gridColor": "#8884",
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 12,
        "orient": "bottom",
        "columns": 2,
        "labelLimit": 320,
        "title": None,
    },
    "title": {"color": "currentColor", "fontSize": 12, "fontWeight": "normal"},
}
# Drag to move, and Shift with the wheel to zoom: the wheel alone scrolls the page.
_ZOOM = alt.selection_interval(bind="scales", zoom="wheel![event.shiftKey]", name="zoom")
Rows = Sequence[Mapping[str, Any]]


def sizes(rows: Rows, *, x_title: str, y_title: str) -> dict[str, Any]:
    """Trained parameters against the result; rows have `name`, `kind`, `x`, `y`, and of ours `low` and `high`."""
    base = alt.Chart(_data(rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    at = alt.X("x:Q", title=x_title, scale=alt.Scale(type="log", nice=False, padding=30), axis=alt.Axis(tickCount=6))
    colour = _colour("name", names)
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        at,
        alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False, padding=12)),
        colour,
        alt.Shape(
            "kind:N",
            scale=alt.Scale(domain=kinds, range=list(_SHAPES[: len(kinds)])),
            legend=alt.Legend() if len(kinds) > 1 else None,
        ),
        tooltip=_tooltip(rows),
    )
    bars = base.mark_rule(strokeWidth=2).encode(at, alt.Y("low:Q", title=y_title), alt.Y2("high:Q"), colour)
    return _finished(bars + points)


def losses(validations: Rows, steps: Rows) -> dict[str, Any]:
    """Validation losses as lines with points, training losses as faint lines, by step or by token, as the reader chooses.

    Rows have `arm`, `seed`, `step`, `tokens`, `loss`.
    """
    unit = alt.param(
        name="measure",
        value="step",
        bind=alt.binding_radio(options=["step", "tokens"], labels=["steps", "tokens"], name="by "),
    )
    arms = list(dict.fromkeys(row["arm"] for row in validations))
    chosen = _chosen("arm")

    def of(rows: Rows) -> alt.Chart:
        return alt.Chart(_data(rows)).transform_calculate(at="measure == 'step' ? datum.step : datum.tokens")

    at = alt.X("at:Q", title="steps, or tokens", axis=alt.Axis(format="~s"))
    values = [row["loss"] for row in (*validations, *steps) if row["loss"] > 0]
    loss = alt.Y(
        "loss:Q", title="loss", scale=alt.Scale(type="log", nice=False, domain=[0.97 * min(values), 1.03 * max(values)])
    )
    series = {"color": _colour("arm", arms), "strokeDash": _dash("arm", arms), "detail": "seed:N"}
    faint = (
        of(steps)
        .mark_line(opacity=0.25, strokeWidth=1)
        .encode(at, loss, opacity=alt.condition(chosen, alt.value(0.25), alt.value(0.03)), **series)
    )
    lines = (
        of(validations)
        .mark_line(point=True)
        .encode(
            at,
            loss,
            opacity=alt.condition(chosen, alt.value(1), alt.value(0.1)),
            tooltip=_tooltip(validations),
            **series,
        )
    )
    return _finished(alt.layer(faint, lines).add_params(unit, chosen))


def rates(rows: Rows) -> dict[str, Any]:
    """Validation loss by learning rate; rows have `arm`, `rate`, `loss`, `is_best`."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    chosen = _chosen("arm")
    base = alt.Chart(_data(rows)).encode(
        alt.X(
            "rate:Q",
            title="learning rate",
            scale=alt.Scale(type="log", padding=20, nice=False),
            axis=alt.Axis(format=".0e", tickCount=6),
        ),
        alt.Y("loss:Q", title="validation loss", scale=alt.Scale(zero=False)),
        _colour("arm", arms),
        tooltip=_tooltip(rows),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.1)),
    )
    best = base.transform_filter("datum.is_best").mark_point(size=260, shape="circle", strokeWidth=2)
    points = base.mark_point(filled=True, size=50)
    return _finished((base.mark_line().encode(strokeDash=_dash("arm", arms)) + points + best).add_params(chosen))


def by_value(rows: Rows, *, x_title: str, y_title: str, is_number: bool) -> dict[str, Any]:
    """The result by the value of what varies: a rank, a fraction of the data, modules. Rows have `series`, `value`, `y`, `low`,
    `high`."""
    series = list(dict.fromkeys(row["series"] for row in rows))
    order = list(dict.fromkeys(row["value"] for row in rows))
    at = (
        alt.X(
            "value:Q",
            title=x_title,
            scale=alt.Scale(type="log", padding=25, nice=False),
            axis=alt.Axis(values=order, format="~g"),
        )
        if is_number
        else alt.X("value:N", title=x_title, sort=order, axis=alt.Axis(labelAngle=0))
    )
    base = alt.Chart(_data(rows)).encode(at, _colour("series", series))
    y = alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False))
    bars = base.mark_rule(strokeWidth=2).encode(alt.Y("low:Q", title=y_title), alt.Y2("high:Q"))
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        y, alt.Shape("series:N", scale=alt.Scale(domain=series, range=_cycled(_SHAPES, series))), tooltip=_tooltip(rows)
    )
    lines = base.mark_line(opacity=0.6).encode(y, strokeDash=_dash("series", series))
    return _finished(bars + lines + points if is_number else bars + points)


def update_map(values: Sequence[Sequence[float]], largest: float) -> dict[str, Any]:
    """|change| of each element of a square slice, in units of its root mean square."""
    rows = [
        {"row": i, "column": j, "change": round(value, 3)}
        for i, line in enumerate(values)
        for j, value in enumerate(line)
    ]
    axis = alt.Axis(labels=False, ticks=False, domain=False, title=None)
    chart = (
        alt.Chart(_data(rows))
        .mark_rect()
        .encode(
            alt.X("column:O", axis=axis),
            alt.Y("row:O", axis=axis),
            alt.Color(
                "change:Q",
                scale=alt.Scale(scheme="cividis", domain=[0, largest], clamp=True),
                legend=alt.Legend(orient="right", title="RMS", gradientLength=140, columns=1),
            ),
            tooltip=["row:O", "column:O", "change:Q"],
        )
    )
    chart = chart.properties(width=180, height=180)
    return _spec(chart)


def _finished(chart: Any) -> dict[str, Any]:
    return _spec(chart.add_params(_ZOOM).properties(width="container", height=_HEIGHT))


def _spec(chart: Any) -> dict[str, Any]:
    spec: dict[str, Any] = chart.to_dict()
    spec.pop("$schema", None)  # an address, which nothing needs
    return spec | {"config": _CONFIG}  # Altair's own check knows no "currentColor"


def _data(rows: Rows) -> Any:
    return alt.Data(values=[dict(row) for row in rows])


def _chosen(field: str) -> Any:
    """A click on the legend highlights a series."""
    return alt.selection_point(fields=[field], bind="legend", name="chosen")


def _cycled(values: Sequence[Any], names: Sequence[str]) -> list[Any]:
    return [values[i % len(values)] for i in range(len(names))]


def _colour(field: str, names: Sequence[str]) -> Any:
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names), range=_cycled(_COLOURS, names)))


def _dash(field: str, names: Sequence[str]) -> Any:
    dashes = [_DASHES[i // len(_COLOURS) % len(_DASHES)] if len(names) > len(_COLOURS) else _DASHES[i % len(_DASHES)]
              for i in range(len(names))]  # fmt: skip
    return alt.StrokeDash(f"{field}:N", scale=alt.Scale(domain=list(names), range=dashes))


def _tooltip(rows: Rows) -> list[Any]:
    """Every field of the rows."""
    shown = [key for key in rows[0] if key not in ("is_best",)] if rows else []
    kinds = {key: "Q" if isinstance(rows[0][key], int | float) else "N" for key in shown}
    return [
        alt.Tooltip(f"{key}:{kinds[key]}", format=".4~g") if kinds[key] == "Q" else alt.Tooltip(f"{key}:{kinds[key]}")
        for key in shown
    ]
