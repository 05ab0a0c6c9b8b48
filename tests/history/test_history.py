"""The repository: records in, records out, in the right order, whatever happens in between."""

import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tinydb import where

from modules.choices import Source, TaskStatus
from modules.errors import HistoryLocked, IllegalTransition, NotFound, StorageFull
from modules.history import FILE_NAME, FINAL, History, HistoryFilter
from modules.history_index import SortedPairs, words_of
from modules.record import Record


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History(tmp_path, sync="never") as opened:
        yield opened


def task(number: int) -> str:
    return f"{number:032x}"


def record(number: int, status: str = "finished", **fields: object) -> Record:
    fields = {"in_queue_mills": 1000 * number, "req_params": {"prompt": f"picture {number}"}, **fields}
    return Record.model_validate({"task_id": task(number), "task_status": status, **fields})


def ids(records: list[Record]) -> list[int]:
    return [found.id for found in records]


def test_a_record_comes_back_as_it_was_after_reopening(tmp_path: Path) -> None:
    asked = record(
        7, result=["2026-11-22/a.png"], seeds=[2**63 - 1], source="webui", notes=["The demo model stood in."], width=64
    )
    with History(tmp_path) as history:
        kept = history.add(asked)
        assert kept == asked.model_copy(update={"id": 1})
    with History(tmp_path) as history:
        assert history.get(task(7)) == kept
        assert history.get(task(8)) is None


def test_a_task_is_added_once(history: History) -> None:
    history.add(record(1))
    with pytest.raises(IllegalTransition, match="already holds"):
        history.add(record(1))
    with pytest.raises(IllegalTransition):
        history.add_many([record(2), record(3), record(2)])
    assert len(history) == 1, "half of a refused transaction stayed"


def test_an_update_gives_the_next_record_and_checks_it(history: History) -> None:
    first = history.add(record(1, "pending"))
    second = history.update(task(1), task_status="running", start_mills=5, attempts=1)
    assert second == first.model_copy(update={"task_status": TaskStatus.RUNNING, "start_mills": 5, "attempts": 1})
    assert history.get(task(1)) == second
    with pytest.raises(NotFound, match=task(9)):
        history.update(task(9), progress=1)
    with pytest.raises(TypeError, match="task_id"):
        history.update(task(1), task_id="x")
    with pytest.raises(TypeError, match="colour"):
        history.update(task(1), colour="red")
    with pytest.raises(ValidationError):
        history.update(task(1), task_status="lost")
    assert history.get(task(1)) == second


def test_pages_are_newest_first_and_hold_ended_tasks_only(history: History) -> None:
    for number in range(1, 26):
        history.add(record(number, "pending" if number in (3, 24, 25) else FINAL[number % 4].value))
    assert ids(history.page()) == [23, 22, 21, 20, 19, 18, 17, 16, 15, 14]
    assert ids(history.page(page=2)) == [2, 1]
    assert ids(history.page(page=3)) == []
    assert ids(history.page(page_size=None)) == [number for number in range(23, 0, -1) if number != 3]
    assert ids(history.page(statuses=[TaskStatus.PENDING])) == [25, 24, 3]
    assert ids(history.page(statuses=TaskStatus, page_size=4)) == [25, 24, 23, 22]
    assert ids(history.unfinished()) == [3, 24, 25]


def test_a_page_far_behind_the_end_is_empty_and_a_wrong_one_is_refused(history: History) -> None:
    history.add_many(record(number) for number in range(1, 5))
    every = HistoryFilter()
    assert history.page(page=10**30, page_size=10**30) == history.search(every, page=10**30) == []
    assert ids(history.page(page_size=10**30)) == ids(history.search(every, page_size=10**30)) == [4, 3, 2, 1]
    for page, size in ((-1, 10), (0, 0), (0, -1)):
        with pytest.raises(ValueError, match="no page"):
            history.page(page=page, page_size=size)
        with pytest.raises(ValueError, match="no page"):
            history.search(every, page=page, page_size=size)


def test_a_time_window_includes_both_ends(history: History) -> None:
    history.add_many(record(number) for number in range(1, 11))
    assert ids(history.page(start_mills=3000, end_mills=5000)) == [5, 4, 3]
    assert ids(history.page(start_mills=9001)) == [10]
    assert ids(history.page(end_mills=2000)) == [2, 1]
    assert ids(history.page(start_mills=5000, end_mills=4000)) == []
    assert ids(history.page(start_mills=2000, page=1, page_size=4)) == [6, 5, 4, 3]


def test_a_clock_that_goes_back_breaks_neither_ids_nor_order(history: History) -> None:
    times = [5000, 6000, 1000, 2000, 7000]
    history.add_many(record(number, in_queue_mills=time) for number, time in enumerate(times, 1))
    assert ids(history.page()) == [5, 4, 3, 2, 1]
    assert ids(history.page(start_mills=1500, end_mills=6000)) == [4, 2, 1]
    assert ids(history.page(start_mills=1500, end_mills=6000, page=1, page_size=2)) == [1]
    history.delete([task(3), task(4)])
    assert ids(history.page(start_mills=1500, end_mills=6000)) == [2, 1]


def test_ids_are_never_given_twice(tmp_path: Path) -> None:
    with History(tmp_path) as history:
        history.add_many([record(1), record(2)])
        history.delete([task(2)])
        history.storage.compact()
    with History(tmp_path) as history:
        assert history.add(record(3)).id == 3


def test_deleting_passes_over_tasks_in_work(history: History) -> None:
    history.add_many([record(1), record(2, "running"), record(3, "pending"), record(4, "error")])
    assert ids(history.delete([task(4), task(2), task(3), task(9), task(1), task(1)])) == [4, 1]
    assert ids(history.page(statuses=TaskStatus)) == [3, 2]
    assert history.get(task(1)) is None


def test_search_by_each_condition_and_all_together(history: History) -> None:
    history.add(record(1, req_params={"prompt": "A red CAT, asleep", "style_selections": ["Fooocus V2", "SAI Anime"]}))
    history.add(record(2, req_params={"prompt": "a blue cathedral", "base_model_name": "Juggernaut.safetensors"}))
    history.add(record(3, "error", req_params={"prompt": "red roses"}, source="webui", seeds=[7, 8]))
    history.add(record(4, "pending", req_params={"prompt": "red"}, model="demo.safetensors"))
    history.add(record(5, req_params={"prompt": "Straße 猫 чёрный"}, seeds=[8]))

    def found(**conditions: object) -> list[int]:
        return ids(history.search(HistoryFilter(**conditions)))  # type: ignore[arg-type]

    assert found(words="cat") == [2, 1]
    assert found(words="red cat") == [1]
    assert found(words="RED") == [3, 1]
    assert found(words="at") == []
    assert found(words="STRASSE") == found(words="猫") == found(words="ЧЁР") == [5]
    assert found(style="sai anime") == [1]
    assert found(model="juggernaut.SAFETENSORS") == [2]
    assert found(model="demo.safetensors", statuses=tuple(TaskStatus)) == [4]
    assert found(seed=8) == [5, 3]
    assert found(source=Source.WEBUI) == [3]
    assert found(statuses=(TaskStatus.ERROR, TaskStatus.PENDING)) == [4, 3]
    assert found(words="red", start_mills=2000, end_mills=3000) == [3]
    assert found(words="red", style="SAI Anime", source=Source.API) == [1]
    assert found(style="cat") == found(words="style:fooocus") == []
    assert found() == [5, 3, 2, 1]
    assert ids(history.search(HistoryFilter(words="a"), page=1, page_size=1)) == [1]


def test_the_search_follows_changes(history: History) -> None:
    history.add_many(record(number, req_params={"prompt": "old words"}) for number in range(1, 4))
    assert ids(history.search(HistoryFilter(words="old"))) == [3, 2, 1]
    history.update(task(2), req_params={"prompt": "new words"}, model="m.safetensors")
    history.delete([task(1)])
    history.add(record(4, req_params={"prompt": "new"}))
    assert ids(history.search(HistoryFilter(words="old"))) == [3]
    assert ids(history.search(HistoryFilter(words="new"))) == [4, 2]
    assert ids(history.search(HistoryFilter(words="new", model="m.safetensors"))) == [2]


def test_records_added_while_words_are_collected_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.history._READ_AT_ONCE", 3)
    with History(tmp_path, sync="never") as history:
        history.add_many(record(number, req_params={"prompt": "early"}) for number in range(1, 101))
        writer = threading.Thread(
            target=lambda: [history.add(record(number, req_params={"prompt": "late"})) for number in range(101, 201)]
        )
        writer.start()
        history.read_terms()
        writer.join()
        assert ids(history.search(HistoryFilter(words="early"), page_size=None)) == list(range(100, 0, -1))
        assert ids(history.search(HistoryFilter(words="late"), page_size=None)) == list(range(200, 100, -1))


def test_pruning_by_count_age_and_bytes_takes_the_oldest_ended_tasks(tmp_path: Path) -> None:
    with History(tmp_path, sync="never") as history:
        history.add_many(record(number, "pending" if number == 2 else "finished") for number in range(1, 41))
        assert ids(history.prune(keep=35)) == [1, 3, 4, 5]
        assert history.prune(keep=35) == []
        assert ids(history.prune(before_mills=8000)) == [6, 7]
        half = history.storage.rows.live_bytes // 2
        gone = history.prune(max_bytes=half)
        assert ids(gone) == list(range(8, 8 + len(gone)))
        assert half - 400 < history.storage.rows.live_bytes <= half
        assert ids(history.unfinished()) == [2]
        history.prune(keep=0)
        assert ids(history.page(statuses=TaskStatus)) == [2]


def test_a_limit_keeps_the_newest_ended_tasks(tmp_path: Path) -> None:
    with History(tmp_path, sync="never") as history:
        history.add_many(record(number) for number in range(1, 8))
    with History(tmp_path, sync="never", limit=3) as history:
        history.add(record(8, "pending"))
        assert ids(history.page(statuses=TaskStatus)) == [8, 7, 6, 5]
        history.update(task(8), task_status="stop")
        assert ids(history.page(statuses=TaskStatus)) == [8, 7, 6]


def test_counts_follow_the_life_of_tasks(history: History) -> None:
    history.add_many([record(1, "pending"), record(2, "pending"), record(3)])
    history.update(task(1), task_status="running")
    assert history.counts() == {**dict.fromkeys(TaskStatus, 0), "pending": 1, "running": 1, "finished": 1}
    assert len(history) == 3


def test_changes_made_through_tinydb_are_indexed(history: History) -> None:
    history.add_many([record(1), record(2)])
    history.table.update({"task_status": "error", "error": "Why not."}, where("task_id") == task(1))
    history.table.remove(where("task_id") == task(2))
    assert ids(history.page(statuses=[TaskStatus.ERROR])) == [1]
    assert history.get(task(2)) is None
    assert history.table.search(where("req_params").prompt == "picture 1")[0].doc_id == 1


def test_a_stranger_among_the_records_spoils_no_page(history: History) -> None:
    history.add(record(1))
    history.table.insert({"seeds": None, "in_queue_mills": "noon", "task_status": "odd", "task_id": 5})
    history.table.insert({"task_status": "finished", "task_id": "x", "progress": "much"})
    history.add(record(2))
    assert ids(history.page()) == [4, 1]
    assert history.get("x") is None


def test_a_refused_write_leaves_records_and_indexes_as_they_were(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.add(record(1, "pending", req_params={"prompt": "old"}))
    history.read_terms()

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(history.storage._file, "append", full)
        for change in (
            lambda: history.add(record(2)),
            lambda: history.update(task(1), task_status="finished", req_params={"prompt": "new"}),
        ):
            with pytest.raises(StorageFull, match="No space left"):
                change()
    assert ids(history.unfinished()) == [1]
    assert history.get(task(2)) is None
    assert history.search(HistoryFilter(words="new", statuses=tuple(TaskStatus))) == []
    assert history.add(record(2)).id > 1


def test_a_number_that_json_lacks_does_not_make_a_record_unreadable(history: History) -> None:
    history.add(record(1, progress=float("nan")))
    assert history.get(task(1)).progress == -1


def test_one_folder_has_one_writer_and_any_readers(tmp_path: Path) -> None:
    with History(tmp_path) as writer:
        writer.add(record(1))
        with pytest.raises(HistoryLocked):
            History(tmp_path)
        with History(tmp_path, read_only=True) as reader:
            assert ids(reader.page()) == [1]
            with pytest.raises(StorageFull):
                reader.add(record(2))
    with pytest.raises(FileNotFoundError):
        History(tmp_path / "nowhere", read_only=True)


def test_an_output_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFull, match="Choose another"):
        History(tmp_path / "file" / "outputs")


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    with History(tmp_path, sync="never") as history:
        history.storage.compact_above = 1 << 14
        failures: list[BaseException] = []

        def work(first: int) -> None:
            try:
                for number in range(first, first + 60):
                    history.add(record(number, "pending"))
                    assert history.update(task(number), task_status="running").id > 0
                    history.update(task(number), task_status="finished", progress=100)
                    assert len(history.page()) <= 10
                    assert history.search(HistoryFilter(words=f"picture {number}"))
                    if number % 2:
                        assert len(history.delete([task(number)])) == 1
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(first,)) for first in (1000, 2000, 3000, 4000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        expected = history.page(page_size=None)
        assert len(expected) == len(history) == 120
    with History(tmp_path) as history:
        assert history.page(page_size=None) == expected
        assert (tmp_path / FILE_NAME).stat().st_size < 4 * 120 * 500


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30), st.booleans())))
def test_sorted_pairs_keep_order_and_know_their_descents(changes: list[tuple[int, int, bool]]) -> None:
    pairs, model = SortedPairs(), set()
    for key, doc_id, adding in changes:
        if adding and (key, doc_id) not in model:
            pairs.add(key, doc_id)
            model.add((key, doc_id))
        elif not adding:
            pairs.discard(key, doc_id)
            model.discard((key, doc_id))
        ordered = sorted(model)
        assert list(zip(pairs.keys, pairs.ids, strict=True)) == ordered
        falls = sum(b[1] < a[1] for a, b in pairwise(ordered))
        assert pairs.descents == falls
        assert list(pairs.between(5, 15)) == [doc_id for key, doc_id in ordered if 5 <= key <= 15]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_pages_equal_a_plain_scan(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)
    with History(tmp_path_factory.mktemp("h"), sync="never") as history:
        model: list[Record] = []
        for number in range(1, 40):
            queued = chance.randrange(20) if seed % 2 else number
            model.append(history.add(record(number, chance.choice(list(TaskStatus)).value, in_queue_mills=queued)))
        for gone in history.delete(task(chance.randrange(1, 40)) for _ in range(8)):
            model.remove(gone)
        for place, kept in enumerate(model):
            if chance.random() < 0.3:
                model[place] = history.update(kept.task_id, task_status=chance.choice(list(TaskStatus)))
        statuses = chance.sample(list(TaskStatus), chance.randrange(1, 6))
        start, end = chance.randrange(40), chance.randrange(40)
        page, size = chance.randrange(3), chance.randrange(1, 8)
        fitting = [r for r in model[::-1] if r.task_status in statuses and start <= r.in_queue_mills <= end]
        wanted = HistoryFilter(statuses=tuple(statuses), start_mills=start, end_mills=end)
        assert history.search(wanted, page_size=None) == fitting
        expected = fitting[page * size : (page + 1) * size]
        assert history.page(page=page, page_size=size, start_mills=start, end_mills=end, statuses=statuses) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [("A cat's_eye, 2x", ["a", "cat", "s_eye", "2x"]), ("黒猫とcat", ["黒", "猫", "と", "cat"]), ("", [])],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


# What is at hand


def test_a_record_is_at_hand_once_it_was_read_and_until_it_changes(tmp_path):
    with History(tmp_path, sync="never") as history:
        history.add(Record(task_id="a", task_status=TaskStatus.FINISHED, progress=50))
        assert history.at_hand("a") is None
        assert history.at_hand("unknown") is None
        first = history.get("a")
        assert history.at_hand("a") is first is history.get("a")
        history.update("a", progress=60)
        assert history.at_hand("a") is None
        assert history.get("a").progress == 60
        history.storage.compact()
        assert history.get("a").progress == 60
        history.delete(["a"])
        assert history.at_hand("a") is None
        assert history.get("a") is None


def test_a_waiting_record_is_never_at_hand(tmp_path):
    with History(tmp_path, sync="never") as history:
        history.add(Record(task_id="a"))
        assert history.get("a") is not None
        assert history.at_hand("a") is None


def test_a_page_is_at_hand_when_all_its_records_are(tmp_path):
    with History(tmp_path, sync="never") as history:
        history.add_many(
            Record(task_id=str(number), task_status=TaskStatus.FINISHED, in_queue_mills=number) for number in range(30)
        )
        assert history.page_at_hand() is None
        page = history.page(page_size=5)
        assert history.page_at_hand(page_size=5) == page
        assert history.page_at_hand(page_size=6) is None
        assert history.page_at_hand(page_size=5, start_mills=25) == page
        history.page(page_size=5, page=1, end_mills=20)
        assert [record.task_id for record in history.page_at_hand(page_size=2, page=3, end_mills=20)] == ["14", "13"]
        history.delete(["27"])
        assert history.page_at_hand(page_size=5) is None, "one of the page was never read"
        assert [record.task_id for record in history.page(page_size=5)] == ["29", "28", "26", "25", "24"]


def test_nobody_waits_for_what_is_at_hand(tmp_path):
    """While another thread holds the records, the answer is: ask again, from a thread."""
    with History(tmp_path, sync="never") as history:
        history.add(Record(task_id="a", task_status=TaskStatus.FINISHED))
        history.get("a")
        is_held, may_go = threading.Event(), threading.Event()

        def hold() -> None:
            with history.storage.state_lock:
                is_held.set()
                may_go.wait(10)

        holder = threading.Thread(target=hold)
        holder.start()
        is_held.wait(10)
        assert history.at_hand("a") is None
        assert history.page_at_hand() is None
        may_go.set()
        holder.join()
        assert history.at_hand("a") is not None


def test_a_clock_that_went_back_leaves_windows_to_threads(tmp_path):
    with History(tmp_path, sync="never") as history:
        for number, mills in enumerate((10, 30, 20)):
            history.add(Record(task_id=str(number), task_status=TaskStatus.FINISHED, in_queue_mills=mills))
        history.page()
        assert history.page_at_hand() is not None
        assert history.page_at_hand(start_mills=15) is None


def test_only_the_newest_records_read_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("modules.history._REMEMBERED", 3)
    with History(tmp_path, sync="never") as history:
        history.add_many(Record(task_id=str(number), task_status=TaskStatus.FINISHED) for number in range(5))
        for number in range(5):
            history.get(str(number))
        assert [history.at_hand(str(number)) is not None for number in range(5)] == [False, False, True, True, True]
