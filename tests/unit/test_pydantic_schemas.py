"""Schemas that pydantic makes: a valid answer is accepted, and an invalid one has a readable error."""

import json
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

import pytest
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, RootModel

from worker.model.answer_schema import AnswerSchema

T = TypeVar("T")


class Kind(Enum):
    CAT = "cat"
    DOG = "dog"


class Box(BaseModel):
    left: int
    top: int


class Found(BaseModel):
    kind: Kind
    box: Box | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "puppy"]
    breed: str


class Flat(BaseModel):
    """A model with a description."""

    count: int = Field(description="how many", examples=[3])
    share: float = 0.5
    sure: bool


class Nullable(BaseModel):
    note: str | None = None
    tags: list[str | None] | None = None


class Nested(BaseModel):
    found: list[Found]
    main: Found


class Pets(BaseModel):
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]]


class Price(BaseModel):
    amount: Decimal = Field(ge=0, max_digits=8, decimal_places=2)
    currency: Literal["EUR"]


class Times(BaseModel):
    day: date
    at: datetime | None = None
    id: UUID
    source: AnyUrl | None = None


class Counts(BaseModel):
    by_name: dict[str, int]
    by_code: dict[Annotated[str, Field(pattern="^[A-Z]{2}$")], list[int]] = {}


class Line(BaseModel):
    ends: tuple[int, int]
    colours: set[Literal["red", "green"]] = set()


class Node(BaseModel):
    label: str
    children: Sequence["Node"] = ()


class Limits(BaseModel):
    model_config = ConfigDict(extra="forbid")
    score: int = Field(ge=1, le=10)
    code: str = Field(min_length=2, max_length=4, pattern="^[a-z]+$")
    parts: list[int] = Field(min_length=1, max_length=2)


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int


class Names(RootModel[list[str]]):
    pass


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    plate_number: str = Field(alias="plateNumber")


class Mixed(BaseModel):
    value: int | str | list[int]
    rest: Any = None


class Password(BaseModel):
    model_config = ConfigDict(regex_engine="python-re")
    text: str = Field(pattern=r"^(?=.*[A-Z])(?=.*\d)(?!.*\s).{4,}$")


UUID_TEXT = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
# A model, an instance, and a wrong answer with its error.
MODELS: list[tuple[type[BaseModel], Any, Any, str]] = [
    (
        Flat,
        {"count": 3, "sure": True},
        {"count": 1.5, "sure": True},
        'count: the value is not of type "integer"',
    ),
    (Flat, {"count": 3, "share": 1, "sure": False}, {"count": 3}, '"sure" is a required property'),
    (
        Nullable,
        {"note": None, "tags": ["a", None]},
        {"tags": [1]},
        'tags: [0]: the value is not of type "string" and [0]: the value is not',
    ),
    (
        Nullable,
        {},
        {"note": 1},
        'note: the value is not of type "string" and the value is not of type "null"',
    ),
    (
        Nested,
        {"found": [{"kind": "dog", "box": {"left": 1, "top": 2}}], "main": {"kind": "cat"}},
        {"found": [], "main": {"kind": "bird"}},
        'main.kind: the value is not one of "cat" or "dog"',
    ),
    (
        Nested,
        {"found": [], "main": {"kind": "cat", "box": None}},
        {"found": [{"kind": "cat", "box": {"left": 1}}], "main": {"kind": "cat"}},
        'found[0].box: "top" is a required property',
    ),
    (
        Pets,
        {"pets": [{"kind": "cat", "lives": 9}, {"kind": "puppy", "breed": "pug"}]},
        {"pets": [{"kind": "dog", "lives": 9}]},
        'pets[0]: kind: "cat" was expected and "breed" is a required property',
    ),
    (
        Price,
        {"amount": 12.5, "currency": "EUR"},
        {"amount": -1, "currency": "EUR"},
        "amount: the value is less than the minimum of 0",
    ),
    (
        Price,
        {"amount": "12.50", "currency": "EUR"},
        {"amount": 1, "currency": "USD"},
        'currency: "EUR" was expected',
    ),
    (
        Times,
        {"day": "2030-01-31", "at": "2030-01-31T10:00:00Z", "id": UUID_TEXT, "source": "https://a.example/"},
        {"day": 20300131, "id": UUID_TEXT},
        'day: the value is not of type "string"',
    ),
    (Counts, {"by_name": {"a": 1}, "by_code": {"EU": [1]}}, {"by_name": {"a": "1"}}, "by_name.a: "),
    (Line, {"ends": [1, 2], "colours": ["red"]}, {"ends": [1]}, "ends: the value has less than 2 items"),
    (
        Line,
        {"ends": [1, 2]},
        {"ends": [1, 2], "colours": ["red", "red"]},
        "colours: the value has non-unique",
    ),
    (
        Node,
        {"label": "a", "children": [{"label": "b", "children": []}]},
        {"label": "a", "children": [{"children": []}]},
        'children[0]: "label" is a required property',
    ),
    (
        Limits,
        {"score": 10, "code": "abcd", "parts": [1]},
        {"score": 11, "code": "AB", "parts": [], "more": 1},
        "score: the value is greater than the maximum of 10",
    ),
    (Limits, {"score": 1, "code": "ab", "parts": [1, 2]}, {"score": 1, "code": "A1", "parts": [1]}, "code: "),
    (Page[Box], {"items": [{"left": 1, "top": 2}], "total": 1}, {"items": [1], "total": 1}, "items[0]: "),
    (Names, ["a"], [1], '[0]: the value is not of type "string"'),
    (Aliased, {"plateNumber": "A1"}, {"plate_number": "A1"}, '"plateNumber" is a required property'),
    (
        Mixed,
        {"value": [1], "rest": {"a": []}},
        {"value": None},
        'value: the value is not of type "integer" and',
    ),
    (Password, {"text": "Abc1"}, {"text": "abc1"}, "text: the value does not match"),
    (Password, {"text": "1bcD"}, {"text": "Ab 1"}, "text: "),
]


@pytest.mark.parametrize(
    ("model", "valid", "invalid", "error"), MODELS, ids=lambda it: getattr(it, "__name__", "")
)
def test_answers_are_checked_by_the_schema_of_a_model(
    model: type[BaseModel], valid: Any, invalid: Any, error: str
) -> None:
    schema = AnswerSchema(model.model_json_schema())
    result = schema.check(json.dumps(valid))
    assert (result.value, result.errors) == (valid, None)
    model.model_validate(result.value)
    assert error in (schema.check(json.dumps(invalid)).errors or "")
