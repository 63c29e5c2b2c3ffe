"""Generate jobs of many kinds, each with its expected results."""

import base64
import hashlib
import io
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from PIL import Image

from deploy.local.model_simulator.answers import PREFIX
from deploy.local.model_simulator.behavior import Answer, Error, Rule

SUCCEEDED: Final = "succeeded"
# Markers in a question, with the simulator's response to each.
POISON, REJECTED, EMPTY, SLOW = "chaos-poison", "chaos-rejected", "chaos-empty", "chaos-slow"
MARKER_RULES: Final = (
    Rule(outcome=Error(status=500, message="It hurts"), times=None, marker=POISON),
    Rule(outcome=Error(status=400, message="Not like this"), times=None, marker=REJECTED),
    Rule(outcome=Answer(text=""), times=None, marker=EMPTY),
    Rule(outcome=Answer(after=1.5), times=None, marker=SLOW),
)
_NAMED = re.compile(r"#([0-9a-f]{16})#")
_SEEN = re.compile(r"sha256 ([0-9a-f]{12})")


def job_of(question: str) -> str | None:
    """Return the job id in a call's question."""
    found = _NAMED.search(question)
    return found[1] if found else None


@dataclass(frozen=True)
class Stored:
    """An image in S3: its URL and its bytes."""

    url: str
    content: bytes

    @property
    def digest(self) -> str:
        """The digest that the simulator puts into its answer."""
        return hashlib.sha256(self.content).hexdigest()[:12]


@dataclass
class ExpectedJob:
    """A job and its expected outcome.

    Attributes:
        expected_codes: allowed error codes, or `succeeded`.
        image_digests: the digests in a correct answer, in order.
        reply_to: the queue for the result.
        may_be_undeliverable: the result may be in the results queue, marked as undeliverable.
        is_dead_lettered: the job must also be in the dead-letter queue.
        resubmitted_after_s: seconds until a second submission.
        cancelled_after_s: seconds until the job is cancelled.
        id_in_body: the body has the job id; otherwise the message id is the job id.
        sent_at: when the broker confirmed each submission (Unix time).
        unconfirmed: publishes repeated because the confirm was lost.
    """

    id: str
    kind: str
    body: bytes
    expected_codes: frozenset[str]
    image_digests: tuple[str, ...] = ()
    reply_to: str | None = None
    may_be_undeliverable: bool = False
    is_dead_lettered: bool = False
    resubmitted_after_s: float | None = None
    cancelled_after_s: float | None = None
    id_in_body: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sent_at: list[float] = field(default_factory=list)
    unconfirmed: int = 0

    def mismatch(self, body: Mapping[str, Any]) -> str | None:
        """Return the difference between a result's body and the expected one, or None."""
        code = (body["error"] or {}).get("code", body["status"])
        if code not in self.expected_codes:
            message = (body["error"] or {}).get("message")
            return f"{code} ({message}) instead of {', '.join(sorted(self.expected_codes))}"
        if body["metadata"] != self.metadata and code != "invalid_job":
            return f"unexpected metadata {body['metadata']}"
        return self._answer_mismatch(body["answer"]) if code == SUCCEEDED else None

    def _answer_mismatch(self, answer: str) -> str | None:
        if not answer.startswith(PREFIX):
            return f"not the simulator's answer: {answer!r}"
        if tuple(_SEEN.findall(answer)) != self.image_digests:
            return f"an answer for other images: {answer!r}"
        return (
            None if self.image_digests or f"#{self.id}#" in answer or "a link to" in answer else f"{answer!r}"
        )


@dataclass(frozen=True)
class JobInputs:
    """Images in S3 by size, and a private reply queue."""

    small: Sequence[Stored]
    large: Sequence[Stored]
    bucket: str
    private_queue: str


class Jobs:
    """Generate an endless sequence of jobs; the same seed gives the same jobs, except their deadlines."""

    def __init__(self, seed: int, inputs: JobInputs, kinds: Sequence[str] | None = None) -> None:
        self._rng = random.Random(f"jobs {seed}")  # noqa: S311 - repeatable on purpose
        self._inputs = inputs
        self._kinds = {name: it for name, it in KINDS.items() if kinds is None or name in kinds}

    def __iter__(self) -> Iterator[ExpectedJob]:
        names, weights = list(self._kinds), [weight for weight, _ in self._kinds.values()]
        while True:
            (name,) = self._rng.choices(names, weights)
            yield self._kinds[name][1](self, name)

    def _job(self, kind: str, *images: Stored | str, code: str = SUCCEEDED, **more: Any) -> ExpectedJob:
        """Return a job in the short form; `more` are fields of `ExpectedJob` or of the job's body."""
        asked_fields = {
            name: more.pop(name) for name in list(more) if name in ExpectedJob.__dataclass_fields__
        }
        job_id, marker = self._id(), more.pop("marker", "")
        metadata = {"kind": kind, "n": self._rng.randrange(1_000_000)}
        urls = [image.url if isinstance(image, Stored) else image for image in images]
        body = {"id": job_id, "question": f"#{job_id}# What is it? {marker}", "images": urls}
        return ExpectedJob(
            **{
                "id": job_id,
                "kind": kind,
                "body": json.dumps({**body, "metadata": metadata, **more}).encode(),
                "expected_codes": frozenset({code}),
                "image_digests": tuple(image.digest for image in images if isinstance(image, Stored)),
                "metadata": metadata,
                **asked_fields,
            }
        )

    def _id(self) -> str:
        return f"{self._rng.getrandbits(64):016x}"

    def _small(self) -> Stored:
        return self._rng.choice(self._inputs.small)

    def small(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small())

    def large(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._rng.choice(self._inputs.large))

    def slow(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), marker=SLOW)

    def several(self, kind: str) -> ExpectedJob:
        images = self._rng.sample(self._inputs.small, 3)
        return self._job(kind, images[0], _inline(images[1]), images[2])

    def inline(self, kind: str) -> ExpectedJob:
        return self._job(kind, _inline(self._small()))

    def link(self, kind: str) -> ExpectedJob:
        return self._job(kind, "https://example.com/picture.png")

    def long(self, kind: str) -> ExpectedJob:
        """Return a conversation with an image in each of two user turns."""
        job_id, first, second = self._id(), self._small(), _inline(self._small())
        metadata = {"kind": kind}
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": _parts("What is this?", first)},
            {"role": "assistant", "content": "A picture."},
            {"role": "user", "content": _parts(f"#{job_id}# And this?", second)},
        ]
        body = json.dumps({"id": job_id, "messages": turns, "metadata": metadata}).encode()
        image_digests = (first.digest, second.digest)
        return ExpectedJob(job_id, kind, body, frozenset({SUCCEEDED}), image_digests, metadata=metadata)

    def text(self, kind: str) -> ExpectedJob:
        job_id = self._id()
        turns = [{"role": "user", "content": f"#{job_id}# No picture?"}]
        body = json.dumps({"id": job_id, "messages": turns}).encode()
        return ExpectedJob(job_id, kind, body, frozenset({SUCCEEDED}))

    def again(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), resubmitted_after_s=self._rng.uniform(0, 4))

    def cancelled(self, kind: str) -> ExpectedJob:
        """Return a slow job to cancel; it succeeds if the cancel message comes too late."""
        after_s, expected_codes = self._rng.uniform(0, 2), frozenset({SUCCEEDED, "cancelled"})
        return self._job(
            kind, self._small(), marker=SLOW, expected_codes=expected_codes, cancelled_after_s=after_s
        )

    def private_reply_queue(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), reply_to=self._inputs.private_queue, may_be_undeliverable=True)

    def missing_reply_queue(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), reply_to="vqa.results.nobody", may_be_undeliverable=True)

    def deadline(self, kind: str) -> ExpectedJob:
        expected_codes = frozenset({SUCCEEDED, "deadline_exceeded"})
        return self._job(
            kind,
            self._small(),
            deadline=_timestamp_in(self._rng.uniform(2, 8)),
            expected_codes=expected_codes,
        )

    def past_deadline(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), deadline=_timestamp_in(-1), code="deadline_exceeded")

    def missing(self, kind: str) -> ExpectedJob:
        return self._job(kind, f"s3://{self._inputs.bucket}/missing/{self._id()}", code="image_not_found")

    def forbidden(self, kind: str) -> ExpectedJob:
        return self._job(kind, "http://example.com/a.png", code="image_source_not_allowed")

    def gif(self, kind: str) -> ExpectedJob:
        content = base64.b64encode(b"GIF89a is not supported").decode()
        return self._job(kind, f"data:image/gif;base64,{content}", code="image_unsupported_type")

    def invalid(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), code="invalid_job", imagse=[])

    def unreadable(self, kind: str) -> ExpectedJob:
        """Return a body that is not JSON: the failed result is matched by the message id."""
        job_id, expected_codes = self._id(), frozenset({"invalid_job"})
        return ExpectedJob(
            job_id,
            kind,
            f"{{not JSON {job_id}".encode(),
            expected_codes,
            is_dead_lettered=True,
            id_in_body=False,
        )

    def poison(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), marker=POISON, code="attempts_exhausted", is_dead_lettered=True)

    def rejected(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), marker=REJECTED, code="model_rejected")

    def empty(self, kind: str) -> ExpectedJob:
        return self._job(kind, self._small(), marker=EMPTY, code="empty_answer")


# The weight and the generator method of each kind.
KINDS: Final[Mapping[str, tuple[float, Callable[[Jobs, str], ExpectedJob]]]] = {
    "one image in S3": (30, Jobs.small),
    "a large image in S3": (6, Jobs.large),
    "an image in the job": (8, Jobs.inline),
    "several images": (6, Jobs.several),
    "the long form": (8, Jobs.long),
    "text only": (3, Jobs.text),
    "a link": (2, Jobs.link),
    "a slow answer": (8, Jobs.slow),
    "submitted twice": (6, Jobs.again),
    "cancelled": (4, Jobs.cancelled),
    "a private reply queue": (5, Jobs.private_reply_queue),
    "a missing reply queue": (2, Jobs.missing_reply_queue),
    "a deadline": (4, Jobs.deadline),
    "a deadline in the past": (2, Jobs.past_deadline),
    "a missing image": (3, Jobs.missing),
    "a forbidden source": (1, Jobs.forbidden),
    "not an image": (1, Jobs.gif),
    "an unknown field": (2, Jobs.invalid),
    "not JSON": (1, Jobs.unreadable),
    "always HTTP 500": (0.4, Jobs.poison),
    "always HTTP 400": (2, Jobs.rejected),
    "an empty answer": (2, Jobs.empty),
}


def images(seed: int, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return uncompressed PNGs of noise, three bytes per pixel."""
    rng = random.Random(f"images {seed}")  # noqa: S311 - repeatable on purpose
    return [_image(rng, size) for size in sizes]


def _image(rng: random.Random, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def key(nth: int) -> str:
    """Return an object key with characters that need URL encoding."""
    return f"pictures/{string.ascii_lowercase[nth % 26]} +%20/ä{nth}.png"


def _inline(image: Stored) -> Stored:
    return Stored(f"data:image/png;base64,{base64.b64encode(image.content).decode()}", image.content)


def _parts(text: str, image: Stored) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": image.url}}, {"type": "text", "text": text}]


def _timestamp_in(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
