"""Tests of modules.settings, and through it of flags, config and paths."""

import hashlib
import json
import logging
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.choices import ControlType, InpaintEngine, SamplerName
from modules.config import config_keys
from modules.errors import SettingsError
from modules.flags import INERT_FLAGS, build_parser
from modules.params import ParamGroup
from modules.request import GenerationRequest
from modules.settings import PAGE_FIELDS, REQUEST_FIELDS, Settings, is_loopback, ports, result_base

FOOOCUS_FLAGS = """
--listen --port=1 --share --in-browser --disable-in-browser --preset=x --disable-preset-selection --language=de
--theme=dark --disable-image-log --disable-metadata --disable-analytics --disable-enhance-output-sorting
--enable-auto-describe-image --disable-server-info --disable-server-log --debug-mode --multi-user
--disable-preset-download --always-download-new-model --hf-mirror=http://x --rebuild-hash-cache --output-path=/tmp/o
--temp-path=/tmp/t --cache-path=/tmp/c --external-working-path=/tmp/e --web-upload-size=50 --disable-header-check
--gpu-device-id=0 --directml --always-gpu --always-high-vram --always-normal-vram --always-low-vram --always-no-vram
--always-cpu --always-offload-from-vram --disable-offload-from-vram --async-cuda-allocation
--disable-async-cuda-allocation --all-in-fp32 --unet-in-bf16 --unet-in-fp16 --unet-in-fp8-e4m3fn --unet-in-fp8-e5m2
--vae-in-fp16 --vae-in-fp32 --vae-in-bf16 --vae-in-cpu --clip-in-fp8-e4m3fn --clip-in-fp8-e5m2 --clip-in-fp16
--clip-in-fp32 --disable-attention-upcast --attention-split --attention-quad --attention-pytorch --disable-xformers
--disable-ipex-hijack --pytorch-deterministic --preview-option=fast --is-windows-embedded-python --nowebui
--apikey=k --base-url=http://x --webhook-url=http://y
"""


def load(root: Path, *argv: str, **env: str) -> Settings:
    return Settings.load(argv, env=env, root=root)


def write_config(root: Path, **keys: object) -> None:
    (root / "config.txt").write_text(json.dumps(keys), encoding="utf-8")


def write_preset(root: Path, name: str, **keys: object) -> None:
    (root / "presets").mkdir(exist_ok=True)
    (root / "presets" / f"{name}.json").write_text(json.dumps(keys), encoding="utf-8")


def test_every_flag_of_fooocus_is_accepted(tmp_path: Path) -> None:
    settings = load(tmp_path, *FOOOCUS_FLAGS.split())
    assert settings.listen == "0.0.0.0"
    assert (settings.webui_port, settings.api_port) == (1, 2)
    assert settings.deterministic
    assert settings.cors_origins == ("*",)


def test_fp16_and_fp32_for_everything_contradict_each_other(tmp_path: Path) -> None:
    assert load(tmp_path, "--all-in-fp16").unet_dtype == "fp16"
    with pytest.raises(SettingsError, match="contradict"):
        load(tmp_path, "--all-in-fp16", "--all-in-fp32")


def test_parts_own_number_format_wins(tmp_path: Path) -> None:
    settings = load(tmp_path, "--all-in-fp16", "--vae-in-fp32", "--unet-in-bf16")
    assert (settings.unet_dtype, settings.vae_dtype, settings.clip_dtype) == ("bf16", "fp32", "fp16")


@pytest.mark.parametrize("flag", ["--share", "--enable-auto-describe-image", "--disable-enhance-output-sorting"])
def test_a_flag_from_which_nothing_follows_yet_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flag: str
) -> None:
    settings = load(tmp_path, flag)
    settings.log()
    assert settings.inert == (flag,)
    assert flag in caplog.text
    assert load(tmp_path).inert == ()


@pytest.mark.parametrize(("flag", "values"), INERT_FLAGS)
def test_inert_flag_is_named_in_one_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flag: str, values: str | int
) -> None:
    caplog.set_level(logging.INFO)
    settings = load(tmp_path, flag, *(["x"] if values in (1, "+") else []))
    settings.log()
    assert settings.inert == (flag,)
    assert [flag in record.getMessage() for record in caplog.records] == [True]


def test_unknown_flag_ends_with_status_2_and_a_near_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(tmp_path, "--nowebiu")
    assert ended.value.code == 2
    assert "did you mean --nowebui" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", ["--port=x", "--port=-1", "--sse-ping=inf", "--sse-ping=-1", "--max-memory=0", "--theme=x"]
)
def test_flag_with_a_wrong_value_ends_with_status_2(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load(tmp_path, wrong)
    assert ended.value.code == 2


@pytest.mark.parametrize(("text", "mebibytes"), [("512", 512), ("512M", 512), ("8G", 8192), ("1.5g", 1536)])
def test_memory_has_units(tmp_path: Path, text: str, mebibytes: int) -> None:
    assert load(tmp_path, "--max-memory", text).max_memory == mebibytes


def test_flags_have_help_and_extensions_add_their_own(tmp_path: Path) -> None:
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--shout", type=int, default=3)

    assert "--webhook-secret" in build_parser().format_help()
    settings = Settings.load(["--shout", "7"], env={}, root=tmp_path, extra=[add_arguments])
    assert settings.extra == {"shout": 7}


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    settings = load(tmp_path, "--apikey", "open-sesame", "--webhook-secret", "hush", "--auth", "ann:pw-of-ann")
    assert not [word for word in ("open-sesame", "hush", "pw-of-ann") if word in repr(settings)]


@pytest.mark.parametrize(
    ("port", "env", "expected"),
    [
        (None, {}, (7865, 7866)),
        (9000, {}, (9000, 9001)),
        (9000, {"GRADIO_SERVER_PORT": "8000"}, (9000, 9001)),
        (None, {"GRADIO_SERVER_PORT": "8000"}, (8000, 8001)),
        (9000, {"API_PORT": "5000"}, (9000, 5000)),
        (0, {}, (0, 0)),
    ],
)  # fmt: skip
def test_ports(port: int | None, env: dict[str, str], expected: tuple[int, int]) -> None:
    problems: list[str] = []
    assert ports(port, env, problems) == expected
    assert problems == []


def test_unusable_port_in_the_environment_is_reported() -> None:
    problems: list[str] = []
    assert ports(None, {"API_PORT": "99999", "GRADIO_SERVER_PORT": "http"}, problems) == (7865, 7866)
    assert [problem.split(" ")[0] for problem in problems] == ["GRADIO_SERVER_PORT", "API_PORT"]


@pytest.mark.parametrize("port", [65535, 70000])
def test_port_without_a_next_one_is_refused(port: int) -> None:
    with pytest.raises(SettingsError, match=str(port)):
        ports(port, {}, [])


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("", "http://127.0.0.1:7866"),
        ("127.0.0.1", "http://127.0.0.1:7866"),
        ("img.example", "http://img.example:7866"),
        ("img.example/x/", "http://img.example:7866/x"),
        ("localhost:80", "http://localhost:80"),
        ("::1", "http://[::1]:7866"),
        ("[::1]:80", "http://[::1]:80"),
        ("https://img.example/x/", "https://img.example/x"),
        ("HTTPS://img.example", "HTTPS://img.example"),
    ],
)
def test_base_of_result_urls(base_url: str, expected: str) -> None:
    assert result_base(base_url, 7866, None) == expected


def test_base_of_result_urls_follows_the_request_unless_given(tmp_path: Path) -> None:
    assert load(tmp_path).result_base("https://seen.example") == "https://seen.example"
    assert load(tmp_path, "--base-url", "fixed").result_base("https://seen.example") == "http://fixed:7866"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.2", False),
        ("printer", False),
    ],
)
def test_only_this_machine_reaches_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_webhook_flag_wins_over_the_environment(tmp_path: Path) -> None:
    assert load(tmp_path, WEBHOOK_URL="http://env").webhook_url == "http://env"
    assert load(tmp_path, "--webhook-url", "http://flag", WEBHOOK_URL="http://env").webhook_url == "http://flag"


def test_strongest_layer_wins(tmp_path: Path) -> None:
    keys = (
        "default_cfg_scale",
        "default_clip_skip",
        "default_sample_sharpness",
        "default_cfg_tsnr",
        "default_image_number",
    )
    write_preset(tmp_path, "default", **dict.fromkeys(keys[:4], 2))
    write_config(tmp_path, **dict.fromkeys(keys[:3], 3))
    write_preset(tmp_path, "mine", **dict.fromkeys(keys[:2], 4))
    config = load(tmp_path, "--preset", "mine", default_cfg_scale="5").config
    assert [getattr(config, key) for key in keys] == [5, 4, 3, 2, 2]


def test_wrong_value_is_reported_and_the_next_layer_used(tmp_path: Path) -> None:
    write_preset(tmp_path, "default", default_sampler="euler", default_clip_skip=99)
    write_config(tmp_path, default_sampler="oiler", default_cfg_scale="much", default_ip_type_2="Nose")
    settings = load(tmp_path)
    assert settings.config.default_sampler is SamplerName.EULER
    assert (settings.config.default_cfg_scale, settings.config.default_clip_skip) == (7.0, 2)
    reported = sorted(problem.split(" ")[0] for problem in settings.problems)
    assert reported == ["default_cfg_scale", "default_clip_skip", "default_ip_type_2", "default_sampler"]
    assert any("'oiler' in config.txt" in problem for problem in settings.problems)


@pytest.mark.parametrize("content", ["{broken", "[1, 2]", "\x00\xff"])
def test_unreadable_config_is_reported_and_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.txt").write_text(content, encoding="utf-8")
    settings = load(tmp_path)
    assert len(settings.problems) == 1
    assert "config.txt is ignored" in settings.problems[0]


def test_config_written_by_windows_editors_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.txt").write_bytes(b"\xef\xbb\xbf" + b'{\r\n "default_clip_skip": 1\r\n}')
    assert load(tmp_path).config.default_clip_skip == 1


@pytest.mark.parametrize("name", ["nope", "../secret", "mine.json"])
def test_unknown_preset_is_reported(tmp_path: Path, name: str) -> None:
    write_preset(tmp_path, "mine")
    (tmp_path / "secret.json").write_text('{"default_clip_skip": 1}')
    settings = load(tmp_path, "--preset", name)
    assert settings.config.default_clip_skip == 2
    assert "there is mine" in settings.problems[0]


def test_environment_values_are_literals(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        default_styles="['Fooocus V2']",
        default_black_out_nsfw="True",
        default_prompt="a red apple",
        default_inpaint_engine_version="None",
        default_aspect_ratio="1024×768 <span>",
    ).config
    assert config.default_styles == ("Fooocus V2",)
    assert config.default_black_out_nsfw
    assert config.default_prompt == "a red apple"
    assert config.default_inpaint_engine_version is InpaintEngine.NONE
    assert config.default_aspect_ratio == "1024*768"


def test_lora_rows_may_leave_out_enabled_and_set_the_number_of_rows(tmp_path: Path) -> None:
    write_config(tmp_path, default_loras=[["a.safetensors", 0.1], [False, "None", 1.0]])
    settings = load(tmp_path)
    assert settings.config.default_max_lora_number == 2
    assert settings.request_defaults()["loras"] == [
        {"enabled": True, "model_name": "a.safetensors", "weight": 0.1},
        {"enabled": False, "model_name": "None", "weight": 1.0},
    ]


def test_image_prompts_take_stop_and_weight_of_their_type(tmp_path: Path) -> None:
    write_config(tmp_path, default_ip_type_2="FaceSwap", default_ip_weight_3=1.5, default_ip_image_1="None")
    rows = load(tmp_path).config.image_prompt_defaults()
    assert [(row.type, row.stop_at, row.weight) for row in rows] == [
        (ControlType.IMAGE_PROMPT, 0.5, 0.6),
        (ControlType.FACE_SWAP, 0.9, 0.75),
        (ControlType.IMAGE_PROMPT, 0.5, 1.5),
        (ControlType.IMAGE_PROMPT, 0.5, 0.6),
    ]
    assert rows[0].image is None


def test_defaults_name_fields_of_the_request_and_make_a_valid_one(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert {*REQUEST_FIELDS.values(), *PAGE_FIELDS.values()} <= GenerationRequest.model_fields.keys()
    assert {*REQUEST_FIELDS, *PAGE_FIELDS} <= {*config_keys()}
    request = GenerationRequest.model_validate(settings.page_defaults())
    assert request.image_number == 2
    assert issubclass(GenerationRequest, ParamGroup)


def test_image_number_of_the_configuration_is_the_pages_only(tmp_path: Path) -> None:
    write_config(tmp_path, default_image_number=7)
    settings = load(tmp_path)
    assert "image_number" not in settings.request_defaults()
    assert settings.page_defaults()["image_number"] == 7


def test_paths_of_several_folders_and_of_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_config(tmp_path, path_checkpoints=["a", str(tmp_path / "b"), "gone"], path_vae="gone", path_loras=3)
    settings = load(tmp_path, path_embeddings=str(tmp_path / "a"))
    assert settings.paths.checkpoints == (tmp_path / "a", tmp_path / "b")
    assert settings.paths.vae == tmp_path / "models/vae"
    assert settings.paths.embeddings == tmp_path / "a"
    assert settings.paths.loras == (tmp_path / "models/loras",)
    assert len(settings.problems) == 3


def test_output_flag_wins_and_its_folder_is_made(tmp_path: Path) -> None:
    write_config(tmp_path, path_outputs="from-config", temp_path="scratch")
    assert load(tmp_path).paths.outputs == tmp_path / "from-config"
    settings = load(tmp_path, "--output-path", str(tmp_path / "new/out"))
    settings.prepare()
    assert (tmp_path / "new/out").is_dir()
    assert settings.paths.temp == tmp_path / "scratch"


def test_loading_writes_nothing(tmp_path: Path) -> None:
    load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_first_start_writes_the_path_keys_and_later_ones_leave_the_file_alone(settings: Settings) -> None:
    written = json.loads(settings.paths.config.read_text(encoding="utf-8"))
    assert written["path_checkpoints"] == "models/checkpoints"
    assert all(key.startswith("path_") for key in written)
    assert settings.paths.checkpoints[0].is_dir()
    settings.paths.config.write_text('{"default_clip_skip": 5}')
    again = Settings.load(["--temp-path", str(settings.paths.temp)], env={}, root=settings.paths.root)
    again.prepare()
    assert again.config.default_clip_skip == 5
    assert again.paths.config.read_text() == '{"default_clip_skip": 5}'
    assert again.problems == ()


def test_list_of_all_keys_can_be_used_as_config(settings: Settings) -> None:
    text = settings.paths.config_example.read_text(encoding="utf-8")
    keys = json.loads(text[text.index("{") :])
    assert keys.keys() - {"temp_path"} >= {key for key in config_keys() if not key.startswith("default_ip_")}
    assert {"default_ip_type_4", "path_sam", "temp_path"} <= keys.keys()
    settings.paths.config.write_text(json.dumps(keys), encoding="utf-8")
    again = Settings.load([], env={}, root=settings.paths.root)
    assert again.problems == ()
    assert again.config.model_dump() == settings.config.model_dump()
    assert again.config.image_prompt_defaults() == settings.config.image_prompt_defaults()
    assert again.paths == settings.paths


def test_location_of_config_comes_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"default_clip_skip": 4}')
    assert load(tmp_path, config_path=str(tmp_path / "other.json")).config.default_clip_skip == 4


def test_keys_come_from_flag_and_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# team\nalpha\n\nbeta\nalpha\n")
    assert load(tmp_path, "--apikey", "one", "--api-keys-file", str(tmp_path / "keys")).api_keys == (
        "one",
        "alpha",
        "beta",
    )
    assert load(tmp_path).api_keys == ()


@pytest.mark.parametrize("content", [None, "# none yet\n"])
def test_file_without_keys_stops_the_start(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(SettingsError, match="--api-keys-file"):
        load(tmp_path, "--api-keys-file", str(tmp_path / "keys"))


def test_logins_of_the_file_count_when_others_can_connect(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"pw2").hexdigest()
    (tmp_path / "auth.json").write_text(json.dumps([{"user": "ann", "pass": "pw1"}, {"user": "bob", "hash": hashed}]))
    assert load(tmp_path).logins == ()
    ann, bob = load(tmp_path, "--listen").logins
    assert ann.accepts("ann", "pw1")
    assert bob.accepts("bob", "pw2")
    assert not bob.accepts("ann", "pw2")
    assert not ann.accepts("ann", "pw2")
    assert not ann.accepts("änn", "pw1")


@pytest.mark.parametrize("content", ["[", '[{"user": "ann"}]', "3", '["ann"]'])
def test_unreadable_logins_stop_the_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "auth.json").write_text(content)
    with pytest.raises(SettingsError, match=r"auth\.json"):
        load(tmp_path, "--listen")


@pytest.mark.parametrize("person", ["ann", "ann:", ":pw"])
def test_login_without_password_stops_the_start(tmp_path: Path, person: str) -> None:
    with pytest.raises(SettingsError, match="USER:PASSWORD"):
        load(tmp_path, "--auth", person)


def test_device_of_older_flags(tmp_path: Path) -> None:
    assert load(tmp_path).device == "auto"
    assert load(tmp_path, "--always-cpu", "3").device == "cpu"
    assert load(tmp_path, "--gpu-device-id", "1").device == "cuda:1"
    assert load(tmp_path, "--gpu-device-id", "1", "--device", "mps").device == "mps"


@given(
    st.dictionaries(
        st.sampled_from(config_keys()), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text())
    )
)
def test_no_config_stops_the_start(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, object]) -> None:
    root = tmp_path_factory.mktemp("root")
    write_config(root, **keys)
    settings = load(root)
    assert len(settings.problems) <= len(keys)


def test_settings_are_light() -> None:
    code = (
        "import sys, modules.settings\n"
        "heavy = ('torch', 'gradio', 'fastapi', 'tinydb', 'numpy', 'PIL', 'requests', 'asyncio')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
