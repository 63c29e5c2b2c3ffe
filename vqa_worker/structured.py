"""Answers as instances of pydantic models."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vqa_worker.messages.decoding import InvalidJobError
from vqa_worker.results import Result

Model = TypeVar("Model", bound=BaseModel)


class NoValueError(Exception):
    """The job succeeded, and its answer is not an instance of the model that was asked for.

    Attributes:
        result: the whole result, for example for its `answer`.
    """

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


def params_for(returns: type[BaseModel], params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `params` of a job whose answer is an instance of `returns`.

    Raises:
        InvalidJobError: `params` has a `response_format` already.
    """
    if params and "response_format" in params:
        raise InvalidJobError(
            "params: response_format cannot be combined with returns", job_id=None, id_in_body=False
        )
    schema = returns.model_json_schema()
    # APIs take letters, digits, underscores and dashes; the name of a generic model has brackets.
    name = "".join(char if char.isascii() and char.isalnum() else "_" for char in returns.__name__)[:64]
    given = {"name": name, "schema": schema}
    return {**(params or {}), "response_format": {"type": "json_schema", "json_schema": given}}


def value_of(result: Result, returns: type[Model]) -> Model:
    """Return the answer of a job as an instance of `returns`.

    Raises:
        JobFailedError: the job failed.
        NoValueError: the answer is valid for the schema, and not for the model's own validators; or the
            workers do not validate answers (`VQA_SCHEMA_REPAIRS=off`).
    """
    result.raise_for_error()
    if result.parsed is None:
        raise NoValueError("the result has no parsed value: VQA_SCHEMA_REPAIRS of the workers is off", result)
    try:
        return returns.model_validate(result.parsed)
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, it['loc']))}: {it['msg']}" for it in error.errors())
        raise NoValueError(f"the answer is not a valid {returns.__name__}: {fields}", result) from error
