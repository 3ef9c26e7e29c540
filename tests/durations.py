"""Seconds of each test file, for shards of equal time: ``python tests/durations.py JUNIT.XML``."""

import collections
import pathlib
import sys
import xml.etree.ElementTree as ET

FILE = pathlib.Path(__file__).parent / "fixtures" / "durations.txt"
UNKNOWN = 10.0  # of a file that is not in the list


def record(junit: str) -> str:
    """A line ``seconds file`` for each file of a run with ``--junitxml``, the longest first."""
    seconds: dict[str, float] = collections.Counter()
    for case in ET.parse(junit).iter("testcase"):
        module = case.get("classname", "").replace(".", "/")
        seconds[f"{module}.py"] += float(case.get("time", 0))
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return "".join(f"{s:.0f} {file}\n" for file, s in longest_first)


def shard(files: set[str], number: int, of: int) -> set[str]:
    """Files of one of ``of`` shards; each file goes to the shard that is shortest so far."""
    known = {f: float(s) for s, f in (line.split() for line in FILE.read_text().splitlines())}
    loads, chosen = [0.0] * of, set()
    for file in sorted(files, key=lambda f: (-known.get(f, UNKNOWN), f)):
        shortest = loads.index(min(loads))
        loads[shortest] += known.get(file, UNKNOWN)
        if shortest == number - 1:
            chosen.add(file)
    return chosen


if __name__ == "__main__":
    FILE.write_text(record(sys.argv[1]))
