"""Plain data round-trips through both formats; hostile and broken files end in a CacheError and nothing else."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.cache import codec
from autoplan.errors import CacheError

EXAMPLE = {
    "none": None,
    "flags": [True, False],
    "ints": [0, -1, 255, 65536, -(2**63), 2**64 - 1],
    "floats": [0.1, -0.0, 1e-308, 1.7976931348623157e308],
    "text": ["", "naïve \N{SNOWMAN} \U0001f600", 'quote " \\ \n \x00'],
    "nested": {"a": {"b": [[], {}, [[1, 2], [3]]]}, "": 0},
    "long": ["x" * 300, list(range(200))],
}

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=30,
)


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_a_file_gives_back_what_was_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    codec.write(path, EXAMPLE)
    found = codec.read(path)
    assert found == EXAMPLE
    assert repr(found) == repr(EXAMPLE)  # also tells 1 from True and 1.0, and 0.0 from -0.0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_both_formats_agree(data: codec.Plain) -> None:
    assert repr(codec.loads_json(codec.dumps_json(data))) == repr(data)
    assert repr(codec.loads_pickle(codec.dumps_pickle(data))) == repr(data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_modern_pickle_of_plain_data_is_read(protocol: int) -> None:
    data = json.loads(json.dumps(EXAMPLE)) | {"many": [{"name": f"layer {i}"} for i in range(3000)]}
    assert codec.loads_pickle(pickle.dumps(data, protocol=protocol)) == data


def test_tuples_become_lists_and_nothing_is_shared() -> None:
    data = {"shape": (2, (3,))}
    found = codec.plain(data)
    assert found == {"shape": [2, [3]]}
    row = [1]
    assert codec.loads_pickle(codec.dumps_pickle([row, row])) == [[1], [1]]


def test_json_is_readable() -> None:
    data = {"schema": 1, "layers": [{"name": f"layer.{i}", "ratio": 0.5} for i in range(5)]}
    lines = codec.dumps_json(data).decode().splitlines()
    assert '    {"name": "layer.0", "ratio": 0.5},' in lines
    assert max(map(len, lines)) <= 120
    assert json.loads("\n".join(lines)) == data


def test_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert codec.digest({"a": 1, "b": [1, 2]}) == codec.digest({"b": (1, 2), "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"b": 1}, [{"a": 1}], {"a": None}]
    assert len({codec.digest(data) for data in different}) == len(different)
    assert codec.digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"value": {"ratio": math.inf}}, "value.ratio is inf"),
        ({"value": [1.0, math.nan]}, r"value\[1\] is nan"),
        ({"a": {1: 2}}, "a.1 has a key that is a int"),
        ({"a": {1, 2}}, "a is a set"),
        (b"bytes", "it is a bytes"),
        ([np.float64(1.0)], r"\[0\] is a numpy.float64"),
        ([2**64], "more than 64 bits"),
        (["\ud800"], "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        ([object()], "is a object"),
        ([pytest], "is a module"),
    ],
)
def test_what_is_not_plain_is_refused_by_its_place(tmp_path: Path, data: object, where: str) -> None:
    for suffix in (".json", ".pkl"):
        with pytest.raises(CacheError, match=where):
            codec.write(tmp_path / f"data{suffix}", data)
    assert not list(tmp_path.iterdir())


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CacheError, match="deeper than"):
        codec.dumps_json(endless)


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    for call in (lambda path: codec.write(path, {}), codec.read):
        with pytest.raises(CacheError, match=r"\.json or \.pkl"):
            call(tmp_path / "plan.yaml")


# -- a write that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    path = tmp_path / "plan.json"
    codec.write(path, {"old": 1})

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(CacheError if isinstance(failure, OSError) else KeyboardInterrupt):
        codec.write(path, {"new": 2})
    monkeypatch.undo()
    assert codec.read(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_keeps_links_and_permissions(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    codec.write(target, {"old": 1})
    target.chmod(0o640)
    link.symlink_to(target)
    codec.write(link, {"new": 2})
    assert link.is_symlink()
    assert codec.read(target) == {"new": 2}
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("missing.json", "folder.json", "pipe.json"):
        with pytest.raises(CacheError, match="cannot read") as caught:
            codec.read(tmp_path / name)
        assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(CacheError, match="cannot write"):
        codec.write(tmp_path / "no" / "folder.json", {})


# -- hostile files ---------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (os.mkdir, (SENTINEL,)) if self.how == "reduce" else (eval, (f"__import__('os').mkdir({SENTINEL!r})",))


SENTINEL = "/tmp/autoplan-a-hostile-pickle-ran"
_MKDIR = b"cos\nmkdir\n"
_ARGUMENT = b"(V" + SENTINEL.encode() + b"\nt"


class _Persistent(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return "id" if obj == "persist" else None


def _persistent_pickle(protocol: int) -> bytes:
    file = io.BytesIO()
    _Persistent(file, protocol=protocol).dump(["persist"])
    return file.getvalue()


HOSTILE_PICKLES: dict[str, bytes] = {
    **{f"reduce, protocol {p}": pickle.dumps({"a": Bomb("reduce")}, protocol=p) for p in range(6)},
    **{f"eval, protocol {p}": pickle.dumps([Bomb("eval")], protocol=p) for p in range(6)},
    **{f"persistent id, protocol {p}": _persistent_pickle(p) for p in (0, 4)},
    **{f"set, protocol {p}": pickle.dumps({1, 2}, protocol=p) for p in (0, 4)},
    **{f"bytes, protocol {p}": pickle.dumps({"a": b"x"}, protocol=p) for p in (0, 3, 5)},
    "global": _MKDIR + b".",
    "global and reduce": _MKDIR + _ARGUMENT + b"R.",
    "inst": b"(V" + SENTINEL.encode() + b"\nios\nmkdir\n.",
    "obj": b"(" + _MKDIR + b"V" + SENTINEL.encode() + b"\no.",
    "newobj": b"\x80\x02" + _MKDIR + _ARGUMENT + b"\x81.",
    "newobj_ex": b"\x80\x04" + _MKDIR + _ARGUMENT + b"}\x92.",
    "build": b"\x80\x02}}b.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93.",
    "ext1": b"\x80\x02\x82\x01.",
    "ext2": b"\x80\x02\x83\x01\x00.",
    "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "binpersid": b"\x80\x02K\x01Q.",
    "next buffer": b"\x80\x05\x97.",
    "bytearray": pickle.dumps(bytearray(b"x"), protocol=5),
    "frozenset": pickle.dumps(frozenset([1]), protocol=4),
    "tuple": pickle.dumps((1, 2), protocol=4),
    "complex": pickle.dumps(1j, protocol=4),
    "numpy": pickle.dumps(np.zeros(2), protocol=4),
    "memo of 2**31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo of 2**32 - 1": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo that skips": b"\x80\x02Nq\x07.",
    "text memo": b"Np2147483647\n.",
    "get before put": b"\x80\x02h\x00.",
    "string of 2**62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "string of 2**63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "string of 2**32 - 1 bytes": b"\x80\x04X\xff\xff\xff\xffx.",
    "bytes of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "int of 2**31 - 1 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "int of 255 bytes": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "frame of 2**63 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"N.",
    "frame one byte too long": b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N.",
    "protocol 6": b"\x80\x06N.",
    "protocol 255": b"\x80\xffN.",
    "not UTF-8": b"\x80\x04\x8c\x02\xff\xff.",
    "half a surrogate pair": b"\x80\x04\x8c\x03\xed\xa0\x80.",
    "deep": b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",
    "deep, with marks": b"\x80\x04" + b"](" * 5000 + b"e" * 5000 + b".",
    "deep, dicts": b"\x80\x04" + b"}K\x00" * 5000 + b"N" + b"s" * 5000 + b".",
    "a list that holds itself": b"\x80\x04]\x94h\x00a.",
    "billion laughs": b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b".",
    "infinite": pickle.dumps({"a": [math.inf]}),
    "not a number": pickle.dumps({"a": math.nan}),
    "key that is an int": pickle.dumps({1: 2}),
    "key that is None": pickle.dumps({None: 2}),
    "key that is a list": b"\x80\x04}]Ns.",
    "append to a dict": b"\x80\x04}Na.",
    "append to a str": b"\x80\x04\x8c\x01xNa.",
    "set an item of a str": b"\x80\x04\x8c\x01xNNs.",
    "items without a mark": b"\x80\x04]e.",
    "append to nothing": b"\x80\x04Na.",
    "append below a mark": b"\x80\x04](Na.",
    "nothing": b"\x80\x04.",
    "a mark alone": b"\x80\x04(.",
    "pop": b"\x80\x04NN0.",
    "trailing bytes": b"\x80\x04N." + b"N.",
    "no stop": b"\x80\x04N",
    "empty": b"",
    "unknown opcode": b"\x80\x04\xff.",
    "JSON": b"{}",
}

HOSTILE_JSON: dict[str, bytes] = {
    "empty": b"",
    "text": b"plan",
    "truncated": codec.dumps_json(EXAMPLE)[:-20],
    "duplicate keys": b'{"a": 1, "b": 2, "a": 3}',
    "duplicate keys, one escaped": b'{"a": 1, "\\u0061": 3}',
    "NaN": b'{"a": NaN}',
    "Infinity": b"[Infinity]",
    "minus Infinity": b"[-Infinity]",
    "float that overflows": b"[1e999]",
    "float that overflows, in digits": b"[1" + b"0" * 400 + b".0]",
    "int of 65 bits": b"[36893488147419103232]",
    "int that is one too large": b"[18446744073709551616]",
    "int that is one too small": b"[-9223372036854775809]",
    "int of 10000 digits": b"[" + b"9" * 10000 + b"]",
    "deep lists": b"[" * 100_000,
    "deep lists, closed": b"[" * 500 + b"]" * 500,
    "deep dicts": b'{"a":' * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "half a surrogate pair": b'["\\ud800"]',
    "two values": b"{} {}",
    "comment": b"{} // plan",
    "trailing comma": b"[1,]",
    "single quotes": b"{'a': 1}",
    "control character": b'["\x01"]',
    "a pickle": codec.dumps_pickle(EXAMPLE),
    "null bytes": b"\x00" * 64,
}


def _refused(loads: Any, data: bytes) -> str:
    """The message with which `loads` refuses `data`; it may neither run anything nor claim memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CacheError) as caught:
            loads(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert not os.path.exists(SENTINEL)
    return str(caught.value)


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_a_hostile_pickle_is_refused(name: str, tmp_path: Path) -> None:
    message = _refused(codec.loads_pickle, HOSTILE_PICKLES[name])
    assert "not a pickle of plain data" in message or "not plain data" in message
    path = tmp_path / "hostile.pkl"
    path.write_bytes(HOSTILE_PICKLES[name])
    with pytest.raises(CacheError, match=r"hostile\.pkl"):
        codec.read(path)


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_a_hostile_json_file_is_refused(name: str, tmp_path: Path) -> None:
    assert len(_refused(codec.loads_json, HOSTILE_JSON[name])) < 500
    path = tmp_path / "hostile.json"
    path.write_bytes(HOSTILE_JSON[name])
    with pytest.raises(CacheError, match=r"hostile\.json"):
        codec.read(path)


CLAIMS: dict[str, tuple[Any, bytes]] = {
    "lists": (codec.loads_json, b"[" + b"[]," * 100_000 + b"0]"),
    "numbers": (codec.loads_json, b"[" + b"0," * 200_000 + b"0]"),
    "wide text": (codec.loads_json, b'["' + "\U0001f600".encode() + b"x" * (2 << 20) + b'"]'),
    "wide text, escaped": (codec.loads_json, b'["\\ud83d\\ude00' + b"x" * (2 << 20) + b'"]'),
    "bytes": (codec.loads_json, b" " * (codec.MAX_BYTES + 1)),
    "pickled lists": (codec.loads_pickle, b"\x80\x04](" + b"]" * 100_000 + b"e."),
    "pickled numbers": (codec.loads_pickle, b"\x80\x04](" + b"N" * 200_000 + b"e."),
    "marks": (codec.loads_pickle, b"\x80\x04" + b"(" * 200_000 + b"."),
    "one string often": (
        codec.loads_pickle,
        b"\x80\x02](X\x00\x00\x10\x00" + b"x" * (1 << 20) + b"q\x00" + b"h\x00" * 20 + b"e.",
    ),
    "pickle bytes": (codec.loads_pickle, b"\x80\x04" + b"N" * codec.MAX_BYTES),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_file_that_claims_too_much_is_refused_before_it_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, data = CLAIMS[name]
    monkeypatch.setattr(codec, "MAX_MEMORY", 12 << 20)  # a sixteenth, for speed
    monkeypatch.setattr(codec, "_decode", lambda *_: pytest.fail("it was built"))
    monkeypatch.setattr(codec, "_BuiltinsUnpickler", lambda *_: pytest.fail("it was built"))
    with pytest.raises(CacheError, match="keep fewer records"):
        loads(data)


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(codec, "MAX_MEMORY", 1 << 20)
    with pytest.raises(CacheError, match="keep fewer records"):
        codec.write(tmp_path / f"data{suffix}", [{"number": number} for number in range(5000)])
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(codec.MAX_BYTES + 1)
    with pytest.raises(CacheError, match="keep fewer records"):
        codec.read(path)


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_a_truncated_file_is_refused_at_every_length(suffix: str) -> None:
    whole = codec.dumps_json(EXAMPLE).rstrip() if suffix == ".json" else codec.dumps_pickle(EXAMPLE)
    loads = codec.loads_json if suffix == ".json" else codec.loads_pickle
    for length in range(len(whole)):
        with pytest.raises(CacheError):
            loads(whole[:length])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(min_value=0), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_flipped_bytes_give_plain_data_or_a_cache_error(flips: list[tuple[int, int]], as_json: bool) -> None:
    broken = bytearray(codec.dumps_json(EXAMPLE) if as_json else codec.dumps_pickle(EXAMPLE))
    for position, value in flips:
        broken[position % len(broken)] = value
    try:
        found = (codec.loads_json if as_json else codec.loads_pickle)(bytes(broken))
    except CacheError:
        return
    assert codec.plain(found) == found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([bytes([code]) for code in b"\x80\x94\x95]})(aeusNKhjqrXC.\x8c\x88G\x00\x01"]), max_size=40
    )
)
def test_random_opcodes_give_plain_data_or_a_cache_error(opcodes: list[bytes]) -> None:
    try:
        found = codec.loads_pickle(b"\x80\x04" + b"".join(opcodes) + b".")
    except CacheError:
        return
    assert codec.plain(found) == found
