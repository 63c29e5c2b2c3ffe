"""The JSON schema that a job gives for its answer, and what satisfies it.

A schema and an answer come from others, and validating can take exponential time: references that are
doubled in each definition, for example. So the steps are counted before they are taken.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from vqa_worker.messages.serialization import to_json
from worker.model.json_answer import NotJsonError, candidates, parse_strictly
from worker.model.look_ahead import without_look_ahead

if TYPE_CHECKING:
    import jsonschema_rs

MAX_SCHEMA_BYTES: Final = 64 * 1024
MAX_SCHEMA_DEPTH: Final = 64
# Of a compiled regular expression; a large repetition of a Unicode class exceeds it.
MAX_PATTERN_BYTES: Final = 512 * 1024
# Linear time, but up to 5 µs for each character, in which the library holds the interpreter's lock.
CHARS_PER_STEP: Final = 2
# A step is one subschema and one value. The first takes about 0.1 s, in Python; the second lists the errors.
MAX_STEPS: Final = 200_000
MAX_LISTED_STEPS: Final = 5_000
# Of all subschemas, without descending into a value; more is a mistake, or meant to harm.
MAX_STEPS_IN_PLACE: Final = 50_000

MAX_ERRORS: Final = 10
MAX_ERROR_CHARS: Final = 200
MAX_ALTERNATIVES: Final = 4
# Of alternatives within alternatives.
MAX_LEVELS: Final = 8

_PATTERN_REFUSED: Final = (
    "this pattern is too large, or has a back-reference or look-around"
    " (only look-ahead at the start of `pattern` is supported)"
)

_REFERENCE: Final = "$ref"
_OTHER_REFERENCES: Final = ("$dynamicRef", "$recursiveRef")
# The second one is that of draft 4.
_IDS: Final = ("$id", "id")
_DEFINITIONS: Final = ("$defs", "definitions")
# Keywords by what they apply to: the value itself, the members of an object, or the items of an array.
_LISTS_IN_PLACE: Final = ("allOf", "anyOf", "oneOf")
_IN_PLACE: Final = ("not", "if", "then", "else")
_NAMED_IN_PLACE: Final = ("dependentSchemas", "dependencies")
_ALL_MEMBERS: Final = ("additionalProperties", "unevaluatedProperties", "propertyNames")
_ALL_ITEMS: Final = ("items", "additionalItems", "unevaluatedItems", "contains")
# Their objects have subschemas under names of the schema's author.
_NAMED: Final = frozenset({"properties", "patternProperties", *_DEFINITIONS, *_NAMED_IN_PLACE})
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
_UNEVALUATED: Final = ("unevaluatedProperties", "unevaluatedItems")


class InvalidSchemaError(Exception):
    """The schema is wrong, or too large; the message says why and where."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The value of an answer, or why there is none.

    Attributes:
        value: that satisfies the schema; None if `errors` is set.
        errors: for a person and for the model.
        is_final: whether another answer would not help.
    """

    value: Any = None
    errors: str | None = None
    is_final: bool = False


class AnswerSchema:
    """A JSON schema for answers. Creating and using it can take 0.1 s: do it in a thread."""

    def __init__(self, schema: Any) -> None:
        """Compile the schema.

        Raises:
            InvalidSchemaError: it is wrong, or too large.
        """
        if not isinstance(schema, dict | bool):
            raise InvalidSchemaError("must be an object")
        if len(to_json(schema)) > MAX_SCHEMA_BYTES:
            raise InvalidSchemaError(f"must be at most {MAX_SCHEMA_BYTES} bytes of JSON")
        if _is_deeper(schema, MAX_SCHEMA_DEPTH):
            raise InvalidSchemaError(f"must not be nested more than {MAX_SCHEMA_DEPTH} levels deep")
        self._schema = _with_supported_patterns(schema)
        self._check_references()
        self._validator = _compile(self._schema)

    def check(self, text: str, *, is_cut_off: bool = False) -> Checked:
        """Return the value of an answer.

        Args:
            text: of the answer.
            is_cut_off: by the token limit. Then nothing is mended: the rest of the value could be missing.
        """
        try:
            return self._check_value(parse_strictly(text))
        except NotJsonError as error:
            why = f"the answer is not JSON: {error}"
        found = [] if is_cut_off else candidates(text)
        if len(found) == 1:
            return self._check_value(found[0])
        # One of several is only clear if no other one satisfies the schema.
        valid = [it for it in map(self._check_value, found) if it.errors is None]
        if len(valid) == 1:
            return valid[0]
        return Checked(errors=f"the answer has {len(found)} JSON values instead of one" if found else why)

    def _check_value(self, value: Any) -> Checked:
        steps = self._count_steps([(self._schema, value)], MAX_STEPS)
        if steps > MAX_STEPS:
            text = f"checking the answer takes more than {MAX_STEPS} steps: use a simpler schema"
            return Checked(errors=text, is_final=True)
        if self._validator.is_valid(value):
            return Checked(value=value)
        if steps > MAX_LISTED_STEPS:
            return Checked(errors="a part of it is wrong; it is too large to say which")
        return Checked(errors=_listed(self._validator.iter_errors(value)))

    def _check_references(self) -> None:
        """Check the references, and that no subschema refers to itself or to too many others in place.

        Raises:
            InvalidSchemaError: the schema breaks one of these rules.
        """
        parts = dict(_subschemas(self._schema))
        known, steps = {*map(id, parts.values())}, 0
        for path, part in parts.items():
            self._check_part(path, part, known)
            # No member and no item: only subschemas in place apply to this value.
            steps += self._count_steps([(part, None)], MAX_STEPS_IN_PLACE)
            if steps > MAX_STEPS_IN_PLACE:
                raise InvalidSchemaError(f"{_where(path)}refers to itself, or to too many other subschemas")

    def _check_part(self, path: str, part: Mapping[str, Any], known: Collection[int]) -> None:
        for name in _OTHER_REFERENCES:
            if name in part:
                raise InvalidSchemaError(f"{_where(path)}{name} is not supported: use $ref")
        if path and any(isinstance(part.get(name), str) for name in _IDS):
            raise InvalidSchemaError(f"{_where(path)}$id is only supported at the top")
        reference = part.get(_REFERENCE, "#")
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise InvalidSchemaError(f"{_where(path)}$ref must begin with #/: other documents are not read")
        target = self._target(reference)
        if not isinstance(target, bool) and id(target) not in known:
            raise InvalidSchemaError(f"{_where(path)}$ref does not name a subschema")

    def _count_steps(self, start: Iterable[tuple[Any, Any]], limit: int) -> int:
        """Return the number of steps of a validation, or a number over `limit`."""
        stack, steps = [*start], 0
        while stack and steps <= limit:
            schema, value = stack.pop()
            steps += 1
            if isinstance(schema, dict):
                steps += _steps_of_patterns(schema, value)
                stack.extend(islice(self._next_steps(schema, value), limit + 1))
        return steps + len(stack)

    def _next_steps(self, schema: Mapping[str, Any], value: Any) -> Iterator[tuple[Any, Any]]:
        in_place = [(part, value) for part in _in_place(schema)]
        reference = schema.get(_REFERENCE)
        if isinstance(reference, str):
            in_place.append((self._target(reference), value))
        yield from in_place
        if any(name in schema for name in _UNEVALUATED):
            # What the others have evaluated is found by applying them again.
            yield from in_place
        if isinstance(value, dict):
            yield from _steps_of_members(schema, value)
        elif isinstance(value, list):
            yield from _steps_of_items(schema, value)

    def _target(self, reference: str) -> Any:
        """Return the subschema that a local reference names, or None."""
        target: Any = self._schema
        for step in reference.removeprefix("#").split("/")[1:]:
            name = _unescaped(step)
            if isinstance(target, list):
                target = target[int(name)] if name.isdecimal() and int(name) < len(target) else None
            else:
                target = target.get(name) if isinstance(target, dict) else None
        return target


def _with_supported_patterns(schema: Any) -> Any:
    """Return a copy of the schema without look-ahead at the start of patterns."""
    changed = copy.deepcopy(schema)
    for _, part in _subschemas(changed):
        pattern, others = part.get("pattern"), part.get("allOf", [])
        if isinstance(pattern, str) and isinstance(others, list) and (parts := without_look_ahead(pattern)):
            del part["pattern"]
            part["allOf"] = [*others, *parts]
    return changed


def _compile(schema: Any) -> "jsonschema_rs.Validator":
    # Late, because it would delay the start of every command.
    import jsonschema_rs  # noqa: PLC0415 - see above

    try:
        return jsonschema_rs.validator_for(
            schema,
            offline=True,
            # The engine without backtracking. It has no look-around and no back-references.
            pattern_options=jsonschema_rs.RegexOptions(size_limit=MAX_PATTERN_BYTES),
            # Instead of the value, which may be long.
            mask="the value",
        )
    except jsonschema_rs.ValidationError as error:
        message = _PATTERN_REFUSED if "regex" in error.message else error.message
        raise InvalidSchemaError(f"{_path(error.instance_path)}{_short(message)}") from None
    except ValueError as error:
        raise InvalidSchemaError(_short(str(error))) from None


def _in_place(schema: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the subschemas that apply to the same value; references apart."""
    for name in _LISTS_IN_PLACE:
        if isinstance(parts := schema.get(name), list):
            yield from parts
    for name in _IN_PLACE:
        if name in schema:
            yield schema[name]
    for name in _NAMED_IN_PLACE:
        if isinstance(named := schema.get(name), dict):
            yield from named.values()


def _steps_of_patterns(schema: Mapping[str, Any], value: Any) -> int:
    chars = len(value) if isinstance(value, str) and "pattern" in schema else 0
    patterns = schema.get("patternProperties")
    if isinstance(value, dict) and isinstance(patterns, dict):
        chars += len(patterns) * sum(map(len, value))
    return chars // CHARS_PER_STEP


def _steps_of_members(schema: Mapping[str, Any], value: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    if isinstance(parts := schema.get("properties"), dict):
        yield from ((parts[name], value[name]) for name in parts.keys() & value.keys())
    if isinstance(parts := schema.get("patternProperties"), dict):
        yield from ((part, member) for part in parts.values() for member in value.values())
    for name in _ALL_MEMBERS:
        if name in schema:
            yield from ((schema[name], member) for member in value.values())


def _steps_of_items(schema: Mapping[str, Any], value: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    for name in _ALL_ITEMS:
        if isinstance(parts := schema.get(name), list):
            yield from zip(parts, value, strict=False)
        elif name in schema:
            yield from ((parts, item) for item in value)
    if isinstance(parts := schema.get("prefixItems"), list):
        yield from zip(parts, value, strict=False)


def _subschemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object in a schema that may be a subschema, with its path; enumerated values apart."""
    stack: list[tuple[str, Any, bool]] = [("", schema, True)]
    while stack:
        path, part, is_schema = stack.pop()
        if isinstance(part, list):
            stack += [(f"{path}/{n}", item, True) for n, item in enumerate(part)]
        if not isinstance(part, dict):
            continue
        if is_schema:
            yield path, part
        for name, inner in part.items():
            if not is_schema or name not in _VALUES:
                stack.append((f"{path}/{name}", inner, not (is_schema and name in _NAMED)))


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inside)


def _unescaped(step: str) -> str:
    """Return a step of a JSON pointer in a URL (RFC 6901, §6)."""
    return unquote(step).replace("~1", "/").replace("~0", "~")


def _listed(errors: Iterable["jsonschema_rs.ValidationError"]) -> str:
    found = [f"{_path(error.instance_path)}{_short(_message(error))}" for error in errors]
    more = len(found) - MAX_ERRORS
    return "; ".join(found[:MAX_ERRORS]) + (f"; and {more} more" if more > 0 else "")


def _message(error: "jsonschema_rs.ValidationError") -> str:
    """Return what is wrong; of alternatives, what is wrong with the first ones."""
    return " and ".join(islice(_reasons(error, len(error.instance_path), MAX_LEVELS), MAX_ALTERNATIVES))


def _reasons(error: "jsonschema_rs.ValidationError", begins: int, levels: int) -> Iterator[str]:
    """Yield what is wrong with each alternative, with paths that begin at step `begins` of the whole path."""
    alternatives = getattr(error.kind, "context", None) if levels else None
    first = [errors[0] for errors in alternatives or () if errors]
    for it in first[:MAX_ALTERNATIVES]:
        yield from _reasons(it, begins, levels - 1)
    if not first:
        yield f"{_path(error.instance_path[begins:])}{_short(error.message)}"


def _path(path: Sequence[str | int]) -> str:
    """Return the path of a value as in `items[0].price: `, or nothing for the whole value."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{_short(text.removeprefix('.'))}: " if text else ""


def _where(path: str) -> str:
    """Return where a subschema is, if it is not the whole schema."""
    return f"{_short(path)}: " if path else ""


def _short(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[: MAX_ERROR_CHARS - 1]}…"
