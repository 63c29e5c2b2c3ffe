"""Read the body of an error answer: codes, sentences and other values, in every form that APIs send."""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

# Sentences are shown up to this length; some APIs quote the whole request.
MAX_CHARS: Final = 4000
# They are matched up to this length, in the event loop: the patterns take about 10 ms for it.
MAX_MATCHED_CHARS: Final = 1000
MAX_FOUND_SENTENCES: Final = 20
MAX_CODE_CHARS: Final = 200
MAX_JSON_BYTES: Final = 1_000_000
MAX_DEPTH: Final = 8
MAX_VALUES: Final = 500
MAX_SENTENCES: Final = 3
# A sentence can quote a data URL.
MAX_QUOTED_CHARS: Final = 200_000
MIN_DATA_ALPHABET: Final = 20
MAX_PAGE_CHARS: Final = 5000
MAX_TITLE_CHARS: Final = 200

_CODES: Final = frozenset(
    {"code", "type", "status", "status_code", "statuscode", "http_code", "reason"}
    | {"error_code", "errorcode", "error_type", "errortype"}
    | {"limit_source", "quotaid", "error"}
)
_SENTENCES: Final = frozenset(
    {"message", "msg", "detail", "details", "error", "errors", "raw", "title", "reason", "error_message"}
    | {"errormessage", "error_msg", "error_description", "errormsg"}
)
# The request or the answer, quoted: not the API's words.
_QUOTED: Final = frozenset(
    {"input", "failed_generation", "flagged_input", "request", "messages", "prompt", "body", "ctx"}
)
# Where validation libraries (pydantic 1 and 2) quote the input in the text of an error.
_QUOTE: Final = re.compile(r"""[,;]?\s?(?:["'](?:input|messages)["']\s?:|\binput_value=|\bmessages = \[).*""")
# A text in quotation marks of any kind, also if its end is missing; a question after a colon. Not: an
# apostrophe; a field; a message of another API, as in `{'error': {'message': 'Overloaded'}}`.
_FIELD: Final = (
    r"\w{0,16}_\w{1,24}|model|messages?|content|role|tools?|functions?|temperature|stop|seed|text|images?"
)
_QUOTATION: Final = re.compile(
    r"""(?<![^\s(\[{:=,])(?<!message['"]:\s)(?<!msg['"]:\s)(?<!error['"]:\s)(?<!detail['"]:\s)(?<!reason['"]:\s)"""
    rf"""(?!['"`\u2018\u201c](?:{_FIELD})['"`\u2019\u201d])"""
    r"""(?:'(?=\S)(?:[^'\n]|(?<=\w)'(?=\w))*(?:'|$)|"[^"\n]*(?:"|$)|`[^`\n]*(?:`|$)"""
    r"""|\u2018[^\u2019\n]*(?:\u2019|$)|\u201c[^\u201d\n]*(?:\u201d|$)"""
    r"""|(?<=:\s)[^.:!\n'"]{1,400}\?)""",
    re.MULTILINE,
)
_QUOTED_TEXT: Final = "'x'"
_DATA: Final = re.compile(r"(?<=base64,)[A-Za-z0-9+/=_-]{100,}|(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/=_-]{500,}")
_ERROR_CLASS: Final = re.compile(r"\b[A-Z][A-Za-z]{3,40}(?:Error|Exception)\b")
_TITLE: Final = re.compile(r"<(title|h1)\b[^>]{0,200}>(.{1,400}?)</\1", re.IGNORECASE | re.DOTALL)
_HTML: Final = re.compile(r"<(!doctype|html|body|head)\b", re.IGNORECASE)
_SCRIPT: Final = re.compile(r"<(script|style)\b[^>]*>.*?</\1>", re.IGNORECASE | re.DOTALL)
_EVENT: Final = re.compile(r"(?:(?:event|id|retry|):[^\n]*\n){0,4}data:([^\n]*)")
_TAG: Final = re.compile(r"<[^<>]{0,400}>")
# Also `429 Too Many Requests`.
_STATUS: Final = re.compile(r"([45]\d\d)(?:\s|$)", re.ASCII)
_NOT_WORD: Final = re.compile(r"[^a-z0-9]+")


@dataclass(slots=True)
class ErrorBody:
    """What an error answer says.

    Attributes:
        sentences: for a person, the most specific first.
        codes: codes, types and names of exceptions: in lower case, only a-z and 0-9.
        status: the HTTP status in the body, if there is one.
        values: names and values of all fields, for hints when to try again.
    """

    sentences: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    status: int | None = None
    values: list[tuple[str, str]] = field(default_factory=list)

    @property
    def words(self) -> str:
        """All sentences, bounded; for patterns."""
        return "\n".join(self.sentences)[:MAX_MATCHED_CHARS]

    def words_without_quotes(self, model: str) -> str:
        """Return the words without what they quote: the job's words must not decide.

        Names of fields stay, and the name of the model.
        """
        text = "\n".join(self.sentences)[:MAX_CHARS]
        if text.startswith(("{", "[")):
            # JSON without a known field, or a part of it: all words are in quotation marks.
            return self.words
        kept = _QUOTATION.sub(lambda it: it[0] if it[0][1:-1] == model else _QUOTED_TEXT, text)
        return kept[:MAX_MATCHED_CHARS]

    def said(self, status: int) -> str:
        """Return the API's own words for a person; without any, the name of the status."""
        return "; ".join(self.sentences[:MAX_SENTENCES])[:MAX_CHARS] or _phrase(status)


def parse_error_body(body: bytes) -> ErrorBody:
    """Read JSON (also nested in strings, in a list, or as an SSE event), an HTML page or text."""
    text = body[:MAX_JSON_BYTES].decode("utf-8-sig", errors="replace").strip()
    found = ErrorBody()
    value = _json(text) if len(body) <= MAX_JSON_BYTES else None
    if isinstance(value, dict | list):
        _collect(value, found)
        if not found.sentences:
            found.sentences.append(json.dumps(value, ensure_ascii=False)[:MAX_CHARS])
    elif value is not None:
        found.sentences.append(str(value))
    elif "<" in text[:100] and (page := _page(text)):
        found.sentences.append(page)
    elif text and text != "null":
        _collect(text, found)
    found.codes = list(dict.fromkeys(filter(None, (_plain(code[:MAX_CODE_CHARS]) for code in found.codes))))
    return found


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no explanation"


def _plain(code: str) -> str:
    return _NOT_WORD.sub("", code.lower())


def _json(text: str) -> Any:
    """Return the value of JSON, of the first event of an SSE stream, or None."""
    if event := _EVENT.match(text):
        text = event[1]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _page(text: str) -> str:
    """Return the title of an HTML page, or else the start of its text; empty if it is not HTML."""
    title = _TITLE.search(text, 0, MAX_PAGE_CHARS)
    if not title and not _HTML.search(text, 0, MAX_PAGE_CHARS):
        return ""
    words = html.unescape(_TAG.sub(" ", title[2] if title else _SCRIPT.sub(" ", text[:MAX_PAGE_CHARS])))
    return f"{' '.join(words.split())[:MAX_TITLE_CHARS]} (an HTML page)".lstrip()


def _collect(value: object, found: ErrorBody) -> None:
    """Collect the codes, sentences and values of nested JSON, breadth first: the outermost come first."""
    level: list[tuple[str, object]] = [("", value)]
    seen = 0
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, object]] = []
        for name, item in level:
            seen += 1
            if seen > MAX_VALUES:
                return
            below += _visit(name, item, found)
        level = below


def _visit(name: str, item: object, found: ErrorBody) -> Iterator[tuple[str, object]]:
    """Note a value, and yield what is inside."""
    match item:
        case dict():
            yield from _fields(item, found)
        case list():
            yield from ((name, inner) for inner in item)
        case str() if item.strip():
            found.values.append((name, item))
            is_code = len(item.split()) == 1
            if name in _CODES and (is_code or name not in _SENTENCES):
                found.codes.append(item)
                _note_status(item, found)
            if not name or (name in _SENTENCES and not (is_code and name == "reason")):
                yield from _text(item, found)
        case int() | float() if not isinstance(item, bool):
            found.values.append((name, str(item)))
            if name in _CODES:
                _note_status(str(item), found)


def _fields(item: dict[str, object], found: ErrorBody) -> Iterator[tuple[str, object]]:
    """Yield the fields of an object; one of FastAPI's list of faults becomes a sentence with its place."""
    place = item.get("loc")
    if isinstance(place, list) and isinstance(item.get("msg"), str):
        where = ".".join(str(part) for part in place if part != "body")
        _add_sentence(f"{where}: {item['msg']}" if where else str(item["msg"]), found)
        found.codes += [str(item.get("type", "")), "validation"]
        return
    yield from ((str(key).lower(), inner) for key, inner in item.items() if str(key).lower() not in _QUOTED)


def _text(text: str, found: ErrorBody) -> Iterator[tuple[str, object]]:
    """Add a sentence; yield JSON that it contains, as LiteLLM and OpenRouter pass on answers of others."""
    if len(text.split()) == 1:
        found.codes.append(text)
    start, end = text.find("{"), text.rfind("}")
    inner = _json(text[start : end + 1].replace("\\n", " ")) if 0 <= start < end else None
    if isinstance(inner, dict):
        yield "", inner
        text = text[:start].strip(" \n-:b'\"")
    _add_sentence(text, found)


def _add_sentence(text: str, found: ErrorBody) -> None:
    found.codes += _ERROR_CLASS.findall(text[:MAX_CHARS])
    text = _DATA.sub(_without_data, text[:MAX_QUOTED_CHARS])
    text = _QUOTE.sub("", " ".join(text.split()))[:MAX_CHARS]
    is_room = len(found.sentences) < MAX_FOUND_SENTENCES
    if text and is_room and not any(text in sentence for sentence in found.sentences):
        found.sentences.append(text)


def _without_data(run: re.Match[str]) -> str:
    """Replace base64, which has many different characters; other long runs are cut later."""
    is_data = (
        run.string.startswith("base64,", max(run.start() - len("base64,"), 0))
        or len(set(run[0])) >= MIN_DATA_ALPHABET
    )
    return f"[{len(run[0])} characters]" if is_data else run[0]


def _note_status(text: str, found: ErrorBody) -> None:
    if found.status is None and (match := _STATUS.match(text.strip())):
        found.status = int(match[1])
