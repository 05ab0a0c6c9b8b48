"""Between any two ranks there is room, in any order of insertions."""

from hypothesis import given
from hypothesis import strategies as st

from modules.ranks import Rank, rank_between


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=60))
def test_a_list_that_is_sorted_by_rank_stays_in_the_order_it_was_put_in(steps: list[tuple[int, bool]]) -> None:
    """Each step accepts a task (the next id) or puts one anywhere."""
    ranks: list[Rank] = []
    for number, (place, is_new) in enumerate(steps):
        if is_new or not ranks:
            new: Rank = (0, number)
            assert all(new > rank for rank in ranks), "who comes last is last"
            ranks.append(new)
            continue
        place = min(place, len(ranks))
        made = rank_between(ranks[place - 1] if place else None, ranks[place] if place < len(ranks) else None)
        assert made is not None
        ranks.insert(place, made)
        assert sorted(ranks) == ranks
        assert len(set(ranks)) == len(ranks)


def test_putting_one_after_the_other_first_or_last_keeps_ranks_short() -> None:
    first, last, front, back = (0, 5), (0, 6), (0, 6), (0, 5)
    for _ in range(1000):
        front = rank_between(first, front) or ()
        back = rank_between(back, last) or ()
        assert first < front < last
        assert first < back < last
    assert len(front) == len(back) == 3


def test_a_task_alone_keeps_its_rank() -> None:
    assert rank_between(None, None) is None


def test_a_rank_stays_in_the_priority_of_the_one_before_it() -> None:
    assert rank_between((0, 7), (1, 3)) == (0, 7, 0)
    assert rank_between(None, (1, 3)) == (1, 2)
