"""Keeps the record of every task, durable before a call returns and found again without searching."""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

from pydantic import ValidationError

from modules.choices import Source, TaskStatus
from modules.errors import IllegalTransition, NotFound, StorageFull
from modules.history_index import LARGEST, RecordIndex, SortedIds, TermIndex, model_term, style_term, terms_of, words_of
from modules.history_log import LogStorage, Sync
from modules.history_rows import Fields, Row
from modules.history_tables import LogDB, LogTable
from modules.record import Record

logger = logging.getLogger(__name__)

FILE_NAME: Final = "history.log"
TABLE: Final = "history"
FINAL: Final = tuple(status for status in TaskStatus if status.is_final)
UNFINISHED: Final = tuple(status for status in TaskStatus if not status.is_final)

_MANY: Final = 2**31
_READ_AT_ONCE: Final = 50  # records read under one hold of the lock while the words are collected
_REMEMBERED: Final = 500  # records kept as objects, some ten kilobytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryFilter:
    """Which records are wanted; every condition given must hold.

    words: beginnings of prompt words, in any order and letter case, all of which must occur.
    style, model: names, compared without letter case; model is the checkpoint asked for or used.
    seed: of one of the pictures.
    start_mills, end_mills: when the task was queued, milliseconds since the epoch, both ends included.
    """

    words: str = ""
    style: str = ""
    model: str = ""
    seed: int | None = None
    start_mills: int | None = None
    end_mills: int | None = None
    statuses: tuple[TaskStatus, ...] = FINAL
    source: Source | None = None

    @property
    def has_terms(self) -> bool:
        """Whether prompt words, a style or a model narrow the search."""
        return bool(self.words.strip() or self.style or self.model)


class History:
    """All records of one output folder, over TinyDB on a durable log.

    Thread-safe and synchronous: adding and updating wait for the disk (milliseconds), so call them from an
    event loop through `asyncio.to_thread`. Reading never waits for a writer's disk. Ids grow with every
    record and are never given twice, whatever the clock does.

    db, table: TinyDB's own interface to the same records, for any query: `history.table.search(where(...))`.
        Changes made there are indexed too.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        sync: Sync = "always",
        read_only: bool = False,
        limit: int = 0,
    ) -> None:
        """Open the history of the output folder `folder`, making both where missing.

        Args:
            sync: see `LogStorage`.
            read_only: look at the records as they are now, beside the server that writes them.
            limit: ended tasks that are kept; the oldest go when one more ends. 0 keeps all.
        Raises:
            HistoryLocked: another server writes this history.
            HistoryDamaged: the file is no history, or of a newer version.
            StorageFull: the folder cannot be written.
            OSError: read_only, and there is no readable history.
        """
        self.folder = Path(folder)
        self.limit = limit
        if not read_only:
            _make_folder(self.folder)
        self.db = LogDB(self.folder / FILE_NAME, sync=sync, read_only=read_only)
        self.storage = cast(LogStorage, self.db.storage)
        self.table = cast(LogTable, self.db.table(TABLE))
        self._remembered: OrderedDict[int, tuple[Row, Record]] = OrderedDict()
        self._reading_terms = threading.Lock()
        self._terms = TermIndex()
        with self.storage.state_lock:
            rows = self.storage.rows.tables.get(TABLE, {})
            self._index = RecordIndex((doc_id, Fields.hot_half(row)) for doc_id, row in rows.items())
            self.storage.listener = self._follow

    def close(self) -> None:
        """Finish what is being written and give the folder free; closing twice is fine."""
        self.db.close()

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index.ids)

    # Writing

    def add(self, record: Record) -> Record:
        """Keep a new record and give it with its id; it is on the disk when this returns.

        Raises:
            IllegalTransition: a record with this task id exists.
            StorageFull: the disk did not take it; nothing has changed.
        """
        return self.add_many([record])[0]

    def add_many(self, records: Iterable[Record]) -> list[Record]:
        """Keep new records in one transaction: all of them or none. Raises as `add`."""
        records = list(records)
        with self.storage.write_lock:
            seen: set[str] = set()
            for record in records:
                if record.task_id in self._index.by_task or record.task_id in seen:
                    raise IllegalTransition(f"The history already holds a task {record.task_id!r}.")
                seen.add(record.task_id)
            ids = self.table.insert_multiple(_document(record) for record in records)
            self._keep_limit()
        return [record.model_copy(update={"id": doc_id}) for record, doc_id in zip(records, ids, strict=True)]

    def update(self, task_id: str, **changes: object) -> Record:
        """Change fields of a record and give the next record; it is on the disk when this returns.

        Raises:
            NotFound: no record has this task id.
            TypeError: a record has no such field, or the field says which record it is.
            pydantic.ValidationError: a value does not fit its field.
            StorageFull: the disk did not take it; nothing has changed.
        """
        unknown = changes.keys() - (Record.model_fields.keys() - {"id", "task_id"})
        if unknown:
            raise TypeError(f"These fields of a record cannot be changed: {', '.join(sorted(unknown))}.")
        with self.storage.write_lock:
            before = self.get(task_id)
            if before is None:
                raise NotFound(f"The history holds no task {task_id!r}.")
            after = Record.model_validate(before.model_dump() | changes)
            self.table.update(_document(after), doc_ids=[after.id])
            self._keep_limit()
            return after

    def delete(self, task_ids: Iterable[str]) -> list[Record]:
        """Remove the finished records of these tasks in one transaction and give them, in the order asked.

        Waiting and running tasks, and unknown ids, are passed over. The pictures are the caller's to remove.
        """
        with self.storage.write_lock:
            found = [self.get(task_id) for task_id in dict.fromkeys(task_ids)]
            gone = [record for record in found if record is not None and record.task_status.is_final]
            self.table.remove(doc_ids=[record.id for record in gone])
            return gone

    def prune(
        self, *, keep: int | None = None, before_mills: int | None = None, max_bytes: int | None = None
    ) -> list[Record]:
        """Remove the oldest finished records and give them, oldest first, without their `req_params`.

        Args:
            keep: how many finished records may stay.
            before_mills: those queued before this moment go.
            max_bytes: what all records together may take in a compacted log.
        """
        with self.storage.write_lock:
            with self.storage.state_lock:
                final = self._index.final
                ids = set(final[: max(0, len(final) - keep)]) if keep is not None else set()
                if before_mills is not None:
                    queued = self._index.times.between(-1, before_mills - 1)
                    ids.update(doc_id for doc_id in queued if doc_id in final)
                if max_bytes is not None:
                    ids.update(self._oldest_above(max_bytes))
                documents = [(self.table.hot(doc_id) or {}, doc_id) for doc_id in sorted(ids)]
            self.table.remove(doc_ids=sorted(ids))
        return [record for hot, doc_id in documents if (record := _record(hot, doc_id)) is not None]

    def _keep_limit(self) -> None:
        """Remove what the limit leaves no room for; if the disk refuses, the next change tries again."""
        if self.limit and len(self._index.final) > self.limit:
            try:
                self.prune(keep=self.limit)
            except StorageFull as error:
                logger.warning("The oldest records were not removed: %s", error)

    def _oldest_above(self, max_bytes: int) -> list[int]:
        """The oldest finished records without which the rest takes at most `max_bytes`."""
        surplus = self.storage.rows.live_bytes - max_bytes
        rows = self.storage.rows.tables.get(TABLE, {})
        ids = []
        for doc_id in self._index.final:
            if surplus <= 0:
                break
            surplus -= rows[doc_id].cost
            ids.append(doc_id)
        return ids

    # Reading

    def get(self, task_id: str) -> Record | None:
        """The record of a task, or None."""
        with self.storage.state_lock:
            doc_id = self._index.by_task.get(task_id)
            records = self._read([doc_id]) if doc_id is not None else []
        return records[0] if records else None

    def at_hand(self, task_id: str) -> Record | None:
        """The record of a task if that needs neither disk nor waiting, so that an event loop may ask.

        None says nothing: ask `get`, from a thread.
        """
        if not self.storage.state_lock.acquire(blocking=False):
            return None
        try:
            doc_id = self._index.by_task.get(task_id)
            return self._recall(doc_id) if doc_id is not None else None
        finally:
            self.storage.state_lock.release()

    def page_at_hand(
        self, *, page: int = 0, page_size: int = 10, start_mills: int | None = None, end_mills: int | None = None
    ) -> list[Record] | None:
        """What `page` gives of ended tasks, if that needs neither disk nor waiting; None: ask `page`, from a thread.

        Raises:
            ValueError: as `page`.
        """
        first, count = _stretch(page, page_size)
        low, high = _window(start_mills, end_mills)
        if page_size > _READ_AT_ONCE or not self.storage.state_lock.acquire(blocking=False):
            return None
        try:
            if self._index.times.descents and (low, high) != _window(None, None):
                return None  # takes a sort of the whole window
            ids = self._index.newest(self._index.of_statuses(FINAL), low, high, first, count)
            found = [self._recall(doc_id) for doc_id in ids]
        finally:
            self.storage.state_lock.release()
        return None if None in found else [record for record in found if record is not None]

    def page(
        self,
        *,
        page: int = 0,
        page_size: int | None = 10,
        start_mills: int | None = None,
        end_mills: int | None = None,
        statuses: Iterable[TaskStatus] = FINAL,
    ) -> list[Record]:
        """Records newest first, by id.

        Args:
            page: zero-based.
            page_size: None for all at once.
            start_mills, end_mills: when the task was queued, both ends included; None leaves the end open.
        Raises:
            ValueError: page is negative, or page_size is not positive.
        """
        first, count = _stretch(page, page_size)
        with self.storage.state_lock:
            lists = self._index.of_statuses(statuses)
            low, high = _window(start_mills, end_mills)
            ids = self._index.newest(lists, low, high, first, count)
        return self._read(ids)

    def search(self, wanted: HistoryFilter, *, page: int = 0, page_size: int | None = 10) -> list[Record]:
        """Records that meet `wanted`, newest first, by id.

        The first search for words, a style or a model reads all requests from the disk once (some forty
        microseconds each); call `read_terms` at a quiet moment to have that done before.

        Raises:
            ValueError: page is negative, or page_size is not positive.
        """
        if wanted.has_terms:
            self.read_terms()
        first, count = _stretch(page, page_size)
        low, high = _window(wanted.start_mills, wanted.end_mills)
        with self.storage.state_lock:
            conditions = [self._index.of_statuses(wanted.statuses), *self._conditions(wanted)]
            found = self._index.matching(conditions, low, high)
            ids = list(islice(found, first, None if count is None else first + count))
        return self._read(ids)

    def _conditions(self, wanted: HistoryFilter) -> Iterator[Sequence[SortedIds]]:
        """For each condition on words, style, model, seed and source the lists of ids that meet it."""
        for word in words_of(wanted.words):
            yield self._terms.beginning(word)
        if wanted.style:
            yield self._terms.exactly(style_term(wanted.style))
        if wanted.model:
            yield self._terms.exactly(model_term(wanted.model))
        if wanted.seed is not None:
            yield [SortedIds(sorted(self._index.seeds.between(wanted.seed, wanted.seed)))]
        if wanted.source is not None:
            yield [self._index.by_source[wanted.source]] if wanted.source in self._index.by_source else []

    def each(self) -> Iterator[Record]:
        """Every record, oldest first, read a few at a time; those removed meanwhile are left out."""
        last = 0
        while True:
            with self.storage.state_lock:
                ids = self._index.ids.between(last + 1, LARGEST)[:_READ_AT_ONCE]
            if not ids:
                return
            yield from self._read(ids)
            last = ids[-1]

    def unfinished(self) -> list[Record]:
        """Waiting and running tasks, oldest first: what a restarted server has to take up again."""
        with self.storage.state_lock:
            lists = self._index.of_statuses(UNFINISHED)
            ids = self._index.newest(lists, -1, LARGEST, 0, None)
        return self._read(ids)[::-1]

    def counts(self) -> dict[TaskStatus, int]:
        """How many records are in each status."""
        with self.storage.state_lock:
            return {status: len(self._index.by_status.get(status, ())) for status in TaskStatus}

    def _read(self, doc_ids: Sequence[int]) -> list[Record]:
        """The records of these ids, without those removed meanwhile and documents that are no records."""
        records: list[Record] = []
        for start in range(0, len(doc_ids), _READ_AT_ONCE):
            if start:
                time.sleep(0)  # a released lock goes to whoever runs next, and that would be this thread again
            with self.storage.state_lock:
                rows = self.storage.rows.tables.get(TABLE, {})
                for doc_id in doc_ids[start : start + _READ_AT_ONCE]:
                    row = rows.get(doc_id)
                    record = self._recall(doc_id) or (self._read_row(doc_id, row) if row else None)
                    if record is not None:
                        records.append(record)
        return records

    def _recall(self, doc_id: int) -> Record | None:
        """The record if it was read before and has not changed since; the caller holds `state_lock`."""
        row, record = self._remembered.get(doc_id, (None, None))
        if record is None or self.storage.rows.tables.get(TABLE, {}).get(doc_id) is not row:
            return None
        self._remembered.move_to_end(doc_id)
        return record

    def _read_row(self, doc_id: int, row: Row) -> Record | None:
        """The record that `row` says, None if it is none; the caller holds `state_lock`."""
        record = _record(Fields(row, self.storage.read_cold).whole(), doc_id)
        if record is not None and record.task_status.is_final:
            self._remembered[doc_id] = (row, record)
            self._remembered.move_to_end(doc_id)
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return record

    # Following changes

    def _follow(self, table: str, doc_id: int, before: Row | None, after: Row | None) -> None:
        """Keep both indexes in step with every change of the table, whoever made it."""
        if table != TABLE:
            return
        self._index.change(
            doc_id, Fields.hot_half(before) if before else None, Fields.hot_half(after) if after else None
        )
        if doc_id <= self._terms.covered:
            old, new = self._terms_of(before), self._terms_of(after)
            self._terms.discard(doc_id, old - new)
            self._terms.add(doc_id, new - old)

    def _terms_of(self, row: Row | None) -> frozenset[str]:
        if row is None:
            return frozenset()
        fields = Fields(row, self.storage.read_cold)
        return terms_of(fields, fields.get("req_params") or {})

    def read_terms(self) -> None:
        """Collect the words, styles and models of all records, once; others may read and write meanwhile."""
        with self._reading_terms:
            while self._terms.covered < LARGEST:
                with self.storage.state_lock:
                    self._read_some_terms()
                time.sleep(0)  # a released lock goes to whoever runs next, and that would be this thread again

    def _read_some_terms(self) -> None:
        """Collect the terms of the next few records; with none left, new ones are followed from now on."""
        rows = self.storage.rows.tables.get(TABLE, {})
        ids = self._index.ids.between(self._terms.covered + 1, LARGEST)[:_READ_AT_ONCE]
        for doc_id in ids:
            self._terms.add(doc_id, self._terms_of(rows[doc_id]))
        self._terms.covered = ids[-1] if ids else LARGEST


def _document(record: Record) -> dict[str, Any]:
    """What is stored of a record: all but its id, which is the document's."""
    return record.model_dump(mode="json", exclude={"id"})


def _record(document: Mapping[str, Any], doc_id: int) -> Record | None:
    try:
        fields = {name: value for name, value in document.items() if value is not None}
        return Record.model_validate(fields | {"id": doc_id})
    except ValidationError as error:
        logger.error("Document %d of the history is no record: %s", doc_id, error)
        return None


def _stretch(page: int, page_size: int | None) -> tuple[int, int | None]:
    """The first place on a page and how many there are; no list is longer than the numbers here."""
    if page < 0 or (page_size is not None and page_size < 1):
        raise ValueError(f"There is no page {page} of {page_size} records; pages count from 0 and hold 1 or more.")
    if page_size is None:
        return 0, None
    return min(page * page_size, _MANY), min(page_size, _MANY)


def _window(start_mills: int | None, end_mills: int | None) -> tuple[int, int]:
    """The ends of a time window; an open beginning includes records that never were queued."""
    return (-1 if start_mills is None else start_mills, LARGEST if end_mills is None else end_mills)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFull(
            f"The output folder {folder} cannot be made ({error.strerror}). Choose another one."
        ) from error
