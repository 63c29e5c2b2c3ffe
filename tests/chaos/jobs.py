"""The jobs that are asked, of many kinds, and what each of them must come to."""

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
# What makes the simulator answer a job in its own way, whatever else is wrong.
POISON, REJECTED, EMPTY, SLOW = "chaos-poison", "chaos-rejected", "chaos-empty", "chaos-slow"
STANDING_RULES: Final = (
    Rule(outcome=Error(status=500, message="It hurts"), times=None, marker=POISON),
    Rule(outcome=Error(status=400, message="Not like this"), times=None, marker=REJECTED),
    Rule(outcome=Answer(text=""), times=None, marker=EMPTY),
    Rule(outcome=Answer(after=1.5), times=None, marker=SLOW),
)
_NAMED = re.compile(r"#([0-9a-f]{16})#")
_SEEN = re.compile(r"sha256 ([0-9a-f]{12})")


def job_of(question: str) -> str | None:
    """The id of the job that a call is for, which stands in its question."""
    found = _NAMED.search(question)
    return found[1] if found else None


@dataclass(frozen=True)
class Stored:
    """An image in S3: its URL, its bytes, and how the simulator calls it in an answer."""

    url: str
    content: bytes

    @property
    def seen_as(self) -> str:
        return hashlib.sha256(self.content).hexdigest()[:12]


@dataclass
class Asked:
    """A job, and what must become of it.

    Attributes:
        codes: the error codes it may end with, or `succeeded`.
        sees: its images as a right answer names them, in order.
        reply_to: the queue that its result must come to.
        elsewhere: whether the result may also be in the results queue, as undeliverable.
        dies: whether it must come to the dead-letter queue, too.
        again_after_s: a second submission follows so much later.
        cancelled_after_s: it is cancelled so much later.
        id_in_body: whether the body says the id; else only the message's own id does.
        sent_at: when each submission was confirmed by the broker (Unix time).
        doubtful: submissions that had to be sent again, since the broker went before it confirmed them.
    """

    id: str
    kind: str
    body: bytes
    codes: frozenset[str]
    sees: tuple[str, ...] = ()
    reply_to: str | None = None
    elsewhere: bool = False
    dies: bool = False
    again_after_s: float | None = None
    cancelled_after_s: float | None = None
    id_in_body: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sent_at: list[float] = field(default_factory=list)
    doubtful: int = 0

    def fault_of(self, body: Mapping[str, Any]) -> str | None:
        """What is wrong with a result's body; None if it is as it must be."""
        code = (body["error"] or {}).get("code", body["status"])
        if code not in self.codes:
            return (
                f"{code} ({(body['error'] or {}).get('message')}) instead of {', '.join(sorted(self.codes))}"
            )
        if body["metadata"] != self.metadata and code != "invalid_job":
            return f"the metadata {body['metadata']} are another job's"
        return self._fault_of_answer(body["answer"]) if code == SUCCEEDED else None

    def _fault_of_answer(self, answer: str) -> str | None:
        if not answer.startswith(PREFIX):
            return f"not the simulator's answer: {answer!r}"
        if tuple(_SEEN.findall(answer)) != self.sees:
            return f"an answer about other images: {answer!r}"
        return None if self.sees or f"#{self.id}#" in answer or "a link to" in answer else f"{answer!r}"


@dataclass(frozen=True)
class Places:
    """Where jobs can point: images in S3 by size, and the queue of a publisher of its own."""

    small: Sequence[Stored]
    large: Sequence[Stored]
    bucket: str
    private_queue: str


class Jobs:
    """Makes jobs without end, the same for the same seed but for their deadlines."""

    def __init__(self, seed: int, places: Places, kinds: Sequence[str] | None = None) -> None:
        self._rng = random.Random(f"jobs {seed}")  # noqa: S311 - repeatable on purpose
        self._places = places
        self._makers = {name: it for name, it in MAKERS.items() if kinds is None or name in kinds}

    def __iter__(self) -> Iterator[Asked]:
        names, weights = list(self._makers), [weight for weight, _ in self._makers.values()]
        while True:
            (name,) = self._rng.choices(names, weights)
            yield self._makers[name][1](self, name)

    def _job(self, kind: str, *images: Stored | str, code: str = SUCCEEDED, **more: Any) -> Asked:
        """A job in the short form; `more`: further fields of `Asked`, or of the job if they are none."""
        asked_fields = {name: more.pop(name) for name in list(more) if name in Asked.__dataclass_fields__}
        job_id, marker = self._id(), more.pop("marker", "")
        metadata = {"kind": kind, "n": self._rng.randrange(1_000_000)}
        urls = [image.url if isinstance(image, Stored) else image for image in images]
        body = {"id": job_id, "question": f"#{job_id}# What is it? {marker}", "images": urls}
        return Asked(
            **{
                "id": job_id,
                "kind": kind,
                "body": json.dumps({**body, "metadata": metadata, **more}).encode(),
                "codes": frozenset({code}),
                "sees": tuple(image.seen_as for image in images if isinstance(image, Stored)),
                "metadata": metadata,
                **asked_fields,
            }
        )

    def _id(self) -> str:
        return f"{self._rng.getrandbits(64):016x}"

    def _small(self) -> Stored:
        return self._rng.choice(self._places.small)

    def small(self, kind: str) -> Asked:
        return self._job(kind, self._small())

    def large(self, kind: str) -> Asked:
        return self._job(kind, self._rng.choice(self._places.large))

    def slow(self, kind: str) -> Asked:
        return self._job(kind, self._small(), marker=SLOW)

    def several(self, kind: str) -> Asked:
        images = self._rng.sample(self._places.small, 3)
        return self._job(kind, images[0], _inline(images[1]), images[2])

    def inline(self, kind: str) -> Asked:
        return self._job(kind, _inline(self._small()))

    def link(self, kind: str) -> Asked:
        return self._job(kind, "https://example.com/picture.png")

    def long(self, kind: str) -> Asked:
        """Two turns with an image each; the question is the last one's text."""
        job_id, first, second = self._id(), self._small(), _inline(self._small())
        metadata = {"kind": kind}
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": _parts("What is this?", first)},
            {"role": "assistant", "content": "A picture."},
            {"role": "user", "content": _parts(f"#{job_id}# And this?", second)},
        ]
        body = json.dumps({"id": job_id, "messages": turns, "metadata": metadata}).encode()
        sees = (first.seen_as, second.seen_as)
        return Asked(job_id, kind, body, frozenset({SUCCEEDED}), sees, metadata=metadata)

    def text(self, kind: str) -> Asked:
        job_id = self._id()
        turns = [{"role": "user", "content": f"#{job_id}# No picture?"}]
        body = json.dumps({"id": job_id, "messages": turns}).encode()
        return Asked(job_id, kind, body, frozenset({SUCCEEDED}))

    def again(self, kind: str) -> Asked:
        return self._job(kind, self._small(), again_after_s=self._rng.uniform(0, 4))

    def cancelled(self, kind: str) -> Asked:
        """Whether it is in time depends on what else happens."""
        after_s, codes = self._rng.uniform(0, 2), frozenset({SUCCEEDED, "cancelled"})
        return self._job(kind, self._small(), marker=SLOW, codes=codes, cancelled_after_s=after_s)

    def private(self, kind: str) -> Asked:
        return self._job(kind, self._small(), reply_to=self._places.private_queue, elsewhere=True)

    def nobodys(self, kind: str) -> Asked:
        return self._job(kind, self._small(), reply_to="vqa.results.nobody", elsewhere=True)

    def deadline(self, kind: str) -> Asked:
        codes = frozenset({SUCCEEDED, "deadline_exceeded"})
        return self._job(kind, self._small(), deadline=_in(self._rng.uniform(2, 8)), codes=codes)

    def late(self, kind: str) -> Asked:
        return self._job(kind, self._small(), deadline=_in(-1), code="deadline_exceeded")

    def missing(self, kind: str) -> Asked:
        return self._job(kind, f"s3://{self._places.bucket}/missing/{self._id()}", code="image_not_found")

    def forbidden(self, kind: str) -> Asked:
        return self._job(kind, "http://example.com/a.png", code="image_source_not_allowed")

    def no_image(self, kind: str) -> Asked:
        content = base64.b64encode(b"GIF89a is not taken").decode()
        return self._job(kind, f"data:image/gif;base64,{content}", code="image_unsupported_type")

    def invalid(self, kind: str) -> Asked:
        return self._job(kind, self._small(), code="invalid_job", imagse=[])

    def unreadable(self, kind: str) -> Asked:
        """Not JSON: the message's own id reports whom the failed result is for."""
        job_id, codes = self._id(), frozenset({"invalid_job"})
        return Asked(job_id, kind, f"{{not JSON {job_id}".encode(), codes, dies=True, id_in_body=False)

    def poison(self, kind: str) -> Asked:
        return self._job(kind, self._small(), marker=POISON, code="attempts_exhausted", dies=True)

    def rejected(self, kind: str) -> Asked:
        return self._job(kind, self._small(), marker=REJECTED, code="model_rejected")

    def empty(self, kind: str) -> Asked:
        return self._job(kind, self._small(), marker=EMPTY, code="empty_answer")


# How often each kind comes, and how it is made.
MAKERS: Final[Mapping[str, tuple[float, Callable[[Jobs, str], Asked]]]] = {
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
    "a private reply queue": (5, Jobs.private),
    "a reply queue that is missing": (2, Jobs.nobodys),
    "a deadline": (4, Jobs.deadline),
    "a deadline in the past": (2, Jobs.late),
    "a missing image": (3, Jobs.missing),
    "a forbidden source": (1, Jobs.forbidden),
    "not an image": (1, Jobs.no_image),
    "a field misspelt": (2, Jobs.invalid),
    "not JSON": (1, Jobs.unreadable),
    "poisonous": (0.4, Jobs.poison),
    "rejected by the model": (2, Jobs.rejected),
    "an empty answer": (2, Jobs.empty),
}


def pictures(seed: int, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    """PNGs of noise, which no compression makes smaller: three bytes for each pixel."""
    rng = random.Random(f"pictures {seed}")  # noqa: S311 - repeatable on purpose
    return [_picture(rng, size) for size in sizes]


def _picture(rng: random.Random, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def key(nth: int) -> str:
    """An object's key with characters that a careless client would mangle."""
    return f"pictures/{string.ascii_lowercase[nth % 26]} +%20/ä{nth}.png"


def _inline(image: Stored) -> Stored:
    return Stored(f"data:image/png;base64,{base64.b64encode(image.content).decode()}", image.content)


def _parts(text: str, image: Stored) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": image.url}}, {"type": "text", "text": text}]


def _in(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
