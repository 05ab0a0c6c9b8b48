"""Downloads: whatever a server, a network or a disk does, a file under its final name is whole and the right one."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules import downloads
from modules.downloads import Transfer, download, place_of, shown_size, size_of, source_of
from modules.downloads_part import part_path
from modules.errors import DownloadFailed, StorageFull
from tests.model_server import ModelServer, model_bytes, model_server

ROOT = Path(__file__).resolve().parents[2]
NAME = "x.safetensors"
CONTENT = model_bytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(downloads, "PROGRESS_BYTES", 1000)
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 8192)
    monkeypatch.setattr(downloads, "TURN_S", 0.02)


def fetch(server: ModelServer, target: Path, *, fragment: str = "", name: str = NAME) -> list[Transfer]:
    return list(download(source_of(server.url_of(name) + fragment), target))


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def begun(server: ModelServer, target: Path, at_least: int = 100_000) -> None:
    """Receive some of the file, and stop there."""
    transfers = download(source_of(server.url_of(NAME)), target)
    next(step for step in transfers if step.done >= at_least)
    transfers.close()


# -- the good way ------------------------------------------------------------------------------------------------------


def test_a_file_comes_whole_and_nothing_else_is_left(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT)
    steps = fetch(server, tmp_path / "sub" / NAME)
    assert (tmp_path / "sub" / NAME).read_bytes() == CONTENT
    assert left(tmp_path / "sub") == {NAME}
    done = [step.done for step in steps if step.stage == "receiving"]
    assert done == sorted(done)
    assert done[-1] == len(CONTENT)
    assert {step.total for step in steps} == {len(CONTENT)}


def test_a_file_that_is_there_is_not_asked_for(server: ModelServer, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"mine")
    assert fetch(server, tmp_path / NAME) == []
    assert server.asked == []
    assert (tmp_path / NAME).read_bytes() == b"mine"


def test_a_chunked_answer_without_length_is_whole_when_its_end_came(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT, chunked=True)
    fetch(server, tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_redirects_are_followed_and_the_hash_that_the_first_answer_tells_counts(
    server: ModelServer, tmp_path: Path
) -> None:
    server.add(NAME, redirect="/blob", linked_sha256=SHA256, linked_size=len(CONTENT))
    server.add("blob", CONTENT)
    steps = fetch(server, tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert any(step.stage == "checking" for step in steps)


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_cut_connections_go_on_where_they_broke_off(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT, cuts=[100_000, 50_000])
    fetch(server, tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert server.ranges_asked == ["", "bytes=100000-", "bytes=150000-"]
    assert server.asked[1][2]["if-range"] == server.files[f"/{NAME}"].etag


def test_a_closed_download_goes_on_later_with_the_rest(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT)
    begun(server, tmp_path / NAME)
    assert left(tmp_path) == {f"{NAME}.part", f"{NAME}.part.json"}
    kept = (tmp_path / f"{NAME}.part").stat().st_size
    assert kept >= 100_000
    steps = fetch(server, tmp_path / NAME)
    assert steps[0].done == kept
    assert server.ranges_asked == ["", f"bytes={kept}-"]
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_server_that_sends_no_parts_begins_anew(server: ModelServer, tmp_path: Path) -> None:
    served = server.add(NAME, CONTENT)
    begun(server, tmp_path / NAME)
    served.ranges = False
    assert fetch(server, tmp_path / NAME)[0].done == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_without_a_version_to_compare_nothing_is_continued(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT, tagged=False, cuts=[100_000])
    fetch(server, tmp_path / NAME)
    assert server.ranges_asked == ["", ""]
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("ignores_if_range", [False, True])
@pytest.mark.parametrize("size", [300_000, 200_000, 50_000])
def test_a_file_that_changed_in_between_is_never_mixed(
    server: ModelServer, tmp_path: Path, ignores_if_range: bool, size: int
) -> None:
    served = server.add(NAME, CONTENT, ignores_if_range=ignores_if_range)
    begun(server, tmp_path / NAME)
    served.content = model_bytes(size, fill=9)
    fetch(server, tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == served.content


@pytest.mark.parametrize("shift", [-10_000, 10_000])
def test_a_part_that_begins_elsewhere_is_not_appended(server: ModelServer, tmp_path: Path, shift: int) -> None:
    name = "x.bin"  # nothing but the position tells
    server.add(name, CONTENT, cuts=[100_000], shift=shift)
    fetch(server, tmp_path / name, name=name)
    assert (tmp_path / name).read_bytes() == CONTENT
    assert server.ranges_asked == ["", "bytes=100000-", ""]


def test_a_part_of_another_address_is_not_continued(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT)
    begun(server, tmp_path / NAME)
    server.add("other.safetensors", CONTENT)
    list(download(source_of(server.url_of("other.safetensors")), tmp_path / NAME))
    assert server.ranges_asked == ["", ""]


def test_only_what_was_safely_on_the_disk_is_relied_on(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT)
    begun(server, tmp_path / NAME)
    notes = tmp_path / f"{NAME}.part.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"synced": 4096}))
    with (tmp_path / f"{NAME}.part").open("r+b") as part:  # a power cut left other bytes behind the safe ones
        part.seek(5000)
        part.write(b"\0" * 50_000)
    fetch(server, tmp_path / NAME)
    assert server.ranges_asked[-1] == "bytes=4096-"
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"url": 1}', '{"nonsense": 1}'])
def test_unreadable_notes_mean_a_new_beginning(server: ModelServer, tmp_path: Path, notes: str) -> None:
    server.add(NAME, CONTENT)
    begun(server, tmp_path / NAME)
    (tmp_path / f"{NAME}.part.json").write_text(notes)
    fetch(server, tmp_path / NAME)
    assert server.ranges_asked == ["", ""]
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_killed_process_leaves_no_file_and_the_next_one_goes_on(server: ModelServer, tmp_path: Path) -> None:
    is_slow = threading.Event()
    is_slow.set()
    reached = threading.Event()

    def pause(sent: int) -> None:
        if sent > 200_000 and is_slow.is_set():
            reached.set()
            time.sleep(30)

    server.add(NAME, CONTENT, pause=pause)
    script = (
        "import sys; from pathlib import Path; from modules import downloads, downloads_part\n"
        "downloads.CHUNK_BYTES = 8192; downloads_part.SYNC_BYTES = 32768\n"
        "list(downloads.download(downloads.source_of(sys.argv[1]), Path(sys.argv[2])))"
    )
    child = subprocess.Popen([sys.executable, "-c", script, server.url_of(NAME), str(tmp_path / NAME)], cwd=ROOT)
    try:
        assert reached.wait(60)
        time.sleep(0.2)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    assert left(tmp_path) == {f"{NAME}.part", f"{NAME}.part.json"}
    is_slow.clear()
    steps = fetch(server, tmp_path / NAME)
    assert 150_000 < steps[0].done < 210_000
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_slow_drip_can_be_ended_at_any_byte(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT, chunk=1, pause=lambda _sent: time.sleep(0.01))
    transfers = download(source_of(server.url_of(NAME)), tmp_path / NAME)
    began_s = time.monotonic()
    next(step for step in transfers if step.done >= 3)
    transfers.close()
    assert time.monotonic() - began_s < 3
    assert not (tmp_path / NAME).exists()


# -- wrong answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"statuses": [404] * 9}, "there is no such file"),
        ({"statuses": [403] * 9}, "a login or a licence"),
        ({"statuses": [500] * 9}, "the server answered 500"),
        ({"statuses": [418] * 9}, "the server answered 418"),
        ({"statuses": [416] * 9}, "another one than before"),
        ({"cuts": [10] * 9}, "broke off"),
        ({"length": len(CONTENT) + 50}, "another one than before"),
        ({"content_type": "text/html; charset=utf-8"}, "a web page"),
        ({"linked_sha256": "0" * 64}, "SHA-256"),
        ({"linked_size": len(CONTENT) - 1}, "bytes where the file has"),
        ({"linked_size": len(CONTENT) - 1, "chunked": True}, "more bytes came"),
        ({"linked_size": len(CONTENT) + 1, "chunked": True}, "another one than before"),
        ({"unsized": True}, "does not say how long"),
        ({"unsized": True, "cuts": [100_000]}, "does not say how long"),
        ({"content": CONTENT[:-1]}, "no whole safetensors file"),
        ({"content": b"<html>please log in</html>"}, "no whole safetensors file"),
        ({"content": b""}, "no whole safetensors file"),
        ({"redirect": f"/{NAME}"}, "in a circle"),
        ({"redirect": "file:///etc/passwd"}, "not safe"),
    ],
)
def test_a_wrong_answer_leaves_no_file_and_says_where_what_and_how(
    server: ModelServer, tmp_path: Path, behaviour: dict[str, object], reason: str
) -> None:
    server.add(NAME, **{"content": CONTENT, **behaviour})  # type: ignore[arg-type]
    with pytest.raises(DownloadFailed, match=reason) as caught:
        fetch(server, tmp_path / NAME)
    assert server.url_of(NAME) in str(caught.value)
    assert NAME not in left(tmp_path)
    assert len(server.asked) <= downloads.MAX_REDIRECTS + 1


def test_a_failure_of_the_server_that_passes_is_survived(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT, statuses=[503, 429])
    assert "retrying" in {step.stage for step in fetch(server, tmp_path / NAME)}
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_the_hash_written_beside_a_url_is_checked(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT)
    with pytest.raises(DownloadFailed, match="SHA-256"):
        fetch(server, tmp_path / NAME, fragment=f"#sha256={'1' * 64}")
    assert left(tmp_path) == set()
    fetch(server, tmp_path / NAME, fragment=f"#sha256={SHA256.upper()}")
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_bytes_that_rotted_between_two_sessions_are_thrown_away(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT, linked_sha256=SHA256)
    begun(server, tmp_path / NAME)
    with (tmp_path / f"{NAME}.part").open("r+b") as part:
        part.seek(2000)
        part.write(b"rotten")
    with pytest.raises(DownloadFailed, match="SHA-256"):
        fetch(server, tmp_path / NAME)
    assert left(tmp_path) == set()
    fetch(server, tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="cannot be reached"):
        list(download(source_of("http://127.0.0.1:9/x.safetensors"), tmp_path / NAME))
    assert left(tmp_path) == set()


def test_a_certificate_that_cannot_be_verified_ends_it_at_once(tmp_path: Path, tls_server: str) -> None:
    with pytest.raises(DownloadFailed, match="certificate"):
        list(download(source_of(f"{tls_server}/x.safetensors"), tmp_path / NAME))
    assert left(tmp_path) == set()


@pytest.fixture
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose certificate it has signed itself."""
    import ssl
    from http.server import HTTPServer, SimpleHTTPRequestHandler

    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, capture_output=True, check=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    httpd = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    httpd.handle_error = lambda *_args: None  # type: ignore[method-assign]
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join(5)


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_is_refused_before_a_byte_is_written(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 10, downloads.SPARE_BYTES + 1000))
    server.add(NAME, CONTENT)
    with pytest.raises(StorageFull, match=r"needs 300\.\d KB more and only 67\.1 MB are free"):
        fetch(server, tmp_path / NAME)
    assert left(tmp_path) == set()


def test_a_disk_that_fills_up_keeps_what_is_safe(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modules import downloads_part

    monkeypatch.setattr(downloads_part, "SYNC_BYTES", 50_000)
    server.add(NAME, CONTENT)
    real = downloads_part.Part.write

    def write(part: downloads_part.Part, chunk: bytes) -> None:
        if part.size > 150_000:
            raise OSError(28, "No space left on device")
        real(part, chunk)

    with monkeypatch.context() as full:
        full.setattr(downloads_part.Part, "write", write)
        with pytest.raises(StorageFull, match="No space left"):
            fetch(server, tmp_path / NAME)
    assert NAME not in left(tmp_path)
    assert fetch(server, tmp_path / NAME)[0].done >= 100_000
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_is_told(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT)
    (tmp_path / "file").touch()
    with pytest.raises(StorageFull, match="cannot be written"):
        fetch(server, tmp_path / "file" / NAME)


def test_two_who_want_one_file_fetch_it_once(server: ModelServer, tmp_path: Path) -> None:
    go_on = threading.Event()
    server.add(NAME, CONTENT, pause=lambda sent: sent < 100_000 or go_on.wait(10))
    source = source_of(server.url_of(NAME))
    first, second = download(source, tmp_path / NAME), download(source, tmp_path / NAME)
    next(step for step in first if step.done >= 50_000)
    waiting = next(second)
    assert waiting.stage == "waiting"
    assert waiting.done > 0
    go_on.set()
    list(first)
    list(second)
    assert server.ranges_asked == [""]
    assert left(tmp_path) == {NAME}


def test_the_second_goes_on_where_the_first_gave_up(server: ModelServer, tmp_path: Path) -> None:
    server.add(NAME, CONTENT)
    source = source_of(server.url_of(NAME))
    first, second = download(source, tmp_path / NAME), download(source, tmp_path / NAME)
    next(step for step in first if step.done >= 100_000)
    assert next(second).stage == "waiting"
    first.close()
    assert next(step for step in second if step.stage == "receiving").done >= 100_000
    list(second)
    assert (tmp_path / NAME).read_bytes() == CONTENT


# -- names and addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "a/../../x", "/etc/x", "C:/x", "a\\..\\..\\x", ".hidden", "a/.git/x", "x\0", "x?", "a//b/../c"],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DownloadFailed, match="cannot be the name"):
        place_of(tmp_path, f"{name}.safetensors" if name else name)


@pytest.mark.parametrize("name", ["x", "x.py", "x.safetensors.exe", "x.json"])
def test_a_name_that_no_model_has_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DownloadFailed, match="cannot be the name"):
        place_of(tmp_path, name)


def test_sub_folders_are_fine(tmp_path: Path) -> None:
    assert place_of(tmp_path, "sdxl\\anime/x.safetensors") == tmp_path / "sdxl" / "anime" / "x.safetensors"


@pytest.mark.parametrize(
    "url", ["", "x", "file:///etc/passwd", "ftp://a/b", "https://", "javascript:alert(1)", "http://[/"]
)
def test_only_http_and_https_are_sources(url: str) -> None:
    with pytest.raises(DownloadFailed, match="http"):
        source_of(url)


@pytest.mark.parametrize("mirror", ["hf.example", "https://hf.example", "https://hf.example/"])
def test_a_mirror_stands_in_for_the_hub_only(mirror: str) -> None:
    source = source_of("https://huggingface.co/a/b/resolve/main/x.bin?download=1", mirror=mirror)
    assert source.address == "https://hf.example/a/b/resolve/main/x.bin?download=1"
    other = "https://elsewhere.example/huggingface.co/x.bin"
    assert source_of(other, mirror=mirror).address == other


def test_a_mirror_may_have_a_path() -> None:
    source = source_of("https://huggingface.co/a/x.bin", mirror="http://nas.lan:8080/hub")
    assert source.address == "http://nas.lan:8080/hub/a/x.bin"


def test_people_never_see_the_key_in_an_address() -> None:
    assert source_of("https://me:secret@h.example/x.bin?token=secret").shown == "https://h.example/x.bin"


def test_the_size_is_told_before_anything_is_fetched(server: ModelServer) -> None:
    server.add("blob", CONTENT)
    server.add(NAME, redirect="/blob", linked_size=len(CONTENT))
    assert size_of(source_of(server.url_of(NAME))) == len(CONTENT)
    assert size_of(source_of(server.url_of("blob"))) == len(CONTENT)
    assert size_of(source_of(server.url_of("missing"))) is None
    assert size_of(source_of("http://127.0.0.1:9/x")) is None
    assert {method for method, _path, _headers in server.asked} == {"HEAD"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 KB"), (6_616_632_368, "6.6 GB")]
)
def test_sizes_are_told_in_decimal_units(count: int, text: str) -> None:
    assert shown_size(count) == text


def test_the_part_stands_beside_its_file(tmp_path: Path) -> None:
    assert part_path(tmp_path / NAME) == tmp_path / f"{NAME}.part"
