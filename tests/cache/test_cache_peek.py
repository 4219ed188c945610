"""Large files are not parsed: what is found and written is what a parser would, and any other layout is left to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoplan.cache import codec, peek
from autoplan.cache.form import FORMAT, KINDS, SCHEMA
from autoplan.cache.store import PlanCache, entry
from autoplan.errors import CacheError

CONTENTS = {
    "empty": {},
    "one kind": {"timings": 3},
    "another": {"plans": 1},
    "all": {"timings": 2, "sensitivities": 5, "plans": 1},
}


def filled(counts: dict[str, int]) -> PlanCache:
    cache = PlanCache()
    for kind, count in counts.items():
        for number in range(count):
            text = '\n    },\n      "' + "a" * 64 + '": {' if number == 0 else "long " * 40 * number
            cache.put(kind, *entry({"number": number, "kind": kind, "text": text}, {"list": [1.5, None, {"a": []}]}))  # type: ignore[arg-type]
    return cache


def peeked(data: bytes) -> dict[str, dict[str, bytes]] | None:
    return peek.records_in(data, FORMAT, SCHEMA, KINDS)


@pytest.mark.parametrize("name", CONTENTS)
def test_it_finds_what_a_parser_finds(name: str) -> None:
    data: Any = filled(CONTENTS[name]).to_dict()
    encoded = codec.dumps_json(data)
    found = peeked(encoded)
    if name == "empty":  # fits on one line
        assert found is None
    else:
        assert found is not None
        assert {kind: {key: json.loads(text) for key, text in own.items()} for kind, own in found.items()} == (
            data["records"]
        )
        assert peek.file_of(found, FORMAT, SCHEMA) == encoded


@pytest.mark.parametrize(
    ("room", "limit"), [(peek, "MAX_BYTES"), (peek, "MAX_CONTAINERS"), (codec, "MAX_MEMORY")], ids=str
)
def test_what_would_not_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch, room: Any, limit: str) -> None:
    encoded = codec.dumps_json(filled({"timings": 20}).to_dict())
    found = peeked(encoded)
    assert found is not None
    smallest = {
        "MAX_BYTES": len(encoded),
        "MAX_CONTAINERS": encoded.count(b"{") + encoded.count(b"["),
        "MAX_MEMORY": 2 * len(encoded) + 512 * 20,
    }[limit]
    monkeypatch.setattr(room, limit, smallest)
    assert peeked(encoded) == found
    assert peek.file_of(found, FORMAT, SCHEMA) == encoded
    monkeypatch.setattr(room, limit, smallest - 1)
    assert peeked(encoded) is None
    with pytest.raises(CacheError, match="keep fewer records"):
        peek.file_of(found, FORMAT, SCHEMA)


@pytest.mark.parametrize("name", ["one kind", "all"])
def test_a_file_that_is_cut_off_or_laid_out_otherwise_is_left_to_the_parser(name: str) -> None:
    encoded = codec.dumps_json(filled(CONTENTS[name]).to_dict())
    assert peeked(encoded) is not None
    for length in range(len(encoded)):
        assert peeked(encoded[:length]) is None
    for other in (
        encoded + b" ",
        encoded.replace(b'"schema": 1', b'"schema": 2'),
        encoded.replace(b"\n", b"\r\n"),
        json.dumps(json.loads(encoded)).encode(),
        json.dumps(json.loads(encoded), indent=4).encode(),
    ):
        assert peeked(other) is None


def test_a_record_that_cannot_be_parsed_is_no_record_and_spoils_no_other(tmp_path: Path) -> None:
    place = tmp_path / "cache.json"
    cache = filled({"timings": 4})
    cache.save(place)
    broken, *others = cache.keys("timings")
    text = place.read_text()
    at = text.index(broken) + 80
    place.write_text(text[:at] + "}" + text[at + 1 :])
    opened = PlanCache(place, read_only=True)
    assert opened.get("timings", broken) is None
    for key in others:
        assert opened.get("timings", key) == cache.get("timings", key)
    assert list(opened.problems()) == [f"timings/{broken}"]


def test_opening_a_large_file_parses_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled({"timings": 50, "plans": 3})
    cache.save(tmp_path / "cache.json")
    parsed: list[int] = []
    loads = codec.loads_json
    monkeypatch.setattr(codec, "loads_json", lambda data: parsed.append(len(data)) or loads(data))
    opened = PlanCache(tmp_path / "cache.json")
    assert len(opened) == 53
    assert not parsed
    assert opened.get("plans", cache.keys("plans")[0]) is not None
    assert len(parsed) == 1
    assert opened == cache


# -- files larger than what is read as a whole -----------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two files that may be read as a whole, but not what they hold together."""
    places = tmp_path / "one.json", tmp_path / "two.json"
    filled({"timings": 8}).save(places[0])
    filled({"sensitivities": 8}).save(places[1])
    monkeypatch.setattr(codec, "MAX_BYTES", 1 + max(place.stat().st_size for place in places))
    return places


def test_two_files_merge_into_a_larger_one(two: tuple[Path, Path], tmp_path: Path) -> None:
    cache = PlanCache(two[0])
    cache.merge(PlanCache(two[1]))
    assert cache.unsaved == 0
    assert two[0].stat().st_size > codec.MAX_BYTES
    with pytest.raises(CacheError, match="keep fewer records"):
        codec.read(two[0])
    both = filled({"timings": 8, "sensitivities": 8})
    for found in (PlanCache(two[0]), PlanCache.load(two[0])):
        assert found == both
        assert found.problems() == {}
    cache.put("plans", *entry({"model": "m"}, {"layers": []}))
    assert len(PlanCache(two[0])) == 17
    PlanCache.load(two[0]).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == two[0].read_bytes()
    lines = set(two[0].read_text().splitlines())
    assert set(two[1].read_text().splitlines()) - lines <= {"    }", '    "plans": {}', '    "timings": {},', "      }"}


def test_what_takes_too_much_memory_at_once_is_not_built(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PlanCache(two[0])
    cache.merge(PlanCache(two[1]))
    monkeypatch.setattr(codec, "MAX_MEMORY", codec.json_memory(two[0].read_bytes()) * 3 // 4)
    loaded = PlanCache.load(two[0])
    assert loaded == cache
    with pytest.raises(CacheError, match="keep fewer records"):
        loaded.to_dict()
    with pytest.raises(CacheError, match="keep fewer records"):
        loaded.save(tmp_path / "cache.pkl")
    assert not (tmp_path / "cache.pkl").exists()
    folder = PlanCache(f"{tmp_path}/folder/")
    folder.merge(loaded)
    assert folder == loaded
    assert PlanCache.from_dict(folder.to_dict()) == loaded  # of many files, each of which is small


def test_a_record_that_could_not_be_read_again_is_kept_in_memory(two: tuple[Path, Path]) -> None:
    before = two[0].read_bytes()
    cache = PlanCache(two[0])
    large = entry({"model": "m"}, {"text": "x" * codec.MAX_BYTES})
    cache.put("plans", *large)
    assert cache.unsaved == 1
    assert cache.get("plans", large[0]) == large[1]
    assert two[0].read_bytes() == before


def test_a_tampered_record_is_not_merged_and_spoils_no_other(two: tuple[Path, Path]) -> None:
    two[1].write_bytes(two[1].read_bytes().replace(b'"kind": "sensitivities"', b'"kind": "sensitivitiez"', 1))
    bad = list(PlanCache(two[1], read_only=True).problems())
    assert len(bad) == 1
    cache = PlanCache(two[0])
    cache.merge(PlanCache(two[1]))
    assert len(cache) == 15
    assert cache.problems() == {}
    other = PlanCache(two[1])
    other.put("plans", *entry({"model": "m"}, {"layers": []}))
    assert list(PlanCache(two[1]).problems()) == bad
