"""Find and renew AWS credentials in threads."""

import asyncio
import time

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


class CredentialsCache:
    """The credentials of the AWS default chain; renewed before they expire."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._renewable: RefreshableCredentials | None = None
        self._frozen: ReadOnlyCredentials | None = None
        self._lock = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        self._next_renewal = float("-inf")

    async def current(self) -> ReadOnlyCredentials:
        """Return valid credentials.

        Raises:
            NoCredentialsError: the chain has none.
            CredentialRetrievalError: they cannot be retrieved or renewed.
        """
        if self._frozen is None or self._expires(MUST_RENEW_S):
            async with self._lock:
                if self._frozen is None or self._expires(MUST_RENEW_S):
                    self._frozen = await asyncio.to_thread(self._find)
        elif self._expires(None) and time.monotonic() >= self._next_renewal:
            self._next_renewal = time.monotonic() + RENEWAL_PAUSE_S
            self._renewal = asyncio.create_task(self._renew(), name="aws-credentials")
        return self._frozen

    def _expires(self, within_s: int | None) -> bool:
        """Return whether they expire within so many seconds; None: within botocore's 15 minutes."""
        return self._renewable is not None and self._renewable.refresh_needed(within_s)

    async def _renew(self) -> None:
        """Renew in the background. botocore logs a failure, and a later call tries again."""
        try:
            self._frozen = await asyncio.to_thread(self._find)
        except BotoCoreError:
            return

    def _find(self) -> ReadOnlyCredentials:
        try:
            credentials = self._session.get_credentials()
            if credentials is None:
                raise NoCredentialsError
            frozen = credentials.get_frozen_credentials()
        except ClientError as error:
            raise role_denied(error) from None
        except RuntimeError:
            # botocore raises this if the renewed credentials have expired too.
            raise CredentialRetrievalError(provider="STS", error_msg="they have already expired") from None
        if isinstance(credentials, RefreshableCredentials):
            self._renewable = credentials
        return frozen


def role_denied(error: ClientError) -> CredentialRetrievalError:
    """Return the error for a role that STS denies; the message contains only the code."""
    code = error.response.get("Error", {}).get("Code", "no code")
    return CredentialRetrievalError(provider="STS", error_msg=code)
