"""How long threads waited for a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoplan import contention

WAITED_NS = contention.waited_ns  # what tests are spared


def test_a_process_that_shares_its_cpu_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/proc/self/schedstat"):
        pytest.skip("this system does not count waiting")
    monkeypatch.setattr(contention, "waited_ns", WAITED_NS)
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    others: list[subprocess.Popen[bytes]] = []
    try:
        others += (subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2))
        os.sched_setaffinity(0, one)
        for other in others:
            os.sched_setaffinity(other.pid, one)
        own = contention.Contention()
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        assert own.share() > 0.2
        assert contention.BUSY in own.note()
    finally:
        os.sched_setaffinity(0, allowed)
        for other in others:
            other.kill()
            other.wait()


def test_where_nothing_is_counted_nobody_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "schedstat").write_text("not counted here")
    for folder in (tmp_path, tmp_path / "nothing"):
        monkeypatch.setattr(contention, "Path", lambda path, folder=folder: folder)
        assert WAITED_NS() == 0
    assert contention.Contention().share() == 0
    assert contention.Contention().note() == ""
