"""What the server was told: flags, environment, preset and config.txt, resolved into one frozen object."""

import hashlib
import hmac
import ipaddress
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self

from modules.config import Config, Layer, config_keys, environment_values, read_config
from modules.errors import SettingsError, near_matches
from modules.flags import AddArguments, Flags, ParsedFlags, parse_flags
from modules.paths import PATH_KEYS, Paths, config_path, make_folders, path_values, read_paths

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = 7865
Dtype = Literal["auto", "fp32", "fp16", "bf16"]


# Config key → request field; what a request leaves out takes these values.
REQUEST_FIELDS: Mapping[str, str] = {
    "default_prompt": "prompt",
    "default_prompt_negative": "negative_prompt",
    "default_styles": "style_selections",
    "default_performance": "performance_selection",
    "default_aspect_ratio": "aspect_ratios_selection",
    "default_output_format": "output_format",
    "default_sample_sharpness": "sharpness",
    "default_cfg_scale": "guidance_scale",
    "default_model": "base_model_name",
    "default_refiner": "refiner_model_name",
    "default_refiner_switch": "refiner_switch",
    "default_sampler": "sampler_name",
    "default_scheduler": "scheduler_name",
    "default_vae": "vae_name",
    "default_clip_skip": "clip_skip",
    "default_cfg_tsnr": "adaptive_cfg",
    "default_black_out_nsfw": "black_out_nsfw",
    "default_overwrite_step": "overwrite_step",
    "default_overwrite_switch": "overwrite_switch",
    "default_inpaint_engine_version": "inpaint_engine",
}
# More start values of the page, which the API never took from the configuration.
PAGE_FIELDS: Mapping[str, str] = {
    "default_image_number": "image_number",
    "default_save_metadata_to_images": "save_metadata_to_images",
    "default_metadata_scheme": "metadata_scheme",
    "default_uov_method": "uov_method",
    "default_overwrite_upscale": "overwrite_upscale_strength",
    "default_enhance_checkbox": "enhance_checkbox",
    "default_enhance_uov_method": "enhance_uov_method",
    "default_enhance_uov_processing_order": "enhance_uov_processing_order",
    "default_enhance_uov_prompt_type": "enhance_uov_prompt_type",
    "default_save_only_final_enhanced_image": "save_final_enhanced_image_only",
}


@dataclass(frozen=True, slots=True)
class Credential:
    """A person who may log in to the page; sha256 is the hex digest of the password."""

    user: str
    sha256: str

    def accepts(self, user: str, password: str) -> bool:
        """True for this person's name and password; takes the same time either way."""
        digest = hashlib.sha256(password.encode()).hexdigest()
        right_user = hmac.compare_digest(self.user.encode(), user.encode())
        return hmac.compare_digest(self.sha256.lower(), digest) and right_user


@dataclass(frozen=True, kw_only=True)
class Settings(Flags):
    """Everything that was configured; the flags themselves, and what follows from them and the files.

    webui_port, api_port: 0 asks the system for a free one.
    config: the keys of config.txt. paths: where things are.
    api_keys: every key that opens the API; empty means open to all. logins: persons who may use the page.
    problems: sentences about values that could not be used; the defaults stand in for them.
    inert: flags that were given and from which nothing follows, here or yet.
    extra: values of the arguments that extensions added, by destination.
    """

    config: Config
    paths: Paths
    webui_port: int
    api_port: int
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    logins: tuple[Credential, ...] = field(default=(), repr=False)
    problems: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    extra: Mapping[str, object]

    @classmethod
    def load(
        cls,
        argv: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        root: Path = ROOT,
        extra: Iterable[AddArguments] = (),
    ) -> Self:
        """Reads everything and writes nothing; `prepare()` makes the folders and files.

        argv: the command line without the program's name. env: `os.environ` unless given.
        extra: callables that add the arguments of extensions to the parser.

        Raises:
            SettingsError: a flag cannot be used. SystemExit: as argparse, for a wrong command line.
        """
        env = os.environ if env is None else env
        parsed = parse_flags(argv, extra)
        problems: list[str] = []
        layers = _layers(parsed.flags.preset, root / "presets", config_path(env, root), problems)
        config, wrong = read_config([("the environment", environment_values(env, config_keys())), *layers])
        return cls._assemble(parsed, config, layers, env, root, [*problems, *wrong])

    @classmethod
    def _assemble(
        cls,
        parsed: ParsedFlags,
        config: Config,
        layers: list[Layer],
        env: Mapping[str, str],
        root: Path,
        problems: list[str],
    ) -> Self:
        """The settings out of their read parts; adds to `problems`."""
        flags = {declared.name: getattr(parsed.flags, declared.name) for declared in fields(Flags)}
        flags["webhook_url"] = flags["webhook_url"] or env.get("WEBHOOK_URL", "")
        flags["hf_mirror"] = flags["hf_mirror"] or env.get("HF_MIRROR", "")
        flags["offline"] = flags["offline"] or env.get("HF_HUB_OFFLINE", "").lower() in (
            "1",
            "on",
            "yes",
            "true",
        )
        paths = read_paths(parsed.flags.output_path, parsed.flags.temp_path, layers, env, root, problems)
        webui_port, api_port = ports(parsed.flags.port, env, problems)
        return cls(
            **flags,
            config=config,
            paths=paths,
            webui_port=webui_port,
            api_port=api_port,
            api_keys=_api_keys(parsed.flags),
            logins=_logins(parsed.flags, root / "auth.json"),
            problems=tuple(problems),
            inert=parsed.inert,
            extra=parsed.extra,
        )

    @property
    def listens_on_loopback(self) -> bool:
        """True when only this machine can connect."""
        return is_loopback(self.listen)

    @property
    def exposure(self) -> str:
        """A sentence about who may use this server without being asked, "" when nobody who should not."""
        asks_persons = bool(self.logins) and not self.nowebui
        if self.api_keys or (self.listens_on_loopback and not asks_persons):
            return ""
        who = "Everyone on this machine" if self.listens_on_loopback else f"Everyone who can reach {self.listen}"
        if self.nowebui:
            return f"{who} can use the API; start it with --apikey, or without --listen."
        if not asks_persons:
            return f"{who} can use this server; start it with --apikey or --auth, or without --listen."
        return f"{who} can use the API: --auth guards the page alone. Start the server with --apikey as well."

    @property
    def open_browser(self) -> bool:
        """True when the page should be opened in a browser of this machine."""
        wanted = self.in_browser or (self.listens_on_loopback and not self.share)
        return wanted and not self.disable_in_browser and not self.nowebui

    @property
    def unet_dtype(self) -> Dtype:
        """Number format asked for the UNet."""
        return _dtype(self.unet_in_fp16, self.unet_in_bf16, False, self)

    @property
    def vae_dtype(self) -> Dtype:
        """Number format asked for the VAE."""
        return _dtype(self.vae_in_fp16, self.vae_in_bf16, self.vae_in_fp32, self)

    @property
    def clip_dtype(self) -> Dtype:
        """Number format asked for the text encoders."""
        return _dtype(self.clip_in_fp16, False, self.clip_in_fp32, self)

    @property
    def log_level(self) -> int:
        """Level of the root logger."""
        if self.debug_mode:
            return logging.DEBUG
        return logging.WARNING if self.disable_server_info else logging.INFO

    def result_base(self, request_base: str | None = None) -> str:
        """Start of result URLs, without a final slash; request_base is the request's scheme and host."""
        return result_base(self.base_url, self.api_port, request_base)

    def request_defaults(self) -> dict[str, object]:
        """Request field → value, for the fields whose default the configuration sets.

        `loras` is a list of `{"enabled", "model_name", "weight"}`, `default_max_lora_number` long.
        """
        values = {name: getattr(self.config, key) for key, name in REQUEST_FIELDS.items()}
        rows = self.config.default_loras[: self.config.default_max_lora_number]
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "loras": [row._asdict() for row in rows],
        }

    def page_defaults(self) -> dict[str, object]:
        """The request defaults with the page's further start values, such as `image_number`."""
        return {
            **self.request_defaults(),
            **{name: getattr(self.config, key) for key, name in PAGE_FIELDS.items()},
        }

    def prepare(self) -> None:
        """Makes missing folders, writes config.txt at the first start and the list of all keys at each.

        Raises:
            SettingsError: a folder cannot be made.
        """
        make_folders(self.paths)
        if not self.paths.config.exists():
            folders = {key: default for key, (_, default) in PATH_KEYS.items()}
            _write(self.paths.config, json.dumps(folders, indent=4) + "\n")
        _write(self.paths.config_example, self._tutorial())

    def log_in_worker(self) -> None:
        """Sets up logging in a worker process, as in the server's."""
        logging.basicConfig(level=self.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def log(self) -> None:
        """Logs what could not be used, and once which flags mean nothing here."""
        for problem in self.problems:
            logger.warning("%s", problem)
        if self.inert:
            logger.warning("Accepted without effect, for existing start scripts: %s.", " ".join(self.inert))

    def _tutorial(self) -> str:
        """Every key with its current value, under a few lines that say how to use them."""
        numbered = {
            f"default_ip_{part}_{number}": value
            for number, row in enumerate(self.config.image_prompt_defaults(), 1)
            for part, value in row.model_dump(mode="json").items()
        }
        keys = {**path_values(self.paths), **self.config.model_dump(mode="json"), **numbered}
        return (
            "Every key that config.txt may hold, with its current value.\n"
            "This file is written at each start and never read. To change a value, copy its line into\n"
            f"{self.paths.config.name} between the braces, and mind the commas.\n\n"
            + json.dumps(keys, indent=4, ensure_ascii=False)
            + "\n"
        )


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def result_base(base_url: str, api_port: int, request_base: str | None = None) -> str:
    """Start of result URLs, without a final slash.

    Only `http://` and `https://` are schemes: with one the value is taken as it is; without, `http://` and,
    if it names no port, the API port are added. An empty value follows the request, else this machine.
    """
    base = base_url.strip()
    if not base:
        return (request_base or f"http://127.0.0.1:{api_port}").rstrip("/")
    if base.lower().startswith(("http://", "https://")):
        return base.removesuffix("/")
    host, slash, path = base.partition("/")
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    if not host.rpartition("]")[2].partition(":")[2]:
        host = f"{host.rstrip(':')}:{api_port}"
    return f"http://{host}{slash}{path}".removesuffix("/")


def ports(port: int | None, env: Mapping[str, str], problems: list[str]) -> tuple[int, int]:
    """Port of the page and of the API; sentences about unusable environment variables go to `problems`.

    Raises:
        SettingsError: `--port` is no port number, or leaves none for the API.
    """
    if port is not None and port > 65535:
        raise SettingsError(f"--port {port} is not a port number; ports end at 65535.")
    webui = port if port is not None else _port(env, "GRADIO_SERVER_PORT", problems)
    webui = DEFAULT_PORT if webui is None else webui
    api = _port(env, "API_PORT", problems)
    if api is None:
        api = webui + 1 if webui else 0
    if api > 65535:
        raise SettingsError(f"Port {webui} leaves no next port for the API; set API_PORT or choose a lower --port.")
    if api == webui and api:
        problems.append(f"API_PORT is the port of the page, {webui}; the API answers there only.")
    return webui, api


def _port(env: Mapping[str, str], name: str, problems: list[str]) -> int | None:
    """A port number from the environment, or None."""
    text = env.get(name, "").strip()
    if not text:
        return None
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    problems.append(f"{name} = {text!r} in the environment is ignored: it is not a port number.")
    return None


def _dtype(fp16: bool, bf16: bool, fp32: bool, flags: Flags) -> Dtype:
    """The number format a part's own flags ask for, else the one for everything."""
    if fp16 or bf16 or fp32:
        return "fp16" if fp16 else "bf16" if bf16 else "fp32"
    return "fp16" if flags.all_in_fp16 else "fp32" if flags.all_in_fp32 else "auto"


def _layers(preset: str | None, folder: Path, config_path: Path, problems: list[str]) -> list[Layer]:
    """Preset, config.txt and the default preset, strongest first; unreadable ones are left out."""
    layers: list[Layer] = []
    if preset and preset != "initial":
        names = sorted(path.stem for path in folder.glob("*.json"))
        if preset in names:
            layers.append((f"preset {preset!r}", _read_json(folder / f"{preset}.json", problems)))
        else:
            near = near_matches(preset, names) or names
            problems.append(f"--preset {preset!r} is ignored: there is no such preset; there is {', '.join(near)}.")
    if config_path.is_file():
        layers.append((config_path.name, _read_json(config_path, problems)))
    if (folder / "default.json").is_file():
        layers.append(("the default preset", _read_json(folder / "default.json", problems)))
    return layers


def _read_json(path: Path, problems: list[str]) -> dict[str, object]:
    """The JSON object in a file; an unreadable one is reported and counts as empty."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} is ignored: it is not readable as JSON ({error}).")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} is ignored: it holds {type(value).__name__} and not a JSON object.")
        return {}
    return value


def _api_keys(flags: Flags) -> tuple[str, ...]:
    """Every key that opens the API.

    Raises:
        SettingsError: the file of keys cannot be read, or holds none.
    """
    keys = [flags.apikey] if flags.apikey else []
    if flags.api_keys_file:
        try:
            lines = Path(flags.api_keys_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--api-keys-file {flags.api_keys_file!r} cannot be read: {error}.") from error
        from_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not from_file:
            raise SettingsError(f"--api-keys-file {flags.api_keys_file!r} holds no key; write one a line.")
        keys += from_file
    return tuple(dict.fromkeys(keys))


def _logins(flags: Flags, auth_file: Path) -> tuple[Credential, ...]:
    """Persons of `--auth`, and those of auth.json when the page can be reached from other machines.

    Raises:
        SettingsError: a person has no password, or the file is unreadable and would open the page to all.
    """
    persons = []
    for entry in flags.auth:
        user, colon, password = entry.partition(":")
        if not (user and colon and password):
            raise SettingsError("--auth expects USER:PASSWORD.")
        persons.append(Credential(user, hashlib.sha256(password.encode()).hexdigest()))
    if (flags.share or not is_loopback(flags.listen)) and auth_file.is_file():
        persons += _read_auth(auth_file)
    return tuple(persons)


def _read_auth(path: Path) -> list[Credential]:
    """The persons in auth.json: `{"user", "pass"}` or `{"user", "hash"}`, hash being SHA-256 in hex."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        return [
            Credential(entry["user"], entry.get("hash") or hashlib.sha256(entry["pass"].encode()).hexdigest())
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f'{path.name} cannot be read ({error!r}); it holds a list of {{"user": …, "pass": …}}.'
        ) from error


def _write(path: Path, text: str) -> None:
    """Writes a text file; a read-only program folder is no reason not to start."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written: %s.", path.name, error.strerror)
