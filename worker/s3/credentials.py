"""AWS credentials as of now, found and renewed off the event loop."""

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

# Credentials that end sooner than this are renewed before they are used again; before that, in the
# background (the SDK's own times are 10 and 15 minutes).
MUST_RENEW_S = 600
RENEWAL_PAUSE_S = 60.0


class CredentialsCache:
    """The credentials that the usual AWS chain gives; those that end are renewed in time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._renewable: RefreshableCredentials | None = None
        self._frozen: ReadOnlyCredentials | None = None
        self._turn = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        self._next_renewal = float("-inf")

    async def current(self) -> ReadOnlyCredentials:
        """Credentials to sign with.

        Raises:
            NoCredentialsError: the chain has none, so far.
            CredentialRetrievalError: they cannot be had, or renewed.
        """
        if self._frozen is None or self._is_ending(MUST_RENEW_S):
            async with self._turn:
                if self._frozen is None or self._is_ending(MUST_RENEW_S):
                    self._frozen = await asyncio.to_thread(self._find)
        elif self._is_ending(None) and time.monotonic() >= self._next_renewal:
            self._next_renewal = time.monotonic() + RENEWAL_PAUSE_S
            self._renewal = asyncio.create_task(self._renew(), name="aws-credentials")
        return self._frozen

    def _is_ending(self, within_s: int | None) -> bool:
        """Whether they end within so many seconds; None: when the SDK would renew them."""
        return self._renewable is not None and self._renewable.refresh_needed(within_s)

    async def _renew(self) -> None:
        """Renew in good time. A failure is not a matter yet: the SDK logs it, and there is another try."""
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
            # The SDK's word for credentials that are still the old ones after they were renewed.
            raise CredentialRetrievalError(provider="STS", error_msg="those it gives have expired") from None
        if isinstance(credentials, RefreshableCredentials):
            self._renewable = credentials
        return frozen


def role_denied(error: ClientError) -> CredentialRetrievalError:
    """STS refuses the role; of its answer only the code is reported."""
    code = error.response.get("Error", {}).get("Code", "no code")
    return CredentialRetrievalError(provider="STS", error_msg=code)
