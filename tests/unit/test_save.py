"""Saving: names, formats, clashes, and files that are whole or not there."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules import save
from modules.choices import OutputFormat
from modules.errors import StorageFull
from modules.files_atomic import write_atomically
from modules.save import clean_save_name, dated_stems, remove_partial_files, save_image

NOW = datetime(2026, 1, 31, 23, 59, 58)


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    gradient = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_180), gradient)).convert(mode)


@pytest.mark.parametrize(
    ("output_format", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
def test_dated_file_has_the_asked_suffix_and_the_real_format(tmp_path: Path, output_format: str, kind: str) -> None:
    saved = save_image(picture(), root=tmp_path, output_format=OutputFormat(output_format), now=NOW)

    folder, name = saved.path.split("/")
    assert folder == "2026-01-31"
    assert name.startswith("2026-01-31_23-59-58_")
    assert name.endswith(f".{output_format}")
    assert 1000 <= int(name.rsplit(".", 1)[0].rsplit("_", 1)[1]) <= 9999
    assert saved.size_bytes == (tmp_path / saved.path).stat().st_size
    with Image.open(saved.file) as read:
        assert (read.format, read.size) == (kind, (40, 24)) == (kind, (saved.width, saved.height))


def test_png_keeps_every_pixel(tmp_path: Path) -> None:
    saved = save_image(picture(), root=tmp_path, output_format="png", now=NOW)
    with Image.open(saved.file) as read:
        assert read.tobytes() == picture().tobytes()


def test_jpeg_is_progressive_with_quality_95(tmp_path: Path) -> None:
    saved = save_image(picture(), root=tmp_path, output_format="jpeg", now=NOW)
    reference = tmp_path / "reference.jpg"
    picture().save(reference, quality=95)
    with Image.open(saved.file) as read, Image.open(reference) as expected:
        assert read.info["progressive"]
        assert read.quantization == expected.quantization


def test_webp_is_lossy(tmp_path: Path) -> None:
    saved = save_image(picture(), root=tmp_path, output_format="webp", now=NOW)
    assert b"VP8 " in saved.file.read_bytes()[:64]


def test_jpeg_composites_alpha_on_white(tmp_path: Path) -> None:
    saved = save_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), root=tmp_path, output_format="jpg", now=NOW)
    with Image.open(saved.file) as read:
        assert read.getpixel((4, 4)) == (255, 255, 255)


def test_names_without_metadata_leave_no_text_in_the_file(tmp_path: Path) -> None:
    saved = save_image(picture(), root=tmp_path, output_format="png", now=NOW)
    with Image.open(saved.file) as read:
        assert not read.info


def test_save_name_gets_the_index_and_clashes_get_a_number(tmp_path: Path) -> None:
    names = [
        save_image(picture(), root=tmp_path, output_format="png", now=NOW, save_name="cat", index=index).path
        for index in (0, 1, 0, 0)
    ]
    assert [name.split("/")[1] for name in names] == ["cat-0.png", "cat-1.png", "cat-0_1.png", "cat-0_2.png"]


@pytest.mark.parametrize("wish", [None, "", "none", "None", " ", "...", " . "])
def test_no_name_means_a_dated_name(wish: str | None) -> None:
    assert clean_save_name(wish) is None


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ("my cat_1.v2-b", "my cat_1.v2-b"),
        ("../../etc/passwd", "_.._etc_passwd"),
        (".hidden", "hidden"),
        ("C:\\boot", "C__boot"),
        ("a\0b\nc", "a_b_c"),
        ("Über 苹果", "Über 苹果"),
        ("nul", "_nul"),
        ("com1.txt", "_com1.txt"),
        ("x" * 300, "x" * 120),
    ],
)
def test_save_names_are_made_safe(wish: str, name: str) -> None:
    assert clean_save_name(wish) == name


@given(st.text(max_size=300))
def test_any_save_name_is_one_plain_file_name(wish: str) -> None:
    name = clean_save_name(wish)
    if name is not None:
        assert name == Path(name).name
        assert not name.startswith(".")
        assert len(name) <= 120
        assert len(f".{name}-31_99999.jpeg.part".encode()) <= 255
        assert all(char.isalnum() or char in " ._-" for char in name)
        assert clean_save_name(name) == name


@pytest.mark.parametrize("wish", ["苹" * 200, "𝔘" * 200, "é" * 200])
def test_longest_names_fit_into_the_file_system(tmp_path: Path, wish: str) -> None:
    saved = save_image(picture(), root=tmp_path, output_format="jpeg", now=NOW, save_name=wish, index=31)
    assert saved.file.is_file()


def test_every_number_of_a_second_is_tried_once() -> None:
    stems = list(dated_stems(NOW))
    assert len(set(stems)) == 9000
    assert {stem[-4:] for stem in stems} == {str(number) for number in range(1000, 10_000)}


def test_nothing_is_overwritten_when_the_number_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save.random.SystemRandom, "randrange", lambda self, stop: stop - 1)
    first = save_image(picture(), root=tmp_path, output_format="png", now=NOW)
    second = save_image(Image.new("RGB", (2, 2)), root=tmp_path, output_format="png", now=NOW)
    assert first.path.endswith("_9999.png")
    assert second.path.endswith("_1000.png")
    with Image.open(first.file) as read:
        assert read.size == (40, 24)


def test_concurrent_writers_of_one_name_all_get_a_file_of_their_own(tmp_path: Path) -> None:
    def write(side: int) -> tuple[str, int]:
        image = Image.new("RGB", (side, 3))
        return save_image(image, root=tmp_path, output_format="png", now=NOW, save_name="same").path, side

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, range(1, 25)))

    assert len({path for path, _ in written}) == 24
    for path, side in written:
        with Image.open(tmp_path / path) as read:
            assert read.size == (side, 3)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageFull, match="No space left"):
        save_image(picture(), root=tmp_path, output_format="png", now=NOW)
    assert list((tmp_path / "2026-01-31").iterdir()) == []


def test_a_file_in_the_way_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "2026-01-31").write_text("in the way")
    with pytest.raises(StorageFull, match="2026-01-31"):
        save_image(picture(), root=tmp_path, output_format="png", now=NOW)


KILLED_WRITER = """
import sys
from datetime import datetime
from pathlib import Path
from PIL import Image
from modules.save import save_image
image = Image.effect_noise((700, 700), 90).convert("RGB")
print("ready", flush=True)
while True:
    save_image(image, root=Path(sys.argv[1]), output_format="png", now=datetime(2026, 1, 31), save_name="k")
"""


def test_kill_leaves_whole_pictures_only(tmp_path: Path) -> None:
    for delay_s in (0.11, 0.17, 0.23):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay_s)  # the moment of the kill is the input of this test, not something to wait for
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()

    visible = [path for path in tmp_path.glob("*/*") if not path.name.startswith(".")]
    for path in visible:
        with Image.open(path) as read:
            read.load()
    left = len(list(tmp_path.glob("*/.*")))
    assert remove_partial_files(tmp_path) == left
    assert sorted(tmp_path.glob("*/*")) == sorted(visible)


def test_atomic_write_replaces_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "log.html"
    write_atomically(target, b"old")
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"

    def broken(source: object, destination: object) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="broken"):
        write_atomically(target, b"newer")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["log.html"]
