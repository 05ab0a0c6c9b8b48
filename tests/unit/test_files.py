"""Tests of modules.files."""

import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules import files
from modules.errors import ModelFileMissing, NotFound
from modules.files import FOLDERS, Catalogue, HashCache, Kind, inside, list_models
from modules.settings import Settings


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def checkpoints(*folders: Path, embedded: Path | None = None) -> Catalogue:
    return Catalogue({Kind.CHECKPOINT: folders}, embedded)


def test_files_come_before_sub_folders_and_case_does_not_count(tmp_path: Path) -> None:
    touch(tmp_path, "b.safetensors", "A.ckpt", "Z/a.pth", "c/x.bin", "c/B.safetensors", "patch.fooocus.patch")
    assert list_models(tmp_path) == [
        "A.ckpt",
        "b.safetensors",
        "patch.fooocus.patch",
        "c/B.safetensors",
        "c/x.bin",
        "Z/a.pth",
    ]


def test_other_suffixes_and_hidden_names_are_left_out(tmp_path: Path) -> None:
    touch(
        tmp_path, "readme.txt", "model.SAFETENSORS", ".hidden.safetensors", ".cache/x.safetensors", "x.patch", "x.part"
    )
    (tmp_path / "folder.safetensors").mkdir()
    assert list_models(tmp_path) == ["model.SAFETENSORS"]


def test_missing_folder_is_empty(tmp_path: Path) -> None:
    assert list_models(tmp_path / "none") == []


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_linked_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "x.safetensors")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "models/round").symlink_to(tmp_path / "models")
    assert list_models(tmp_path / "models") == ["linked/x.safetensors"]


def test_shards_are_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors", "n.safetensors")
    catalogue = checkpoints(tmp_path)
    assert catalogue.names(Kind.CHECKPOINT) == ["m.safetensors", "n.safetensors"]
    assert catalogue.find(Kind.CHECKPOINT, "m.safetensors") == tmp_path / "m.safetensors"


def test_first_folder_wins_and_embedded_models_come_last(tmp_path: Path) -> None:
    touch(tmp_path / "one", "same.safetensors", "z.safetensors")
    touch(tmp_path / "two", "same.safetensors", "a.safetensors")
    touch(
        tmp_path / "embedded",
        "tiny.safetensors",
        "a.safetensors",
        "loras/l.safetensors",
        "checkpoints/more.safetensors",
    )
    catalogue = Catalogue({Kind.CHECKPOINT: (tmp_path / "one", tmp_path / "two"), Kind.LORA: ()}, tmp_path / "embedded")
    assert catalogue.names(Kind.CHECKPOINT) == [
        "same.safetensors",
        "z.safetensors",
        "a.safetensors",
        "more.safetensors",
        "tiny.safetensors",
    ]
    assert catalogue.find(Kind.CHECKPOINT, "same.safetensors") == tmp_path / "one/same.safetensors"
    assert catalogue.find(Kind.CHECKPOINT, "a.safetensors") == tmp_path / "two/a.safetensors"
    assert catalogue.names(Kind.LORA) == ["l.safetensors"]


def test_name_may_use_back_slashes(tmp_path: Path) -> None:
    touch(tmp_path, "sub/x.safetensors")
    assert checkpoints(tmp_path).find(Kind.CHECKPOINT, "sub\\x.safetensors") == tmp_path / "sub/x.safetensors"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/../x.safetensors", "", ".", "x"])
def test_only_listed_names_are_found(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "secret.safetensors", "models/x.safetensors")
    catalogue = checkpoints(tmp_path / "models")
    assert catalogue.find(Kind.CHECKPOINT, name) is None
    with pytest.raises(ModelFileMissing):
        catalogue.resolve(Kind.CHECKPOINT, name)


def test_missing_name_comes_with_near_ones(tmp_path: Path) -> None:
    touch(tmp_path, "juggernautXL_v8Rundiffusion.safetensors", "other.safetensors")
    catalogue = checkpoints(tmp_path)
    with pytest.raises(ModelFileMissing, match=r"did you mean juggernautXL_v8Rundiffusion\.safetensors"):
        catalogue.resolve(Kind.CHECKPOINT, "juggernautXL_v8Rundifusion.safetensors")
    with pytest.raises(ModelFileMissing, match=r"2 files are\."):
        catalogue.resolve(Kind.CHECKPOINT, "qqqq")


def test_short_forms_match(tmp_path: Path) -> None:
    touch(tmp_path, "a/ink.safetensors", "b/ink.safetensors", "v1.5.safetensors")
    catalogue = checkpoints(tmp_path)
    assert catalogue.match(Kind.CHECKPOINT, "b/ink.safetensors") == "b/ink.safetensors"
    assert catalogue.match(Kind.CHECKPOINT, "INK") == "a/ink.safetensors"
    assert catalogue.match(Kind.CHECKPOINT, "v1.5") == "v1.5.safetensors"
    assert catalogue.match(Kind.CHECKPOINT, "nothing") is None


def test_new_file_is_found_without_a_refresh_and_listed_after_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = checkpoints(tmp_path)
    assert catalogue.names(Kind.CHECKPOINT) == []
    touch(tmp_path, "new.safetensors")
    assert catalogue.find(Kind.CHECKPOINT, "new.safetensors") is None, "a rescan for each miss would be too dear"
    monkeypatch.setattr(files, "RESCAN_INTERVAL_S", -1.0)
    assert catalogue.find(Kind.CHECKPOINT, "new.safetensors") == tmp_path / "new.safetensors"
    (tmp_path / "new.safetensors").unlink()
    assert catalogue.names(Kind.CHECKPOINT) == ["new.safetensors"]
    catalogue.refresh()
    assert catalogue.names(Kind.CHECKPOINT) == []


def test_catalogue_of_the_settings_has_every_kind_and_reaches_another_process(settings: Settings) -> None:
    for name in FOLDERS.values():
        found = getattr(settings.paths, name)
        touch(found[0] if isinstance(found, tuple) else found, f"{name}.safetensors")
    catalogue: Catalogue = pickle.loads(pickle.dumps(Catalogue.of(settings.paths)))
    assert {kind: catalogue.names(kind) for kind in Kind} == {
        kind: [f"{name}.safetensors"] for kind, name in FOLDERS.items()
    }


def test_inside_gives_files_below_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "2026-11-22/a.png")
    assert inside(tmp_path, "2026-11-22/a.png") == tmp_path / "2026-11-22/a.png"
    assert inside(tmp_path, "2026-11-22/../2026-11-22/a.png") == tmp_path / "2026-11-22/a.png"


@pytest.mark.parametrize(
    "relative",
    ["", ".", "sub", "none.png", "../secret.png", "sub/../../secret.png", "sub\\..\\..\\secret.png", "a\0.png",
     "C:/secret.png", "sub/link.png", "loop/x.png", "x" * 5000],
)  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_inside_refuses_what_leads_out_or_is_no_file(tmp_path: Path, relative: str) -> None:
    touch(tmp_path, "secret.png", "root/sub/a.png")
    (tmp_path / "root/sub/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root/loop")
    with pytest.raises(NotFound):
        inside(tmp_path / "root", relative)


def test_inside_refuses_absolute_paths(tmp_path: Path) -> None:
    touch(tmp_path, "secret.png", "root/a.png")
    with pytest.raises(NotFound):
        inside(tmp_path / "root", str(tmp_path / "secret.png"))


@given(st.text(alphabet="./\\ab~%:\0", max_size=12))
def test_inside_never_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, relative: str) -> None:
    base = tmp_path_factory.getbasetemp() / "never"
    touch(base, "a", "b", "root/a", "root/b/a")
    try:
        found = inside(base / "root", relative)
    except NotFound:
        return
    assert found.is_relative_to(base / "root")


def test_hash_is_the_files_sha256_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()[:10]
    assert HashCache(tmp_path / "hash_cache.txt").short(model) == expected

    def no_second_reading(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(files, "_sha256", no_second_reading)
    assert HashCache(tmp_path / "hash_cache.txt").short(model) == expected


def test_changed_file_gets_a_new_hash(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"old")
    cache = HashCache(tmp_path / "hash_cache.txt")
    cache.short(model)
    model.write_bytes(b"new")
    os.utime(model, ns=(1, 1))
    assert cache.short(model) == hashlib.sha256(b"new").hexdigest()[:10]
    assert HashCache(tmp_path / "hash_cache.txt").short(model) == hashlib.sha256(b"new").hexdigest()[:10]


def test_cache_of_another_program_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"weights")
    (tmp_path / "hash_cache.txt").write_text(json.dumps({str(model): "0123456789"}) + '\n{"path": "x", "ide\n[]\n')
    assert HashCache(tmp_path / "hash_cache.txt").short(model) == hashlib.sha256(b"weights").hexdigest()[:10]


def test_hash_of_shards_covers_all_of_them_in_order(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.safetensors").write_bytes(b"wei")
    (tmp_path / "m-00002-of-00002.safetensors").write_bytes(b"ghts")
    cache = HashCache(tmp_path / "hash_cache.txt")
    assert cache.short(tmp_path / "m.safetensors") == hashlib.sha256(b"weights").hexdigest()[:10]
    with pytest.raises(ModelFileMissing):
        cache.short(tmp_path / "none.safetensors")


def test_rebuild_forgets_and_computes_in_threads(tmp_path: Path) -> None:
    models = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for model in models:
        model.write_bytes(model.name.encode())
    cache = HashCache(tmp_path / "hash_cache.txt")
    (tmp_path / "hash_cache.txt").write_text("stale\n")
    cache.rebuild(models, threads=3)
    lines = (tmp_path / "hash_cache.txt").read_text().splitlines()
    assert sorted(json.loads(line)["path"] for line in lines) == [str(model) for model in models]


def test_changes_are_noticed_in_every_folder_without_reading_what_did_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    catalogue = Catalogue({Kind.LORA: [tmp_path / "loras"], Kind.VAE: [tmp_path / "vae"]})
    assert (catalogue.names(Kind.LORA), catalogue.names(Kind.VAE)) == ([], [])
    (tmp_path / "loras" / "sub" / "new.safetensors").write_bytes(b"")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "new.safetensors").write_bytes(b"")
    catalogue.notice_changes()
    assert (catalogue.names(Kind.LORA), catalogue.names(Kind.VAE)) == (["sub/new.safetensors"], ["new.safetensors"])
    (tmp_path / "vae" / "new.safetensors").unlink()
    catalogue.notice_changes()
    assert catalogue.names(Kind.VAE) == []
    monkeypatch.setattr(catalogue, "_scan", lambda kind: pytest.fail(f"{kind} was read again"))
    catalogue.notice_changes()


def test_promised_files_are_listed_and_nothing_else_changes(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "here.safetensors").write_bytes(b"")
    catalogue = Catalogue({Kind.LORA: [tmp_path / "loras"], Kind.VAE: [tmp_path / "vae"]})
    promised = catalogue.with_files(Kind.LORA, ["soon.safetensors"])
    assert promised.find(Kind.LORA, "soon.safetensors") == tmp_path / "loras" / "soon.safetensors"
    assert promised.find(Kind.LORA, "here.safetensors") is not None
    assert promised.find(Kind.VAE, "soon.safetensors") is None
    assert catalogue.find(Kind.LORA, "soon.safetensors") is None
