"""Gives TinyDB's own query API over the history log: each change costs one frame."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, cast

from tinydb import TinyDB
from tinydb.queries import QueryLike
from tinydb.table import Document, Table

from modules.history_frames import Frame
from modules.history_log import LogStorage, stored_document
from modules.history_rows import Fields, Row

Change = Mapping[str, Any] | Callable[[MutableMapping[str, Any]], None]
"""What `update` takes: fields to set, or a function that alters a document in place."""


class Changes(MutableMapping[int, dict[str, Any]]):
    """What TinyDB's updaters see in place of a whole table: copies of documents, every change recorded."""

    def __init__(self, storage: LogStorage, table: str) -> None:
        self._storage = storage
        self._table = table
        self._rows: Mapping[int, Row] = storage.rows.tables.get(table, {})
        self._touched: dict[int, dict[str, Any]] = {}
        self._removed: dict[int, None] = {}
        self._cleared = False

    def _lives(self, doc_id: int) -> bool:
        """Whether the table held the document before and the updater left it alone so far."""
        return not self._cleared and doc_id in self._rows and doc_id not in self._removed

    def __getitem__(self, doc_id: int) -> dict[str, Any]:
        if doc_id not in self._touched:
            if not self._lives(doc_id):
                raise KeyError(doc_id)
            with self._storage.state_lock:
                self._touched[doc_id] = dict(Fields(self._rows[doc_id], self._storage.read_cold))
        return self._touched[doc_id]

    def __setitem__(self, doc_id: int, document: dict[str, Any]) -> None:
        self._touched[doc_id] = document

    def __delitem__(self, doc_id: int) -> None:
        if doc_id not in self:
            raise KeyError(doc_id)
        self._touched.pop(doc_id, None)
        if self._lives(doc_id):
            self._removed[doc_id] = None

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self._touched or (isinstance(doc_id, int) and self._lives(doc_id))

    def __iter__(self) -> Iterator[int]:
        yield from (doc_id for doc_id in self._rows if self._lives(doc_id))
        yield from (doc_id for doc_id in list(self._touched) if not self._lives(doc_id))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        self._cleared = True
        self._touched.clear()
        self._removed.clear()

    def frame(self) -> Frame | None:
        """The transaction these changes make; None when nothing differs from before.

        Raises:
            TypeError: a document holds a value that JSON cannot say.
        """
        stored = tuple(
            stored_document(doc_id, document)
            for doc_id, document in self._touched.items()
            if not self._lives(doc_id) or not self._unchanged(doc_id, document)
        )
        exists = self._table in self._storage.rows.tables
        if exists and not (self._cleared or self._removed or stored):
            return None
        return Frame(self._table, cleared=self._cleared, removed=tuple(self._removed), stored=stored)

    def _unchanged(self, doc_id: int, document: dict[str, Any]) -> bool:
        row = self._rows[doc_id]
        _, hot, cold = stored_document(doc_id, document)
        if hot != row.hot or len(cold) != row.length:
            return False
        with self._storage.state_lock:
            return cold == self._storage.read_cold(row.offset, row.length)


class LogTable(Table):
    """A TinyDB table over `LogStorage`; same methods, same meanings, and safe to use from many threads.

    A document's values are JSON with 64-bit integers. Documents that leave the table are copies. Ids are not
    given twice, not even after reopening, until the table is truncated.
    """

    _storage: LogStorage
    _next_id: int | None  # type: ignore[assignment]  # TinyDB declares None and stores ints

    def __init__(self, storage: LogStorage, name: str, cache_size: int = 0, persist_empty: bool = False) -> None:
        """As TinyDB, but without a cache of results unless asked: it would hold documents, cold fields and all."""
        super().__init__(storage, name, cache_size, persist_empty)

    def _read_table(self) -> Mapping[str, Mapping[str, Any]]:  # type: ignore[override]
        return self._storage.table_view(self.name)

    def _update_table(self, updater: Callable[[dict[int, Mapping[str, Any]]], None]) -> None:
        with self._storage.write_lock:
            changes = Changes(self._storage, self.name)
            updater(cast(dict[int, Mapping[str, Any]], changes))
            frame = changes.frame()
            if frame is not None:
                self._storage.commit(frame)
            self.clear_cache()

    def _get_next_id(self) -> int:
        doc_id = self._next_id if self._next_id is not None else self._storage.highest(self.name) + 1
        self._next_id = doc_id + 1
        return doc_id

    def _matching(self, cond: QueryLike) -> list[int]:
        """Ids of the documents that meet `cond`."""
        with self._storage.state_lock:
            return [int(key) for key, fields in self._read_table().items() if cond(fields)]

    def hot(self, doc_id: int) -> dict[str, Any] | None:
        """A document without its cold fields, or None; reads nothing from the disk."""
        with self._storage.state_lock:
            row = self._storage.rows.tables.get(self.name, {}).get(doc_id)
        return None if row is None else Fields.hot_half(row)

    # Writing: TinyDB's methods, from the first read to the disk's answer under one lock.

    def insert(self, document: Mapping[str, Any]) -> int:
        with self._storage.write_lock:
            return super().insert(document)

    def insert_multiple(self, documents: Iterable[Mapping[str, Any]]) -> list[int]:
        with self._storage.write_lock:
            return super().insert_multiple(documents)

    def update(self, fields: Change, cond: QueryLike | None = None, doc_ids: Iterable[int] | None = None) -> list[int]:
        with self._storage.write_lock:
            if doc_ids is None and cond is not None:
                doc_ids = self._matching(cond)
            return super().update(fields, doc_ids=doc_ids)

    def update_multiple(self, updates: Iterable[tuple[Change, QueryLike]]) -> list[int]:
        with self._storage.write_lock:
            return super().update_multiple(updates)

    def upsert(self, document: Mapping[str, Any], cond: QueryLike | None = None) -> list[int]:
        with self._storage.write_lock:
            return super().upsert(document, cond)

    def remove(self, cond: QueryLike | None = None, doc_ids: Iterable[int] | None = None) -> list[int]:
        with self._storage.write_lock:
            if doc_ids is None and cond is not None:
                doc_ids = self._matching(cond)
            return super().remove(doc_ids=doc_ids)

    def truncate(self) -> None:
        with self._storage.write_lock:
            super().truncate()

    # Reading: a short look under the state lock, never waiting for a writer's disk.

    def search(self, cond: QueryLike) -> list[Document]:
        with self._storage.state_lock:
            return super().search(cond)

    def get(  # type: ignore[override]
        self, cond: QueryLike | None = None, doc_id: int | None = None, doc_ids: list[int] | None = None
    ) -> Document | list[Document] | None:
        with self._storage.state_lock:
            if doc_id is None and doc_ids is not None:
                view = self._read_table()
                wanted = sorted(set(doc_ids))
                return [Document(view[str(key)], key) for key in wanted if str(key) in view]
            if doc_id is not None:
                return super().get(cond, doc_id)
            return super().get(cond) if cond is not None else super().get()

    def __iter__(self) -> Iterator[Document]:
        with self._storage.state_lock:
            documents = list(super().__iter__())
        return iter(documents)


class LogDB(TinyDB):
    """TinyDB on a history log: `LogDB(path, sync="always", read_only=False, ...)`, see `LogStorage`."""

    table_class = LogTable  # type: ignore[assignment]  # TinyDB declares its own, which caches by default
    default_storage_class = LogStorage  # type: ignore[assignment]  # TinyDB declares its JSONStorage
