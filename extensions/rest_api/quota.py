"""How many tasks of one API key may wait."""

from collections import Counter

from modules.errors import QueueFull
from modules.events import Event, is_final
from modules.jobs import Job, JobQueue


class KeyQuota:
    """Counts the waiting tasks of each key; tasks of an earlier server count for nobody."""

    def __init__(self, jobs: JobQueue, limit: int) -> None:
        """Allow `limit` waiting tasks per key; 0 is no limit."""
        self._jobs = jobs
        self._limit = limit
        self._owners: dict[str, str] = {}

    def check(self, key_name: str) -> None:
        """Refuse one more task of this key when its share of the queue is full.

        Raises:
            QueueFull: as many tasks wait as the key may have.
        """
        if not self._limit:
            return
        waiting = Counter(self._owners.get(job.task_id) for job in self._jobs.waiting)[key_name]
        if waiting >= self._limit:
            raise QueueFull(f"{waiting} tasks of this key wait, and no more may.")

    def own(self, task_id: str, key_name: str) -> None:
        """Remember whose task it is."""
        if self._limit:
            self._owners[task_id] = key_name

    def on_event(self, job: Job, event: Event) -> None:
        """Forget a task that has ended."""
        if is_final(event):
            self._owners.pop(job.task_id, None)
