"""Communication of a compiled program."""

import math
import re


def collectives(compiled):
    """Kind and largest number of elements of each result."""
    found = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(",
        compiled.as_text(),
    )
    return [
        (kind, max(math.prod(map(int, re.findall(r"\d+", d))) for d in re.findall(r"\[(.*?)\]", t)))
        for t, kind in found
    ]
