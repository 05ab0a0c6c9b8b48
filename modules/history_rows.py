"""Keeps in memory what a history log says: each document's hot half, and where its cold half lies."""

from collections.abc import Callable, ItemsView, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from modules.errors import HistoryDamaged
from modules.history_frames import Frame, Placed, from_json

COLD_FIELDS: Final = frozenset({"req_params"})
"""Fields that stay on the disk, for they are large and no list shows them."""

_FRAME_COST: Final = 48  # bytes a frame of one document needs besides its two halves, nearly


class Row(NamedTuple):
    """One live document: its hot JSON, and the place of its cold JSON in the log (length 0: none)."""

    hot: bytes
    offset: int
    length: int

    @property
    def cost(self) -> int:
        """Bytes this document takes in a compacted log, nearly."""
        return len(self.hot) + self.length + _FRAME_COST


Listener: TypeAlias = Callable[[str, int, Row | None, Row | None], None]
"""Called with table, id, the row before and the row after (None: there is none) for each change."""

ReadCold: TypeAlias = Callable[[int, int], bytes]
"""Gives the bytes at (offset, length) of the log."""


class Rows:
    """All tables of one log. Not thread-safe; the storage holds the lock.

    tables: rows by table and id, in the order they were inserted.
    highest: the largest id each table ever gave away since it was last emptied.
    live_bytes: what a compacted log would take, nearly.
    """

    def __init__(self) -> None:
        self.tables: dict[str, dict[int, Row]] = {}
        self.highest: dict[str, int] = {}
        self.live_bytes = 0

    def apply(self, frame: Frame, placed: list[Placed], start: int, listener: Listener | None = None) -> None:
        """Do what `frame`, found at byte `start` of the log, says."""
        if frame.dropped:
            self._drop(frame.table, listener)
            return
        rows = self.tables.setdefault(frame.table, {})
        if frame.cleared:
            self._remove(frame.table, list(rows), listener)
            self.highest[frame.table] = 0
        self._remove(frame.table, frame.removed, listener)
        highest = max(self.highest.get(frame.table, 0), frame.highest)
        for doc_id, hot, offset, length in placed:
            row = Row(hot, start + offset, length)
            before = rows.get(doc_id)
            self.live_bytes += row.cost - (before.cost if before else 0)
            rows[doc_id] = row
            if doc_id > highest:
                highest = doc_id
            if listener:
                listener(frame.table, doc_id, before, row)
        self.highest[frame.table] = highest

    def _remove(self, table: str, doc_ids: list[int] | tuple[int, ...], listener: Listener | None) -> None:
        """Forget the documents of these ids, where they exist."""
        rows = self.tables[table]
        for doc_id in doc_ids:
            row = rows.pop(doc_id, None)
            if row is None:
                continue
            self.live_bytes -= row.cost
            if listener:
                listener(table, doc_id, row, None)

    def _drop(self, table: str, listener: Listener | None) -> None:
        """Forget one table, or all when no name is given."""
        for name in [table] if table else list(self.tables):
            if name in self.tables:
                self._remove(name, list(self.tables[name]), listener)
                del self.tables[name]
                self.highest.pop(name, None)


class Fields(Mapping[str, Any]):
    """A row as a read-only mapping; cold fields are read from the log when somebody asks for them."""

    __slots__ = ("_cold", "_hot", "_read_cold", "_row")

    def __init__(self, row: Row, read_cold: ReadCold) -> None:
        self._row = row
        self._read_cold = read_cold
        self._hot = self.hot_half(row)
        self._cold: dict[str, Any] | None = None if row.length else {}

    @staticmethod
    def hot_half(row: Row) -> dict[str, Any]:
        """The fields of `row` that are in memory."""
        hot: dict[str, Any] = from_json(row.hot)
        return hot

    def _on_disk(self) -> dict[str, Any]:
        """The cold half, read once. Raises HistoryDamaged."""
        if self._cold is None:
            data = self._read_cold(self._row.offset, self._row.length)
            try:
                self._cold = from_json(data)
            except ValueError as error:
                raise HistoryDamaged(
                    f"The history log was altered on the disk at byte {self._row.offset}: {error}. "
                    "Stop the server and run `python launch.py history check`."
                ) from error
        return self._cold

    def whole(self) -> dict[str, Any]:
        """Both halves at once, as a dict of its own."""
        return {**self._hot, **self._on_disk()}

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        if key in self._hot or key not in COLD_FIELDS:
            return self._hot[key]
        return self._on_disk()[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._hot
        yield from self._on_disk()

    def __len__(self) -> int:
        return len(self._hot) + len(self._on_disk())


class TableView(Mapping[str, Fields]):
    """A table as TinyDB expects to read it: text ids to documents, each made when it is looked at."""

    def __init__(self, rows: Mapping[int, Row], read_cold: ReadCold) -> None:
        self.rows = rows
        self.read_cold = read_cold

    def __getitem__(self, key: str) -> Fields:
        row = self.rows.get(int(key)) if key.lstrip("-").isdecimal() else None
        if row is None:
            raise KeyError(key)
        return Fields(row, self.read_cold)

    def __iter__(self) -> Iterator[str]:
        return map(str, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def items(self) -> "TableItems":
        return TableItems(self)


class TableItems(ItemsView[str, Fields]):
    """Ids and documents of a table; a query walks over them without looking each id up again."""

    _mapping: TableView

    def __iter__(self) -> Iterator[tuple[str, Fields]]:
        read_cold = self._mapping.read_cold
        for doc_id, row in self._mapping.rows.items():
            yield str(doc_id), Fields(row, read_cold)
