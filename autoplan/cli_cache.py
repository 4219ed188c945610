"""`autoplan cache ...`: what a plan cache holds, whether it is sound, and moving records between caches."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from autoplan.errors import CacheError

if TYPE_CHECKING:
    from autoplan.cache.store import Entry, PlanCache

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PLACE = "a folder, a .json or .pkl file, or a URL of either"

AddCommand = Callable[[Any, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]


def add(commands: Any, command: AddCommand) -> None:
    """Add `cache` and its actions to the parsers of `commands`; `command` makes one."""
    parser = command(commands, "cache", "show, check, merge and prune what was measured and planned", _list)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, summary: str, run: Callable[[argparse.Namespace], int], own: bool = True) -> Any:
        parser = command(actions, name, summary, run)
        parser.add_argument("--json", action="store_true", help="the same as JSON")
        if own:
            parser.add_argument("--cache", metavar="PLACE", help=f"{_PLACE} (default: the user's own cache)")
        return parser

    parser = action("list", "list the records", _list)
    parser.add_argument("--kind", choices=("timings", "sensitivities", "plans"), help="of this kind only")
    parser = action("show", "print one record, as JSON", _show)
    parser.add_argument("key", metavar="KEY", help="its key, or as much of its beginning as no other has")
    action("verify", "read every record and tell which cannot be trusted; changes nothing", _verify)
    parser = action(
        "merge", "put all records of several caches into one; the later named have the last word", _merge, False
    )
    parser.add_argument("places", metavar="PLACE", nargs="+", help=_PLACE)
    parser.add_argument("--out", metavar="PLACE", required=True, help="the cache that takes them; may hold others")
    parser = action("prune", "forget old records", _prune)
    parser.add_argument(
        "--older-than", type=_duration, metavar="AGE", help="those put longer ago, such as 30d, 12h, 2w"
    )
    parser.add_argument(
        "--max-size", type=_size, metavar="SIZE", help="then the oldest until the rest fit, such as 1GB"
    )
    parser = action("export", "write all records to one file", _export)
    parser.add_argument("file", metavar="FILE", help="path or URL, .json or .pkl; replaced if it is there")
    parser = action("import", "take in all records of a cache", _import)
    parser.add_argument("place", metavar="PLACE", help=_PLACE)


def _list(arguments: argparse.Namespace) -> int:
    from tabulate import tabulate

    cache = _to_read(arguments.cache)
    rows = [(entry, _about(cache, entry)) for entry in cache.entries() if arguments.kind in (None, entry.kind)]
    if arguments.json:
        _print_json([{**_plain(entry), "about": about} for entry, about in rows])
        return 0
    table = [[entry.kind, entry.key[:12], _age(entry.stored), _in_bytes(entry.nbytes), about] for entry, about in rows]
    if table:
        print(tabulate(table, ["kind", "key", "age", "size", "about"], disable_numparse=True))
    print(f"{len(rows)} records, {_in_bytes(sum(entry.nbytes for entry, _ in rows))}, in {_place(arguments.cache)}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from autoplan.cache import codec

    cache = _to_read(arguments.cache)
    found = [(kind, key) for kind, key in cache if key.startswith(arguments.key)]
    if len(found) > 1 and len(arguments.key) < 64:
        keys = ", ".join(f"{kind}/{key[:16]}" for kind, key in found[:8])
        raise CacheError(f"{len(found)} keys begin with {arguments.key!r}: {keys}{', ...' if len(found) > 8 else ''}")
    records = [{"kind": kind, "key": key, **record} for kind, key in found if (record := cache.get(kind, key))]
    if not records:
        print(f"autoplan: no whole record has a key that begins with {arguments.key!r}", file=sys.stderr)
        return 1
    for record in records:
        print(codec.dumps_json(record).decode(), end="")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    place, records, problems = _place(arguments.cache), 0, {}
    try:
        cache = _to_read(arguments.cache)
        records, problems = len(cache), cache.problems()
    except CacheError as error:
        problems[place] = str(error)
    if arguments.json:
        _print_json({"path": place, "records": records, "problems": problems})
    else:
        for where, problem in problems.items():
            print(f"{where}: {problem}")
        print(f"{records} records in {place}, {len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}")
    return 1 if problems else 0


def _merge(arguments: argparse.Namespace) -> int:
    return _take_in([_to_read(place) for place in arguments.places], arguments.out, arguments.json)


def _import(arguments: argparse.Namespace) -> int:
    return _take_in([_to_read(arguments.place)], _place(arguments.cache), arguments.json)


def _take_in(sources: Sequence[PlanCache], place: str, as_json: bool) -> int:
    from autoplan.cache.store import PlanCache

    taken, out = PlanCache(), PlanCache(place)
    for source in sources:
        taken.merge(source)
    before = len(out)
    out.merge(taken)
    if out.unsaved:
        raise CacheError(f"{out.unsaved} of {len(taken)} records could not be written to {place}")
    if as_json:
        _print_json({"path": place, "read": len(taken), "added": len(out) - before, "records": len(out)})
    else:
        print(f"{len(taken)} records read, {len(out) - before} of them new, {len(out)} now in {place}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from autoplan.cache.store import PlanCache

    if arguments.older_than is None and arguments.max_size is None:
        raise CacheError("prune wants --older-than, --max-size or both")
    place = _place(arguments.cache)
    cache = PlanCache(place)
    gone = cache.prune(older_than=arguments.older_than, max_bytes=arguments.max_size)
    if arguments.json:
        _print_json({"path": place, "removed": [_plain(entry) for entry in gone], "records": len(cache)})
    else:
        freed = _in_bytes(sum(entry.nbytes for entry in gone))
        print(f"{len(gone)} records ({freed}) removed, {len(cache)} left in {place}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    cache = _to_read(arguments.cache)
    cache.save(arguments.file)
    if arguments.json:
        _print_json({"path": arguments.file, "records": len(cache)})
    else:
        print(f"{len(cache)} records written to {arguments.file}")
    return 0


# -- places ----------------------------------------------------------------------------------------------------------


def _place(given: str | None) -> str:
    from autoplan.cache.store import default_path

    return given or default_path()


def _to_read(given: str | None) -> PlanCache:
    """The cache at a place, changed by nothing. Raises CacheError where there is none, or a file is unsound."""
    from autoplan.cache import codec, files
    from autoplan.cache.store import PlanCache

    place = files.place(_place(given))
    try:
        exists, is_folder = place.exists(), place.is_folder()
    except OSError as error:
        raise CacheError(f"the plan cache at {place} cannot be read: {error}") from error
    if given is not None and not exists:
        raise CacheError(f"there is no plan cache at {given}")
    if place.suffix in codec.SUFFIXES and exists and not is_folder:
        return PlanCache.load(_place(given))
    return PlanCache(_place(given), read_only=True)


# -- words and numbers -----------------------------------------------------------------------------------------------


def _about(cache: PlanCache, entry: Entry) -> str:
    """A record in a few words, as far as its fingerprint has them: records of other versions may not."""
    record = cache.get(entry.kind, entry.key)
    prints: dict[str, Any] = record["fingerprint"] if record else {}

    def part(*names: str) -> Any:
        found: Any = prints
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return "?" if found is None else found

    if entry.kind == "timings":
        shape = f"{part('shape', 'rows')}x{part('shape', 'in_features')}x{part('shape', 'out_features')}"
        kind = f"{part('shape', 'dtype')} {part('shape', 'mode')}"
        return f"{part('candidate')}/{part('kernel')}, {shape} {kind}, {part('environment', 'device')}"
    model = f"model {str(part('model', 'digest'))[:8]}"
    if entry.kind == "sensitivities":
        return f"{part('layer')} on {part('program')}, {model}"
    layers = part("model", "layers")
    return f"{model}, {len(layers) if isinstance(layers, dict) else '?'} layers, budget {part('options', 'budget')}"


def _plain(entry: Entry) -> dict[str, Any]:
    return {**entry._asdict(), "stored": entry.stored and entry.stored.isoformat()}


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2))


def _age(stored: datetime | None) -> str:
    if stored is None:
        return "?"
    seconds = max(0.0, (datetime.now(timezone.utc) - stored).total_seconds())
    unit = next((unit for unit in "dhm" if seconds >= _SECONDS[unit]), "s")
    return f"{int(seconds // _SECONDS[unit])}{unit}"


def _in_bytes(number: float) -> str:
    power = 0
    while number >= 999.5 and power < 4:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?) ?([smhdw])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be a number and s, m, h, d or w, such as 30d, not {text!r}")
    return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?) ?([kmgt]i?|)b?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"must be a number of bytes, kB, MB, GB or TB, such as 1GB, not {text!r}")
    return int(float(match[1]) * _BYTES[match[2]])
