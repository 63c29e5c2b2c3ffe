"""Find the JSON value in the text of an answer; mend only what cannot change its meaning.

Models write code fences and prose around the JSON, reasoning before it, and the syntax of Python or
JavaScript inside. All this has one meaning. `NaN`, a truncated value, and a name that occurs twice in
an object have none in JSON, so they are not mended.
"""

import json
import re
from contextlib import suppress
from typing import Any, Final

from vqa_worker.messages.limits import has_too_large_number

MAX_DEPTH: Final = 100
# Prose can have brackets. Each pair of them costs a parse.
_MAX_SPANS: Final = 50

# `<think>` of Qwen, DeepSeek and others; some chat templates leave out the opening tag.
_REASONING: Final = re.compile(
    r"\A(?!\s*[\[{`]).*?</(think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE
)
_FENCE: Final = re.compile(r"[ \t]*(`{3,}|~{3,})[^`]*$")
_STRING: Final = r'"(?:[^"\\]|\\.)*"'
_OTHER_STRING: Final = r"'(?:[^'\\]|\\.)*'"
_BRACKET: Final = re.compile(r"[{\[]")
_OBJECT: Final = re.compile(r"""\{\s*["']""")
_WITH_STRINGS: Final = re.compile(rf"{_STRING}|[{{}}\[\]]", re.DOTALL)
_WITH_ALL_STRINGS: Final = re.compile(rf"{_STRING}|{_OTHER_STRING}|[{{}}\[\]]", re.DOTALL)
_TOKENS: Final = re.compile(
    rf"(?P<kept>{_STRING})|(?P<quoted>{_OTHER_STRING})|(?P<literal>\b(?:True|False|None)\b)"
    r"|(?<=[^\s\[{,])(?P<comma>\s*,)(?=\s*[}\]])",
    re.DOTALL,
)
_LITERALS: Final = {"True": "true", "False": "false", "None": "null"}
_ESCAPED: Final = re.compile(r'\\.|"', re.DOTALL)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


class NotJsonError(Exception):
    """The text is not JSON; the message says why and does not quote it."""


def parse_strictly(text: str) -> Any:
    """Return the value of a text that is JSON (RFC 8259), apart from a byte order mark.

    Raises:
        NotJsonError: it is not, or its value cannot be passed on.
    """
    return _parse(text.strip().removeprefix("\ufeff"))


def candidates(text: str) -> list[Any]:
    """Return the different values that a text which is not JSON may mean, in order; none: it is not clear.

    A value inside another one is not among them. If one is truncated or damaged, it may have been the answer:
    then there is none.
    """
    text = _REASONING.sub("", text.removeprefix("\ufeff"), count=1)
    found: list[Any] = []
    for value in _values(_fenced(text)) or _values(text):
        if not any(_is_same(value, other) for other in found):
            found.append(value)
    return found


def _fenced(text: str) -> str:
    """Return what is inside the code fences of a text; one without its end does not count."""
    blocks: list[str] = []
    lines: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        if fence and line.strip() == fence:
            blocks += lines
            fence = ""
        elif fence:
            lines.append(line)
        elif (opening := _FENCE.match(line)) is not None:
            fence, lines = opening[1], []
    return "".join(blocks)


def _values(text: str) -> list[Any]:
    """Return the value of the whole text, or else those of its outermost objects and arrays."""
    with suppress(NotJsonError):
        return [_parse(text)]
    found, position = [], 0
    for _ in range(_MAX_SPANS):
        start = _BRACKET.search(text, position)
        if start is None:
            break
        ends = [
            _end_of_span(text, start.start(), brackets) for brackets in (_WITH_STRINGS, _WITH_ALL_STRINGS)
        ]
        position = max(ends)
        if position == 0:
            return []
        spans = [text[start.start() : end] for end in dict.fromkeys(ends) if end]
        for span in spans:
            with suppress(NotJsonError):
                found.append(_mended(span))
                position = start.start() + len(span)
                break
        else:
            if _OBJECT.match(spans[0]):
                return []
    return found


def _end_of_span(text: str, start: int, brackets: re.Pattern[str]) -> int:
    """Return the position after the bracket that closes the one at `start`; 0: there is none."""
    depth = 0
    for match in brackets.finditer(text, start):
        if match[0] in "{[":
            depth += 1
        elif match[0] in "}]":
            depth -= 1
        if depth == 0:
            return match.end()
    return 0


def _mended(text: str) -> Any:
    """Return the value of a text that is JSON, or JSON in the syntax of Python or JavaScript.

    Raises:
        NotJsonError: it is neither.
    """
    try:
        return _parse(text)
    except NotJsonError:
        return _parse(_TOKENS.sub(_as_json, text), strict=False)


def _as_json(token: re.Match[str]) -> str:
    if token["literal"] is not None:
        return _LITERALS[token["literal"]]
    if token["quoted"] is not None:
        inside = _ESCAPED.sub(lambda it: {r"\'": "'", '"': r"\""}.get(it[0], it[0]), token["quoted"][1:-1])
        return f'"{inside}"'
    return token["kept"] or ""


def _parse(text: str, *, strict: bool = True) -> Any:
    """`strict`: whether line breaks and other control characters in strings must be escaped."""
    try:
        value = json.loads(
            text, strict=strict, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates
        )
    except json.JSONDecodeError as error:
        raise NotJsonError(
            f"{error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise NotJsonError("it is nested too deeply") from None
    except _RefusedError as error:
        raise NotJsonError(str(error)) from None
    except ValueError:
        # An integer of more than 4,300 digits has a message for programmers.
        raise NotJsonError("a number is too long") from None
    _check_value(value, text)
    return value


class _RefusedError(ValueError):
    pass


def _refuse_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not JSON: use null or a number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _RefusedError("an object has the same name twice")
    return value


def _check_value(value: Any, text: str) -> None:
    """Check that a value can be passed on in a result.

    Raises:
        NotJsonError: it cannot.
    """
    if _is_deeper(value, MAX_DEPTH):
        raise NotJsonError(f"it is nested more than {MAX_DEPTH} levels deep")
    if has_too_large_number(value):
        raise NotJsonError("a number is too large: floats have 64 bits, integers at most 256")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise NotJsonError("a string is not valid Unicode") from None


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inside)


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two values are the same JSON; in Python, 1 is also true."""
    return json.dumps(one) == json.dumps(other)
