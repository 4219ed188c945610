"""Whether others on the machine take part in a measurement: by how long this process's threads wait for a CPU."""

from __future__ import annotations

import time
from pathlib import Path

BUSY = "others took the CPUs"
_DISTURBED = 0.2  # seconds a second; on two CPUs a busy process gives 0.77 to 0.88, and none 0.00 to 0.07


class Contention:
    """From now on: how long threads of this process that could run have to wait, because something else does.

    More threads than CPUs, or a quota of CPU time, make them wait as well. Threads that end meanwhile do not count.
    """

    def __init__(self) -> None:
        self._waited, self._began = waited_ns(), time.perf_counter_ns()

    def share(self) -> float:
        """Seconds of waiting a second, of all threads together; 0 where the system does not count them."""
        return max(0, waited_ns() - self._waited) / max(1, time.perf_counter_ns() - self._began)

    def note(self) -> str:
        """What there is to say of a measurement that began with this: "" if they hardly waited."""
        share = self.share()
        return f"{BUSY}: {share:.2f} s of waiting a second" if share > _DISTURBED else ""


def waited_ns() -> int:
    """Nanoseconds that the threads that live have waited for a CPU so far, as Linux counts (schedstats); else 0."""
    waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(file.read_text().split()[1])  # time on a CPU, waiting for one, and how often it ran
        except (OSError, IndexError, ValueError):  # the thread has ended, or it is not counted
            continue
    return waited
