"""Keeps the JSON of ended tasks, which never changes again."""

from collections import OrderedDict

import orjson

from extensions.rest_api.wire import Wire
from modules.record import Record

KEPT_RECORDS = 1_000


class ShownRecords:
    """JSON of records as the lists show them; that of an ended task is made once for each base of URLs."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[int, str], tuple[Record, bytes]] = OrderedDict()

    def json(self, record: Record, wire: Wire) -> bytes:
        """The record as JSON."""
        key = (record.id, wire.base)
        known, text = self._made.get(key, (None, b""))
        if known is record:  # a record is never altered: the same object says the same
            self._made.move_to_end(key)
            return text
        text = orjson.dumps(wire.record(record))
        if record.task_status.is_final:
            self._made[key] = (record, text)
            self._made.move_to_end(key)
            while len(self._made) > KEPT_RECORDS:
                self._made.popitem(last=False)
        return text
