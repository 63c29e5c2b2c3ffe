"""Find and renew AWS credentials in threads."""

import asyncio
import time
from collections.abc import Callable

from botocore.credentials import ReadOnlyCredentials, RefreshableCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
)
from botocore.session import Session

# Credentials that expire sooner are renewed before use; those that expire a little later, in the background
# (botocore's own times are 10 and 15 minutes).
MUST_RENEW_S = 600
RENEWAL_PAUSE_S = 60.0
# Keys in the files of the AWS configuration have no expiry and may be replaced.
REREAD_S = 60.0
_FROM_FILES = frozenset({"shared-credentials-file", "config-file"})


class CredentialsCache:
    """The credentials of the AWS default chain; renewed before they expire, and when S3 rejects them."""

    def __init__(self, open_session: Callable[[], Session]) -> None:
        """`open_session`: returns a session that has read nothing yet."""
        self._open_session = open_session
        self._session = open_session()
        self._renewable: RefreshableCredentials | None = None
        self._are_from_file = False
        self._frozen: ReadOnlyCredentials | None = None
        self._lock = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        self._next_renewal = float("-inf")
        # The start of the last read after a rejection.
        self._read_at = float("-inf")

    async def current(self) -> ReadOnlyCredentials:
        """Return valid credentials.

        Raises:
            NoCredentialsError: the chain has none.
            CredentialRetrievalError: they cannot be retrieved or renewed.
        """
        if self._frozen is None or self._expires(MUST_RENEW_S):
            async with self._lock:
                if self._frozen is None or self._expires(MUST_RENEW_S):
                    self._frozen = await asyncio.to_thread(self._find_or_read_again)
                    self._next_renewal = time.monotonic() + (REREAD_S if self._are_from_file else 0.0)
        elif (self._are_from_file or self._expires(None)) and time.monotonic() >= self._next_renewal:
            self._next_renewal = time.monotonic() + RENEWAL_PAUSE_S
            self._renewal = asyncio.create_task(self._renew(), name="aws-credentials")
        return self._frozen

    async def renew(self, rejected: ReadOnlyCredentials) -> bool:
        """Read the credentials again if they are still `rejected`; return whether they are others now."""
        rejected_at = time.monotonic()
        async with self._lock:
            # Of requests that are rejected together, one reads for all.
            if self._frozen == rejected and self._read_at <= rejected_at:
                self._read_at = time.monotonic()
                try:
                    self._frozen = await asyncio.to_thread(self._read_again)
                except BotoCoreError:
                    return False
        return self._frozen != rejected

    def _expires(self, within_s: int | None) -> bool:
        """Return whether they expire within so many seconds; None: within botocore's 15 minutes."""
        return self._renewable is not None and self._renewable.refresh_needed(within_s)

    async def _renew(self) -> None:
        """Renew in the background. botocore logs a failure, and a later call tries again."""
        try:
            find = self._read_again if self._are_from_file else self._find
            self._frozen = await asyncio.to_thread(find)
        except BotoCoreError:
            return

    def _find_or_read_again(self) -> ReadOnlyCredentials:
        """Find the credentials; without any so far, or if a role's own keys fail, read the files again."""
        if self._frozen is not None:
            try:
                return self._find()
            except CredentialRetrievalError:
                pass
        return self._read_again()

    def _read_again(self) -> ReadOnlyCredentials:
        """Find the credentials with a new session, since a session reads the files only once."""
        session = self._open_session()
        frozen = self._find(session)
        self._session = session
        return frozen

    def _find(self, session: Session | None = None) -> ReadOnlyCredentials:
        try:
            credentials = (session or self._session).get_credentials()
            if credentials is None:
                raise NoCredentialsError
            frozen = credentials.get_frozen_credentials()
        except ClientError as error:
            raise role_denied(error) from None
        except RuntimeError:
            # botocore raises this if the renewed credentials have expired too.
            raise CredentialRetrievalError(provider="STS", error_msg="they have already expired") from None
        self._are_from_file = credentials.method in _FROM_FILES
        self._renewable = credentials if isinstance(credentials, RefreshableCredentials) else None
        return frozen


def role_denied(error: ClientError) -> CredentialRetrievalError:
    """Return the error for a role that STS denies; the message contains only the code."""
    code = error.response.get("Error", {}).get("Code", "no code")
    return CredentialRetrievalError(provider="STS", error_msg=code)
