"""How much others on the machine take part in a measurement: by how long this process's threads wait for a CPU."""

from __future__ import annotations

import time
from pathlib import Path

DISTURBED = 0.2  # seconds a second; one competitor for a CPU gives 0.5 to 0.9, an idle machine under 0.1


class Contention:
    """From now on: how long threads of this process that could run have to wait, because something else does."""

    def __init__(self) -> None:
        self._waited, self._began = waited_ns(), time.perf_counter_ns()

    def share(self) -> float:
        """Seconds of waiting a second, of all threads together; 0 where the system does not count them."""
        return max(0, waited_ns() - self._waited) / max(1, time.perf_counter_ns() - self._began)


def waited_ns() -> int:
    """Nanoseconds that the threads that live have waited for a CPU so far, as Linux counts (schedstats); else 0."""
    waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(file.read_text().split()[1])  # time on a CPU, waiting for one, and how often it ran
        except (OSError, IndexError, ValueError):  # the thread has ended, or it is not counted
            continue
    return waited
