"""The log beneath TinyDB: frames, torn tails, damage, failing disks, compaction, locking."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tinydb import Query, TinyDB, where
from tinydb.table import Document

from modules import history_files
from modules.errors import HistoryDamaged, HistoryLocked, StorageFull
from modules.history_files import LogFile
from modules.history_log import LogStorage
from modules.history_rows import Rows
from modules.history_tables import LogDB

PROMPT = {"prompt": "a\ttab, a\nline feed and a ×", "image_seed": 2**63 - 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "h.log"


def contents(path: Path, table: str = "t") -> dict[int, dict]:
    """What a reader sees, by id."""
    with LogDB(path, read_only=True) as db:
        return {document.doc_id: dict(document) for document in db.table(table)}


def fill(path: Path, count: int) -> dict[int, dict]:
    with LogDB(path) as db:
        for number in range(count):
            db.table("t").insert({"number": number, "req_params": {**PROMPT, "number": number}})
        return {document.doc_id: dict(document) for document in db.table("t")}


class FailingOs:
    """Stands in for `os` in the files module: the named calls fail with ENOSPC or EIO when told to."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.short_by = 0
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in ("write", "fdatasync", "fsync", "ftruncate", "replace"):
            return real

        def call(*args):
            self.calls.append(name)
            if name == "write" and self.short_by:
                part = bytes(args[1])[: self.short_by]
                self.short_by = 0
                self.failing["write"] = errno.ENOSPC
                return real(args[0], part)
            if name in self.failing:
                raise OSError(self.failing[name], os.strerror(self.failing[name]))
            return real(*args)

        return call


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FailingOs:
    failing = FailingOs()
    monkeypatch.setattr(history_files, "os", failing)
    return failing


def test_documents_survive_reopening(path: Path) -> None:
    written = fill(path, 3)
    assert contents(path) == written
    assert written[1]["req_params"] == {**PROMPT, "number": 0}


def test_a_transaction_of_many_documents_is_one_frame_with_one_write(path: Path, disk: FailingOs) -> None:
    with LogDB(path) as db:
        disk.calls.clear()
        db.table("t").insert_multiple({"n": number, "req_params": PROMPT} for number in range(50))
        assert disk.calls == ["write", "fdatasync"]
    assert path.read_bytes().count(b"\n") == 1


def test_a_tail_torn_at_any_byte_costs_its_transaction_only(path: Path) -> None:
    before = fill(path, 2)
    acknowledged = path.stat().st_size
    with LogDB(path) as db:
        db.table("t").insert_multiple([{"late": 1, "req_params": PROMPT}, {"late": 2}])
    whole = path.read_bytes()
    for cut in range(acknowledged, len(whole)):
        path.write_bytes(whole[:cut])
        assert contents(path) == before, f"a reader saw half a transaction at byte {cut}"
        with LogDB(path) as db:
            assert db.storage.torn_bytes == cut - acknowledged
            assert {d.doc_id: dict(d) for d in db.table("t")} == before
            assert db.table("t").insert({"next": 1}) == 3
        assert contents(path) == {**before, 3: {"next": 1}}


def test_a_torn_tail_is_kept_aside(path: Path) -> None:
    fill(path, 1)
    with path.open("ab") as log:
        log.write(b"0123abcd {half a fra")
    with LogDB(path):
        pass
    assert b"0123abcd {half a fra" in path.with_name("h.log.damaged").read_bytes()


@pytest.mark.parametrize("frame", [0, 1, 3])
def test_a_damaged_frame_hides_none_behind_it(path: Path, frame: int) -> None:
    written = fill(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[frame])
    damaged[len(damaged) // 2] ^= 1
    lines[frame] = bytes(damaged)
    path.write_bytes(b"".join(lines))
    del written[frame + 1]
    assert contents(path) == written
    with LogDB(path) as db:
        [damage] = db.storage.damaged
        assert (damage.offset, damage.length) == (sum(map(len, lines[:frame])), len(damaged))
        db.table("t").insert({"more": 1})
        assert bytes(damaged) in path.read_bytes(), "evidence was overwritten"
        db.storage.compact()
        assert not db.storage.damaged
    assert bytes(damaged) in path.with_name("h.log.damaged").read_bytes(), "evidence was lost by compaction"
    assert contents(path) == {**written, max(written) + 1: {"more": 1}}


@pytest.mark.parametrize(
    "content", [b'{"_default": {"1": {"a": 1}}}', b"SQLite format 3\x00" + b"\x00" * 84, b"notes\nmore\n"]
)
def test_a_foreign_file_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(HistoryDamaged, match="not a history log"):
        LogDB(path)
    assert path.read_bytes() == content
    path.unlink()
    LogDB(path).close()  # the refused opening gave its lock back


def test_a_file_of_a_newer_format_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.history_frames.VERSION", 2)
    fill(path, 1)
    monkeypatch.setattr("modules.history_frames.VERSION", 1)
    content = path.read_bytes()
    with pytest.raises(HistoryDamaged, match="Update Focale"):
        LogDB(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("short_by", [0, 1, 20])
def test_a_full_disk_fails_one_transaction_and_the_next_are_readable(
    path: Path, disk: FailingOs, short_by: int
) -> None:
    with LogDB(path) as db:
        table = db.table("t")
        table.insert({"n": 1})
        disk.short_by = short_by
        disk.failing = {} if short_by else {"write": errno.ENOSPC}
        with pytest.raises(StorageFull, match="No space left"):
            table.insert({"n": 2, "req_params": PROMPT})
        assert [d["n"] for d in table.all()] == [1], "a refused document is visible"
        disk.failing = {}
        table.insert({"n": 3})
        assert [d["n"] for d in table.all()] == [1, 3]
    assert [d["n"] for d in contents(path).values()] == [1, 3]
    with LogDB(path) as db:
        assert not db.storage.damaged
        assert not db.storage.torn_bytes


def test_a_frame_the_disk_did_not_confirm_is_taken_back(path: Path, disk: FailingOs) -> None:
    with LogDB(path) as db:
        disk.failing = {"fdatasync": errno.EIO}
        with pytest.raises(StorageFull, match="Input/output"):
            db.table("t").insert({"n": 1})
        disk.failing = {}
        assert len(db.table("t")) == 0
    assert contents(path) == {}


def test_nothing_is_written_behind_a_frame_that_cannot_be_cut_off(path: Path, disk: FailingOs) -> None:
    with LogDB(path) as db:
        table = db.table("t")
        table.insert({"n": 1})
        disk.short_by = 12
        disk.failing = {"ftruncate": errno.EIO}
        with pytest.raises(StorageFull):
            table.insert({"n": 2})
        disk.failing.pop("write")
        with pytest.raises(StorageFull):
            table.insert({"n": 3})
        disk.failing = {}
        table.insert({"n": 4})
    assert [d["n"] for d in contents(path).values()] == [1, 4]


def test_a_full_disk_does_not_hinder_opening_with_a_torn_tail(path: Path, disk: FailingOs) -> None:
    written = fill(path, 2)
    with path.open("ab") as log:
        log.write(b"0123")
    disk.failing = {"write": errno.ENOSPC}
    with LogDB(path) as db:
        assert {d.doc_id: dict(d) for d in db.table("t")} == written


class WindowsOs:
    """Stands in for `os` in the files module and lacks what Windows lacks."""

    def __getattr__(self, name: str) -> object:
        if name in ("pread", "fdatasync"):
            raise AttributeError(name)
        return getattr(os, name)


def lock_byte(descriptor: int, _mode: int, _count: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_log_works_with_what_windows_offers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_files, "_WINDOWS", True)
    monkeypatch.setattr(history_files, "os", WindowsOs())
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=lock_byte, LK_NBLCK=2))
    written = fill(path, 5)
    with LogDB(path) as db:
        with pytest.raises(HistoryLocked):
            LogDB(path)
        db.storage.compact()
        assert db.table("t").get(doc_id=3) == written[3]
        db.table("t").remove(doc_ids=[1])
        monkeypatch.setattr(os, "replace", refuse_to_replace)
        with pytest.raises(StorageFull):
            db.storage.compact()
        db.table("t").remove(doc_ids=[2])
    del written[1], written[2]
    assert contents(path) == written


def refuse_to_replace(_: Path, __: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_second_writer_is_told_who_holds_the_log(path: Path) -> None:
    with LogDB(path):
        with pytest.raises(HistoryLocked, match=f"process {os.getpid()}"):
            LogDB(path)
        code = "import sys; from modules.history_tables import LogDB; LogDB(sys.argv[1])"
        other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
        assert "HistoryLocked" in other.stderr
    LogDB(path).close()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(history_files.os, "open", refuse)
    with pytest.raises(StorageFull, match="Read-only file system"):
        LogStorage(tmp_path / "h.log")


def test_a_reader_beside_the_writer_sees_whole_transactions_and_may_reload(path: Path) -> None:
    with LogDB(path) as writer, LogDB(path, read_only=True) as reader:
        writer.table("t").insert({"n": 1, "req_params": PROMPT})
        assert len(reader.table("t")) == 0
        reader.storage.reload()
        assert reader.table("t").all() == writer.table("t").all()
        writer.storage.compact()
        assert reader.table("t").all() == writer.table("t").all(), "the reader lost the old file"
        with pytest.raises(StorageFull, match="reading only"):
            reader.table("t").insert({"n": 2})


def test_a_reader_that_opens_while_the_log_is_replaced_reads_one_of_the_two(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LogDB(path) as writer:
        table = writer.table("t")
        table.insert_multiple({"n": n, "req_params": {"prompt": "p" * 100 * n}} for n in range(20))
        table.remove(doc_ids=range(1, 10))
        compacted: list[int] = []

        class ReplacedAfterOpening(LogFile):
            def __init__(self, path: Path, *, writable: bool) -> None:
                super().__init__(path, writable=writable)
                if not compacted:
                    compacted.append(1)
                    writer.storage.compact()

        monkeypatch.setattr("modules.history_log.LogFile", ReplacedAfterOpening)
        with LogDB(path, read_only=True) as reader:
            assert reader.table("t").all() == table.all()


def test_compaction_starts_when_dead_bytes_outweigh_live_ones(path: Path) -> None:
    with LogDB(path, compact_above=4096, compact_in_thread=False) as db:
        table = db.table("t")
        table.insert({"n": 0, "req_params": PROMPT})
        for number in range(200):
            table.update({"n": number}, doc_ids=[1])
        assert path.stat().st_size < 4096 + 1024
        assert table.all() == [{"n": 199, "req_params": PROMPT}]
    assert contents(path) == {1: {"n": 199, "req_params": PROMPT}}


def test_compaction_keeps_what_is_written_beside_it(path: Path) -> None:
    with LogDB(path) as db:
        table = db.table("t")
        table.insert_multiple({"n": number, "req_params": {"number": number}} for number in range(2000))
        done = threading.Event()

        def compact_again_and_again() -> None:
            for _ in range(5):
                db.storage.compact()
            done.set()

        thread = threading.Thread(target=compact_again_and_again)
        thread.start()
        rounds = 0
        while not done.is_set() or rounds < 20:
            rounds += 1
            table.update({"n": -rounds}, doc_ids=[rounds % 2000 + 1])
            new = table.insert({"n": rounds, "req_params": {"number": -rounds}})
            if rounds % 3 == 0:
                table.remove(doc_ids=[new])
            assert table.get(doc_id=rounds % 2000 + 1)["req_params"] == {"number": rounds % 2000}
        thread.join()
        seen = {document.doc_id: dict(document) for document in table}
    assert contents(path) == seen


def test_compaction_refuses_to_bless_bytes_that_rotted(path: Path) -> None:
    fill(path, 3)
    with LogDB(path) as db:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(HistoryDamaged, match="altered while in use"):
            db.storage.compact()
        assert path.read_bytes() == content


def test_compaction_refuses_a_tail_that_rotted_while_it_ran(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, 3)
    with LogDB(path) as db:
        write_live = LogStorage._write_live

        def write_beside(storage: LogStorage, fresh: LogFile) -> tuple[Rows, int]:
            rows, start = write_live(storage, fresh)
            db.table("t").insert({"n": 4})
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content)
            return rows, start

        monkeypatch.setattr(LogStorage, "_write_live", write_beside)
        with pytest.raises(HistoryDamaged, match="altered while in use"):
            db.storage.compact()
        assert len(db.table("t")) == 4
    assert len(contents(path)) == 3


@pytest.mark.parametrize("call", ["write", "fdatasync", "replace"])
def test_a_failed_compaction_changes_nothing(path: Path, disk: FailingOs, call: str) -> None:
    written = fill(path, 3)
    with LogDB(path) as db:
        content = path.read_bytes()
        disk.failing = {call: errno.ENOSPC}
        with pytest.raises(StorageFull):
            db.storage.compact()
        disk.failing = {}
        assert path.read_bytes() == content
        assert not path.with_name("h.log.tmp").exists(), "a full disk stays full"
        db.table("t").insert({"n": 4})
        db.storage.compact()
    assert contents(path) == {**written, 4: {"n": 4}}


def test_a_replaced_log_is_acknowledged_only_when_its_name_is_on_the_disk(path: Path, disk: FailingOs) -> None:
    fill(path, 2)
    with LogDB(path) as db:
        real = history_files.flush_folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("modules.history_log.flush_folder", refuse_to_flush)
            db.storage.compact()
            with pytest.raises(StorageFull):
                db.table("t").insert({"n": 3})
        assert history_files.flush_folder is real
        db.table("t").insert({"n": 3})
    assert len(contents(path)) == 3


def refuse_to_flush(_: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_interval_flushing_reaches_the_disk_at_the_latest_on_closing(path: Path, disk: FailingOs) -> None:
    db = LogDB(path, sync="interval")
    disk.calls.clear()
    db.insert({"n": 1})
    assert disk.calls == ["write"]
    db.close()
    assert "fdatasync" in disk.calls
    assert [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)] == []


def test_ids_are_not_given_twice_even_after_reopening_and_compacting(path: Path) -> None:
    fill(path, 3)
    with LogDB(path) as db:
        db.table("t").remove(doc_ids=[3])
        db.storage.compact()
    with LogDB(path) as db:
        assert db.table("t").insert({}) == 4
        db.table("t").truncate()
        assert db.table("t").insert({}) == 1


def test_tinydb_queries_see_cold_fields(path: Path) -> None:
    with LogDB(path) as db:
        db.insert_multiple([{"n": 1, "req_params": {"prompt": "cat"}}, {"n": 2}])
        assert db.search(where("req_params").prompt == "cat") == [{"n": 1, "req_params": {"prompt": "cat"}}]
        assert db.count(~Query().req_params.exists()) == 1
        assert db.get(Query().n.one_of([2, 3])).doc_id == 2
        assert db.contains(where("n") == 1)
        assert not db.contains(doc_id=9)


def test_documents_that_leave_the_table_are_copies(path: Path) -> None:
    with LogDB(path) as db:
        given = {"list": [1]}
        db.insert(given)
        given["list"].append(2)
        db.get(doc_id=1)["list"].append(3)
        for _ in range(2):
            [found] = db.search(where("list").exists())
            assert found == {"list": [1]}, "a search gave away what it keeps"
            found["list"].append(4)
        assert db.get(doc_id=1) == {"list": [1]}


def test_a_failing_updater_changes_nothing(path: Path) -> None:
    fill(path, 2)
    size = path.stat().st_size

    def fail(document: dict) -> None:
        document["n"] = 1
        raise ZeroDivisionError

    with LogDB(path) as db:
        with pytest.raises(ZeroDivisionError):
            db.table("t").update(fail)
        with pytest.raises(ValueError, match="already exists"):
            db.table("t").insert(Document({}, 1))
        with pytest.raises(TypeError):
            db.table("t").insert({"what": object()})
    assert path.stat().st_size == size


def test_an_update_that_changes_nothing_writes_nothing(path: Path) -> None:
    fill(path, 1)
    size = path.stat().st_size
    with LogDB(path) as db:
        assert db.table("t").update({"number": 0}) == [1]
    assert path.stat().st_size == size


def test_dropping_tables_is_kept(path: Path) -> None:
    with LogDB(path) as db:
        for name in ("a", "b", "c"):
            db.table(name).insert({"n": name})
        db.drop_table("a")
        assert db.tables() == {"b", "c"}
    with LogDB(path) as db:
        assert db.tables() == {"b", "c"}
        db.drop_tables()
    with LogDB(path) as db:
        assert db.tables() == set()


def test_a_foreign_write_through_the_storage_interface_is_kept(path: Path) -> None:
    with LogDB(path) as db:
        db.insert({"n": 1})
        db.storage.write({"_default": {"5": {"n": 5}}, "other": {1: {"x": 1}}})
    with LogDB(path) as db:
        assert [document.doc_id for document in db] == [5]
        assert db.table("other").all() == [{"x": 1}]
    assert issubclass(LogDB, TinyDB)
