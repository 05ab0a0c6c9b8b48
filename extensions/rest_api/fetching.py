"""Fetches pictures from, and posts webhooks to, URLs that strangers name; what the settings allow and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass

from modules.settings import Settings


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Contacts strangers' URLs under one policy.

    allow_private: whether loopback and private addresses may be contacted. allowed_hosts: what else may.
    """

    allow_private: bool
    allowed_hosts: tuple[str, ...]

    @classmethod
    def of(cls, settings: Settings) -> "Fetcher":
        """The policy of the settings: a server for this machine alone may contact this machine."""
        return cls(settings.listens_on_loopback and not settings.share, settings.allow_url_hosts)

    def image(self, url: str) -> bytes:
        """The bytes of a picture; blocks.

        Raises:
            FetchRefused: it is not to be had.
        """
        from modules.fetch import FetchPolicy, fetch  # TLS takes a tenth of a second to load, and few calls need it

        return fetch(url, policy=FetchPolicy(self.allow_private, self.allowed_hosts))

    def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        """Post a body and return the status of the answer; blocks.

        Raises:
            FetchRefused: nobody may be, or could be, told.
        """
        from modules.fetch import FetchPolicy, post

        policy = FetchPolicy(self.allow_private, self.allowed_hosts)
        return post(url, body, headers=headers, policy=policy, timeout_s=timeout_s)
