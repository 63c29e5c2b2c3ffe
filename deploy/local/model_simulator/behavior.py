"""The simulator's behavior as data: the same objects serve the tests and the HTTP endpoint."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_MODELS = ("simulated/vision", "simulated/vision-small")

# What is around the JSON of a good answer, as some gateways send it: a byte order mark, comments as in
# server-sent events, a whole stream that nobody requested, or another JSON value.
Wrapping = Literal["bom", "comments", "stream", "object"]


class _Strict(BaseModel):
    # A misspelt name in a test is an error.
    model_config = ConfigDict(extra="forbid")


class _Outcome(_Strict):
    after: float = 0.0
    """Seconds to wait first."""


class Answer(_Outcome):
    """A well-formed 200 that differs from the usual answer in the fields given."""

    kind: Literal["answer"] = "answer"
    text: str | None = None
    """Instead of the usual text; may be empty."""
    parts: bool = False
    """Send the content as a list of text parts."""
    null_content: bool = False
    reasoning_content: str | None = None
    refusal: str | None = None
    finish_reason: str | None = None
    no_choices: bool = False
    """Send an empty list of choices."""
    usage: Literal["full", "no_cost", "none"] = "full"
    extra: dict[str, Any] = {}
    """Fields to add to the body, or to replace in it."""
    headers: dict[str, str] = {}


class Error(_Outcome):
    """An error status with a body as OpenAI sends it, or with any other body."""

    kind: Literal["error"] = "error"
    status: int = 500
    message: str = "Scripted failure"
    type: str | None = None
    code: str | None = None
    body: str | dict[str, Any] | None = None
    """Instead of the usual body; a string is sent as `text/plain`."""
    headers: dict[str, str] = {}


class Malformed(_Outcome):
    """A 200 that no client can use.

    `not_json`: an HTML page; `no_choices_key`: JSON of another shape; `cut_json`: half a body, complete for
    HTTP; `truncated`: fewer bytes than announced, then a connection reset; `interrupted`: half an answer with
    the finish reason `error`.
    """

    kind: Literal["malformed"] = "malformed"
    how: Literal["not_json", "no_choices_key", "cut_json", "truncated", "interrupted"] = "not_json"


class Hang(_Outcome):
    """No answer, ever; the connection stays open until the caller closes it."""

    kind: Literal["hang"] = "hang"


class Reset(_Outcome):
    """A connection reset before any answer."""

    kind: Literal["reset"] = "reset"


Outcome = Answer | Error | Malformed | Hang | Reset


class Rule(_Strict):
    """An outcome and the calls that get it."""

    outcome: Annotated[Outcome, Field(discriminator="kind")]
    times: int | None = Field(default=1, ge=1)
    """For how many calls; None for all."""
    marker: str | None = None
    """Only for calls whose messages contain this text."""


class Behavior(_Strict):
    """Everything that can be changed at run time."""

    models: list[str] = list(DEFAULT_MODELS)
    latency: float = Field(default=0.0, ge=0)
    """Seconds before every usual answer."""
    max_concurrent: int | None = Field(default=None, ge=0)
    """The number of concurrent calls beyond which calls get `busy_status`."""
    busy_status: int = 429
    retry_after: str | None = None
    """The `Retry-After` of those answers; DeepInfra is not known to send one."""
    early_status: int | None = None
    """Answer every call with this error status before its body is read, and close the connection."""
    wrapping: Wrapping | None = None
    """Of every usual answer."""
    decode: bool = True
    """Whether images are decoded completely; if not, only their headers are read."""
    rules: list[Rule] = []
    """Outcomes to play: each call uses the first rule that matches."""

    def next_outcome(self, text: str) -> Outcome | None:
        """Return the outcome for a call whose messages contain this text, and count down its rule."""
        for position, rule in enumerate(self.rules):
            if rule.marker is None or rule.marker in text:
                if rule.times is not None:
                    rule.times -= 1
                    if not rule.times:
                        del self.rules[position]
                return rule.outcome
        return None
