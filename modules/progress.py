"""Turns the stages of a run into step texts and percentages that never fall."""

from modules.events import Progress

MAX_PERCENT_BEFORE_END = 99


class ProgressMeter:
    """Counts preparation and sampling steps of one attempt.

    Each preparation step adds one percent; the rest is shared evenly over all sampling steps of all images.
    """

    def __init__(self, images: int) -> None:
        """Begin at 1 %, as clients of Fooocus know it."""
        self._images = images
        self._prepared = 1
        self._percent = 1
        self._steps = 1
        self._done_before = 0

    def plan(self, steps: int, done_images: int = 0) -> None:
        """Tell how many sampling steps each image takes, and how many images an earlier attempt made."""
        self._steps = max(1, steps)
        self._done_before = done_images

    def stage(self, message: str, *, image: int = 0) -> Progress:
        """A stage that cannot be subdivided begins."""
        self._prepared = min(self._prepared + 1, 20)
        self._raise_to(min(self._prepared, self._percent + 1))
        return Progress(self._percent, message, image=image, images=self._images)

    def sampling(self, step: int, *, image: int, batch: int = 1, preview: bytes | None = None) -> Progress:
        """A sampling step of the images `image` … `image + batch - 1` (from 1) was made; `step` counts from 1.

        The text names the first of them, in the shape that clients parse.
        """
        share = (100 - self._prepared) / (self._steps * self._images)
        done = (image - 1) * self._steps + step * batch
        self._raise_to(int(self._prepared + share * done))
        return Progress(
            self._percent,
            f"Sampling step {step}/{self._steps}, image {image}/{self._images} ...",
            preview,
            step=step,
            steps=self._steps,
            image=image,
            images=self._images,
        )

    def _raise_to(self, percent: int) -> None:
        self._percent = max(self._percent, min(percent, MAX_PERCENT_BEFORE_END))
