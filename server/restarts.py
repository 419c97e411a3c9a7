"""When what has died is started again, and when no more."""

import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from server.errors import ServerError


class Restarts:
    """Counts faults.

    Args:
        max_restarts: In WINDOW_S.
        clock: Seconds.
    """

    MAX_RESTARTS: ClassVar[int] = 5
    WINDOW_S: ClassVar[float] = 600.0
    MAX_DELAY_S: ClassVar[float] = 30.0

    def __init__(self, max_restarts: int = MAX_RESTARTS, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_restarts, self._clock = max_restarts, clock
        self._restarts: deque[float] = deque()

    def next_delay_s(self, fault: ServerError) -> float:
        """Return how long to wait before the next start: not at all the first time, then 1, 2, 4, ... seconds.

        Raises:
            ServerError: It was started again too often already; the sentence has the last fault.
        """
        now = self._clock()
        while self._restarts and self._restarts[0] <= now - self.WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            often = f"{len(self._restarts)} restarts in {self.WINDOW_S / 60:g} minutes"
            raise ServerError(
                f"{str(fault).rstrip('.')}; given up after {often}." if self._restarts else str(fault), fault.log_tail
            )
        delay_s = min(self.MAX_DELAY_S, float(2 ** (len(self._restarts) - 1))) if self._restarts else 0.0
        self._restarts.append(now)
        return delay_s
