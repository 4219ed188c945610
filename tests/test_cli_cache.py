"""`autoplan cache`: what each action prints and changes, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest

from autoplan import PlanCache, cli, cli_cache
from autoplan.cache import codec, files
from autoplan.cache.store import entry

Run = Callable[..., tuple[int, str, str]]


def timing(rows: int, ratio: float = 0.5) -> tuple[str, dict[str, Any]]:
    shape = {"rows": rows, "in_features": 64, "out_features": 96, "dtype": "float32", "mode": "eager"}
    fingerprint = {"environment": {"device": "Some CPU"}, "shape": shape, "candidate": "bf16", "kernel": "onednn"}
    return entry(fingerprint, {"ratio": ratio})


def filled(path: Path | str | None, *rows: int) -> PlanCache:
    cache = PlanCache.default() if path is None else PlanCache(path)
    cache.put_many("timings", dict(timing(number) for number in rows))
    return cache


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `autoplan cache ...`; gives the exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["cache", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["show"],
        ["merge", "a.json"],
        ["merge", "--out", "c.json"],
        ["export"],
        ["list", "--kind", "tunings"],
        ["prune", "--older-than", "30 days"],
        ["prune", "--older-than", "d"],
        ["prune", "--max-size", "-1GB"],
        ["prune", "--max-size", "1 parsec"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["cache", *arguments])
    assert exit.value.code == 2
    assert "usage: autoplan cache" in capsys.readouterr().err


def test_every_action_has_help_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "show", "verify", "merge", "prune", "export", "import"):
        with pytest.raises(SystemExit) as exit:
            cli.main(["cache", action, "--help"])
        assert exit.value.code == 0
        text = capsys.readouterr().out
        assert "--json" in text
        assert "exit codes:" in text


def test_list(run: Run, tmp_path: Path) -> None:
    assert run("list") == (0, f"0 records, 0 B, in {tmp_path}/user-cache/autoplan/\n", "")
    assert not (tmp_path / "user-cache").exists()
    cache = filled(None, 1, 48)
    fingerprint = {"layer": "encoder.0", "program": "1:onednn", "model": {"digest": "abcdef0123456789"}}
    cache.put("sensitivities", *entry(fingerprint, {"harm": 1e-4}))
    cache.put("plans", *entry({"model": {"digest": "abcdef01234", "layers": {"a": {}}}, "options": {}}, {"layers": []}))
    code, out, _ = run("list")
    assert code == 0
    assert "bf16/onednn, 48x64x96 float32 eager, Some CPU" in out
    assert "encoder.0 on 1:onednn, model abcdef01" in out
    assert "model abcdef01, 1 layers, budget ?" in out
    assert "4 records, " in out
    listed = json.loads(run("list", "--json")[1])
    assert {(item["kind"], item["key"]) for item in listed} == set(cache)
    assert sum(item["nbytes"] for item in listed) == sum(
        file.stat().st_size for file in (tmp_path / "user-cache").rglob("*.json")
    )
    assert len(json.loads(run("list", "--kind", "plans", "--json")[1])) == 1


def test_list_of_records_that_say_little(run: Run, tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "old.json")
    for kind, fingerprint in (("timings", {"shape": 3}), ("sensitivities", {"model": []}), ("plans", {"model": "m"})):
        cache.put(kind, *entry(fingerprint, {}))  # type: ignore[arg-type]
    code, out, _ = run("list", "--cache", tmp_path / "old.json")
    assert code == 0
    assert out.count("?") >= 6


def test_show(run: Run, tmp_path: Path) -> None:
    cache = filled(tmp_path / "plans", *range(20))
    key, record = timing(7)
    for wanted in (key, key[:30]):
        code, out, _ = run("show", wanted, "--cache", tmp_path / "plans")
        assert code == 0
        assert json.loads(out) == {"kind": "timings", "key": key, **record}
    code, out, err = run("show", "nothing", "--cache", tmp_path / "plans")
    assert (code, out) == (1, "")
    assert "no whole record" in err
    code, _, err = run("show", "", "--cache", tmp_path / "plans")
    assert code == 2
    assert "20 keys begin with ''" in err
    assert len(cache) == 20


@pytest.mark.parametrize("name", ["plans", "plans.json", "plans.pkl"])
def test_verify_of_a_sound_cache(run: Run, tmp_path: Path, name: str) -> None:
    filled(tmp_path / name, 1, 2)
    assert run("verify", "--cache", tmp_path / name) == (0, f"2 records in {tmp_path / name}, no problems\n", "")
    found = json.loads(run("verify", "--json", "--cache", tmp_path / name)[1])
    assert found == {"path": str(tmp_path / name), "records": 2, "problems": {}}


def test_what_cannot_be_read_is_no_sound_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "plans", 1)

    def refuse(*_: object) -> Any:
        raise PermissionError("no access")

    with monkeypatch.context() as patch:
        patch.setattr(files.Local, "names", refuse)
        code, out, _ = run("verify", "--cache", tmp_path / "plans")
        assert code == 1
        assert "cannot be listed: no access" in out
    monkeypatch.setattr(files.Local, "exists", refuse)
    code, out, _ = run("verify", "--cache", tmp_path / "plans")
    assert code == 1
    assert "cannot be read: no access" in out
    code, _, err = run("list", "--cache", tmp_path / "plans")
    assert code == 2
    assert "cannot be read: no access" in err


def test_verify_names_what_cannot_be_trusted_and_changes_nothing(run: Run, tmp_path: Path) -> None:
    filled(tmp_path / "plans", 1, 2, 3)
    bad = tmp_path / "plans" / "timings" / f"{timing(2)[0]}.json"
    bad.write_text(bad.read_text().replace("0.5", "0.1"))
    code, out, _ = run("verify", "--cache", tmp_path / "plans")
    assert code == 1
    assert f"timings/{timing(2)[0]}: " in out
    assert "3 records" in out
    assert "1 problem\n" in out
    assert bad.exists()
    cache = PlanCache.load(filled_file(tmp_path))
    data: Any = cache.to_dict()
    data["records"]["timings"][timing(2)[0]]["value"]["ratio"] = 0.1
    codec.write(tmp_path / "plans.json", data)
    code, out, _ = run("verify", "--cache", tmp_path / "plans.json", "--json")
    assert code == 1
    assert list(json.loads(out)["problems"]) == [f"timings/{timing(2)[0]}"]
    (tmp_path / "plans.json").write_text("half a fi")
    code, out, _ = run("verify", "--cache", tmp_path / "plans.json")
    assert code == 1
    assert "not JSON of plain data" in out
    assert (tmp_path / "plans.json").read_text() == "half a fi"
    assert run("list", "--cache", tmp_path / "plans.json")[0] == 2


def filled_file(folder: Path) -> Path:
    filled(folder / "plans.json", 1, 2)
    return folder / "plans.json"


@pytest.mark.parametrize("out", ["c", "c.json", "memory://cli/c", "memory://cli/c.json"])
def test_merge(run: Run, tmp_path: Path, out: str) -> None:
    fsspec.filesystem("memory").store.clear()
    place = out if "://" in out else str(tmp_path / out)
    filled(tmp_path / "a", 1, 2)
    two = filled(tmp_path / "b.json", 3)
    two.put("timings", *timing(2, ratio=0.25))
    filled(place, 9)
    code, text, _ = run("merge", tmp_path / "a", tmp_path / "b.json", "--out", place)
    assert code == 0
    assert text == f"3 records read, 3 of them new, 4 now in {place}\n"
    merged = PlanCache(place)
    assert len(merged) == 4
    assert merged.get("timings", timing(2)[0]) == timing(2, ratio=0.25)[1], "the later named has the last word"
    found = json.loads(run("merge", tmp_path / "a", place, "--out", place, "--json")[1])
    assert found == {"path": place, "read": 4, "added": 0, "records": 4}
    fsspec.filesystem("memory").store.clear()


def test_merge_fails_where_something_cannot_be_read_or_written(run: Run, tmp_path: Path) -> None:
    filled(tmp_path / "a.json", 1)
    code, _, err = run("merge", tmp_path / "a.json", tmp_path / "missing.json", "--out", tmp_path / "c.json")
    assert code == 2
    assert "there is no plan cache at" in err
    (tmp_path / "b.json").write_text("{}")
    assert run("merge", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "c.json")[0] == 2
    assert not (tmp_path / "c.json").exists()
    code, _, err = run("merge", tmp_path / "a.json", "--out", tmp_path / "b.json")
    assert code == 2
    assert "1 of 1 records could not be written" in err
    assert (tmp_path / "b.json").read_text() == "{}"


def test_prune(run: Run, tmp_path: Path) -> None:
    cache = filled(tmp_path / "plans", 1)
    old = codec.sealed({**timing(2)[1], "stored": (datetime.now(timezone.utc) - timedelta(days=40)).isoformat()})
    data = {"format": "autoplan cache", "schema": 1}
    data |= {"records": {"timings": {timing(2)[0]: old}, "sensitivities": {}, "plans": {}}}
    cache.merge(PlanCache.from_dict(data))
    assert run("prune", "--cache", tmp_path / "plans")[0] == 2
    code, out, _ = run("prune", "--older-than", "30d", "--max-size", "1GB", "--cache", tmp_path / "plans", "--json")
    assert code == 0
    found = json.loads(out)
    assert [item["key"] for item in found["removed"]] == [timing(2)[0]]
    assert found["records"] == len(PlanCache(tmp_path / "plans")) == 1
    code, out, _ = run("prune", "--max-size", "10", "--cache", tmp_path / "plans")
    assert code == 0
    assert out.startswith("1 records (")
    assert len(PlanCache(tmp_path / "plans")) == 0


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_export_and_import(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    cache = filled(None, 1, 2)
    file = tmp_path / f"site{suffix}"
    code, out, _ = run("export", file)
    assert (code, out) == (0, f"2 records written to {file}\n")
    assert PlanCache.load(file) == cache
    assert json.loads(run("export", file, "--json")[1]) == {"path": str(file), "records": 2}
    monkeypatch.setenv("AUTOPLAN_CACHE", str(tmp_path / "another"))
    assert json.loads(run("import", file, "--json")[1])["added"] == 2
    assert PlanCache(tmp_path / "another") == cache
    assert run("export", tmp_path / "site.yaml")[0] == 2
    assert run("import", tmp_path / "missing.json")[0] == 2


def test_help_does_not_read_the_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(PlanCache, "__init__", lambda *_, **__: pytest.fail("a cache was opened"))
    with pytest.raises(SystemExit):
        cli.main(["cache", "--help"])
    assert "prune" in capsys.readouterr().out


def test_numbers_in_words() -> None:
    assert [cli_cache._size(text) for text in ("0", "10B", "1.5kB", "1 KiB", "1GB", "2tib")] == [
        0, 10, 1500, 1024, 10**9, 2 * 2**40,
    ]  # fmt: skip
    assert [cli_cache._duration(text).total_seconds() for text in ("90s", "1.5 m", "2h", "30d", "1w")] == [
        90, 90, 7200, 30 * 86400, 7 * 86400,
    ]  # fmt: skip
    assert [cli_cache._in_bytes(number) for number in (0, 999, 1000, 1.5e6, 2e13)] == [
        "0 B", "999 B", "1 kB", "1.5 MB", "20 TB",
    ]  # fmt: skip
    now = datetime.now(timezone.utc)
    ages = [timedelta(seconds=5), timedelta(minutes=3), timedelta(hours=5), timedelta(days=40), timedelta(days=-1)]
    assert [cli_cache._age(now - age) for age in ages] == ["5s", "3m", "5h", "40d", "0s"]
    assert cli_cache._age(None) == "?"
