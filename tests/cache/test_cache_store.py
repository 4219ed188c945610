"""PlanCache: what is put is found, by many processes, and no file makes it fail."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import autoplan.cache
from autoplan.cache import codec, files, form
from autoplan.cache.store import PlanCache, entry, resolve
from autoplan.errors import CacheError


def _timing(rows: int, ratio: float = 0.5) -> tuple[str, form.Record]:
    return entry({"environment": {"device": "cpu", "torch": "2.13"}, "rows": rows}, {"ratio": ratio, "rounds": 30})


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# What schema 1 looks like. Every later version must read it: never change this text.
GOLDEN = """
{
  "format": "autoplan cache",
  "schema": 1,
  "records": {
    "timings": {
      "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862": {
        "fingerprint": {"a": 1},
        "value": {"ratio": 0.5}
      }
    },
    "sensitivities": {
      "a1bd8f25c1908fd9d7e388eab1d14e6d70bbf03b6f49aab268677b1e2b423919": {
        "fingerprint": {"layer": "encoder.0", "weights": ["sampled:00", null]},
        "value": {"harm": 1e-05, "sqnr_db": 41.5, "note": "na\\u00efve", "held_out": true}
      }
    },
    "plans": {}
  }
}
""".lstrip()


def test_the_golden_file_of_schema_1(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    path.write_text(GOLDEN)
    fingerprint = {"layer": "encoder.0", "weights": ["sampled:00", None]}
    value = {"harm": 1e-05, "sqnr_db": 41.5, "note": "naïve", "held_out": True}
    for cache in (PlanCache(path), PlanCache.load(path)):
        assert len(cache) == 2
        assert cache.get("timings", codec.digest({"a": 1})) == {"fingerprint": {"a": 1}, "value": {"ratio": 0.5}}
        assert cache.get("sensitivities", codec.digest(fingerprint)) == {"fingerprint": fingerprint, "value": value}
    if form.SCHEMA == 1:
        PlanCache.load(path).save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_text() == GOLDEN


def test_what_is_put_is_found_and_kept_apart() -> None:
    cache = PlanCache()
    key, record = _timing(1)
    assert cache.get("timings", key) is None
    cache.put("timings", key, record)
    assert cache.get("timings", key) == record
    assert cache.get("plans", key) is None
    assert len(cache) == 1
    assert list(cache) == [("timings", key)]
    assert cache.keys("timings") == [key]
    record["value"]["ratio"] = 9.0
    found = cache.get("timings", key)
    assert found is not None
    assert found["value"]["ratio"] == 0.5
    found["value"]["ratio"] = 9.0
    assert cache.get("timings", key) != found
    cache.put("timings", *_timing(1, ratio=0.25))
    assert len(cache) == 1
    assert bool(PlanCache())


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"fingerprint": {"rows": 1}}, "a record is"),
        ({"fingerprint": {"rows": 1}, "value": 3.0}, "are dicts"),
        ({"fingerprint": {"rows": 1}, "value": {"ratio": float("inf")}}, "value.ratio is inf"),
        ({"fingerprint": {"rows": 1}, "value": {"ratio": {1, 2}}}, "value.ratio is a set"),
        ({"fingerprint": {"rows": 2}, "value": {}}, "the digest of its fingerprint is"),
    ],
)
def test_what_is_no_record_is_refused_and_nothing_kept(record: dict[str, Any], problem: str) -> None:
    cache = PlanCache()
    key = codec.digest({"rows": 1})
    with pytest.raises(CacheError, match=problem):
        cache.put_many("timings", dict([_timing(7), (key, record)]))
    assert len(cache) == 0


def test_an_unknown_kind_names_the_known_ones() -> None:
    cache: Any = PlanCache()
    for method, arguments in (("get", ("tuning", "k")), ("put", ("tuning", *_timing(1))), ("keys", ("",))):
        with pytest.raises(CacheError, match="timings, sensitivities, plans"):
            getattr(cache, method)(*arguments)


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_save_load_pickle_and_equality(tmp_path: Path, suffix: str) -> None:
    cache = PlanCache()
    cache.put_many("timings", dict(_timing(rows) for rows in range(5)))
    cache.put("plans", *entry({"model": "m"}, {"layers": [{"name": "a", "candidate": "none"}]}))
    path = tmp_path / f"cache{suffix}"
    cache.save(path)
    for copy in (PlanCache.load(path), PlanCache(path), pickle.loads(pickle.dumps(cache))):
        assert copy == cache
        assert copy.to_dict() == cache.to_dict()
    assert PlanCache.load(path).path is None
    assert pickle.loads(pickle.dumps(PlanCache(path))).path is None
    state = cache.__getstate__()
    assert codec.plain(state) == state
    assert cache != PlanCache()
    assert cache != 3


def test_merge_takes_what_is_missing_and_the_others_word() -> None:
    one, two = PlanCache(), PlanCache()
    one.put_many("timings", dict([_timing(1), _timing(2, ratio=0.1)]))
    two.put_many("timings", dict([_timing(2, ratio=0.2), _timing(3)]))
    one.merge(two)
    assert len(one) == 3
    found = one.get("timings", _timing(2)[0])
    assert found is not None
    assert found["value"]["ratio"] == 0.2
    assert len(two) == 2


# -- bound to a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_a_bound_cache_writes_at_once_and_merges(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"cache{suffix}"
    one, two = PlanCache(path), PlanCache(path)
    assert not path.exists()
    one.put("timings", *_timing(1))
    two.put("sensitivities", *_timing(2))
    three = PlanCache(path)
    assert len(three) == 2
    assert two == three
    one.merge(three)
    assert one == three
    assert _files(path.parent) == [path.name]


def test_put_many_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[Any] = []
    write = files.Local.write

    def count(place: files.Local, data: bytes) -> None:
        writes.append(place)
        write(place, data)

    monkeypatch.setattr(files.Local, "write", count)
    cache = PlanCache(tmp_path / "cache.json")
    cache.put_many("timings", dict(_timing(rows) for rows in range(50)))
    assert len(writes) == 1
    assert len(PlanCache(tmp_path / "cache.json")) == 50


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "half": GOLDEN.encode()[:200],
    "no schema": b'{"format": "autoplan cache", "records": {}}',
    "schema 0": GOLDEN.replace('"schema": 1', '"schema": 0').encode(),
    "schema true": GOLDEN.replace('"schema": 1', '"schema": true').encode(),
    "schema text": GOLDEN.replace('"schema": 1', '"schema": "1"').encode(),
    "no kinds": b'{"format": "autoplan cache", "schema": 1, "records": {}}',
    "unknown kind": GOLDEN.replace('"plans"', '"tunings"').encode(),
    "kind of another type": GOLDEN.replace('"plans": {}', '"plans": []').encode(),
    "infinite": GOLDEN.replace("0.5", "Infinity").encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_trusted_is_set_aside_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = tmp_path / "cache.json"
    path.write_bytes(BROKEN[name])
    with pytest.raises(CacheError, match=r"cache\.json"):
        PlanCache.load(path)
    assert path.read_bytes() == BROKEN[name]
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(path)
        cache.put("timings", *_timing(1))
        assert len(PlanCache(path)) == 1
    assert (tmp_path / "cache.json.unreadable-1").read_bytes() == BROKEN[name]
    assert len(caplog.records) == 1
    assert "cache.json.unreadable-1" in caplog.text
    path.write_bytes(BROKEN[name])  # while the cache is in use
    cache.put("timings", *_timing(2))
    assert (tmp_path / "cache.json.unreadable-2").read_bytes() == BROKEN[name]
    assert _files(tmp_path) == ["cache.json", "cache.json.unreadable-1", "cache.json.unreadable-2"]
    assert PlanCache(path).get("timings", _timing(2)[0])


def test_a_hostile_pickle_is_set_aside_and_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "cache.pkl"
    path.write_bytes(pickle.dumps({"format": "autoplan cache", "schema": 1, "records": Bomb()}))
    cache = PlanCache(path)
    cache.put("timings", *_timing(1))
    assert _files(tmp_path) == ["cache.pkl", "cache.pkl.unreadable-1"]
    assert len(PlanCache(path)) == 1


def test_a_file_of_a_newer_autoplan_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.json"
    newer = GOLDEN.replace('"schema": 1', '"schema": 7')
    path.write_text(newer)
    with pytest.raises(CacheError, match=r"written by a newer autoplan \(schema 7 > 1\)"):
        PlanCache.load(path)
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(path)
        cache.put("timings", *_timing(1))
        cache.put("timings", *_timing(2))
        PlanCache(path)
    assert cache.get("timings", _timing(1)[0])
    assert path.read_text() == newer
    assert _files(tmp_path) == ["cache.json"]
    assert len(caplog.records) == 1
    assert "newer autoplan" in caplog.text


def test_older_schemas_are_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.json"
    path.write_text(GOLDEN)
    monkeypatch.setattr(form, "SCHEMA", 3)
    monkeypatch.setitem(form.MIGRATIONS, 1, lambda data: {**data, "steps": 1})
    monkeypatch.setitem(
        form.MIGRATIONS, 2, lambda data: {**data, "records": {**data["records"], "plans": {"k": data["steps"]}}}
    )
    assert PlanCache.load(path).keys("plans") == ["k"]
    monkeypatch.setitem(form.MIGRATIONS, 2, lambda data: data["what is not there"])
    with pytest.raises(CacheError, match="not of schema 2"):
        PlanCache.load(path)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        3,
        [],
        {},
        {"value": {}},
        {"fingerprint": {"a": 1}, "value": []},
        {"fingerprint": 1, "value": {}},
        {"fingerprint": {"a": 2}, "value": {"ratio": 0.5}},
    ],
)
def test_a_damaged_record_is_a_miss_and_harms_no_other(tmp_path: Path, damaged: object) -> None:
    data = json.loads(GOLDEN)
    key, good = codec.digest({"a": 1}), _timing(1)
    data["records"]["timings"] = {key: damaged, good[0]: good[1]}
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(data))
    cache = PlanCache(path)
    assert cache.get("timings", key) is None
    assert cache.get("timings", good[0]) == good[1]
    other = PlanCache()
    other.merge(cache)
    assert key not in other.keys("timings")
    cache.put("timings", *entry({"a": 1}, {"ratio": 0.75}))
    assert PlanCache(path).get("timings", key) == {"fingerprint": {"a": 1}, "value": {"ratio": 0.75}}


def test_a_failing_write_is_reported_once_and_made_good_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.json"
    cache = PlanCache(path)
    cache.put("timings", *_timing(1))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with caplog.at_level(logging.WARNING):
        cache.put("timings", *_timing(2))
        cache.put("timings", *_timing(3))
    monkeypatch.undo()
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert path.read_bytes() == before
    assert cache.get("timings", _timing(3)[0])
    cache.put("timings", *_timing(4))
    assert len(PlanCache(path)) == 4


def test_a_file_that_may_not_be_read_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.json"
    path.write_text(GOLDEN)

    def fail(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Local, "read", fail)
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(path)
        cache.put("timings", *_timing(1))
    monkeypatch.undo()
    assert cache.get("timings", _timing(1)[0])
    assert path.read_text() == GOLDEN
    assert len(caplog.records) == 1


def test_a_broken_file_that_cannot_be_moved_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.json"
    path.write_bytes(b"broken")

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", fail)
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(path)
        cache.put("timings", *_timing(1))
    assert path.read_bytes() == b"broken"
    assert cache.get("timings", _timing(1)[0])
    assert len(caplog.records) == 1


# -- shared ----------------------------------------------------------------------------------------------------------

# One interpreter that forks, since importing torch anew for each writer would take longer than the writing.
WRITERS = """
import os, sys, traceback
from autoplan.cache.store import PlanCache, entry

def write(name):
    cache = PlanCache(sys.argv[1])
    for number in range(20):
        cache.put("timings", *entry({"writer": name, "number": number}, {"ratio": number / 20}))

children = []
for name in range(4):
    child = os.fork()
    if child == 0:
        try:
            write(name)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.json"
    monkeypatch.setenv("PYTHONPATH", str(Path(autoplan.__file__).parents[1]))
    with subprocess.Popen([sys.executable, "-c", WRITERS, str(path)]) as writers:
        reads = 0
        while writers.poll() is None:
            if path.exists():
                codec.read(path)  # never half a file
                reads += 1
            time.sleep(0.002)
    assert writers.returncode == 0
    assert reads > 0
    cache = PlanCache(path)
    assert len(cache) == 80
    for name in range(4):
        for number in range(20):
            key, record = entry({"writer": name, "number": number}, {"ratio": number / 20})
            assert cache.get("timings", key) == record
    assert _files(tmp_path) == [path.name]


def test_threads_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    shared, own = PlanCache(path), PlanCache(path)

    def work(cache: PlanCache, first: int) -> None:
        for rows in range(first, first + 10):
            cache.put("timings", *_timing(rows))
            cache.to_dict()

    threads = [threading.Thread(target=work, args=(cache, 100 * i)) for i, cache in enumerate([shared, shared, own])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(PlanCache(path)) == 30


# -- which cache -----------------------------------------------------------------------------------------------------


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PlanCache()
    assert resolve(cache) is cache
    assert resolve(False) is None
    for path in (tmp_path / "a.json", str(tmp_path / "a.json")):
        found = resolve(path)
        assert found is not None
        assert found.path == tmp_path / "a.json"
    monkeypatch.setenv("AUTOPLAN_CACHE", str(tmp_path / "site.pkl"))
    found = resolve(None)
    assert found is not None
    assert found.path == tmp_path / "site.pkl"
    monkeypatch.delenv("AUTOPLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = resolve(None)
    assert found is not None
    assert found.path == tmp_path / "autoplan"
    found = resolve(tmp_path)
    assert found is not None
    assert len(found) == 0
    for wrong in (True, 3, "cache.yaml"):
        with pytest.raises(CacheError, match=r"\.json"):
            resolve(wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"[1, 2]", b'{"format": "autoplan plan", "schema": 1}'])
def test_a_file_that_holds_something_else_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(path)
        cache.put("timings", *_timing(1))
    assert len(cache) == 1  # in memory
    assert path.read_bytes() == content
    assert "holds something else than an autoplan cache" in caplog.text
