"""Folders, URLs and layers: what is put is found wherever it is kept, and what is damaged harms nothing else."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest

from autoplan.cache import codec, files, form
from autoplan.cache.form import KINDS
from autoplan.cache.store import PlanCache, entry
from autoplan.errors import CacheError

Made = tuple[str, form.Record]


def _timing(rows: int, ratio: float = 0.5) -> Made:
    return entry({"environment": {"device": "cpu"}, "rows": rows}, {"ratio": ratio})


def _file(folder: Path, made: Made) -> Path:
    return folder / "timings" / f"{made[0]}.json"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture(params=["plans/", "plans.json", "plans.pkl", "memory://site/plans", "memory://site/plans.json"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A place for a cache, of every sort."""
    fsspec.filesystem("memory").store.clear()
    yield request.param if "://" in request.param else f"{tmp_path}/{request.param}"
    fsspec.filesystem("memory").store.clear()


def test_every_place_keeps_what_is_put(where: str) -> None:
    cache = PlanCache(where)
    assert len(cache) == 0
    cache.put_many("timings", dict(_timing(rows) for rows in range(5)))
    cache.put("plans", *entry({"model": "m"}, {"layers": []}))
    cache.put("timings", *_timing(0, ratio=0.25))
    assert cache.unsaved == 0
    again = PlanCache(where)
    assert again == cache
    assert list(again) == list(cache)
    assert len(again) == 6
    assert again.get("timings", _timing(0)[0]) == _timing(0, ratio=0.25)[1]
    assert again.get("timings", _timing(9)[0]) is None
    assert again.get("plans", _timing(0)[0]) is None
    assert again.problems() == {}
    assert str(again.path) == where.rstrip("/")
    copy = pickle.loads(pickle.dumps(again))
    assert copy == again
    assert copy.path is None


def test_every_place_forgets(where: str) -> None:
    cache = PlanCache(where)
    cache.put_many("timings", dict(_timing(rows) for rows in range(4)))
    cache.discard("timings", [_timing(2)[0], "no such key"])
    assert cache.get("timings", _timing(2)[0]) is None
    assert len(PlanCache(where)) == len(cache) == 3


def test_every_place_can_be_merged_into_every_other(where: str, tmp_path: Path) -> None:
    one, two = PlanCache(where), PlanCache(tmp_path / "other" / "cache.json")
    one.put_many("timings", dict([_timing(1), _timing(2)]))
    two.put_many("timings", dict([_timing(2, ratio=0.25), _timing(3)]))
    one.merge(two)
    assert len(PlanCache(where)) == 3
    assert PlanCache(where).get("timings", _timing(2)[0]) == _timing(2, ratio=0.25)[1]
    two.merge(PlanCache(where, read_only=True))
    assert two == one


def test_a_read_only_cache_changes_nothing(where: str, tmp_path: Path) -> None:
    PlanCache(where).put("timings", *_timing(1))
    before = sorted(tmp_path.rglob("*")), dict(fsspec.filesystem("memory").store)
    cache = PlanCache(where, read_only=True)
    cache.put("timings", *_timing(2))
    assert len(cache) == 2
    assert cache.unsaved == 1
    assert cache.get("timings", _timing(2)[0])
    assert (sorted(tmp_path.rglob("*")), dict(fsspec.filesystem("memory").store)) == before
    assert len(PlanCache(where)) == 1
    with pytest.raises(CacheError, match="read only"):
        cache.discard("timings", [_timing(1)[0]])
    with pytest.raises(CacheError, match="read only"):
        cache.prune(max_bytes=0)


# -- a folder --------------------------------------------------------------------------------------------------------


def test_a_folder_holds_one_readable_file_per_record(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "new" / "plans")
    assert not (tmp_path / "new").exists()
    made = _timing(1)
    cache.put("timings", *made)
    file = _file(tmp_path / "new" / "plans", made)
    assert _names(tmp_path / "new" / "plans") == ["timings"]
    assert _names(file.parent) == [file.name]
    assert PlanCache.load(file) == cache  # the same format as a cache in one file
    assert PlanCache(tmp_path / "new" / "plans").get("timings", made[0]) == made[1]
    other = PlanCache(tmp_path / "new" / "plans")
    other.put("timings", *_timing(2))
    assert cache.get("timings", _timing(2)[0]), "what another wrote is seen at once"


def test_a_large_folder_costs_what_is_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads nothing, a look-up reads one file, a put writes one: however many records there are."""
    cache = PlanCache(tmp_path)
    cache.put_many("timings", dict(_timing(rows) for rows in range(1000)))
    done: list[str] = []
    for name in ("read", "write", "names"):
        method = getattr(files.Local, name)

        def counted(place: files.Local, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            done.append(name)
            return method(place, *args, **kwargs)

        monkeypatch.setattr(files.Local, name, counted)
    cache = PlanCache(tmp_path)
    assert done == []
    assert cache.get("timings", _timing(500)[0])
    assert cache.get("timings", _timing(5000)[0]) is None
    assert done == ["read", "read"]
    cache.put("timings", *_timing(5000))
    assert done[2:] == ["read", "write"]
    assert len(cache) == 1001
    assert done[4:] == ["names"] * len(KINDS)


def test_what_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    one, two = PlanCache(tmp_path / "one"), PlanCache(tmp_path / "two")
    one.put("timings", *_timing(1))
    two.merge(one)
    before = _file(tmp_path / "two", _timing(1)).stat()
    two.merge(one)
    assert _file(tmp_path / "two", _timing(1)).stat() == before


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "timings").mkdir()
    for name in ("notes.txt", "timings/readme.json", "timings/.hidden", f"timings/{'g' * 64}.json"):
        (tmp_path / name).write_text("mine")
    cache = PlanCache(tmp_path)
    cache.put("timings", *_timing(1))
    assert len(cache) == 1
    assert cache.problems() == {}
    cache.prune(max_bytes=0)
    assert len(cache) == 0
    assert _names(tmp_path) == ["notes.txt", "timings"]
    assert _names(tmp_path / "timings") == [".hidden", f"{'g' * 64}.json", "readme.json"]


@pytest.mark.parametrize("key", ["", ".", "..", "../../secret", "/etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_key_is_no_path(tmp_path: Path, key: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    cache = PlanCache(tmp_path / "a" / "b")
    cache.put("timings", *_timing(1))
    assert cache.get("timings", key) is None
    cache.discard("timings", [key])
    assert (tmp_path / "secret.json").exists()


def test_which_paths_are_folders(tmp_path: Path) -> None:
    (tmp_path / "v2.1").mkdir()
    for path in (tmp_path / "plans", f"{tmp_path}/v2.2/", tmp_path / "v2.1", f"file://{tmp_path}/by%20url"):
        PlanCache(path).put("timings", *_timing(1))
    assert _names(tmp_path) == ["by url", "plans", "v2.1", "v2.2"]
    with pytest.raises(CacheError, match=r"use a \.json or \.pkl file, or a folder"):
        PlanCache(tmp_path / "plans.yaml")


BAD_RECORDS: dict[str, Any] = {
    "empty": b"",
    "half": lambda data: data[: len(data) // 2],
    "binary": b"\x80\x04N.",
    "a changed value": lambda data: data.replace(b'"ratio": 0.5', b'"ratio": 0.1'),
    "a changed fingerprint": lambda data: data.replace(b'"rows": 1', b'"rows": 2'),
    "a changed date": lambda data: data.replace(b'"stored": "2', b'"stored": "1'),
    "a changed digest": lambda data: data.replace(b'"digest": "', b'"digest": "0'),
    "a renamed field": lambda data: data.replace(b'"digest"', b'"dagest"'),
    "another key": lambda data: data.replace(_timing(1)[0].encode(), _timing(2)[0].encode()),
    "no record": b'{"format": "autoplan cache", "schema": 1, '
    b'"records": {"timings": {}, "sensitivities": {}, "plans": {}}}',
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_set_aside_once_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    made, folder = _timing(1), tmp_path / "plans"
    cache = PlanCache(folder)
    cache.put_many("timings", dict([made, _timing(7)]))
    file, bad = _file(folder, made), BAD_RECORDS[name]
    damaged = bad(file.read_bytes()) if callable(bad) else bad
    file.write_bytes(damaged)
    assert list(PlanCache(folder, read_only=True).problems()) == [f"timings/{made[0]}"]
    with caplog.at_level(logging.WARNING):
        assert PlanCache(folder, read_only=True).get("timings", made[0]) is None
        assert file.read_bytes() == damaged
        caplog.clear()
        assert cache.get("timings", made[0]) is None
        assert cache.get("timings", made[0]) is None
        assert PlanCache(folder).get("timings", made[0]) is None
    aside = file.with_name(f"{file.name}.unreadable-1")
    assert aside.read_bytes() == damaged
    assert len(caplog.records) == 1
    assert aside.name in caplog.text
    assert cache.get("timings", _timing(7)[0]) == _timing(7)[1]
    cache.put("timings", *made)
    assert PlanCache(folder).get("timings", made[0]) == made[1]
    file.write_bytes(damaged)
    cache.put("timings", *made)  # never written over unseen
    assert file.with_name(f"{file.name}.unreadable-2").read_bytes() == damaged
    assert PlanCache(folder).get("timings", made[0]) == made[1]


@pytest.mark.parametrize("content", ['{"format": "autoplan cache", "schema": 99}', '{"format": "another"}', "[]"])
def test_a_record_that_is_not_ours_to_judge_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    made = _timing(1)
    file = _file(tmp_path, made)
    file.parent.mkdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(tmp_path)
        assert cache.get("timings", made[0]) is None
        cache.put_many("timings", dict([made, _timing(2)]))
    assert file.read_text() == content
    assert cache.unsaved == 1
    assert cache.get("timings", made[0]) == made[1]
    assert PlanCache(tmp_path).get("timings", _timing(2)[0])
    assert len(caplog.records) == 1


def test_another_process_may_have_put_a_bad_record_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding it bad and holding the lock: the good one is read, and not moved away."""
    made = _timing(1)
    cache = PlanCache(tmp_path)
    cache.put("timings", *made)
    file = _file(tmp_path, made)
    good = file.read_bytes()
    file.write_bytes(b"bad")
    make_folder = files.Local.make_folder

    def repaired(place: files.Local) -> None:
        file.write_bytes(good)
        make_folder(place)

    monkeypatch.setattr(files.Local, "make_folder", repaired)  # comes first when the lock is taken
    assert cache.get("timings", made[0]) == made[1]
    assert _names(file.parent) == [file.name]


def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PlanCache(tmp_path)
    cache.put_many("timings", dict([_timing(1), _timing(2)]))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with caplog.at_level(logging.WARNING):
        cache.put("timings", *_timing(2, ratio=0.25))
        cache.put("timings", *_timing(3))
    monkeypatch.undo()
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"
    } == before
    assert len(caplog.records) == 1
    assert cache.get("timings", _timing(2)[0]) == _timing(2, ratio=0.25)[1]
    cache.put("timings", *_timing(4))
    assert cache.unsaved == 0
    assert PlanCache(tmp_path) == cache
    assert len(cache) == 4


def test_a_folder_that_cannot_be_made_works_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "plans").write_text("a file")
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(tmp_path / "plans")
        assert cache.get("timings", _timing(1)[0]) is None
        cache.put("timings", *_timing(1))
        cache.put("timings", *_timing(2))
    assert cache.get("timings", _timing(1)[0]) == _timing(1)[1]
    assert (tmp_path / "plans").read_text() == "a file"
    assert len(caplog.records) <= 3  # cannot be read, listed, written: each once
    with pytest.raises(CacheError, match="cannot write"):
        cache.prune(max_bytes=0)


# -- pruning ---------------------------------------------------------------------------------------------------------


def _aged(made: Made, days: float) -> tuple[str, dict[str, Any]]:
    stored = datetime.now(timezone.utc) - timedelta(days=days)
    return made[0], codec.sealed({**made[1], "stored": stored.isoformat()})


@pytest.fixture
def aged(where: str) -> PlanCache:
    """Records of 1 to 4 days, and one that does not say."""
    old = {"format": form.FORMAT, "schema": 1, "records": {kind: {} for kind in KINDS}}
    old["records"]["timings"] = dict([*(_aged(_timing(day), day) for day in range(1, 5)), _timing(9)])  # type: ignore
    cache = PlanCache(where)
    cache.merge(PlanCache.from_dict(old))
    cache.put("plans", *entry({"model": "m"}, {"now": True}))
    return cache


def test_prune_by_age(aged: PlanCache, where: str) -> None:
    gone = aged.prune(older_than=timedelta(days=2.5))
    assert {item.key for item in gone} == {_timing(rows)[0] for rows in (3, 4, 9)}
    assert len(aged) == len(PlanCache(where)) == 3
    assert aged.prune(older_than=timedelta(days=2.5)) == []


def test_prune_by_size_takes_the_oldest(aged: PlanCache, where: str) -> None:
    sizes = {item.key: item.nbytes for item in aged.entries()}
    keep = [entry({"model": "m"}, {})[0], _timing(1)[0], _timing(2)[0]]
    aged.prune(max_bytes=sum(sizes[key] for key in keep))
    assert {key for _, key in PlanCache(where)} == set(keep)
    aged.prune(max_bytes=0)
    assert len(PlanCache(where)) == 0


def test_prune_says_how_large_files_are_and_sweeps_up(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    cache.put("timings", *_timing(1))
    file = _file(tmp_path, _timing(1))
    assert cache.entries()[0].nbytes == file.stat().st_size
    left = file.with_name(f".{file.name}.0123.tmp")  # of a writer that was killed
    left.write_bytes(b"half")
    assert len(cache) == 1
    cache.prune(older_than=timedelta(days=1))
    assert not left.exists()
    assert file.exists()


# -- layers ----------------------------------------------------------------------------------------------------------


def test_the_site_cache_comes_first_and_is_never_written(where: str, tmp_path: Path) -> None:
    PlanCache(where).put_many("timings", dict([_timing(1, ratio=0.1), _timing(2, ratio=0.1)]))
    own = PlanCache(tmp_path / "own")
    own.put_many("timings", dict([_timing(2, ratio=0.9), _timing(3, ratio=0.9)]))
    cache = PlanCache(tmp_path / "own", site=where)

    def ratio(rows: int) -> float | None:
        found = cache.get("timings", _timing(rows)[0])
        return found and found["value"]["ratio"]

    assert [ratio(rows) for rows in (1, 2, 3, 4)] == [0.1, 0.1, 0.9, None]
    assert len(cache) == 3
    cache.put("timings", *_timing(4, ratio=0.9))
    assert ratio(4) == 0.9
    assert len(PlanCache(where)) == 2
    assert len(PlanCache(tmp_path / "own")) == 3
    assert cache.to_dict() == PlanCache.from_dict(cache.to_dict()).to_dict()
    assert {item.key for item in cache.entries()} == {_timing(rows)[0] for rows in (2, 3, 4)}
    assert "site" in repr(cache)
    cache.prune(max_bytes=0)
    assert len(cache) == 2


def test_layers_may_be_caches_and_stack() -> None:
    fleet, team, own = PlanCache(), PlanCache(), PlanCache()
    fleet.put("timings", *_timing(1))
    team.put("timings", *_timing(2))
    own = PlanCache(site=PlanCache(site=fleet))
    assert own.get("timings", _timing(1)[0])
    own = PlanCache.default(site=team)
    own.put("timings", *_timing(3))
    assert own.get("timings", _timing(2)[0])
    assert len(PlanCache.default()) == 1


def test_what_the_site_holds_damaged_is_looked_for_in_the_own(tmp_path: Path) -> None:
    made = _timing(1)
    PlanCache(tmp_path / "site").put("timings", *made)
    _file(tmp_path / "site", made).write_text("damaged")
    cache = PlanCache(tmp_path / "own", site=tmp_path / "site")
    assert cache.get("timings", made[0]) is None
    cache.put("timings", *made)
    assert cache.get("timings", made[0]) == made[1]
    assert _file(tmp_path / "site", made).read_text() == "damaged"


# -- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Any:
    """fsspec's file system in memory, empty."""
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def test_a_url_is_asked_once_for_what_it_does_not_hold(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    PlanCache("memory://fleet").put("timings", *_timing(0))
    cache = PlanCache("memory://fleet")
    cache.get("timings", _timing(0)[0])
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: pytest.fail("a round trip for nothing"))
    monkeypatch.setattr(type(memory), "ls", lambda *_, **__: pytest.fail("a round trip for nothing"))
    assert all(cache.get("timings", _timing(rows)[0]) is None for rows in range(1, 100))


@pytest.mark.parametrize("url", ["memory://fleet/plans.json", "memory://fleet"])
def test_what_is_damaged_at_a_url_is_left_alone(memory: Any, caplog: pytest.LogCaptureFixture, url: str) -> None:
    made = _timing(1)
    PlanCache(url).put("timings", *made)
    (path,) = memory.store
    memory.pipe_file(path, b"half a fi")
    with caplog.at_level(logging.WARNING):
        cache = PlanCache(url)
        assert cache.get("timings", made[0]) is None
    assert list(memory.store) == [path]
    assert memory.cat_file(path) == b"half a fi"
    assert len(caplog.records) == 1


def test_a_file_system_that_fails_is_one_warning(
    memory: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Throttled(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise Throttled("slow down")

    for name in ("open", "pipe_file", "ls"):
        monkeypatch.setattr(type(memory), name, fail)
    with caplog.at_level(logging.WARNING):
        for url in ("memory://fleet/plans.json", "memory://fleet"):
            cache = PlanCache(url)
            cache.put("timings", *_timing(1))
            cache.put("timings", *_timing(2))
            assert cache.get("timings", _timing(2)[0]) == _timing(2)[1]
            assert len(cache) == 2
    assert "Throttled: slow down" in caplog.text
    assert len(caplog.records) <= 4
    with pytest.raises(CacheError, match="cannot write memory"):
        cache.save("memory://fleet/export.json")
    with pytest.raises(CacheError, match="cannot read memory"):
        PlanCache.load("memory://fleet/export.json")


def test_a_file_that_is_too_large_is_not_fetched(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BYTES", 1000)
    memory.pipe_file("/large.json", b" " * 5000)
    with pytest.raises(CacheError, match="keep fewer records"):
        codec.read("memory://large.json")


def test_what_a_url_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="nosuch"):
        PlanCache("nosuch://bucket/plans")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for use in (PlanCache, PlanCache.load, PlanCache().save):
        with pytest.raises(CacheError, match=r'pip install "autoplan\[urls\]"'):
            use("memory://plans.json")


def test_importing_the_cache_does_not_import_fsspec() -> None:
    """torch does, where it saves checkpoints; we do it when a URL is given."""
    assert not any(name == "fsspec" for name in vars(files)), json.dumps(sorted(vars(files)))


def test_a_url_that_became_a_path_is_refused() -> None:
    for work in (
        lambda path: PlanCache(path),
        lambda path: PlanCache.load(path),
        lambda path: PlanCache().save(path),
        codec.read,
    ):
        with pytest.raises(CacheError, match="pass it as a str"):
            work(Path("memory://bucket/cache.json"))
    assert not Path("memory:").exists()
