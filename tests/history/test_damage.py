"""Bytes of the log altered at random: what is lost is told, and nothing else is lost."""

import io
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modules.history_frames import Frame, Stored, encode
from modules.history_rows import Rows
from modules.history_scan import Damage, Proven, replay, scan
from modules.history_tables import LogDB


def frames(count: int) -> list[bytes]:
    chance = random.Random(count)
    return [
        encode(Frame("t", stored=(Stored(number, b'{"n":%d}' % number, b'{"x":"%d"}' % chance.randrange(9**9)),)))
        for number in range(1, count + 1)
    ]


def surviving(lines: list[bytes]) -> tuple[set[int], tuple[Damage, ...]]:
    rows = Rows()
    found = replay(io.BytesIO(b"".join(lines)), rows)
    return set(rows.tables.get("t", {})), found.damaged


@pytest.mark.parametrize("byte", [0x00, 0x09, 0x0A, 0x20, 0x7B, 0xFF])
def test_one_altered_byte_costs_at_most_its_own_frame_and_is_told(byte: int) -> None:
    lines = frames(4)
    content = b"".join(lines)
    ends = [sum(map(len, lines[: number + 1])) for number in range(4)]
    for place in range(len(content)):
        if content[place] == byte:
            continue
        altered = content[:place] + bytes([byte]) + content[place + 1 :]
        own = next(number for number, end in enumerate(ends) if place < end)
        alive, damaged = surviving([altered])
        assert alive >= {1, 2, 3, 4} - {own + 1}
        assert damaged, f"byte {place} was altered and nobody was told"
        assert any(damage.offset <= place < damage.offset + damage.length for damage in damaged)
        if place + 1 in ends:
            assert alive == {1, 2, 3, 4}, "a damaged line feed cost a frame"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=30), st.integers(0, 30)), max_size=4),
    st.integers(1, 8),
)
@example([(0, b"\n", 0)], 1)
def test_pieces_cover_the_log_and_lie_in_order(wounds: list[tuple[int, bytes, int]], count: int) -> None:
    content = b"".join(frames(count))
    for place, inserted, removed in wounds:
        content = content[:place] + inserted + content[place + removed :]
    end = 0
    for piece in scan(io.BytesIO(content)):
        if isinstance(piece, Proven):
            assert piece.offset == end
            assert content[end : end + len(piece.line) - 1] == piece.line[:-1]
            end += len(piece.line)
        elif piece.offset == end - 1:
            assert piece.length == 1
            assert content[piece.offset : end] != b"\n"
        else:
            assert piece.offset == end
            end += piece.length
    assert b"\n" not in content[end:], "a finished line was left out"


def test_a_log_without_its_last_line_feed_is_whole_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "h.log"
    with LogDB(path) as db:
        db.insert_multiple([{"n": 1}])
        db.insert({"n": 2})
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with LogDB(path) as db:
        assert [document["n"] for document in db] == [1, 2]
        assert len(db.storage.damaged) == 1
        db.insert({"n": 3})
    with LogDB(path) as db:
        assert [document["n"] for document in db] == [1, 2, 3]
        db.storage.compact()
        assert not db.storage.damaged
    with LogDB(path) as db:
        assert [document["n"] for document in db] == [1, 2, 3]
        assert not db.storage.damaged
