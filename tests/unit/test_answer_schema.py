"""Malformed answers and what becomes of each; schemas that are refused."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.running import ROOT
from worker.model.answer_schema import MAX_STEPS, AnswerSchema, InvalidSchemaError
from worker.model.json_answer import MAX_DEPTH

INVOICE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "total": {"type": "number"},
        "currency": {"enum": ["EUR", "USD"]},
        "note": {"type": ["string", "null"]},
        "paid": {"type": "boolean"},
    },
    "required": ["total", "currency"],
    "additionalProperties": False,
}
VALUE = {"total": 12.5, "currency": "EUR"}
TEXT = json.dumps(VALUE)


def refused(errors: str) -> Any:
    """Return what a table has for an answer that must be asked for again."""
    return ("refused", errors)


# What a model wrote, and what it becomes: a value, or what is wrong.
MALFORMED: dict[str, tuple[str, Any]] = {
    "strict JSON": (TEXT, VALUE),
    "white space and a byte order mark": (f"\ufeff \n{TEXT}\n", VALUE),
    "a code fence": (f"```json\n{TEXT}\n```", VALUE),
    "a code fence and prose": (f"Here is the JSON you asked for:\n```\n{TEXT}\n```\nAnything else?", VALUE),
    "a code fence without its end": (f"```json\n{TEXT}", VALUE),
    "a code fence on one line": (f"```json{TEXT}```", VALUE),
    "prose before": (f"Sure! It's this: {TEXT}", VALUE),
    "prose after": (f"{TEXT}\n\nI wasn't sure about the total.", VALUE),
    "prose with brackets": (f"As {{requested}} [1], the invoice is: {TEXT}", VALUE),
    "a trailing comma": ('{"total": 12.5, "currency": "EUR",\n}', VALUE),
    "single quotes": ("{'total': 12.5, 'currency': 'EUR'}", VALUE),
    "single quotes with quotes inside": (
        """{'total': 1, 'currency': 'EUR', 'note': 'it\\'s "paid" {}'}""",
        {"total": 1, "currency": "EUR", "note": 'it\'s "paid" {}'},
    ),
    "a closing bracket in single quotes": (
        "{'note': 'a } b', 'total': 1, 'currency': 'EUR'}",
        {"note": "a } b", "total": 1, "currency": "EUR"},
    ),
    "Python literals": (
        '{"total": 1, "currency": "EUR", "paid": True, "note": None}',
        {"total": 1, "currency": "EUR", "paid": True, "note": None},
    ),
    "Python literals in a string": (
        '{"total": 1, "currency": "EUR", "note": "True, None,}",}',
        {"total": 1, "currency": "EUR", "note": "True, None,}"},
    ),
    "a line break in a string": (
        '{"total": 1, "currency": "EUR", "note": "a\nb"}',
        {"total": 1, "currency": "EUR", "note": "a\nb"},
    ),
    "reasoning in front": (f'<think>Maybe {{"total": 3}}? No.</think>\n{TEXT}', VALUE),
    "reasoning without its opening tag": (f"It says 12.5.\n</think>\n\n{TEXT}", VALUE),
    "the same object twice": (f"{TEXT}\n{TEXT}", VALUE),
    "two objects of which one is valid": (f'{{"total": 1}}\n{TEXT}', VALUE),
    "two valid objects": (
        f'{TEXT}{{"total": 1, "currency": "USD"}}',
        refused("2 JSON values instead of one"),
    ),
    "NaN": ('{"total": NaN, "currency": "EUR"}', refused("not JSON: NaN is not JSON")),
    "Infinity": ('{"total": -Infinity, "currency": "EUR"}', refused("not JSON: -Infinity is not JSON")),
    "a number that is too large": ('{"total": 1e999, "currency": "EUR"}', refused("a number is too large")),
    "an integer that is too long": (f'{{"total": {"9" * 5000}}}', refused("a number is too long")),
    "truncated": (
        '{"total": 12.5, "currency": "E',
        refused("not JSON: Unterminated string starting at line 1"),
    ),
    "truncated after an example": (f'Like {TEXT}: {{"total": 3, "cur', refused("not JSON")),
    "a valid object inside a damaged one": (f'{{"invoice": {TEXT}, total: }}', refused("not JSON")),
    "a damaged object before a valid one": (f'{{"total": NaN}} or {TEXT}', refused("not JSON")),
    "an apostrophe in single quotes": ("{'note': 'it's', 'total': 1}", refused("not JSON")),
    "a name twice": ('{"total": 1, "total": 2, "currency": "EUR"}', refused("the same name twice")),
    "half of a surrogate pair": ('{"note": "\\ud83d"}', refused("not valid Unicode")),
    "a missing comma": ('{"total": 12.5 "currency": "EUR"}', refused("not JSON: Expecting ',' delimiter")),
    "a comma too many": ('{"total": 12.5,, "currency": "EUR"}', refused("not JSON")),
    "nested too deeply": ("[" * 5000, refused("nested too deeply")),
    "nested a little too deeply": (
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        refused(f"nested more than {MAX_DEPTH} levels deep"),
    ),
    "prose only": ("The total is 12.50 EUR.", refused("not JSON: Expecting value at line 1, column 1")),
    "a wrong enum": ('{"total": 1, "currency": "Euro"}', refused('currency: the value is not one of "EUR"')),
    "an extra field": (
        '{"total": 1, "currency": "EUR", "vat": 1}',
        refused("Additional properties are not allowed ('vat' was unexpected)"),
    ),
    "a number as a string": (
        '{"total": "12.5", "currency": "EUR"}',
        refused('total: the value is not of type "number"'),
    ),
    "a missing field": ('{"total": 1}', refused('"currency" is a required property')),
    "an enum in lower case": (
        '{"total": 1, "currency": "eur"}',
        refused("currency: the value is not one of"),
    ),
    "null for a number": (
        '{"total": null, "currency": "EUR"}',
        refused('total: the value is not of type "number"'),
    ),
    "a thousands separator": (
        '{"total": 1,250.00, "currency": "EUR"}',
        refused("not JSON: Expecting property"),
    ),
    "a unit": ('{"total": 12.5 EUR, "currency": "EUR"}', refused("not JSON: Expecting ',' delimiter")),
    "a comment": ('{"total": 12.5, // net\n"currency": "EUR"}', refused("not JSON: Expecting property name")),
    "names without quotes": ('{total: 12.5, currency: "EUR"}', refused("not JSON: Expecting property name")),
    "typographic quotes": (
        "{\u201ctotal\u201d: 12.5, \u201ccurrency\u201d: \u201cEUR\u201d}",
        refused("not JSON: Expecting property name"),
    ),
    "undefined": ('{"total": 1, "currency": "EUR", "note": undefined}', refused("not JSON: Expecting value")),
    "an ellipsis": ('{"total": 1, "currency": "EUR", ...}', refused("not JSON: Expecting property name")),
    "a bracket too many": (f"{TEXT}}}", VALUE),
    "tags": (f"<answer>{TEXT}</answer>", VALUE),
    "tokens of a chat template": (f"<|begin_of_box|>{TEXT}<|end_of_box|><|im_end|>", VALUE),
    "inline code": (f"The answer is `{TEXT}`.", VALUE),
    "two code fences of which one is valid": (
        f'```json\n{{"total": 1}}\n```\nOr rather:\n```json\n{TEXT}\n```',
        VALUE,
    ),
    "the schema": (json.dumps(INVOICE), refused('"total" is a required property')),
    "a code fence with nothing inside": ("```json\n```", refused("not JSON: Expecting value")),
    "nothing": ("", refused("not JSON: Expecting value")),
    "wrapped in a list": (f"[{TEXT}]", refused('the value is not of type "object"')),
    "wrapped in a string": (json.dumps(TEXT), refused('the value is not of type "object"')),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_answer_is_mended_only_if_its_meaning_is_clear(name: str) -> None:
    text, expected = MALFORMED[name]
    result = AnswerSchema(INVOICE).check(text)
    if isinstance(expected, tuple):
        assert result.value is None
        assert expected[1] in (result.errors or "")
        assert not result.is_final
    else:
        assert (result.value, result.errors) == (expected, None)


def documented() -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the documentation: what the model wrote, an example, and its error or nothing."""
    page = (ROOT / "docs/structured-answers.md").read_text()
    for row in page.partition("## From the text")[2].partition("\n## ")[0].splitlines():
        name, example, *error = [cell.strip() for cell in row.strip("|").split(" | ")] + [""] * 2
        if row.startswith("|") and "`" in example:
            text = re.sub(r"\A(`+) ?(.+?) ?\1\Z", r"\2", example).replace("\u23ce", "\n")
            yield name, text, error[0].strip("`")


def test_the_documented_answers_become_what_the_documentation_says() -> None:
    schema = json.loads((ROOT / "docs/structured-answers.md").read_text().split("```json")[1].split("```")[0])
    checks = AnswerSchema(schema["params"]["response_format"]["json_schema"]["schema"])
    rows = [*documented()]
    assert len(rows) > 20
    for name, text, error in rows:
        result = checks.check(text)
        assert result.value == (None if error else VALUE), name
        assert error in (result.errors or ""), name


@pytest.mark.parametrize(
    ("text", "value"), [(TEXT, VALUE), (f"{TEXT}\n\n\n", VALUE), (f"{TEXT} I think", None), (TEXT[:-1], None)]
)
def test_an_answer_that_is_cut_off_is_not_mended(text: str, value: object) -> None:
    """Models in JSON mode may write white space up to the limit: then the value is complete."""
    assert AnswerSchema(INVOICE).check(text, is_cut_off=True).value == value


def test_other_values_than_objects_may_be_asked_for() -> None:
    assert AnswerSchema({"type": "string"}).check('"<think>"').value == "<think>"
    assert AnswerSchema({"type": "string"}).check("cat").errors
    assert AnswerSchema({"type": "array"}).check("Here: [1, 2,]").value == [1, 2]
    found = AnswerSchema({"type": ["null", "boolean"]}).check("null")
    assert (found.value, found.errors) == (None, None)
    assert AnswerSchema(True).check("1").value == 1  # noqa: FBT003 - a schema


def test_the_errors_name_the_places_and_are_bounded() -> None:
    items = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}}
    errors = AnswerSchema({"properties": {"list": items}}).check('{"list": ["a", 5]}').errors
    assert errors == ('list[1]: the value is not of type "string" and the value is not of type "null"')
    many = AnswerSchema(items).check(json.dumps([1] * 30)).errors
    assert many is not None
    assert many.endswith("; and 20 more")
    long = AnswerSchema({"additionalProperties": False}).check(json.dumps({"x" * 1000: 1})).errors
    assert long is not None
    assert len(long) < 300
    assert "too large to say which" in (AnswerSchema(items).check(json.dumps([1] * 10_000)).errors or "")


def doubled(keyword: str, definitions: int) -> dict[str, Any]:
    """Return a schema in which each definition refers to the one before twice."""
    made: dict[str, Any] = {"d0": {"type": "string"}}
    for n in range(1, definitions):
        made[f"d{n}"] = {keyword: [{"$ref": f"#/$defs/d{n - 1}"}] * 2}
    return {"$defs": made, "$ref": f"#/$defs/d{definitions - 1}"}


def nested(keyword: str, levels: int, **others: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {keyword: [schema] if keyword == "allOf" else schema, **others}
    return schema


def nested_look_ahead(form: str, levels: int) -> str:
    pattern = "a"
    for _ in range(levels):
        pattern = form.format(pattern)
    return pattern


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([], "must be an object"),
    "text": ("object", "must be an object"),
    "an unknown type": ({"properties": {"a": {"type": "text"}}}, "properties.a.type: "),
    "an unknown dialect": ({"$schema": "https://example.com/mine"}, "Unknown meta-schema"),
    "a remote reference": ({"items": {"$ref": "https://example.com/a"}}, "/items: $ref must begin with #/"),
    "a file": ({"$ref": "file:///etc/passwd"}, "$ref must begin with #/"),
    "an anchor": ({"$ref": "#name"}, "$ref must begin with #/"),
    "a reference to nothing": ({"$ref": "#/$defs/a"}, "$ref does not name a subschema"),
    "a reference into data": ({"enum": [{"$dynamicRef": "#a"}], "$ref": "#/enum/0"}, "$ref does not name"),
    "a number as a reference": ({"$ref": 5}, "$ref must begin with #/"),
    "a dynamic reference": ({"not": {"$dynamicRef": "#a"}}, "/not: $dynamicRef is not supported"),
    "another base": ({"properties": {"a": {"$id": "http://a/"}}}, "$id is only supported at the top"),
    "itself": ({"$ref": "#"}, "refers to itself"),
    "a circle": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "refers to itself",
    ),
    "doubled references": (doubled("anyOf", 40), "too many other subschemas"),
    "doubled references of allOf": (doubled("allOf", 40), "too many other subschemas"),
    "nested unevaluated properties": (
        nested("allOf", 30, unevaluatedProperties=False),
        "too many other subschemas",
    ),
    "many bytes": ({"description": "é" * 40_000}, "at most 65536 bytes"),
    "many levels": (nested("not", 200), "more than 64 levels deep"),
    "look-behind": ({"pattern": "(?<=a)b"}, "pattern: this pattern is too large, or has"),
    "look-ahead later": ({"pattern": "^a(?=b)"}, "pattern: this pattern is too large, or has"),
    "look-ahead without an anchor": ({"pattern": "(?=b)"}, "pattern: this pattern is too large, or has"),
    "look-ahead of one alternative": ({"pattern": "^(?=a)b|c"}, "pattern: this pattern is too large, or has"),
    "repeated look-ahead": ({"pattern": "^(?!a)*b"}, "pattern: this pattern is too large, or has"),
    "look-ahead without its end": ({"pattern": "^(?!a"}, "pattern: this pattern is too large, or has"),
    "look-ahead of names": (
        {"patternProperties": {"^(?!a)": {}}},
        "patternProperties.^(?!a): this pattern is too large, or has",
    ),
    # 100 bytes that an engine with a limit on backtracking takes hours for.
    "nested look-ahead": (
        {"pattern": nested_look_ahead("(?:(?={})a){{30}}", 9)},
        "pattern: this pattern is too large, or has",
    ),
    "nested look-ahead at the start": (
        {"pattern": f"^(?={nested_look_ahead('(?:(?={})a)*', 9)})a"},
        "pattern: this pattern is too large, or has",
    ),
    "a huge pattern in look-ahead": (
        {"pattern": "^(?=((a{100}){100}){100})"},
        "pattern: this pattern is too large, or has",
    ),
    "much look-ahead": ({"pattern": f"^{'(?!a)' * 12_000}"}, "too many other subschemas"),
    "a back-reference": ({"pattern": r"(a)\1"}, "pattern: this pattern is too large, or has"),
    "a huge pattern": ({"pattern": "((a{100}){100}){100}"}, "pattern: this pattern is too large, or has"),
    "a wrong pattern": ({"patternProperties": {"[": True}}, "pattern"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_is_wrong_or_meant_to_harm_is_refused_at_once(name: str) -> None:
    schema, message = REFUSED[name]
    with pytest.raises(InvalidSchemaError) as error:
        AnswerSchema(schema)
    assert message in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        # Each level of the answer doubles the steps.
        (
            {
                "$defs": {
                    "n": {"anyOf": [{"required": ["a"], "properties": {"a": {"$ref": "#/$defs/n"}}}] * 2}
                },
                "$ref": "#/$defs/n",
            },
            '{"a":' * 60 + "1" + "}" * 60,
        ),
        ({"items": {"anyOf": [{"minimum": 9}] * 2000}}, json.dumps([1] * 2000)),
        (
            {"patternProperties": {f"{n}": {} for n in range(500)}},
            json.dumps({f"n{n}": 1 for n in range(999)}),
        ),
    ],
    ids=["recursion", "alternatives of items", "patterns of names"],
)
def test_an_answer_that_takes_too_many_steps_is_not_validated(schema: Any, text: str) -> None:
    result = AnswerSchema(schema).check(text)
    assert result.errors == f"checking the answer takes more than {MAX_STEPS} steps: use a simpler schema"
    assert result.is_final


@pytest.mark.parametrize(
    "text",
    [
        *("{" * 1_000_000, '{"a":' * 200_000, '["' * 300_000, "'" * 1_000_000, "{x}" * 300_000),
        *(
            "```x\n" * 200_000,
            "```\n" * 200_000,
            '{"\\' * 200_000,
            "<think>" * 150_000,
            "{'a': " * 100_000,
            "[1," * 300_000,
        ),
    ],
    ids=lambda text: text[:8],
)
def test_a_long_answer_is_checked_in_linear_time(text: str) -> None:
    assert AnswerSchema(INVOICE).check(text).errors is not None


def test_patterns_take_linear_time() -> None:
    schema = AnswerSchema({"pattern": "^(a+)+$"})
    assert schema.check(json.dumps("a" * 300_000 + "!")).errors is not None
    assert schema.check(json.dumps("a" * 300_000)).value is not None
    slow = AnswerSchema({"allOf": [{"pattern": f"^[01]*1[01]{{200}}[2-{n}]"} for n in range(3, 10)]})
    assert slow.check(json.dumps("01" * 100_000)).is_final
    assert AnswerSchema({"patternProperties": {"^(a+)+$": True}}).check(f'{{"{"a" * 500_000}": 1}}').is_final


# Of pydantic 2.12 and 2.13 for `Decimal`, and of passwords and names.
LOOK_AHEAD = [
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d{0,2}0*$",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,4}|(?=[\d.]{1,7}0*$)\d{0,4}\.\d{0,2}0*$)",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,6}|(?=[\d.]{1,7}0*$)\d*\.\d*0*$)",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,0}|(?=[\d.]{1,3}0*$)\d{0,0}\.\d{0,5}0*$)",
    r"^(?=.*[A-Z])(?=.*\d)(?!.*\s).{4,}$",
    r"^(?!admin$|root$)[a-z]+$",
    r"^(?=.{3,5}$)(?:[a-z]+|\d+)$",
    r"^(?=[)(|]|\))(?!\\)",
    r"^(?=(a|b)+c)(?!(?:ab)+c)[a-c]*$",
    r"^(?=\d)",
]
TEXTS = [
    *("", "-", "+.", "0", "12.50", "-0012.5000", "1.234", "12345678901.123456", "1,5", ".5", "0.00001"),
    *("Abc1", "abc1", "Ab 1", "admin", "administrator", "root", "abc", "123", "abcdef", "12a"),
    *(")", "(a", "|", "\\", "ac", "abc", "ababc", "abac", "1", "a1"),
]


@pytest.mark.parametrize("pattern", LOOK_AHEAD)
def test_look_ahead_at_the_start_of_a_pattern_means_what_it_means_elsewhere(pattern: str) -> None:
    form = {"pattern": pattern, "allOf": [{"type": ["string", "null"]}]}
    schema = AnswerSchema({"properties": {"a": form}})
    assert form == {"pattern": pattern, "allOf": [{"type": ["string", "null"]}]}, (
        "the API gets the job's own schema"
    )
    accepted = [text for text in TEXTS if schema.check(json.dumps({"a": text})).errors is None]
    assert accepted == [text for text in TEXTS if re.search(pattern, text)]
    assert 0 < len(accepted) < len(TEXTS)
    assert schema.check('{"a": null}').errors is None
    assert schema.check('{"a": 5}').errors


def test_look_ahead_takes_linear_time() -> None:
    schema = AnswerSchema({"pattern": r"^(?=(a+)+$)(?!(a|a)*b)(?=.*a)(a*)*$"})
    assert schema.check(json.dumps("a" * 30_000)).errors is None
    assert schema.check(json.dumps("a" * 30_000 + "!")).errors is not None


def test_recursive_schemas_and_names_like_keywords_are_supported() -> None:
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    "$ref": {"type": "string"},
                    "$id": {"type": "string"},
                    "enum": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }
    value = {"children": [{"children": [], "$ref": "x", "$id": "y"}], "enum": None}
    assert AnswerSchema(tree).check(json.dumps(value)).value == value
    errors = AnswerSchema(tree).check('{"children": [{"children": 5}]}').errors
    assert errors == 'children[0].children: the value is not of type "array"'
    draft_7 = {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/a~1b"}
    assert AnswerSchema({**draft_7, "definitions": {"a/b": {"type": "null"}}}).check("1").errors


def test_the_library_is_loaded_with_the_first_schema() -> None:
    code = (
        "import sys, worker.app.assembly, worker.cli.commands; assert 'jsonschema_rs' not in sys.modules;"
        "from worker.model.answer_schema import AnswerSchema; AnswerSchema({});"
        "assert 'jsonschema_rs' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - the test's own code
