"""The committed checksums of what the core answers and decides, in many random runs of every kind.

python -m tests.independent.golden_decisions --write      all of them anew: only for a change of decisions that the
                                                          CHANGELOG names
python -m tests.independent.golden_decisions --lines KEY  what one run was answered, to be compared with another's
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from jaxcache.types import WritePolicy
from tests.independent.fuzzer import Fuzzer
from tests.independent.record import Record
from tests.independent.setting import EVICTION_POLICIES, MIXTURES, Kind

FILE = Path(__file__).parents[1] / "goldens" / "decisions.json"
ROUNDS = 6  # runs of every kind, each of another seed
CALLS_PER_RUN = 250


def kinds() -> Iterator[Kind]:
    for choices in itertools.product(MIXTURES, EVICTION_POLICIES, WritePolicy, (False, True)):
        yield Kind(*choices)


def key_of(kind: Kind) -> str:
    names = "+".join(make.__name__ for make in kind.mixture)
    return f"{names} {kind.eviction_policy} {kind.write_policy.value} {'tenants' if kind.has_tenants else '-'}"


def seed_of(key: str, number: int) -> int:
    """Of the same run whatever other kinds there are."""
    return int.from_bytes(f"{key} {number}".encode(), "big")


def run(kind: Kind, number: int, keeps_lines: bool = False) -> Record:
    """number: of the run among those of its kind, 0 .. ROUNDS - 1."""
    fuzzer = Fuzzer(seed_of(key_of(kind), number), kind)
    record = fuzzer.world.record = Record(keeps_lines)
    fuzzer.run(CALLS_PER_RUN)
    record.note("counters", fuzzer.core.digest, sorted(fuzzer.core.counters.values()))  # names may change
    return record


def checksums(kind: Kind) -> list[str]:
    return [run(kind, number).checksum() for number in range(ROUNDS)]


def read() -> dict[str, list[str]]:
    return json.loads(FILE.read_text())


def write() -> None:
    with ProcessPoolExecutor() as pool:
        made = pool.map(checksums, kinds(), chunksize=8)
        lines = [
            f"  {json.dumps(key_of(kind))}: {json.dumps(found)}" for kind, found in zip(kinds(), made, strict=True)
        ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true")
    choice.add_argument("--lines", metavar="KEY", help="such as 'full+window lru write_back tenants 0'")
    args = parser.parse_args()
    if args.write:
        write()
        return
    key, _, number = args.lines.rpartition(" ")
    found = [kind for kind in kinds() if key_of(kind) == key]
    if not found or not number.isdigit():
        parser.error(f"no run is named {args.lines!r}")
    print(*run(found[0], int(number), keeps_lines=True).lines, sep="", end="")


if __name__ == "__main__":
    main()
