"""The dashboard and the alerts ask for what is exported, in the words in which it is exported."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from zarr_dask_stream.watch.metrics import METRICS, WORKER_METRICS, Metric

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
BOARD: dict[str, Any] = json.loads((FOLDER / "streams.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ALERTS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
UNITS = {"short", "s", "bytes", "binBps"}
PREDEFINED = {"__rate_interval": "1m", "__range": "1h"}
FROM_THE_SCRAPE = {"job", "instance"}


def samples(metric: Metric) -> dict[str, set[str]]:
    """Return the names under which a metric is stored, with their labels."""
    labels = {*FROM_THE_SCRAPE, *([metric.label] if metric.label else []), *(["stream"] if metric in METRICS else [])}
    if metric.type != "histogram":
        return {metric.sample: labels}
    return {f"{metric.name}_bucket": labels | {"le"}, f"{metric.name}_sum": labels, f"{metric.name}_count": labels}


EXPORTED = {name: labels for metric in (*METRICS, *WORKER_METRICS) for name, labels in samples(metric).items()}
KINDS = {metric.sample: set(metric.kinds) for metric in (*METRICS, *WORKER_METRICS) if metric.label and metric.kinds}
KINDS["zds_runs_total"].add("gone")  # on a scheduler, which outlives its clients


def filled_in(text: str) -> str:
    """Put something in place of each variable, as Grafana does."""
    names = re.findall(r"\$(\w+)", text)
    assert set(names) <= {*VARIABLES, *PREDEFINED}, text
    return re.sub(r"\$(\w+)", lambda match: PREDEFINED.get(match[1], ".*"), text)


def parts(expression: Any) -> Iterator[Any]:
    yield expression
    match expression:
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr():
            yield from parts(expression.expr)
        case promql.BinaryExpr():
            yield from parts(expression.lhs)
            yield from parts(expression.rhs)
        case promql.Call():
            for argument in expression.args:
                yield from parts(argument)
        case promql.MatrixSelector():
            yield from parts(expression.vector_selector)


def check(text: str) -> None:
    """Parse an expression as Prometheus would; see that all it names is exported, and is what it is taken for."""
    expression: Any = promql.parse(filled_in(text))
    found: list[Any] = list(parts(expression))
    selectors: list[Any] = [part for part in found if isinstance(part, promql.VectorSelector)]
    assert selectors, text
    for selector in selectors:
        assert selector.name in EXPORTED, f"{selector.name} is not exported"
        for matcher in selector.matchers.matchers:
            assert matcher.name in EXPORTED[selector.name], f"{selector.name} has no label {matcher.name}"
            if matcher.name in ("outcome", "phase"):
                assert set(matcher.value.split("|")) <= KINDS[selector.name], matcher.value
    labels = set.intersection(*(EXPORTED[selector.name] for selector in selectors))
    counted = {name for name in EXPORTED if name.endswith(("_total", "_bucket", "_sum", "_count"))}
    in_rates = set()
    for part in found:
        if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            assert set(part.modifier.labels) <= labels, f"{text}: groups by what it has not"
        if isinstance(part, promql.Call) and part.func.name in ("rate", "increase"):
            in_rates.add(part.args[0].vector_selector.name)
    assert in_rates == {selector.name for selector in selectors} & counted, (
        f"{text}: counters, and only those, have rates"
    )


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_is_exported(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        check(target["expr"])
        named = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        grouped: list[Any] = [
            p for p in parts(promql.parse(filled_in(target["expr"]))) if isinstance(p, promql.AggregateExpr)
        ]
        assert all(name in part.modifier.labels for name in named for part in grouped[:1])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["type"] in ("stat", "timeseries")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    for override in panel["fieldConfig"]["overrides"]:
        (metric,) = {
            m.sample: m for m in (*METRICS, *WORKER_METRICS) if m.sample in panel["targets"][0]["expr"]
        }.values()
        assert override["matcher"]["options"] in metric.kinds


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    left_out = {"zds_planned_chunks", "zds_worker_batches", "zds_worker_decoded_bytes", "zds_worker_written_bytes",
                "zds_worker_chunk_read_seconds"}  # fmt: skip
    for metric in (*METRICS, *WORKER_METRICS):
        assert (metric.name in shown) is (metric.name not in left_out), metric.name


def test_panels_fit_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= 24 - place["w"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({panel["title"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert BOARD["id"] is None, "Grafana gives it one"
    assert BOARD["schemaVersion"] >= 39
    assert BOARD["uid"]
    assert VARIABLES["datasource"]["query"] == "prometheus"
    text = json.dumps(BOARD)
    assert "http" not in text, "no address of anybody's"
    for name in VARIABLES:
        assert f"${name}" in text or f"${{{name}}}" in text, f"nothing uses {name}"


def test_choices_come_from_labels_that_exist() -> None:
    for variable in (one for one in VARIABLES.values() if one["type"] == "query"):
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert found, variable
        check_selector: Any = promql.parse(filled_in(found[1]))
        assert found[2] in EXPORTED[check_selector.name]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_exported(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]


def test_what_is_scraped_has_the_rules() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    assert {job["job_name"] for job in config["scrape_configs"]} == {"dask-scheduler", "dask-worker"}
