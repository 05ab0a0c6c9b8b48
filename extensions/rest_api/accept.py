"""Reads the Accept header the way clients of this API use it."""

from modules.images import MEDIA_TYPES


def binary_format(header: str, override: str | None = None) -> str | None:
    """The picture format a generate call wants instead of JSON, or None.

    Only a header with a single entry of type `image` selects one; browsers' long lists never do. An unknown
    subtype, `*` included, means png.

    Args:
        override: value of `?accept=`, which wins over the header.
    """
    entry = (override if override else header).lower().split(";")[0].strip()
    parts = entry.split("/")
    if len(parts) != 2 or parts[0] != "image" or "," in entry:
        return None
    return parts[1] if parts[1] in MEDIA_TYPES else "png"


def file_format(header: str) -> str | None:
    """The format a stored picture is wanted in; None for "as it is stored"."""
    entry = header.lower().split(";")[0].strip()
    kind, _slash, subtype = entry.partition("/")
    return subtype if kind == "image" and subtype in MEDIA_TYPES else None
