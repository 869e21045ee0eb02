"""Progress events as readable lines with rate and time left."""

import logging
import time
from collections.abc import Callable
from typing import Any

from configs.printable import printable

# Told what is done, of how much, in how many seconds.
Show = Callable[[int, int, float], None]
LINE_INTERVAL_S = 5.0
LEAST_WATCHED_S = 1.0  # what is done at once, and told one by one, has no rate


class ProgressLog:
    """Turns the events of a worker into log lines, one per series every few seconds."""

    def __init__(
        self,
        logger: "logging.Logger | logging.LoggerAdapter[Any]",
        show: Show = lambda *_: None,
    ) -> None:
        """`show` is told with each line."""
        self._logger = logger
        self._show = show
        self._series: tuple[str, int] | None = None
        self._first = (0.0, 0)
        self._done = 0
        self._last_line = 0.0
        self._shares: dict[int, tuple[int, int]] = {}

    def event(self, event: dict[str, Any]) -> None:
        """Log a `message` or `progress` event."""
        if event["event"] == "message":
            self._logger.info("%s", printable(event["text"]))
        elif event["event"] == "progress":
            self._progress(event)

    def _progress(self, event: dict[str, Any]) -> None:
        if self._series is None or event["unit"] != self._series[0]:
            self._shares = {}
        self._shares[event["rank"]] = (event["done"], event["total"])
        done, total = (sum(part) for part in zip(*self._shares.values(), strict=True))
        now, series = time.monotonic(), (event["unit"], total)
        if series != self._series or done < self._done:
            self._series, self._first = series, (now, done)
            self._last_line = 0.0
        self._done = done
        if done != total and now - self._last_line < LINE_INTERVAL_S:
            return
        self._last_line = now
        elapsed, gained = now - self._first[0], done - self._first[1]
        parts = [f"{done:,}" + (f" of {total:,}" if total else "") + f" {event['unit']}"]
        if gained and elapsed >= LEAST_WATCHED_S:
            rate = gained / elapsed
            per_second = f"{rate:,.1f} {event['unit']}/s"
            parts.append(
                per_second
                if rate >= 1
                else f"{1 / rate:,.1f} s per {event['unit'].removesuffix('s')}"
            )
            if total:
                parts.append(f"{clock((total - done) / rate)} left")
        if event["detail"]:
            parts.append(event["detail"])
        self._logger.info(" | ".join(parts))
        self._show(done, total, elapsed)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
