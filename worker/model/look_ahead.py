"""Rewrite look-ahead at the start of a pattern, for a regular expression engine without look-around.

`^(?=A)(?!B)C` matches a text if `^(?:A)` and `^C` match it and `^(?:B)` does not. Patterns of passwords are
written so, and those of pydantic for decimal numbers. An engine with look-around is not used instead: nested
look-ahead in counted repetitions takes exponential time, and no limit on backtracking ends it.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

_START: Final = re.compile(r"\^\(\?([=!])")
# A class with a bracket inside means different things to different engines: only its first bracket matches.
_TOKEN: Final = re.compile(r"\\.|\[\^?(?:\\.|[^\[\]\\])+\]|[\[()|]", re.DOTALL)
_QUANTIFIER: Final = re.compile(r"[*+?{]")
# At the end of the patterns of pydantic 2.12 and 2.13 for `Decimal` with `max_digits`. Its first alternative
# matches the empty text, so it always matches.
_ALWAYS: Final = re.compile(r"\(\?:\\d\{0,\d+\}\|\(\?=[^()]*\)[^()|]*\)\Z")


def without_look_ahead(pattern: str) -> list[dict[str, Any]] | None:
    """Return schemas that together mean the same as a pattern.

    None: the pattern does not begin with look-ahead, or the rest cannot be separated from it. The schemas may
    still have patterns that are not supported.
    """
    rest, schemas = _ALWAYS.sub("", pattern), list[dict[str, Any]]()
    if any(text == "[" for _, text, _ in _tokens(rest)):
        return None
    while (start := _START.match(rest)) is not None:
        end = next((end for end, text, depth in _tokens(rest) if text == ")" and depth == 0), None)
        if end is None or _QUANTIFIER.match(rest, end):
            return None
        ahead = {"pattern": f"^(?:{rest[start.end() : end - 1]})"}
        # Patterns apply to strings only; everything else must still be valid.
        schemas.append(ahead if start[1] == "=" else {"not": {"type": "string", **ahead}})
        rest = f"^{rest[end:]}"
    if not schemas or any(text == "|" and depth == 0 for _, text, depth in _tokens(rest)):
        return None
    return [*schemas, {"pattern": rest}]


def _tokens(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Yield brackets, classes, alternations and escapes, as (end, text, depth after it)."""
    depth = 0
    for match in _TOKEN.finditer(pattern):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        yield match.end(), match[0], depth
