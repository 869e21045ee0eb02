"""Where a run is, for a Prometheus server that asks a port of this machine.

The process that starts a run's ranks hears what they tell, and answers for all of them, from its
first stage to its last.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from configs.schema.run import RunConfig

FIGURES = "figures"  # the event with numbers by name

_ENDPOINTS: "dict[int, _Endpoint]" = {}
_OPENING = threading.Lock()


class _Endpoint:
    """The gauges of this process at one port."""

    def __init__(self, port: int) -> None:
        """Raises OSError where the port is taken."""
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415

        self._registry, self._gauges = CollectorRegistry(), dict[str, Any]()
        start_http_server(port, registry=self._registry)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, which always has labels of the same names."""
        from prometheus_client import Gauge  # noqa: PLC0415 - optional

        if name not in self._gauges:
            made = f"kdflow_{name.replace('/', '_')}"
            self._gauges[name] = Gauge(made, name, list(labels), registry=self._registry)
        self._gauges[name].labels(**labels).set(value)


class Gauges:
    """What the ranks of a stage tell, at the run's port, where it names one. A port that is taken
    costs the gauges, of which `tell` is told, and nothing else.
    """

    def __init__(self, run: RunConfig, stage: str, tell: Callable[[str], None]) -> None:
        self._labels = {"run": run.name, "stage": stage}
        self._endpoint = _endpoint(run.tracking.prometheus_port, tell)
        self._unit = ""
        self._since = 0.0
        self._first: dict[int, int] = {}
        self._done: dict[int, int] = {}

    def event(self, event: Mapping[str, Any]) -> None:
        """Take a `progress` event or one of figures; others are not for here."""
        if self._endpoint is None:
            return
        if event["event"] == FIGURES:
            for name, value in event["figures"].items():
                self._endpoint.set(name, value, run=self._labels["run"])
        elif event["event"] == "progress":
            self._progress(self._endpoint, event)

    def _progress(self, endpoint: _Endpoint, event: Mapping[str, Any]) -> None:
        labels = self._labels | {"unit": event["unit"], "rank": str(event["rank"])}
        endpoint.set("stage_done", event["done"], **labels)
        endpoint.set("stage_total", event["total"], **labels)
        if event.get("gpu_bytes") is not None:
            endpoint.set("gpu_bytes", event["gpu_bytes"], **self._labels, rank=labels["rank"])
        for name, value in event.get("figures", {}).items():
            endpoint.set(f"stage_{name}", value, **self._labels, rank=labels["rank"])
        now, rank, done = time.monotonic(), event["rank"], event["done"]
        if event["unit"] != self._unit or done < self._done.get(rank, 0):  # a new count
            self._unit, self._since, self._first, self._done = event["unit"], now, {}, {}
        self._first.setdefault(rank, done)  # what it had done before does not count
        self._done[rank] = done
        if now > self._since:
            gained = sum(self._done.values()) - sum(self._first.values())
            endpoint.set(
                "stage_per_s", gained / (now - self._since), **self._labels, unit=self._unit
            )


def _endpoint(port: int | None, tell: Callable[[str], None]) -> _Endpoint | None:
    if port is None:
        return None
    with _OPENING:  # stages may begin side by side
        if port not in _ENDPOINTS:
            try:
                _ENDPOINTS[port] = _Endpoint(port)
            except OSError as error:
                tell(f"no figures for Prometheus: port {port}: {error}")
                return None
        return _ENDPOINTS[port]
