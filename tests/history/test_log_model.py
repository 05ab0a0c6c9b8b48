"""Drives the log and TinyDB's own memory storage with the same random calls; they must never differ."""

import copy
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from tinydb import TinyDB, where
from tinydb.operations import increment
from tinydb.storages import MemoryStorage
from tinydb.table import Document

from modules.history_tables import LogDB

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.text(max_size=5),
    st.lists(st.integers(0, 9), max_size=3),
)
NUMBERS = st.integers(0, 3)
DOCUMENTS = st.fixed_dictionaries(
    {"n": NUMBERS},
    optional={"a": VALUES, "req_params": st.dictionaries(st.sampled_from(["prompt", "x"]), VALUES, max_size=2)},
)
CONDITIONS = st.one_of(
    NUMBERS.map(lambda n: where("n") == n),
    NUMBERS.map(lambda n: (where("n") < n) & where("a").exists()),
    st.text(max_size=1).map(lambda text: where("req_params").prompt == text),
)


class LogBesideMemory(RuleBasedStateMachine):
    """`model` is a plain TinyDB in memory; `before` is what it held before the last transaction."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="focale-history-"))
        self.path = self.folder / "h.log"
        self.model = TinyDB(storage=MemoryStorage)
        self.open()
        self.before: list[Document] = []
        self.acknowledged = 0

    def open(self) -> None:
        self.db = LogDB(self.path, sync="never", compact_above=1 << 40)

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    def remember(self) -> None:
        self.before = copy.deepcopy(self.model.all())
        self.acknowledged = self.path.stat().st_size

    @rule(target=ids, document=DOCUMENTS)
    def insert(self, document: dict) -> int:
        self.remember()
        doc_id = self.db.insert(document)
        assert self.model.insert(Document(document, doc_id)) == doc_id
        return doc_id

    @rule(target=ids, documents=st.lists(DOCUMENTS, max_size=4))
    def insert_multiple(self, documents: list[dict]):
        self.remember()
        ids = self.db.insert_multiple(documents)
        self.model.insert_multiple(Document(d, i) for d, i in zip(documents, ids, strict=True))
        return multiple(*ids)

    @rule(document=DOCUMENTS, condition=CONDITIONS)
    def update(self, document: dict, condition) -> None:
        self.remember()
        assert self.db.update(document, condition) == self.model.update(document, condition)

    @rule(document=DOCUMENTS, doc_ids=st.lists(ids, max_size=3))
    def update_by_id(self, document: dict, doc_ids: list[int]) -> None:
        self.remember()
        assert self.db.update(document, doc_ids=doc_ids) == self.model.update(document, doc_ids=doc_ids)

    @rule(condition=CONDITIONS, other=CONDITIONS, document=DOCUMENTS)
    def update_multiple(self, condition, other, document: dict) -> None:
        self.remember()
        updates = [(increment("n"), condition), (document, other)]
        assert self.db.update_multiple(updates) == self.model.update_multiple(updates)

    @rule(document=DOCUMENTS, condition=CONDITIONS)
    def upsert(self, document: dict, condition) -> None:
        self.remember()
        ids = self.db.upsert(document, condition)
        if self.model.contains(condition):
            assert self.model.upsert(document, condition) == ids
        else:
            self.model.insert(Document(document, ids[0]))

    @rule(condition=CONDITIONS)
    def remove(self, condition) -> None:
        self.remember()
        assert self.db.remove(condition) == self.model.remove(condition)

    @rule(doc_id=consumes(ids))
    def remove_by_id(self, doc_id: int) -> None:
        self.remember()
        assert self.db.remove(doc_ids=[doc_id]) == self.model.remove(doc_ids=[doc_id])

    @rule()
    def truncate(self) -> None:
        self.remember()
        self.db.truncate()
        self.model.truncate()

    @rule(condition=CONDITIONS)
    def search(self, condition) -> None:
        found, expected = self.db.search(condition), self.model.search(condition)
        assert [d.doc_id for d in found] == [d.doc_id for d in expected]
        assert found == expected
        assert self.db.count(condition) == self.model.count(condition)

    @rule()
    def reopen(self) -> None:
        self.db.close()
        self.open()

    @rule()
    def compact(self) -> None:
        self.db.storage.compact()
        self.remember()

    @precondition(lambda self: self.path.stat().st_size > self.acknowledged)
    @rule(data=st.data())
    def tear_the_last_transaction(self, data) -> None:
        self.db.close()
        size = self.path.stat().st_size
        cut = data.draw(st.integers(self.last_frame(), size - 1), label="cut")
        with self.path.open("r+b") as log:
            log.truncate(cut)
        self.model.drop_tables()
        self.model.insert_multiple(self.before)
        self.open()
        self.remember()

    def last_frame(self) -> int:
        """Offset of the last frame: an upsert may write one that makes its table before."""
        return self.path.read_bytes().rstrip(b"\n").rfind(b"\n") + 1

    @invariant()
    def same_documents(self) -> None:
        mine, theirs = self.db.all(), self.model.all()
        assert [document.doc_id for document in mine] == [document.doc_id for document in theirs]
        assert mine == theirs
        assert len(self.db) == len(self.model)

    @invariant()
    def live_bytes_are_counted(self) -> None:
        rows = self.db.storage.rows
        assert rows.live_bytes == sum(row.cost for table in rows.tables.values() for row in table.values())


LogBesideMemory.TestCase.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLogBesideMemory = LogBesideMemory.TestCase
