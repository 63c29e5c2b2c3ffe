"""Answers as instances of pydantic models."""

from datetime import date
from decimal import Decimal
from typing import Any, Generic, Literal, TypeVar

import pytest
from pydantic import BaseModel, Field, field_validator

from vqa_worker import InvalidJobError, JobFailedError, NoValueError, Result
from vqa_worker.messages.job import Job
from vqa_worker.structured import params_for, value_of
from worker.model.answer_schema import AnswerSchema

T = TypeVar("T")


class Line(BaseModel):
    name: str = Field(pattern=r"^[^@]{1,200}$")
    price: Decimal


class Invoice(BaseModel):
    """An invoice with what pydantic models of such documents have."""

    number: str
    day: date | None = None
    currency: Literal["EUR", "USD"]
    lines: list[Line]

    @field_validator("number")
    @classmethod
    def _has_digits(cls, value: str) -> str:
        if not any(map(str.isdigit, value)):
            raise ValueError("has no digit")
        return value


class Pair(BaseModel, Generic[T]):
    first: T
    second: T


ANSWER = {"number": "A1", "currency": "EUR", "lines": [{"name": "Tea", "price": 2.5}]}


def result(parsed: Any, **fields: Any) -> Result:
    return Result.model_validate({"id": "a", "status": "succeeded", "parsed": parsed, **fields})


@pytest.mark.parametrize("returns", [Invoice, Pair[int], Pair[Invoice]])
def test_workers_accept_the_schema_of_a_model(returns: type[BaseModel]) -> None:
    params = params_for(returns, {"max_tokens": 9})
    Job.model_validate({"id": "a", "question": "?", "images": ["s3://b/k"], "params": params})
    given = params["response_format"]["json_schema"]
    assert params["max_tokens"] == 9
    assert given["name"].replace("_", "").isalnum()
    AnswerSchema(given["schema"])


def test_a_valid_answer_becomes_an_instance() -> None:
    schema = params_for(Invoice, None)["response_format"]["json_schema"]["schema"]
    for price in ("2.5", 2.5):
        answer = {**ANSWER, "lines": [{"name": "Tea", "price": price}]}
        invoice = value_of(result(answer), Invoice)
        assert invoice == Invoice(number="A1", currency="EUR", lines=[Line(name="Tea", price=Decimal("2.5"))])
    assert schema["required"] == ["number", "currency", "lines"]


def test_what_is_no_instance_is_an_error_with_the_result() -> None:
    with pytest.raises(NoValueError, match="number: Value error, has no digit") as caught:
        value_of(result({**ANSWER, "number": "none"}), Invoice)
    assert caught.value.result.parsed["number"] == "none"
    with pytest.raises(NoValueError, match="VQA_SCHEMA_REPAIRS of the workers is off"):
        value_of(result(None), Invoice)
    failed = {"code": "schema_mismatch", "message": "price: is required", "retryable": False}
    with pytest.raises(JobFailedError, match="schema_mismatch: price: is required"):
        value_of(result(None, status="failed", error=failed), Invoice)
    with pytest.raises(InvalidJobError, match="response_format cannot be combined"):
        params_for(Invoice, {"response_format": {"type": "json_object"}})
