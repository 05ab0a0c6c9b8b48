"""Finds the ids of history records by task, time, status, source, seed and words, without reading the log."""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice, pairwise
from typing import Any, Final, NamedTuple

from modules.choices import TaskStatus

_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_FEW: Final = 8  # lists that are looked into one by one rather than made one
LARGEST: Final = 2**63 - 1
"""The largest id, time or seed the arrays here can hold."""
_FINAL: Final = frozenset(status.value for status in TaskStatus if status.is_final)


class SortedIds(Sequence[int]):
    """Ids in ascending order, eight bytes each; adding at the end and looking up cost next to nothing."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.ids = array("q", ids)

    def add(self, doc_id: int) -> None:
        """Put the id in its place, once."""
        if not self.ids or doc_id > self.ids[-1]:
            self.ids.append(doc_id)
            return
        place = bisect_left(self.ids, doc_id)
        if self.ids[place] != doc_id:
            self.ids.insert(place, doc_id)

    def discard(self, doc_id: int) -> None:
        """Take the id out, if it is in."""
        place = bisect_left(self.ids, doc_id)
        if place < len(self.ids) and self.ids[place] == doc_id:
            del self.ids[place]

    def between(self, first: int, last: int) -> Sequence[int]:
        """The ids from `first` to `last`, both included."""
        return self.ids[bisect_left(self.ids, first) : bisect_right(self.ids, last)]

    def __getitem__(self, place: Any) -> Any:  # noqa: ANN401  an int gives an id, a slice gives ids
        return self.ids[place]

    def __contains__(self, doc_id: object) -> bool:
        if not isinstance(doc_id, int):
            return False
        place = bisect_left(self.ids, doc_id)
        return place < len(self.ids) and self.ids[place] == doc_id

    def __len__(self) -> int:
        return len(self.ids)


class SortedPairs:
    """(key, id) pairs in ascending order, as two arrays side by side.

    descents: neighbours whose ids fall while their keys rise; 0 means that both are in one order.
    """

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        ordered = sorted(pairs)
        self.keys = array("q", [key for key, _ in ordered])
        self.ids = array("q", [doc_id for _, doc_id in ordered])
        self.descents = sum(after < before for before, after in pairwise(self.ids))

    def _place(self, key: int, doc_id: int) -> int:
        """Where the pair is or belongs."""
        low = bisect_left(self.keys, key)
        return bisect_left(self.ids, doc_id, low, bisect_right(self.keys, key, low))

    def _falls(self, place: int) -> int:
        """1 if the id at `place` is smaller than the one before it, else 0."""
        return int(0 < place < len(self.ids) and self.ids[place] < self.ids[place - 1])

    def add(self, key: int, doc_id: int) -> None:
        """Put the pair in its place."""
        place = self._place(key, doc_id)
        self.descents -= self._falls(place)
        self.keys.insert(place, key)
        self.ids.insert(place, doc_id)
        self.descents += self._falls(place) + self._falls(place + 1)

    def discard(self, key: int, doc_id: int) -> None:
        """Take the pair out, if it is in."""
        place = self._place(key, doc_id)
        if place < len(self.ids) and self.keys[place] == key and self.ids[place] == doc_id:
            self.descents -= self._falls(place) + self._falls(place + 1)
            del self.keys[place]
            del self.ids[place]
            self.descents += self._falls(place)

    def between(self, low: int, high: int) -> Sequence[int]:
        """The ids whose keys lie from `low` to `high`, both included, by key."""
        return self.ids[bisect_left(self.keys, low) : bisect_right(self.keys, high)]


class RecordIndex:
    """Ids of records by what their hot fields say. Not thread-safe; the storage's state lock guards it."""

    def __init__(self, records: Iterable[tuple[int, Mapping[str, Any]]] = ()) -> None:
        """Index `records`, given as id and hot fields; many at once are faster than one by one."""
        self.by_task: dict[str, int] = {}
        by_status, by_source = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        times, seeds = [], []
        for doc_id, hot in records:
            task_id, status, source, queued_mills, own_seeds = facts_of(hot)
            self.by_task[task_id] = doc_id
            by_status[status].append(doc_id)
            by_source[source].append(doc_id)
            times.append((queued_mills, doc_id))
            for seed in own_seeds:
                seeds.append((seed, doc_id))
        self.times, self.seeds = SortedPairs(times), SortedPairs(seeds)
        self.ids = SortedIds(sorted(doc_id for _, doc_id in times))
        self.by_status = {status: SortedIds(sorted(ids)) for status, ids in by_status.items()}
        self.by_source = {source: SortedIds(sorted(ids)) for source, ids in by_source.items()}
        self.final = SortedIds(merge(*(ids for status, ids in self.by_status.items() if status in _FINAL)))

    def change(self, doc_id: int, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
        """Follow a record from its hot fields `before` to those `after`; None means it is not there."""
        if before is not None:
            self._forget(doc_id, facts_of(before))
        if after is not None:
            self._learn(doc_id, facts_of(after))

    def _learn(self, doc_id: int, facts: "Facts") -> None:
        self.by_task[facts.task_id] = doc_id
        self.ids.add(doc_id)
        if facts.status in _FINAL:
            self.final.add(doc_id)
        self.by_status.setdefault(facts.status, SortedIds()).add(doc_id)
        self.by_source.setdefault(facts.source, SortedIds()).add(doc_id)
        self.times.add(facts.queued_mills, doc_id)
        for seed in facts.seeds:
            self.seeds.add(seed, doc_id)

    def _forget(self, doc_id: int, facts: "Facts") -> None:
        self.ids.discard(doc_id)
        self.final.discard(doc_id)
        if self.by_task.get(facts.task_id) == doc_id:
            del self.by_task[facts.task_id]
        self.by_status[facts.status].discard(doc_id)
        self.by_source[facts.source].discard(doc_id)
        self.times.discard(facts.queued_mills, doc_id)
        for seed in facts.seeds:
            self.seeds.discard(seed, doc_id)

    def of_statuses(self, statuses: Iterable[TaskStatus]) -> list[SortedIds]:
        """The id lists that together hold every record in one of `statuses`, and no other."""
        wanted = {status.value for status in statuses}
        lists = []
        if wanted >= _FINAL:
            wanted -= _FINAL
            lists.append(self.final)
        return lists + [self.by_status[status] for status in wanted if status in self.by_status]

    def newest(
        self, lists: Sequence[SortedIds], low_mills: int, high_mills: int, skip: int, limit: int | None
    ) -> list[int]:
        """Ids in any of the disjoint `lists` queued in the window, largest first, from place `skip` on."""
        if low_mills <= -1 and high_mills >= LARGEST:
            return _largest_first([ids.ids for ids in lists], skip, limit)
        window = self.times.between(low_mills, high_mills)
        if not window:
            return []
        if not self.times.descents:
            return _largest_first([ids.between(window[0], window[-1]) for ids in lists], skip, limit)
        # a clock went back: ids and times are ordered differently
        return _largest_first([sorted(doc_id for doc_id in window if _in_any(doc_id, lists))], skip, limit)

    def matching(self, conditions: Iterable[Sequence[SortedIds]], low_mills: int, high_mills: int) -> Iterator[int]:
        """Ids that each condition has in any of its lists, queued in the window, largest first."""
        rarest, *others = sorted(conditions, key=lambda lists: sum(map(len, lists)))
        if low_mills > -1 or high_mills < LARGEST:
            others.append([SortedIds(sorted(self.times.between(low_mills, high_mills)))])
        ids = rarest[0] if len(rarest) == 1 else sorted({doc_id for ids in rarest for doc_id in ids})
        return (doc_id for doc_id in reversed(ids) if all(_in_any(doc_id, lists) for lists in others))


def _in_any(doc_id: int, lists: Sequence[SortedIds]) -> bool:
    return any(doc_id in ids for ids in lists)


class Facts(NamedTuple):
    """What a record is indexed by, with neutral values for whatever a stranger stored instead."""

    task_id: str
    status: str
    source: str
    queued_mills: int
    seeds: list[int]


def facts_of(hot: Mapping[str, Any]) -> Facts:
    """The facts in a record's hot fields."""
    seeds = hot.get("seeds")
    return Facts(
        str(hot.get("task_id", "")),
        str(hot.get("task_status", "")),
        str(hot.get("source", "")),
        _whole(hot.get("in_queue_mills")),
        [seed for seed in dict.fromkeys(map(_whole, seeds)) if seed >= 0] if isinstance(seeds, list) else [],
    )


def _whole(value: object) -> int:
    """`value` if it is a whole number that fits eight bytes and is not negative, else -1."""
    return value if isinstance(value, int) and 0 <= value <= LARGEST else -1


def _largest_first(runs: list[Sequence[int]], skip: int, limit: int | None) -> list[int]:
    """Members of the ascending `runs`, largest first, from place `skip` on, at most `limit`."""
    runs = [run for run in runs if run]
    stop = None if limit is None else skip + limit
    if len(runs) == 1:
        run, end = runs[0], len(runs[0])
        low = 0 if stop is None else max(0, end - stop)
        return list(run[low : max(0, end - skip)])[::-1]
    return list(islice(merge(*map(reversed, runs), reverse=True), skip, stop))


def words_of(text: str) -> list[str]:
    """The words of a text, folded; each ideograph or kana is a word, for these scripts set no spaces."""
    return _WORD.findall(text.casefold())


def terms_of(hot: Mapping[str, Any], req_params: Mapping[str, Any]) -> frozenset[str]:
    """What a record can be found by: prompt words, and styles and models marked by a prefix no word has."""
    styles = req_params.get("style_selections") or ()
    models = (hot.get("model"), req_params.get("base_model_name"))
    return frozenset(
        [
            *words_of(str(req_params.get("prompt") or "")),
            *(style_term(str(style)) for style in styles),
            *(model_term(str(model)) for model in models if model),
        ]
    )


def style_term(name: str) -> str:
    """The term of a style name."""
    return "style:" + name.casefold()


def model_term(name: str) -> str:
    """The term of a model's file name."""
    return "model:" + name.casefold()


class TermIndex:
    """Ids of records by term. Guarded by the storage's state lock, like `RecordIndex`.

    covered: records up to this id have been read; those behind it are still to come (see History).
    """

    def __init__(self) -> None:
        self.covered = 0
        self._postings: dict[str, SortedIds] = {}
        self._sorted_terms: list[str] | None = None

    def add(self, doc_id: int, terms: Iterable[str]) -> None:
        """Let the record be found by `terms`."""
        for term in terms:
            posting = self._postings.get(term)
            if posting is None:
                posting = self._postings[term] = SortedIds()
                self._sorted_terms = None
            posting.add(doc_id)

    def discard(self, doc_id: int, terms: Iterable[str]) -> None:
        """Let the record be found by `terms` no longer."""
        for term in terms:
            posting = self._postings.get(term)
            if posting is not None:
                posting.discard(doc_id)
                if not posting:
                    del self._postings[term]
                    self._sorted_terms = None

    def exactly(self, term: str) -> list[SortedIds]:
        """The id lists that hold every record with this term."""
        return [self._postings[term]] if term in self._postings else []

    def beginning(self, start: str) -> list[SortedIds]:
        """The id lists that hold every record with a term that begins with `start`."""
        lists = [self._postings[term] for term in self._from(start)]
        return lists if len(lists) <= _FEW else [SortedIds(sorted({doc_id for ids in lists for doc_id in ids}))]

    def _from(self, start: str) -> Iterator[str]:
        if self._sorted_terms is None:
            self._sorted_terms = sorted(self._postings)
        for place in range(bisect_left(self._sorted_terms, start), len(self._sorted_terms)):
            if not self._sorted_terms[place].startswith(start):
                return
            yield self._sorted_terms[place]
