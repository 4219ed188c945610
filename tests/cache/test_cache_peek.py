"""Large files are not parsed on opening: what is found is what a parser finds, and any other layout is left to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoplan.cache import codec, peek
from autoplan.cache.store import FORMAT, KINDS, SCHEMA, PlanCache, entry

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
