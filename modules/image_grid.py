"""Puts the pictures of one task onto a contact sheet."""

import math
from collections.abc import Sequence

from PIL import Image


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image | None:
    """All pictures row by row on black, in ceil(sqrt(n)) columns; None for fewer than two or for mixed sizes.

    Args:
        images: pictures of equal size and mode.
    Returns:
        (columns · width, rows · height) in the mode of the pictures, or None.
    """
    if len(images) < 2 or len({(image.size, image.mode) for image in images}) != 1:
        return None
    width, height = images[0].size
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(images[0].mode, (columns * width, rows * height))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * width, row * height))
    return sheet
