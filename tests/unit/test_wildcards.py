"""Reading wildcard files."""

import os
import random
from pathlib import Path

import pytest

from modules.prompts import fill_wildcards
from modules.wildcards import Wildcards

SHIPPED = Path(__file__).parents[2] / "presets" / "wildcards"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def test_lines_are_trimmed_and_empty_ones_dropped(tmp_path):
    write(tmp_path / "color.txt", "\ufeffred\r\n\r\n  green \n\nblue")
    assert Wildcards((tmp_path,)).words("color") == ("red", "green", "blue")


def test_latin_1_files_are_read(tmp_path):
    (tmp_path / "city.txt").write_bytes(b"K\xf6ln\n")
    assert Wildcards((tmp_path,)).words("city") == ("Köln",)


def test_sub_folders_are_searched_and_the_top_wins(tmp_path):
    write(tmp_path / "b" / "deep.txt", "deep")
    write(tmp_path / "a" / "color.txt", "lower")
    write(tmp_path / "color.txt", "upper")
    wildcards = Wildcards((tmp_path,))
    assert wildcards.words("deep") == ("deep",)
    assert wildcards.words("color") == ("upper",)
    assert wildcards.names() == ["color", "deep"]


def test_the_first_folder_wins_and_may_be_missing(tmp_path):
    write(tmp_path / "own" / "sub" / "color.txt", "own")
    write(tmp_path / "shipped" / "color.txt", "shipped")
    write(tmp_path / "shipped" / "animal.txt", "cat")
    wildcards = Wildcards((tmp_path / "none", tmp_path / "own", tmp_path / "shipped"))
    assert wildcards.words("color") == ("own",)
    assert wildcards.words("animal") == ("cat",)


def test_unknown_names_have_no_words(tmp_path):
    write(tmp_path / "secret.txt", "x")
    assert Wildcards((tmp_path / "inner",)).words("../secret") == ()
    assert Wildcards((tmp_path,)).words("nothing") == ()


def test_new_changed_and_deleted_files_count_at_once(tmp_path):
    wildcards = Wildcards((tmp_path / "w",))
    assert wildcards.words("color") == ()
    write(tmp_path / "w" / "sub" / "color.txt", "red")
    assert wildcards.words("color") == ("red",)
    write(tmp_path / "w" / "sub" / "color.txt", "red\ngreen")
    assert wildcards.words("color") == ("red", "green")
    (tmp_path / "w" / "sub" / "color.txt").unlink()
    os.utime(tmp_path / "w" / "sub", ns=(1, 1))  # a coarse file clock must not hide the change
    assert wildcards.words("color") == ()


def test_an_unchanged_file_is_read_once_until_refreshed(tmp_path, monkeypatch):
    write(tmp_path / "color.txt", "red")
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    wildcards = Wildcards((tmp_path,))
    for _ in range(3):
        wildcards.words("color")
    assert len(reads) == 1
    wildcards.refresh()
    wildcards.words("color")
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("animal", 100), ("artist", 300), ("color", 17), ("extended-color", 147), ("flower", 200), ("nationality", 190)],
)
def test_shipped_lists_are_long_and_hold_each_line_once(name, at_least):
    lines = Wildcards((SHIPPED,)).words(name)
    assert len(lines) >= at_least
    assert len({line.casefold() for line in lines}) == len(lines)


def test_a_shipped_list_made_of_others_fills_completely():
    text = fill_wildcards("__color_flower__", Wildcards((SHIPPED,)).words, random.Random(5))
    colors, flowers = Wildcards((SHIPPED,)).words("color"), Wildcards((SHIPPED,)).words("flower")
    assert any(text == f"{color} {flower}" for color in colors for flower in flowers)
