"""Tells of the requests, in a thread of its own: of those that are over to the metrics, and a line each to the log.

Of those that are live it tells whether there is room for others.
"""

import threading
import traceback
from collections.abc import Callable

from admission import Load
from live_requests import EndedRequest, LiveRequests
from request_metrics import RequestMetrics

INTERVAL_S = 0.25


class RequestReporter:
    """Looks from time to time at what has ended, and a last time when it is closed.

    Args:
        live: The ensemble's requests.
        metrics: Where they are counted.
        write: Writes one of them to the log.
        show_load: Called with what is live.
    """

    def __init__(
        self,
        live: LiveRequests,
        metrics: RequestMetrics,
        write: Callable[[EndedRequest], object],
        show_load: Callable[[Load], object],
    ) -> None:
        self._live, self._metrics, self._write, self._show_load = live, metrics, write, show_load
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
        load = self._live.load()
        self._show_load(load)
        self._metrics.publish(ended, load)
