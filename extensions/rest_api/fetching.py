"""Fetches pictures and sends webhooks to URLs that strangers name."""

from modules.errors import FetchRefused
from modules.settings import Settings


class Fetcher:
    """Contacts what the settings allow."""

    def image(self, url: str) -> bytes:
        raise FetchRefused("not yet")

    def post(self, url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> int:
        raise FetchRefused("not yet")


def fetcher_of(settings: Settings) -> Fetcher:
    return Fetcher()
