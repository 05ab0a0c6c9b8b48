"""Stores TinyDB documents in an append-only log, one proven frame for each transaction."""

import io
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from tinydb.storages import Storage

from modules.errors import HistoryDamaged, StorageFull
from modules.history_files import LogFile, WriterLock, append_durably, flush_folder
from modules.history_frames import Frame, FrameDamaged, Stored, decode, encode, to_json
from modules.history_rows import COLD_FIELDS, Listener, Row, Rows, TableView
from modules.history_scan import Damage, replay, scan

logger = logging.getLogger(__name__)

Sync = Literal["always", "interval", "never"]

_CHUNK: Final = 1 << 20
_SIP: Final = 1 << 16  # each read lets other threads run, so a thread beside them reads little at a time
_FLUSH_INTERVAL_S: Final = 1.0


class LogStorage(Storage):
    """One log file and what it says. Thread-safe; from an event loop call through `asyncio.to_thread`.

    Beside the log `NAME` lie `NAME.lock` (held by the one writer), `NAME.tmp` (a compaction in work) and
    `NAME.damaged` (bytes that were cut off or left behind because they are no frames).

    write_lock: held by a writer from its first read to the disk's answer. Readers never take it, so that they
        do not wait for the disk.
    state_lock: held for the short moments in which `rows` is read or changed. Taken after `write_lock`.
    damaged: unreadable stretches found at the last opening or reload.
    torn_bytes: length of an unfinished last frame found then; such a transaction was never acknowledged.
    listener: told of every change, under `state_lock`; not of what opening reads.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sync: Sync = "always",
        read_only: bool = False,
        compact_above: int = 1 << 20,
        compact_in_thread: bool = True,
    ) -> None:
        """Open or create the log at `path`.

        Args:
            sync: when a transaction reaches the disk: before the call returns, within a second, or whenever
                the operating system likes. A killed process loses nothing either way; a power cut may.
            read_only: replay the file as it is now, beside its writer; `reload` replays it again.
            compact_above: dead bytes the log may hold before it is compacted, if live bytes are fewer.
            compact_in_thread: False compacts inside the transaction that crosses the limit.
        Raises:
            HistoryLocked: another process writes this log.
            HistoryDamaged: the file is no history log, or of a newer version.
            StorageFull: the folder cannot be written.
            OSError: read_only, and the file cannot be read.
        """
        self.path = Path(path)
        self.sync = sync
        self.read_only = read_only
        self.compact_above = compact_above
        self.compact_in_thread = compact_in_thread
        self.write_lock = threading.RLock()
        self.state_lock = threading.RLock()
        self.rows = Rows()
        self.listener: Listener | None = None
        self.damaged: list[Damage] = []
        self.torn_bytes = 0
        self._broken = ""
        self._folder_unflushed = False
        self._compact_from = 0
        self._compacting = threading.Lock()
        self._compactor: threading.Thread | None = None
        self._flusher: threading.Timer | None = None
        self._lock = None if read_only else WriterLock(self._beside(".lock"))
        try:
            self._file = self._open()
        except BaseException:
            if self._lock:
                self._lock.release()
            raise
        self._compact_if_due()

    # Opening

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _open(self) -> LogFile:
        """Open the file and replay it; a writer also creates it and cuts off what was never acknowledged."""
        if self.read_only:
            file = LogFile(self.path, writable=False)
        else:
            try:
                self._beside(".tmp").unlink(missing_ok=True)
                append_durably(self.path, b"")
                flush_folder(self.path.parent)
                file = LogFile(self.path, writable=True)
            except OSError as error:
                raise _storage_full(self.path, error) from error
        try:
            self._replay_all(file)
        except BaseException:
            file.close()
            raise
        return file

    def _replay_all(self, file: LogFile) -> None:
        """Read what `file` says; judge what it holds besides."""
        rows = Rows()
        with file.stream(_CHUNK) as lines:
            found = replay(lines, rows)
            lines.seek(found.end)
            torn = lines.read(64)
        if not found.frames and (found.damaged or not _begins_like_a_frame(torn)):
            raise HistoryDamaged(
                f"{self.path} is not a history log, or nothing of it can be read. Move it away to start "
                "a new one; `python launch.py history import FILE` reads TinyDB and FooocusAPI files."
            )
        self.rows, self.damaged = rows, list(found.damaged)
        self.torn_bytes = max(0, file.size - found.end)  # a reader may have met frames added since it opened
        for damage in found.damaged:
            logger.warning("%s: %s", self.path, damage)
        if self.read_only:
            file.size = found.end
        elif self.torn_bytes:
            self._cut_torn_tail(file, found.end)

    def _cut_torn_tail(self, file: LogFile, good: int) -> None:
        """Remove an unfinished last frame, keeping its bytes aside where the disk has room for them."""
        logger.warning("%s: the last %d bytes are an unfinished transaction", self.path, self.torn_bytes)
        try:
            self._keep_aside([Damage(good, self.torn_bytes, "an unfinished transaction")])
        except OSError as error:
            logger.warning("They could not be kept in %s: %s", self._beside(".damaged"), error)
        try:
            file.truncate(good)
            file.flush()
        except OSError as error:
            raise _storage_full(self.path, error) from error

    def reload(self) -> None:
        """Replay the file again, for a read-only opening that wants what its writer added since."""
        with self.state_lock:
            self._file.close()
            self._file = self._open()

    def _keep_aside(self, damaged: Iterable[Damage]) -> None:
        """Append the damaged stretches of the log to the file that keeps such bytes. Raises OSError."""
        with open(self.path, "rb") as log:
            for damage in damaged:
                log.seek(damage.offset)
                title = f"# {damage.length} bytes from offset {damage.offset}: {damage.reason}\n"
                append_durably(self._beside(".damaged"), title.encode() + log.read(damage.length) + b"\n")

    # Reading

    @property
    def size(self) -> int:
        """Bytes of the log."""
        return self._file.size

    @property
    def dead_bytes(self) -> int:
        """Bytes a compaction would free, nearly."""
        return self._file.size - self.rows.live_bytes

    def read_cold(self, offset: int, length: int) -> bytes:
        """Bytes of the log; the caller holds `state_lock` since it looked up the place."""
        return self._file.read(offset, length)

    def table_view(self, name: str) -> TableView:
        """The table `name`, empty when there is none; the caller holds `state_lock` while it looks."""
        return TableView(self.rows.tables.get(name, {}), self.read_cold)

    def highest(self, table: str) -> int:
        """The largest id `table` ever gave away since it was last emptied; 0 for none."""
        return self.rows.highest.get(table, 0)

    def read(self) -> dict[str, Any]:
        """Every table, as TinyDB's own classes want to read them."""
        with self.state_lock:
            return {name: self.table_view(name) for name in self.rows.tables}

    # Writing

    def write(self, data: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> None:
        """Make the tables equal to `data`, given as `read` gives them; a table nobody touched costs nothing.

        LogTable does not come here. `drop_tables` is one transaction; other changes are one per table.
        """
        with self.write_lock:
            if not data:
                self.commit(Frame("", dropped=True))
            for name in set(self.rows.tables) - set(data):
                self.commit(Frame(name, dropped=True))
            for name, documents in data.items():
                if not isinstance(documents, TableView):
                    stored = tuple(stored_document(int(key), value) for key, value in documents.items())
                    self.commit(Frame(name, cleared=True, stored=stored))

    def commit(self, frame: Frame) -> None:
        """Write one transaction, then show it to readers. All of it is kept, or nothing.

        Raises:
            StorageFull: the disk did not take it; nothing has changed, and later calls may succeed.
        """
        if self.read_only:
            raise StorageFull(f"{self.path} was opened for reading only.")
        line = encode(frame)
        with self.write_lock:
            start = self._append(line)
            decoded, placed = decode(line)
            with self.state_lock:
                self._file.size = start + len(line)
                self.rows.apply(decoded, placed, start, self.listener)
            self._compact_if_due()

    def _append(self, line: bytes) -> int:
        """Put `line` on the disk and give the offset it got; what a failure leaves is cut off again."""
        self._mend()
        start = self._file.size
        try:
            self._file.append(line)
            if self.sync == "always":
                self._file.flush()
        except OSError as error:
            self._broken = str(error)
            self._mend_if_possible()
            raise _storage_full(self.path, error) from error
        if self.sync == "interval" and self._flusher is None:
            self._flusher = threading.Timer(_FLUSH_INTERVAL_S, self._flush_late)
            self._flusher.daemon = True
            self._flusher.start()
        return start

    def _mend(self) -> None:
        """Bring the file back to its last acknowledged byte after a failed write. Raises StorageFull."""
        try:
            if self._broken:
                self._file.truncate(self._file.size)
                self._broken = ""
            if self._folder_unflushed:
                flush_folder(self.path.parent)
                self._folder_unflushed = False
        except OSError as error:
            raise _storage_full(self.path, error) from error

    def _mend_if_possible(self) -> None:
        try:
            self._mend()
        except StorageFull as error:
            logger.error("Nothing more is written until the log can be cut back: %s", error)

    def _flush_late(self) -> None:
        try:
            self.flush()
        except StorageFull:
            logger.exception("The history could not be flushed")

    def flush(self) -> None:
        """Return when every acknowledged transaction is on the disk. Raises StorageFull."""
        with self.write_lock:
            self._flusher = None
            if self._lock is None:  # closed, or open for reading only
                return
            try:
                self._file.flush()
            except OSError as error:
                raise _storage_full(self.path, error) from error

    def close(self) -> None:
        """Finish a running compaction, flush and let go of the file; closing twice is fine."""
        if self._compactor is not None:
            self._compactor.join()
        flusher = self._flusher
        with self.write_lock, self.state_lock:
            if flusher is not None:
                flusher.cancel()
            if self._lock is not None:
                if self.sync != "always":
                    self.flush()
                self._file.close()
                self._lock.release()
                self._lock = None
            elif self.read_only:
                self._file.close()
        if flusher is not None:
            flusher.join()

    # Compacting

    def _compact_if_due(self) -> None:
        """Compact when dead bytes outweigh live ones; in a thread unless the storage was told otherwise."""
        due = self.dead_bytes > max(self.compact_above, self.rows.live_bytes) and self.size > self._compact_from
        busy = self._compacting.locked() or (self._compactor is not None and self._compactor.is_alive())
        if self.read_only or busy or not due:
            return
        if not self.compact_in_thread:
            self._compact_quietly()
            return
        self._compactor = threading.Thread(target=self._compact_quietly, name="history-compaction", daemon=True)
        self._compactor.start()

    def _compact_quietly(self) -> None:
        """Compact; if that fails go on with the long log, and try again when it is half as long again."""
        try:
            self.compact()
        except (StorageFull, HistoryDamaged) as error:
            self._compact_from = self.size + self.size // 2
            logger.warning("The history was not compacted: %s", error)

    def compact(self) -> None:
        """Write the live documents into a new log and put it in the old one's place.

        Readers go on meanwhile, writers too but for the last moment. A kill at any time leaves a whole log.

        Raises:
            StorageFull: no room for the second log; the first stays in use.
            HistoryDamaged: the log was altered since it was opened; it stays as it is.
        """
        with self._compacting:
            temporary = self._beside(".tmp")
            try:
                self._verify()
                temporary.unlink(missing_ok=True)
                append_durably(temporary, b"")
                fresh = LogFile(temporary, writable=True)
                try:
                    rows, start = self._write_live(fresh)
                    start = self._copy_tail(fresh, rows, start, leave_below=_CHUNK)
                    fresh.flush()
                    self._switch(fresh, rows, start)
                finally:
                    if fresh is not self._file:
                        fresh.close()
                        temporary.unlink(missing_ok=True)
            except OSError as error:
                raise _storage_full(self.path, error) from error
            except FrameDamaged as error:
                raise HistoryDamaged(f"{self.path} was altered while in use: {error}.") from error
            logger.info("Compacted %s to %d bytes", self.path, self.size)

    def _verify(self) -> None:
        """Read the log once more, lest a new checksum is put on bytes that rotted since the start.

        Raises:
            HistoryDamaged: there is damage that opening had not seen.
        """
        end, reached = self._file.size, 0
        with open(self.path, "rb", buffering=_SIP) as lines:
            for piece in scan(lines):
                if isinstance(piece, Damage) and piece not in self.damaged:
                    raise HistoryDamaged(f"{self.path} was altered while in use: {piece}.")
                reached = piece.offset + (piece.length if isinstance(piece, Damage) else len(piece.line))
                if reached >= end:
                    return
        if reached < end:
            raise HistoryDamaged(f"{self.path} was altered while in use: it ends at {reached} and not at {end}.")

    def _write_live(self, fresh: LogFile) -> tuple[Rows, int]:
        """Write what lives now, a frame for each document; give its rows, and the size it had till now."""
        with self.state_lock:
            start = self._file.size
            tables = {name: rows.copy() for name, rows in self.rows.tables.items()}
            highest = dict(self.rows.highest)
        source = LogFile(self.path, writable=False)
        try:
            lines = (
                line
                for name, documents in tables.items()
                for line in live_frames(name, documents, highest.get(name, 0), source)
            )
            rows = Rows()
            _adopt(lines, fresh, rows)
        finally:
            source.close()
        return rows, start

    def _copy_tail(self, fresh: LogFile, rows: Rows, start: int, *, leave_below: int) -> int:
        """Copy the frames written since byte `start` until few are left; give the byte reached."""
        with open(self.path, "rb") as log:
            while (end := self._file.size) - start > leave_below:
                log.seek(start)
                _adopt(io.BytesIO(log.read(end - start)), fresh, rows)
                start = end
        return start

    def _switch(self, fresh: LogFile, rows: Rows, start: int) -> None:
        """Copy the last frames and let the new log take the old one's name; writers wait for this."""
        with self.write_lock:
            self._copy_tail(fresh, rows, start, leave_below=0)
            fresh.flush()
            self._keep_aside(self.damaged)
            with self.state_lock:
                self._file = fresh.take_name_of(self._file)
                self.rows = rows
                self.damaged = []
            try:
                flush_folder(self.path.parent)
            except OSError as error:
                logger.warning("The folder of %s could not be flushed: %s", self.path, error)
                self._folder_unflushed = True


def live_frames(name: str, documents: Mapping[int, Row], highest: int, source: LogFile) -> Iterator[bytes]:
    """The lines that say again what `documents` of the table `name` are; `source` holds their cold halves."""
    yield encode(Frame(name, highest=highest))
    for doc_id, row in documents.items():
        cold = source.read(row.offset, row.length) if row.length else b""
        yield encode(Frame(name, stored=(Stored(doc_id, row.hot, cold),)))


def _adopt(lines: Iterable[bytes], fresh: LogFile, rows: Rows) -> None:
    """Append `lines` to `fresh` in large pieces and apply them to `rows`. Raises OSError, FrameDamaged."""
    waiting: list[bytes] = []
    size, end = 0, fresh.size
    for line in lines:
        frame, placed = decode(line)
        rows.apply(frame, placed, end)
        waiting.append(line)
        size, end = size + len(line), end + len(line)
        if size >= _CHUNK:
            fresh.append(b"".join(waiting))
            waiting, size = [], 0
    fresh.append(b"".join(waiting))
    fresh.size = end


def stored_document(doc_id: int, document: Mapping[str, Any]) -> Stored:
    """`document` in its two JSON halves. Raises TypeError for values JSON cannot say."""
    hot = {key: value for key, value in document.items() if key not in COLD_FIELDS}
    cold = {key: value for key, value in document.items() if key in COLD_FIELDS}
    return Stored(doc_id, to_json(hot), to_json(cold) if cold else b"")


def _begins_like_a_frame(data: bytes) -> bool:
    """Whether `data`, an unfinished line, may be the beginning of a frame or of a block never written."""
    digits, space = data[:8], data[8:9]
    return not data.strip(b"\0") or (all(byte in b"0123456789abcdef" for byte in digits) and space in (b"", b" "))


def _storage_full(path: Path, error: OSError) -> StorageFull:
    return StorageFull(
        f"The history could not be written to {path} ({error.strerror or error}). "
        "Free some space, make the folder writable, or choose another output folder."
    )
