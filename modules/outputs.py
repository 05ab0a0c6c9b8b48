"""Removes finished pictures from the output folder, with all that was written about them."""

import contextlib
import logging
from pathlib import Path

from modules.errors import NotFound, StorageFull
from modules.files import inside
from modules.log_page import remove_entry

logger = logging.getLogger(__name__)


def delete_picture(root: Path, relative: str) -> bool:
    """Delete a picture and its entry on the log page; a picture that is gone already is no error.

    Args:
        root: the output folder; nothing outside of it is ever deleted.
        relative: POSIX path below `root`.
    Returns:
        True when a file was deleted.
    """
    try:
        path = inside(root, relative)
    except NotFound:
        return False
    path.unlink(missing_ok=True)
    with contextlib.suppress(StorageFull):  # the page hides entries whose picture is gone
        remove_entry(path.parent, path.name)
    logger.info("Deleted %s", relative)
    return True
