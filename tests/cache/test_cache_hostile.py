"""Hostile and broken files of whole plans and caches: a CacheError or a clean miss, never code, a hang or a wrong plan.

The bytes that break the two formats themselves are in test_cache_codec.py; here are those that are well-formed and lie,
those that were cut short, and those with flipped bits.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import pickle
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoplan import Plan, PlanCache
from autoplan.cache import codec, form, peek
from autoplan.cache.form import KINDS
from autoplan.errors import CacheError

GOLDEN = Path(__file__).parent / "golden"
PLAN: Any = codec.read(GOLDEN / "plan-v1.json")
EXPECTED_PLAN = Plan.from_dict(PLAN).to_dict()
CACHE: Any = codec.read(GOLDEN / "cache-v1.json")
FILES = ["plan-v1.json", "plan-v1.pkl", "cache-v1.json", "cache-v1.pkl", "cache-v1-lines.pkl"]
MOST_BYTES = 200 << 20


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What is set aside is reported; here that is thousands of times."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from paths(value, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the data with another value at a place."""
    if not path:
        return value
    data = where = copy.deepcopy(data)
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    return data


def nested(depth: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(depth):
        data = [data]
    return data


WRONG: list[Any] = [
    None, True, 0, 1, -1, 2**63 - 1, -(2**63), 2**64, 10**400, 0.0, 0.5, -0.5, -1e-300, 1e308, math.nan, math.inf,
    -math.inf, "", "x", "1", "nan", "\x00", "\ud800", "a" * 100_000, "../../etc/passwd", [], [1], [[]], nested(60),
    nested(100), {}, {"": 0}, {"x": {}}, {1: 2}, {None: 0}, (), b"x", {1}, 1j, object(), Plan, os.system,
]  # fmt: skip


def same(one: Any, two: Any) -> bool:
    """Equal and of equal types, but that a whole number may stand for a float and a tuple for a list."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))
    return (type(one) is type(two) and one == two) or (type(one) is int and type(two) is float and float(one) == two)


def test_a_wrong_value_in_any_field_of_a_plan_is_refused_or_kept_as_it_is() -> None:
    unsealed = {name: value for name, value in PLAN.items() if name != "digest"}  # its author knows how to seal
    outcomes = {"refused": 0, "kept": 0}
    for path in paths(unsealed):
        for wrong in WRONG:
            try:
                plan = Plan.from_dict(changed(unsealed, path, wrong))
            except CacheError:
                outcomes["refused"] += 1
                continue
            outcomes["kept"] += 1
            found: Any = plan.to_dict()
            for key in path[:-1]:
                found = found[key]
            kept = found[path[-1]]
            if path[0] != "fingerprints":  # of these only what apply_plan reads has a form; the rest is for people
                assert same(wrong, kept), (path, wrong, kept)
                assert not isinstance(kept, float) or math.isfinite(kept) or path[-1] == "sqnr_db", (path, kept)
    assert outcomes["refused"] > 4 * outcomes["kept"] > 0


@pytest.mark.parametrize("field", ["us", "us_low", "us_high", "baseline_us", "harm", "nbytes", "gap", "price_us"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -1])
def test_a_time_or_size_that_cannot_be_is_refused(field: str, value: float) -> None:
    unsealed = {name: value for name, value in PLAN.items() if name != "digest"}
    places = [path for path in paths(unsealed) if path and path[-1] == field]
    assert places
    for path in places:
        with pytest.raises(CacheError):
            Plan.from_dict(changed(unsealed, path, value))


def test_a_changed_field_of_a_sealed_plan_is_refused() -> None:
    for path in paths(PLAN):
        if path:
            with pytest.raises(CacheError):
                Plan.from_dict(changed(PLAN, path, "changed"))


def whole(cache: PlanCache) -> dict[tuple[str, str], Any]:
    return {(kind, key): cache.get(kind, key) for kind, key in cache if cache.get(kind, key)}


EXPECTED = whole(PlanCache.from_dict(CACHE))


def check(cache: PlanCache) -> None:
    """All that it gives is what was put in."""
    for kind, key in EXPECTED:
        cache.get(kind, key)  # type: ignore[call-overload]
    assert whole(cache).items() <= EXPECTED.items()


def test_a_wrong_value_in_any_field_of_a_cache_is_refused_or_a_miss() -> None:
    for path in paths(CACHE):
        for wrong in WRONG if len(path) < 6 else WRONG[::3]:
            if path == ("schema",) and wrong == 1:
                continue
            with suppress(CacheError):
                check(PlanCache.from_dict(changed(CACHE, path, wrong)))


def test_a_record_under_another_kind_is_its_own(tmp_path: Path) -> None:
    """A fingerprint says what it is of: a file that is moved answers no question but its own."""
    shutil.copytree(GOLDEN / "cache-v1", tmp_path / "moved")
    (tmp_path / "moved" / "plans").rename(tmp_path / "moved" / "old")
    (tmp_path / "moved" / "timings").rename(tmp_path / "moved" / "plans")
    assert whole(PlanCache(tmp_path / "moved")).keys() <= {key for key in EXPECTED if key[0] == "sensitivities"}


# -- files -----------------------------------------------------------------------------------------------------------


def use(path: Path) -> None:
    """Load a file in every way there is: it is what it was, or refused, or set aside, or not used."""
    data = path.read_bytes()
    if path.name.startswith("plan"):
        with suppress(CacheError):
            assert Plan.load(path).to_dict() == EXPECTED_PLAN
        return
    with suppress(CacheError):
        check(PlanCache.load(path))
    assert path.read_bytes() == data
    check(PlanCache(path, read_only=True))
    check(PlanCache(path))
    assert any(data == file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name))


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_at_every_64th_byte(name: str, tmp_path: Path) -> None:
    data = (GOLDEN / name).read_bytes()
    for length in [*range(0, len(data), 64), len(data) - 2]:
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / name).write_bytes(data[:length])
        use(folder / name)


def test_a_record_of_a_folder_cut_short_at_every_64th_byte(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "cache-v1", tmp_path / "cache")
    for file in list((tmp_path / "cache").rglob("*.json")):
        data = file.read_bytes()
        for length in range(0, len(data) - 1, 64):
            file.write_bytes(data[:length])
            cache = PlanCache(tmp_path / "cache")
            assert cache.get(file.parent.name, file.stem) is None  # type: ignore[arg-type]
            check(cache)
        file.write_bytes(data)
    assert whole(PlanCache(tmp_path / "cache")) == EXPECTED


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=6)


def flipped(data: bytes, flips: list[tuple[int, int]]) -> bytes:
    found = bytearray(data)
    for position, bits in flips:
        found[position % len(found)] ^= bits
    return bytes(found)


def use_flipped(name: str, flips: list[tuple[int, int]]) -> None:
    data = flipped((GOLDEN / name).read_bytes(), flips)
    loads = codec.loads_json if name.endswith(".json") else codec.loads_pickle
    with suppress(CacheError):
        if name.startswith("plan"):
            assert Plan.from_dict(loads(data)).to_dict() == EXPECTED_PLAN
        else:
            check(PlanCache.from_dict(loads(data)))


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), flips=FLIPS)
def test_flipped_bits(name: str, flips: list[tuple[int, int]]) -> None:
    use_flipped(name, flips)


def test_every_single_letter_of_a_plan_counts() -> None:
    """One bit of each byte in turn: the digest leaves no byte that could become another plan."""
    for name in ("plan-v1.json", "plan-v1.pkl"):
        for position in range(len((GOLDEN / name).read_bytes())):
            use_flipped(name, [(position, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_for_a_minute(name: str) -> None:
    """A minute per file, and the process never grows by 200 MB."""
    resource = pytest.importorskip("resource")  # not on Windows
    before, until = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + 60
    while time.monotonic() < until:

        @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(flips=FLIPS)
        def run(flips: list[tuple[int, int]]) -> None:
            use_flipped(name, flips)

        run()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST_BYTES


# -- a corpus of files that lie --------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark when it is unpickled."""

    mark = ""

    def __init__(self, how: Any = os.mkdir) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how, (Bomb.mark,)


def _records(kind: str, found: Any, **others: Any) -> dict[str, Any]:
    return {"format": form.FORMAT, "schema": 1, "records": {**{k: {} for k in KINDS}, kind: found}} | others


KEY, RECORD = next(iter(CACHE["records"]["timings"].items()))
LIES: dict[str, Any] = {
    "a list": [],
    "a text": "autoplan cache",
    "a number": 1,
    "nothing": None,
    "an empty dict": {},
    "another format": _records("timings", {}, format="autoplan plan"),
    "a format that is a list": _records("timings", {}, format=["autoplan cache"]),
    "schema 0": _records("timings", {}, schema=0),
    "schema -1": _records("timings", {}, schema=-1),
    "schema 1.0": _records("timings", {}, schema=1.0),
    "schema True": _records("timings", {}, schema=True),
    "schema 2**62": _records("timings", {}, schema=2**62),
    "schema of a text": _records("timings", {}, schema="1"),
    "no records": {"format": form.FORMAT, "schema": 1},
    "records that are a list": _records("timings", {}, records=[]),
    "a kind that is missing": {"format": form.FORMAT, "schema": 1, "records": {"timings": {}, "plans": {}}},
    "a kind too many": _records("tunings", {}),
    "a kind that is a list": _records("timings", [RECORD]),
    "a record that is nothing": _records("timings", {KEY: None}),
    "a record that is a text": _records("timings", {KEY: "ratio"}),
    "a record whose text claims too much": _records("timings", {KEY: f"[{'[],' * 1_000_000}[]]"}),
    "a record whose text is a list": _records("timings", {KEY: "[]"}),
    "a record whose text is of another time": _records("timings", {KEY: json.dumps({**RECORD, "stored": "2020"})}),
    "a record that is a list": _records("timings", {KEY: [RECORD]}),
    "a record without a value": _records("timings", {KEY: {"fingerprint": RECORD["fingerprint"]}}),
    "a record with more in it": _records("timings", {KEY: {**RECORD, "run": "rm -rf"}}),
    "a record under no key": _records("timings", {"": RECORD}),
    "a record under a path": _records("timings", {"../../x": RECORD}),
    "a record under another key": _records("timings", {"0" * 64: RECORD}),
    "a value of another time": _records("timings", {KEY: {**RECORD, "value": {**RECORD["value"], "ratio": 0.1}}}),
    "a value that is a list": _records("timings", {KEY: {**RECORD, "value": [1]}}),
    "a fingerprint that is a text": _records("timings", {KEY: {**RECORD, "fingerprint": "x"}}),
    "a fingerprint of another device": _records("timings", {KEY: {**RECORD, "fingerprint": {"device": "H100"}}}),
    "a digest that is nothing": _records("timings", {KEY: {**RECORD, "digest": None}}),
    "a digest that is a list": _records("timings", {KEY: {**RECORD, "digest": []}}),
    "a date that was changed": _records("timings", {KEY: {**RECORD, "stored": "9999-12-31T00:00:00+00:00"}}),
    "a date that is a number": _records("timings", {KEY: {**RECORD, "stored": 10**18}}),
    "records nested deep": _records("timings", nested(60)),
    "a plan": PLAN,
    "many empty records": _records("timings", {f"{number:064x}": {} for number in range(2_000)}),
}


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_or_a_miss(name: str, suffix: str, tmp_path: Path) -> None:
    for kind in ("cache", "plan"):
        path = tmp_path / f"{kind}{suffix}"
        path.write_bytes(json.dumps(LIES[name]).encode() if suffix == ".json" else pickle.dumps(LIES[name]))
        tracemalloc.start()
        try:
            if kind == "plan" and LIES[name] is not PLAN:
                with pytest.raises(CacheError):
                    Plan.load(path)
            else:
                use(path)
            assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
        finally:
            tracemalloc.stop()


LARGE = {  # 30 MiB each, twice, in the layout of a large file; or half of that in a pickle
    "one text": b'"' + b"x" * (30 << 20) + b'"',
    "numbers": b"[" + b"0," * (15 << 20) + b"0]",
    "empty lists": b"[" + b"[]," * (10 << 20) + b"0]",
    "an open list": b"[" * (30 << 20),
    "lines": b'\n      "' * (30 << 17),
}


@pytest.mark.parametrize("suffix", codec.SUFFIXES)
@pytest.mark.parametrize("name", LARGE)
def test_a_large_file_that_lies_claims_no_more_memory_than_others(name: str, suffix: str, tmp_path: Path) -> None:
    path, keys = tmp_path / f"cache{suffix}", ("0" * 64, "1" * 64)
    if suffix == ".json":
        marks = {"timings": dict.fromkeys(keys, b"?"), "sensitivities": {}, "plans": {}}
        path.write_bytes(peek.file_of(marks, form.FORMAT, 1).replace(b"?", LARGE[name]))
        assert codec.MAX_BYTES < path.stat().st_size < peek.MAX_BYTES
    else:
        texts = dict(zip(keys, (LARGE[name][: 15 << 20].decode(), LARGE[name][-15 << 20 :].decode()), strict=True))
        path.write_bytes(pickle.dumps(_records("timings", texts), protocol=4))
        assert codec.MAX_BYTES * 0.9 < path.stat().st_size < codec.MAX_BYTES
    tracemalloc.start()
    try:
        with suppress(CacheError):
            check(PlanCache.load(path))
        for read_only in (True, False):
            cache = PlanCache(path, read_only=read_only)
            check(cache)
            cache.put("timings", KEY, CACHE["records"]["timings"][KEY])
            assert cache.get("timings", KEY)
            del cache
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("how", [os.mkdir, os.system, eval, exec, open, __import__, Bomb])
def test_a_bomb_anywhere_in_a_file_does_not_go_off(how: Any, protocol: int, tmp_path: Path) -> None:
    Bomb.mark = str(tmp_path / "mark")
    bomb = Bomb(how)
    for number, data in enumerate([bomb, {**PLAN, "mode": bomb}, {**PLAN, bomb: 1}, _records("timings", {KEY: bomb})]):
        for kind in ("plan", "cache"):
            path = tmp_path / str(number) / f"{kind}.pkl"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps(data, protocol=protocol))
            use(path)
    assert not (tmp_path / "mark").exists()
