"""How long threads waited for a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from autoplan import contention

WAITED_NS = contention.waited_ns  # what tests are spared


def test_a_process_that_shares_its_cpu_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/proc/self/schedstat"):
        pytest.skip("this system does not count waiting")
    monkeypatch.setattr(contention, "waited_ns", WAITED_NS)
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        os.sched_setaffinity(0, one)
        for other in others:
            os.sched_setaffinity(other.pid, one)
        own = contention.Contention()
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        assert own.share() > contention.DISTURBED
    finally:
        os.sched_setaffinity(0, allowed)
        for other in others:
            other.kill()
            other.wait()


def test_where_nothing_is_counted_nobody_waits() -> None:
    assert contention.Contention().share() == 0
