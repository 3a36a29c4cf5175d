"""Dashboard and alerts: they parse, and query only metrics and labels that the code exports."""

import copy
import json
from pathlib import Path

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from pipeline.cluster.metrics import SPECS

_INFRA = Path(__file__).parents[2] / "infra"
_DASHBOARD = json.loads((_INFRA / "grafana" / "lightkv.json").read_text(encoding="utf-8"))
_ALERTS = yaml.safe_load((_INFRA / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
_LABELS = {name: {"run", *spec.labels} for spec in SPECS for name in spec.exported()}
_TARGETS = [(panel["title"], target) for panel in _DASHBOARD["panels"] for target in panel["targets"]]
_RULES = [rule for group in _ALERTS["groups"] for rule in group["rules"]]
_EXPRESSIONS = [t["expr"] for _, t in _TARGETS] + [rule["expr"] for rule in _RULES]


def _parsed(expression):
    """Parse a query as Grafana sends it: with an interval and a range in place of its variables."""
    return promql_parser.parse(expression.replace("$__rate_interval", "1m").replace("$__range", "6h"))


def _selectors(expression):
    """All vector selectors under an expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(expression, name, None)
        if inner is not None:
            yield from _selectors(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from _selectors(inner)


def _groupings(expression):
    """Labels that aggregations group by."""
    modifier = getattr(expression, "modifier", None)
    if isinstance(expression, promql_parser.AggregateExpr) and modifier is not None:
        yield from modifier.labels
    for name in ("expr", "lhs", "rhs", "param"):
        inner = getattr(expression, name, None)
        if inner is not None:
            yield from _groupings(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from _groupings(inner)


@pytest.mark.parametrize("expression", _EXPRESSIONS)
def test_every_query_asks_for_exported_metrics_and_labels(expression):
    parsed = _parsed(expression)
    selectors = list(_selectors(parsed))
    assert selectors
    known = set()
    for selector in selectors:
        assert selector.name in _LABELS
        assert {matcher.name for matcher in selector.matchers.matchers} <= _LABELS[selector.name]
        known |= _LABELS[selector.name] | ({"le"} if selector.name.endswith("_bucket") else set())
    assert set(_groupings(parsed)) <= known


def test_every_exported_metric_is_shown():
    shown = {s.name for expression in _EXPRESSIONS for s in _selectors(_parsed(expression))}
    assert [spec.name for spec in SPECS if not shown & set(spec.exported())] == []


def test_every_panel_and_target_takes_the_data_source_from_the_variable():
    (variable,) = (v for v in _DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    expected = {"type": variable["query"], "uid": f"${{{variable['name']}}}"}
    assert expected["type"] == "prometheus"
    for owner in [*_DASHBOARD["panels"], *(target for _, target in _TARGETS)]:
        assert owner["datasource"] == expected


def test_every_query_is_of_the_chosen_runs():
    assert "run" in {v["name"] for v in _DASHBOARD["templating"]["list"]}
    for title, target in _TARGETS:
        for selector in _selectors(_parsed(target["expr"])):
            assert 'run=~"$run"' in str(selector), title


def test_run_variable_lists_the_runs_of_an_exported_metric():
    (variable,) = (v for v in _DASHBOARD["templating"]["list"] if v["name"] == "run")
    name, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").split(", ")
    assert label in _LABELS[name]


def _unknown(given, understood, path="$"):
    """Paths of the values in `given` that `understood` lacks."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, value in given.items():
            yield from _unknown(value, understood.get(key), f"{path}.{key}")
    elif isinstance(given, list) and len(given) == len(understood or ()):
        for number, value in enumerate(given):
            yield from _unknown(value, understood[number], f"{path}[{number}]")
    elif given != understood:
        yield path


def _unknown_to_grafana(dashboard):
    """Paths of fields that are lost when Grafana's own types read the dashboard and write it again."""
    plugins.register_default_plugins()  # defines which fields panels and queries of each kind have
    return list(_unknown(dashboard, json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))))


def test_every_field_is_one_of_grafanas_types():
    assert _unknown_to_grafana(_DASHBOARD) == []


@pytest.mark.parametrize(
    "path",
    [
        "",
        "panels/0/options/reduceOptions",
        "panels/0/fieldConfig/defaults",
        "panels/6/options/legend",
        "panels/6/fieldConfig/defaults/custom",
        "panels/6/targets/0",
        "templating/list/1",
    ],
)
def test_field_that_grafana_does_not_know_is_seen(path):
    dashboard = copy.deepcopy(_DASHBOARD)
    place = dashboard
    for name in filter(None, path.split("/")):
        place = place[int(name) if name.isdigit() else name]
    place["legendFromat"] = "{{run}}"
    (found,) = _unknown_to_grafana(dashboard)
    assert found.endswith(".legendFromat")


def test_schema_is_one_that_grafana_12_reads_without_migration():
    assert _DASHBOARD["schemaVersion"] == 42
    assert _DASHBOARD["uid"] == "lightkv"
    assert "id" not in _DASHBOARD  # Grafana assigns it


def test_panels_have_ids_and_places_of_their_own():
    panels = _DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_alert_tells_which_run():
    for rule in _RULES:
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
