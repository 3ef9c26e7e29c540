"""Results of calls inside strings.

In a string, `$2` is the result of call 2, `$2.name` and `$2[0]` are parts of it. The braces of
`${2.name}` say where the reference ends, and allow names with blanks. Two dollars are one that is
no reference: `"$$2"` is the text "$2". Elsewhere a dollar is a dollar, also that of an amount of
money: "$1.50", "$1,500".
"""

import re

from examples.finetune.planner.plan import Ref, Text, text_of

_SIMPLE = r"(?:\.[A-Za-z_][A-Za-z0-9_]*|\[[0-9]+\])*+"

AMOUNT = r"\.[0-9]|,[0-9]{3}(?![0-9])"
"""The rest of a number that is an amount of money, after its first digits."""

REFERENCE = re.compile(rf"\$(?:\{{([0-9]++)([.\[][^{{}}$]*+)?\}}|([0-9]++)(?!{AMOUNT})({_SIMPLE}))")

_DOLLARS = re.compile(r"\$++(?=[0-9]|\{[0-9])")
_DOLLARS_OR_END = re.compile(r"\$++(?=[0-9]|\{[0-9]|\Z)")


def reference_of(match: re.Match[str]) -> Ref:
    """The reference that `REFERENCE` found."""
    in_braces, path_in_braces, number, path = match.groups()
    # Some digits are enough to be out of range, and int() refuses thousands.
    return Ref(int((in_braces or number)[:9]), path_in_braces or path or "")


def read_string(content: str) -> str | Ref | Text:
    """The value that a string stands for.

    >>> read_string("Meet at $2.time for $$5")
    Text(parts=('Meet at ', Ref(call=2, path='.time'), ' for $5'))
    """
    parts: list[str | Ref] = []
    end = 0
    for dollars in _DOLLARS.finditer(content):
        pairs, single = divmod(len(dollars[0]), 2)
        parts.append(content[end : dollars.start()] + "$" * pairs)
        end = dollars.end()
        if single and (match := REFERENCE.match(content, end - 1)):
            parts.append(reference_of(match))
            end = match.end()
        elif single:
            parts.append("$")
    return text_of([*parts, content[end:]])


def write_string(value: str | Ref | Text) -> str:
    """The string that `read_string` reads as `value`.

    >>> write_string(Ref(1, ".id")), write_string(Text(("at ", Ref(1), ".")))
    ('$1.id', 'at ${1}.')
    """
    match value:
        case str():
            return _DOLLARS.sub(_double, value)
        case Ref():
            simple = re.fullmatch(_SIMPLE, value.path)
            return f"${value.call}{value.path}" if simple else _in_braces(value)
    written = []
    for part, following in zip(value.parts, (*value.parts[1:], ""), strict=True):
        if isinstance(part, Ref):
            written.append(_in_braces(part))
        else:
            # The dollar of a reference joins those before it.
            before = _DOLLARS_OR_END if isinstance(following, Ref) else _DOLLARS
            written.append(before.sub(_double, part))
    return "".join(written)


def _in_braces(ref: Ref) -> str:
    return f"${{{ref.call}{ref.path}}}"


def _double(dollars: re.Match[str]) -> str:
    return 2 * dollars[0]
