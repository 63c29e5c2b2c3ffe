"""The schema of a provider's profile: what its API accepts, and what its error answers mean."""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# `400`, or `"4xx"` for 400 to 499.
Status: TypeAlias = (
    Annotated[int, Field(ge=200, le=999)] | Annotated[str, StringConstraints(pattern="^[2-9]xx$")]
)
Positive: TypeAlias = Annotated[int, Field(ge=1)]


class Category(StrEnum):
    """Whose fault an error answer is. Each has one consequence."""

    JOB = "job"
    MODEL_JOB = "model_job"
    CAPACITY = "capacity"
    TRANSIENT = "transient"
    CONFIGURATION = "configuration"
    MODEL = "model"
    UNKNOWN = "unknown"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Images(_Part):
    """What the API accepts as images; None: not limited, or not known."""

    types: tuple[str, ...] = ()
    """Media types."""
    cmyk: bool | None = None
    """Whether CMYK JPEGs are decoded; they are converted unless it is known."""
    bits_16: bool | None = None
    """Whether images with 16 bits a channel are decoded; they are converted unless it is known."""
    max_bytes: Positive | None = None
    """Of one image, before base64."""
    max_request_bytes: Positive | None = None
    """Of a request with inline images."""
    max_count: Positive | None = None
    """In a request."""
    links: bool = True
    """Whether the API fetches `https://` images."""
    detail: Literal["sent", "dropped"] = "dropped"
    """What becomes of `detail` of a job's `image_url`."""


class RequestFields(_Part):
    """Fields of the request that differ between APIs; None: not known."""

    token_limit: Literal["max_tokens", "max_completion_tokens", "as given"] = "as given"  # noqa: S105 - a name
    """The name of the token limit: a job's `max_tokens` or `max_completion_tokens` is sent with this name."""
    system_with_images: bool | None = None
    """Whether a request may have a system message and images."""
    json_schema: bool | None = None
    """Whether `response_format: json_schema` works, at least with some models."""
    json_object: bool | None = None
    """Whether `response_format: json_object` works. If `json_schema` is false, jobs with a JSON schema are
    sent with it, and with the schema in the prompt."""
    stream_only_models: tuple[str, ...] = ()
    """Globs for models that only stream."""


class RetryHints(_Part):
    """Where the API says when to try again, as globs, in order of preference."""

    headers: tuple[str, ...] = ()
    """Response headers."""
    body: tuple[str, ...] = ()
    """Fields of the body, at any depth."""


class Tier(_Part):
    """A service tier."""

    timeout_s: Annotated[float, Field(gt=0)]
    """How long a request of this tier may wait, in seconds."""


class Rule(_Part):
    """What an answer means. All conditions that are given must hold."""

    status: tuple[Status, ...] = ()
    """HTTP statuses, `400` or `"4xx"`; empty: any."""
    code: str = ""
    """Regular expression, searched in each code and type: in lower case, only a-z and 0-9."""
    words: tuple[str, ...] = ()
    """Regular expressions, one of which must be found in the answer's sentences, without what these quote."""
    names_model: bool = False
    """Whether the sentences must contain the model's name."""
    category: Category
    """Whose fault it is."""
    isolated: bool = False
    """Whether a transient error concerns only this job, so that it is not evidence of an outage."""
    likely: bool = False
    """Whether the job is only likely to blame: many different jobs in a row are an outage."""
    advice: str = ""
    """For the operator: what to check or to do."""

    def compile(self) -> None:
        """Compile the patterns.

        Raises:
            re.error: one of them is not a regular expression.
        """
        _ = self._code, self._words

    def matches(self, status: int, codes: Sequence[str], words: str, model: str) -> bool:
        """Return whether the rule applies; `model`: its name, or empty."""
        if self.status and status not in self.status and f"{status // 100}xx" not in self.status:
            return False
        if self.code and not any(map(self._code.search, codes)):
            return False
        if self.words and not self._words.search(words):
            return False
        return not self.names_model or _names(words, model)

    # Compiled when first needed: compiling all rules would delay the start by more than 10 ms.
    @cached_property
    def _code(self) -> re.Pattern[str]:
        return re.compile(self.code)

    @cached_property
    def _words(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.words), re.IGNORECASE)


def _names(words: str, model: str) -> bool:
    """Return whether the words contain the name of the model, not only as a part of another word."""
    return bool(model and re.search(rf"(?<!\w){re.escape(model)}(?!\w)", words, re.IGNORECASE))


class Profile(_Part):
    """What is known about a provider's API."""

    name: str
    """Of the profile: a value of `VQA_PROVIDER`."""
    title: str
    """Of the provider."""
    hosts: tuple[str, ...] = ()
    """Domains of its API; subdomains are included."""
    base_url: str = ""
    """The form of `VQA_MODEL_BASE_URL`, with `HOST` and parts in capitals to replace."""
    key_header: Literal["authorization", "api-key"] = "authorization"
    """The header of the API key: `Authorization: Bearer …`, or `api-key: …`."""
    images: Images = Images()
    request: RequestFields = RequestFields()
    retry: RetryHints = RetryHints()
    tiers: Mapping[str, Tier] = {}
    """Service tiers by name."""
    rules: tuple[Rule, ...] = ()
    """What error answers mean; the first match counts."""
    sources: tuple[str, ...] = ()
    """Where the facts come from."""
    unverified: str = ""
    """What could not be verified."""

    def only_streams(self, model: str) -> bool:
        """Return whether a model answers only as a stream."""
        return any(fnmatchcase(model.lower(), glob.lower()) for glob in self.request.stream_only_models)
