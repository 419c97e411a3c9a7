"""Tells of requests that are over, in a thread of its own: to the metrics, and with a line each to the log."""

import threading
import traceback
from collections.abc import Callable

from live_requests import EndedRequest, LiveRequests
from request_metrics import RequestMetrics

INTERVAL_S = 0.25


class RequestReporter:
    """Looks from time to time at what has ended, and a last time when it is closed.

    Args:
        live: The ensemble's requests.
        metrics: Where they are counted.
        write: Writes one of them to the log.
    """

    def __init__(self, live: LiveRequests, metrics: RequestMetrics, write: Callable[[EndedRequest], object]) -> None:
        self._live, self._metrics, self._write = live, metrics, write
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-reporter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Log what has ended meanwhile, and end the thread. The metrics end with the model, and are left alone."""
        self._closing.set()
        self._thread.join()
        for ended in self._live.take_ended():
            self._write(ended)

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            try:
                self._report()
            except Exception:  # the next look is another try
                traceback.print_exc()

    def _report(self) -> None:
        ended = self._live.take_ended()
        for request in ended:
            self._write(request)
        self._metrics.publish(ended, self._live.load())
