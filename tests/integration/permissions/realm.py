"""A virtual host and users on a real broker, imported from the files of deploy/rabbitmq/."""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError

from deploy.local.stack import Stack
from deploy.rabbitmq.__main__ import HERE, STRICT_SETTINGS
from deploy.rabbitmq.rights import KEDA, OPERATOR, PUBLISHER, WORKER
from tests.breaking import administer, url_as

VHOST = "vqa"
USERS = (WORKER, PUBLISHER, KEDA, OPERATOR)
PLAIN_FOLDER, STRICT_FOLDER = HERE, HERE / "strict"
# The worker's settings in addition to its user's URL.
SETTINGS: Mapping[Path, Mapping[str, str]] = {
    PLAIN_FOLDER: {},
    STRICT_FOLDER: STRICT_SETTINGS,
}


@dataclass(frozen=True)
class Realm:
    """The virtual host of one folder's files, with a password for each user."""

    stack: Stack
    folder: Path
    passwords: Mapping[str, str] = field(default_factory=lambda: {it: uuid.uuid4().hex for it in USERS})

    @classmethod
    @contextmanager
    def of(cls, stack: Stack, folder: Path, *, definitions: Path | None = None) -> Iterator[Self]:
        """Import the users, then the other definitions (or `definitions`), then set the passwords."""
        realm = cls(stack, folder)
        try:
            realm.give(folder / "users.json")
            realm.give(definitions or folder / "definitions.json")
            realm.set_passwords()
            yield realm
        finally:
            for path in (f"/api/vhosts/{VHOST}", *(f"/api/users/{user}" for user in USERS)):
                with suppress(HTTPError):  # missing if the import failed
                    administer(stack, "DELETE", path)

    @property
    def is_strict(self) -> bool:
        return self.folder == STRICT_FOLDER

    @property
    def settings(self) -> Mapping[str, str]:
        """Return settings for the worker's user."""
        return {
            "VQA_RABBITMQ_URL": self.url(WORKER),
            "VQA_DECLARE_TOPOLOGY": "false",
            "VQA_JOBS_QUEUE": "vqa.jobs",
            "VQA_RESULTS_QUEUE": "vqa.results",
            "VQA_RETRY_DELAYS": "1,5,30,120",
            **SETTINGS[self.folder],
        }

    def give(self, file: Path) -> None:
        """Import a file."""
        administer(self.stack, "POST", "/api/definitions", json.loads(file.read_text()))

    def set_passwords(self) -> None:
        """Set the passwords of the users."""
        for user in json.loads((self.folder / "users.json").read_text())["users"]:
            body = {"password": self.passwords[user["name"]], "tags": ",".join(user["tags"])}
            administer(self.stack, "PUT", f"/api/users/{user['name']}", body)

    def url(self, user: str, vhost: str = VHOST) -> str:
        """Return the broker's URL for one of the users."""
        return url_as(self.stack, user, self.passwords[user], vhost)

    def permissions(self, user: str) -> Any:
        """Return a user's permissions on the broker."""
        return administer(self.stack, "GET", f"/api/permissions/{VHOST}/{user}")

    def administer(self, user: str, method: str, path: str, body: object = None) -> Any:
        """Call the management API as one of the users; raise HTTPError."""
        return administer(self.stack, method, path, body, user=f"{user}:{self.passwords[user]}")
