"""One cache, many processes: no finished write is lost and no read is torn, also when a writer is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import autoplan
from autoplan.cache.store import PlanCache

# One interpreter that forks, since importing torch anew for each process would take longer than the writing.
SCRIPT = """
import itertools, os, random, select, signal, sys, traceback
from autoplan.cache import backends
from autoplan.cache.store import PlanCache, entry

place, writers, writes, repeats = sys.argv[1], *map(int, sys.argv[2:])
READERS, VICTIM = 4, 0

def complain(message):
    raise AssertionError(message)  # nothing is set aside, unreadable or unwritable here

backends.warn_once = complain

def made(name, number):
    return entry({"writer": name, "number": number}, {"ratio": number / 7, "text": "long " * (number % 50)})

def write(path, name, done):
    cache = PlanCache(path)
    for number in range(writes):
        cache.put("timings", *made(name, number))
        assert not cache.unsaved
        os.write(done, b".")

def read(path, seed, stop, go_on):
    os.close(go_on)
    random.seed(seed)
    found = 0
    while True:
        last = bool(select.select([stop], [], [], 0)[0])  # the parent has closed its end: once more, then done
        cache = PlanCache(path, read_only=True)
        for _ in range(20):
            key, record = made(random.randrange(writers), random.randrange(writes))
            seen = cache.get("timings", key)
            assert seen in (None, record), seen
            found += seen is not None
        if last:
            assert found, "the readers saw nothing"
            return

def start(work, *arguments):
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

for repeat in range(repeats):
    path = place.format(repeat)
    pipes = [os.pipe() for _ in range(writers)]
    children = [start(write, path, name, pipes[name][1]) for name in range(writers)]
    for _, done in pipes:
        os.close(done)
    stop, go_on = os.pipe()
    readers = [start(read, path, 1000 * repeat + name, stop, go_on) for name in range(READERS)]
    random.seed(repeat)
    finished = 0
    for _ in range(random.randrange(writes - 1)):
        finished += len(os.read(pipes[VICTIM][0], 1))
    os.kill(children[VICTIM], signal.SIGKILL)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes[VICTIM] in (0, signal.SIGKILL), codes
    assert not any(codes[:VICTIM] + codes[VICTIM + 1:]), codes
    while data := os.read(pipes[VICTIM][0], 1 << 16):
        finished += len(data)
    os.close(go_on)
    assert not any([os.waitpid(child, 0)[1] for child in readers])
    for end in [stop, *(end for end, _ in pipes)]:
        os.close(end)
    cache = PlanCache(path)
    for name, number in itertools.product(range(writers), range(writes)):
        key, record = made(name, number)
        seen = cache.get("timings", key)
        assert seen == record or (seen is None and name == VICTIM and number >= finished), (name, number, finished)
    assert not cache.problems()
    print(f"repeat {repeat}: killed after {finished} of {writes} writes, {len(cache)} records", flush=True)
"""


def run(place: str, writers: int, writes: int, repeats: int) -> str:
    """The script's output. Raises CalledProcessError with what went wrong on stderr."""
    command = [sys.executable, "-c", SCRIPT, place, str(writers), str(writes), str(repeats)]
    root = str(Path(autoplan.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_folder_shared_by_8_writers_4_readers_and_a_killer(tmp_path: Path) -> None:
    assert run(f"{tmp_path}/{{}}/", 8, 200, 1).count("repeat") == 1
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock")]
    assert all(name.endswith(".tmp") for name in left)
    assert len(left) <= 1, "at most what the killed writer was writing"
    PlanCache(tmp_path / "0").prune(max_bytes=1 << 40)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_file_shared_by_8_writers_4_readers_and_a_killer(tmp_path: Path) -> None:
    assert run(f"{tmp_path}/{{}}.json", 8, 12, 1).count("repeat") == 1
    assert not list(tmp_path.rglob("*.unreadable-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "writes"), [("{}/", 200), ("{}.json", 25), ("{}.pkl", 25)])
def test_twenty_times(tmp_path: Path, place: str, writes: int) -> None:
    assert run(f"{tmp_path}/{place}", 8, writes, 20).count("repeat") == 20
