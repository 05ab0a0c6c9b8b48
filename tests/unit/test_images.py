"""Reading pictures: every spelling of a value, every pixel format, every limit."""

import base64
import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules import images
from modules.errors import FetchRefused, NotFound, UnreadableImage
from modules.images import (
    ImageSources,
    content_hash,
    decode,
    encode,
    file_as,
    preview_jpeg,
    preview_png,
    read_image,
    store_input,
    stored_file,
    url_path_file,
)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """Red at the top left corner, blue elsewhere; 16 × 8."""
    image = Image.new("RGB", (16, 8), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 4, 4))
    return image


PNG = encoded(corners())
TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize("value", [None, "", "None", "none", "null", "string", "  "])
def test_words_for_no_image_give_none(value: str | None) -> None:
    assert read_image(value, field="uov_input_image") is None


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        TEXT,
        TEXT.rstrip("="),
        TEXT.replace("+", "-").replace("/", "_"),
        "\n".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60)),
        f"  {TEXT}\r\n",
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;base64,{TEXT}",
        f"data:image/png;name=a.png;base64,{TEXT}",
        "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        corners(),
    ],
)
def test_every_spelling_of_a_picture_gives_its_pixels(value: str | bytes | Image.Image) -> None:
    image = read_image(value, field="image")
    assert image is not None
    assert (image.mode, image.tobytes()) == ("RGB", corners().tobytes())


def test_path_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    image = read_image(tmp_path / "a.png", field="image")
    assert image is not None
    assert image.tobytes() == corners().tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = corners()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(stored, exif=exif), field="image").tobytes() == upright.tobytes()


def transparent_palette() -> Image.Image:
    image = Image.new("P", (4, 4), 3)
    image.putpalette([5] * 768)
    return image


def grey16(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint16))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (
            encoded(Image.new("RGB", (4, 4), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE)),
            (1, 2, 3),
        ),
        (encoded(Image.new("LA", (4, 4), (0, 0))), (255, 255, 255)),
        (encoded(Image.new("LA", (4, 4), (90, 255))), (90, 90, 90)),
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 51))), (255, 204, 204)),
        (encoded(transparent_palette(), transparency=3), (255, 255, 255)),
        (encoded(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9)), (255, 255, 255)),
        (encoded(grey16(np.full((4, 4), 65535))), (255, 255, 255)),
        (encoded(grey16(np.full((4, 4), 32896))), (128, 128, 128)),
        (encoded(grey16(np.full((4, 4), 200))), (1, 1, 1)),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "BMP"), (1, 2, 3)),
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "GIF"), (1, 2, 3)),
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3)),
    ],
)
def test_pixel_formats_become_rgb(content: bytes, expected: tuple[int, int, int]) -> None:
    image = decode(content, field="image")
    assert image.mode == "RGB"
    assert image.getpixel((2, 2)) == expected


@pytest.mark.parametrize(
    ("content", "level"),
    [
        (encoded(Image.new("RGB", (4, 4), (255, 255, 255))), 255),
        (encoded(Image.new("1", (4, 4), 1)), 255),
        (encoded(Image.new("RGBA", (4, 4), (255, 255, 255, 0))), 0),
        (encoded(Image.new("RGBA", (4, 4), (255, 255, 255, 255))), 255),
        (encoded(grey16(np.full((4, 4), 65535))), 255),
    ],
)
def test_masks_become_grey_and_transparent_means_keep(content: bytes, level: int) -> None:
    mask = decode(content, field="mask", as_mask=True)
    assert (mask.mode, mask.getpixel((1, 1))) == ("L", level)


def test_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(content, field="image").getpixel((0, 0)) == (255, 0, 0)


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG that claims a huge size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(UnreadableImage, match="64"):
        decode(bomb(*size), field="image")


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 60)
    for value in (PNG, TEXT):
        with pytest.raises(UnreadableImage, match="50 MiB"):
            read_image(value, field="image")


@pytest.mark.parametrize(
    "value",
    [
        "hello world!",
        "data:image/png;base64,%%%",
        "data:image/svg+xml,<svg/>",
        b"",
        b"GIF89a",
        PNG[:-30],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        base64.b64encode(b"not a picture").decode(),
        encoded(corners(), "TIFF"),
        encoded(corners(), "PPM"),
        Path("/nowhere/a.png"),
    ],
)
def test_junk_names_the_field(value: str | bytes | Path) -> None:
    with pytest.raises(UnreadableImage) as caught:
        read_image(value, field=("controlnet_image", 1, "cn_img"))
    assert caught.value.field == ("controlnet_image", 1, "cn_img")


@given(st.binary(max_size=200), st.integers(0, len(PNG) - 1))
def test_damaged_pictures_raise_nothing_else(noise: bytes, start: int) -> None:
    with contextlib.suppress(UnreadableImage):
        decode(PNG[:start] + noise + PNG[start + len(noise) :], field="image")


def test_url_is_fetched_and_a_refusal_names_field_and_way_out() -> None:
    fetched = ImageSources(fetch=lambda url: PNG)
    image = read_image("http://example.test/a.png", field="image", sources=fetched)
    assert image is not None
    assert image.size == (16, 8)

    def refuse(url: str) -> bytes:
        raise FetchRefused("its address is private.")

    with pytest.raises(UnreadableImage, match=r"http://10\.0\.0\.1/.*private.*base64"):
        read_image("http://10.0.0.1/", field="image", sources=ImageSources(fetch=refuse))
    with pytest.raises(UnreadableImage, match="not fetched"):
        read_image("http://10.0.0.1/", field="image")


def test_equal_pictures_share_one_stored_file(tmp_path: Path) -> None:
    first = store_input(decode(PNG, field="image"), tmp_path)
    second = store_input(decode(encoded(corners(), "BMP"), field="image"), tmp_path)
    other = store_input(corners().transpose(Image.Transpose.FLIP_LEFT_RIGHT), tmp_path)
    assert first == second == f"inputs/{content_hash(corners())}.png"
    assert other != first
    assert len(list((tmp_path / "inputs").iterdir())) == 2
    restored = read_image(first, field="image", sources=ImageSources(output_root=tmp_path))
    assert restored is not None
    assert restored.tobytes() == corners().tobytes()


def test_own_urls_are_read_from_disk(tmp_path: Path) -> None:
    stored = store_input(corners(), tmp_path)
    (tmp_path / "2026-01-31").mkdir()
    (tmp_path / "2026-01-31" / "my cat-0.png").write_bytes(PNG)
    sources = ImageSources(tmp_path, own_bases=("http://127.0.0.1:7866/", "https://img.example/x"))
    for url in (
        f"http://127.0.0.1:7866/{stored}",
        "https://img.example/x/outputs/2026-01-31/my%20cat-0.png?sig=abc#top",
        "HTTP://127.0.0.1:7866/outputs/2026-01-31/my%20cat-0.png",
    ):
        image = read_image(url, field="image", sources=sources)
        assert image is not None
        assert image.tobytes() == corners().tobytes()
    for url in (
        "http://127.0.0.1:78660/outputs/2026-01-31/a.png",
        "http://127.0.0.1:7866/outputs/2026-01-31/no.png",
    ):
        with pytest.raises(UnreadableImage):
            read_image(url, field="image", sources=sources)


TRAVERSAL = [
    "/outputs/../secret.png",
    "/outputs/../../secret.png",
    "/outputs/2026-01-31/../../secret.png",
    "/outputs/./secret.png",
    "/outputs//secret.png",
    "/outputs/2026-01-31/..\\..\\secret.png",
    "/outputs/2026-01-31\\..\\..\\secret.png",
    "/outputs/C:/secret.png",
    "/outputs//etc/passwd.png",
    "/outputs/2026-01-31/a.png\0.txt",
    "/outputs/2026-01-31/\0.png",
    "/outputs/2026-01-31/link.png",
    "/outputs/linked/secret.png",
    "/outputs/2026-01-31/.hidden.png",
    "/outputs/.hidden/a.png",
    "/outputs/2026-01-31/log.html",
    "/outputs/2026-01-31/a.png/",
    "/outputs/2026-01-31/a.png/b.png",
    "/outputs/history.log",
    "/outputs/2026-01-31/%2e%2e.png",
    "/outputs/" + "x" * 5000 + "/a.png",
    "/outputs/2026-01-31/folder.png",
    "/inputs/../secret.png",
    "/inputs/..",
    "/inputs/2026-01-31/a.png",
    "/secret.png",
    "",
    "/",
    "/outputs",
]


@pytest.mark.parametrize("path", TRAVERSAL)
def test_nothing_outside_the_output_folder_is_served(tmp_path: Path, path: str) -> None:
    root = tmp_path / "out"
    (root / "2026-01-31" / "folder.png").mkdir(parents=True)
    (root / "2026-01-31" / "log.html").write_text("private")
    (root / "2026-01-31" / ".hidden.png").write_bytes(PNG)
    (root / "history.log").write_text("private")
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.png").write_bytes(PNG)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "2026-01-31" / "link.png").symlink_to(tmp_path / "secret.png")
    if path != "/outputs/2026-01-31/a.png/":
        (root / "2026-01-31" / "a.png").write_bytes(PNG)
        assert url_path_file("/outputs/2026-01-31/a.png", root) == root / "2026-01-31" / "a.png"
    assert url_path_file(path, root) is None


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing"):
        stored_file("2026-01-31/nothing.png", tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_conversion_changes_the_format(tmp_path: Path, name: str, kind: str) -> None:
    source = tmp_path / "a.bmp"
    source.write_bytes(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 255)), "PNG"))
    with Image.open(io.BytesIO(file_as(source, name))) as converted:
        assert (converted.format, converted.size) == (kind, (8, 8))


def test_matching_format_is_passed_on_byte_for_byte(tmp_path: Path) -> None:
    content = encoded(corners(), "JPEG", comment=b"parameters")
    (tmp_path / "a.jpeg").write_bytes(content)
    assert file_as(tmp_path / "a.jpeg", "jpg") == content
    assert file_as(tmp_path / "a.jpeg", "png") != content
    with pytest.raises(NotFound):
        file_as(tmp_path / "gone.png", "png")


def test_alpha_is_white_in_jpeg_and_kept_in_png() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    with (
        Image.open(io.BytesIO(encode(clear, "jpeg"))) as jpeg,
        Image.open(io.BytesIO(encode(clear, "png"))) as png,
    ):
        assert jpeg.getpixel((4, 4)) == (255, 255, 255)
        assert png.mode == "RGBA"


def test_previews_are_small_and_keep_the_shape() -> None:
    large = Image.new("RGB", (1536, 640), (10, 20, 30))
    for content, kind in ((preview_jpeg(large), "JPEG"), (preview_png(large), "PNG")):
        with Image.open(io.BytesIO(content)) as preview:
            assert (preview.format, preview.size) == (kind, (512, 213))
    with Image.open(io.BytesIO(preview_png(corners()))) as preview:
        assert preview.tobytes() == corners().tobytes()
    assert large.size == (1536, 640)
