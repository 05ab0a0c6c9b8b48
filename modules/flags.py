"""The command line of the server: every flag declared once, as a typed field."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NoReturn, TypeVar

from modules.errors import SettingsError, near_matches

T = TypeVar("T")
AddArguments = Callable[[argparse.ArgumentParser], None]


def flag(default: T, help: str, *, secret: bool = False, works: bool = True, **argparse_options: object) -> T:
    """A dataclass field that is also a flag: `base_url` is `--base-url`.

    secret: never shown by `repr`. works: False while nothing follows from the flag; docs/status.md lists these.
    argparse_options: go to `add_argument`.
    """
    metadata = {"help": help, "argparse": argparse_options, "works": works}
    declared: T = field(default=default, repr=not secret, metadata=metadata)
    return declared


def names(value: str) -> tuple[str, ...]:
    """The non-empty parts of a comma-separated list."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def megabytes(value: str) -> int:
    """A positive number of mebibytes from "8192", "8192M" or "8G"."""
    digits, factor = (value[:-1], 1024) if value[-1:].lower() == "g" else (value.rstrip("mM"), 1)
    size = int(float(digits) * factor)
    if size <= 0:
        raise ValueError(value)
    return size


def count(value: str) -> int:
    """A whole number that is not negative."""
    number = int(value)
    if number < 0:
        raise ValueError(value)
    return number


def seconds(value: str) -> float:
    """A number of seconds that is neither negative nor infinite."""
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(value)
    return number


OnDisconnect = Literal["continue", "stop"]
Theme = Literal["light", "dark"]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the command line said; each field's help text says what it means."""

    # Serving
    listen: str = flag(
        "127.0.0.1",
        "Address of both ports; the flag alone means every address.",
        nargs="?",
        const="0.0.0.0",
        metavar="IP",
    )
    port: int | None = flag(
        None,
        "Port of the page (7865); the API port is the next one unless API_PORT is set.",
        type=count,
        metavar="N",
    )
    nowebui: bool = flag(False, "Serve the API only; gradio is never loaded.")
    share: bool = flag(False, "Ask Gradio for a public address of the page.", works=False)
    in_browser: bool = flag(False, "Open the page in the browser when it is ready.")
    disable_in_browser: bool = flag(False, "Do not open the browser.")
    auth: tuple[str, ...] = flag(
        (),
        "A person who may log in to the page; may be given several times.",
        secret=True,
        action="append",
        metavar="USER:PASSWORD",
    )
    web_upload_size: int = flag(100, "Largest upload, in megabytes.", type=count, metavar="MB")
    trusted_proxies: tuple[str, ...] = flag(
        (), "Reverse proxies whose X-Forwarded headers are believed.", type=names, metavar="HOST,…"
    )

    # Page
    preset: str | None = flag(None, "Preset whose values become the defaults of page and API.", metavar="NAME")
    disable_preset_selection: bool = flag(False, "Do not offer presets on the page.")
    language: str = flag("default", "Translation file of the page, by its name in language/.", metavar="NAME")
    theme: Theme | None = flag(None, "Look of the page.", choices=("light", "dark"))
    enable_auto_describe_image: bool = flag(
        False, "Describe an uploaded picture when the prompt is empty.", works=False
    )

    # API
    apikey: str = flag(
        "",
        "Key that every request needs; none means open to everyone who can connect.",
        secret=True,
        metavar="KEY",
    )
    api_keys_file: str | None = flag(None, "File with one key a line that requests may use as well.", metavar="FILE")
    base_url: str = flag("", "Start of the URLs in results; the default follows each request.", metavar="URL")
    webhook_url: str = flag("", "Webhook for tasks that name none.", metavar="URL")
    webhook_secret: str = flag("", "Secret that signs webhooks (Standard Webhooks).", secret=True, metavar="SECRET")
    cors_origins: tuple[str, ...] = flag(
        (),
        "Origins of web pages that may call the API; '*' and 'null' count.",
        type=names,
        metavar="ORIGIN,…",
    )
    allow_url_hosts: tuple[str, ...] = flag(
        (), "Hosts that input URLs and webhooks may name besides public ones.", type=names, metavar="HOST,…"
    )
    on_disconnect: OnDisconnect = flag(
        "continue",
        "What a task does when the client that waits for it goes away.",
        choices=("continue", "stop"),
    )
    queue_limit: int = flag(0, "Tasks that may wait; 0 is no limit.", type=count, metavar="N")
    history_limit: int = flag(0, "Finished tasks that are kept; 0 is no limit.", type=count, metavar="N")
    sse_ping: float = flag(15.0, "Seconds between heartbeats of a stream; 0 is none.", type=seconds, metavar="S")
    legacy_api: bool = flag(True, "Answer the routes of the older Fooocus-API as well.")
    legacy_port: int | None = flag(
        None, "One more port that answers the API (8888 for old clients).", type=count, metavar="N"
    )

    # Files
    output_path: str | None = flag(None, "Folder of the results.", metavar="DIR")
    temp_path: str | None = flag(None, "Folder of temporary files.", metavar="DIR")
    disable_image_log: bool = flag(False, "Write no log page; results are still kept and served.")
    disable_metadata: bool = flag(False, "Write no parameters into files.")
    disable_enhance_output_sorting: bool = flag(
        False, "Show enhanced pictures in the order they were made.", works=False
    )

    # Models
    disable_preset_download: bool = flag(False, "Never download the files a preset names.")
    always_download_new_model: bool = flag(False, "Ignore a preset's previous models that are present.")
    hf_mirror: str = flag("", "Replacement for huggingface.co in downloads.", metavar="URL")
    offline: bool = flag(False, "Never contact the network for models.")
    rebuild_hash_cache: int | None = flag(
        None,
        "Compute the hashes of all models again, in N threads.",
        nargs="?",
        const=1,
        type=count,
        metavar="N",
    )

    # Device
    device: str = flag("auto", "Device of the engine: auto, cpu, cuda, cuda:1, mps or xpu.", metavar="NAME")
    gpu_device_id: int | None = flag(None, "The same as --device cuda:N.", type=count, metavar="N")
    always_cpu: int | None = flag(
        None, "The same as --device cpu, in N threads.", nargs="?", const=0, type=count, metavar="N"
    )
    max_memory: int | None = flag(
        None, "Memory the engine may keep models in, such as 8G.", type=megabytes, metavar="SIZE"
    )
    deterministic: bool = flag(False, "Use only exactly repeatable kernels, even where they are slower.")
    all_in_fp32: bool = flag(False, "Compute everything in float32.")
    all_in_fp16: bool = flag(False, "Keep all networks in float16; a CPU computes in float32, or bfloat16 if it can.")
    unet_in_bf16: bool = flag(False, "Keep the UNet in bfloat16; CPUs without instructions for it compute in float32.")
    unet_in_fp16: bool = flag(False, "Keep the UNet in float16; a CPU computes in float32, or bfloat16 if it can.")
    vae_in_fp16: bool = flag(False, "Keep the VAE in float16; SDXL's own overflows in it on a GPU.")
    vae_in_fp32: bool = flag(False, "Compute the VAE in float32.")
    vae_in_bf16: bool = flag(False, "Keep the VAE in bfloat16; CPUs without instructions for it compute in float32.")
    vae_in_cpu: bool = flag(False, "Run the VAE on the CPU, to spare the memory of a GPU.")
    clip_in_fp16: bool = flag(
        False, "Keep the text encoders in float16; a CPU computes in float32, or bfloat16 if it can."
    )
    clip_in_fp32: bool = flag(False, "Compute the text encoders in float32.")

    # Logging
    debug_mode: bool = flag(False, "Log at DEBUG level.")
    disable_server_info: bool = flag(False, "Log warnings and errors only.")


SYNONYMS = {"--deterministic": ("--pytorch-deterministic",), "--trusted-proxies": ("--trust-proxy",)}

# Flags of Fooocus without meaning here, and how many values each takes; start scripts keep working.
INERT_FLAGS: tuple[tuple[str, str | int], ...] = (
    ("--disable-analytics", 0), ("--disable-server-log", 0), ("--multi-user", 0), ("--cache-path", 1),
    ("--external-working-path", "+"), ("--directml", "?"), ("--always-gpu", 0), ("--always-high-vram", 0),
    ("--always-normal-vram", 0), ("--always-low-vram", 0), ("--always-no-vram", 0),
    ("--always-offload-from-vram", 0), ("--disable-offload-from-vram", 0), ("--async-cuda-allocation", 0),
    ("--disable-async-cuda-allocation", 0), ("--unet-in-fp8-e4m3fn", 0), ("--unet-in-fp8-e5m2", 0),
    ("--clip-in-fp8-e4m3fn", 0), ("--clip-in-fp8-e5m2", 0), ("--disable-attention-upcast", 0),
    ("--attention-split", 0), ("--attention-quad", 0), ("--attention-pytorch", 0), ("--disable-xformers", 0),
    ("--disable-ipex-hijack", 0), ("--preview-option", 1), ("--is-windows-embedded-python", 0),
)  # fmt: skip


class _Inert(argparse.Action):
    """Remembers that an inert flag was used."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.inert = (*namespace.inert, self.option_strings[0])


class Parser(argparse.ArgumentParser):
    """An argument parser that names near matches of an unknown flag."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2, as argparse does, in one line and with a hint."""
        unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        near = near_matches(unknown, self._option_string_actions) if unknown.startswith("--") else []
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all flags."
        self.exit(2, f"{self.prog}: {message}; {hint}\n")


def build_parser(extra: Iterable[AddArguments] = ()) -> argparse.ArgumentParser:
    """The parser of every flag; each callable in `extra` adds the arguments of an extension."""
    parser = Parser(prog="launch.py", allow_abbrev=False, description="Focale: images from prompts.")
    parser.set_defaults(inert=())
    for declared in fields(Flags):
        _add_flag(parser, declared.name, declared.default, declared.metadata["help"], declared.metadata["argparse"])
    parser.add_argument("--disable-header-check", nargs="?", const="*", metavar="ORIGIN",
                        help="The same as --cors-origins ORIGIN.")  # fmt: skip
    for name, nargs in INERT_FLAGS:
        parser.add_argument(name, action=_Inert, nargs=nargs, dest="inert", default=(), help=argparse.SUPPRESS)
    for add_arguments in extra:
        add_arguments(parser)
    return parser


def _add_flag(
    parser: argparse.ArgumentParser, name: str, default: object, help: str, options: dict[str, object]
) -> None:
    """Adds one declared flag; a boolean becomes a switch, with a `--no-` form when it is on by default."""
    option = option_of(name)
    arguments: dict[str, object] = {"dest": name, "default": default, "help": help, **options}
    if isinstance(default, bool):
        arguments["action"] = argparse.BooleanOptionalAction if default else "store_true"
    if arguments.get("action") == "append":
        arguments["default"] = None  # argparse would append to the tuple
    parser.add_argument(option, *SYNONYMS.get(option, ()), **arguments)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ParsedFlags:
    """The command line, read.

    flags: the typed values. inert: flags that were given and from which nothing follows, here or yet.
    extra: values of the arguments that extensions added, by destination.
    """

    flags: Flags
    inert: tuple[str, ...]
    extra: dict[str, object]


def parse_flags(argv: Sequence[str], extra: Iterable[AddArguments] = ()) -> ParsedFlags:
    """Reads a command line without the program's name.

    Raises:
        SettingsError: two flags contradict each other.
        SystemExit: as argparse, for unknown flags, wrong values and `--help`.
    """
    parsed = vars(build_parser(extra).parse_args(argv))
    inert: tuple[str, ...] = parsed.pop("inert")
    header_check: str | None = parsed.pop("disable_header_check")
    own = {declared.name: parsed.pop(declared.name) for declared in fields(Flags)}
    own["auth"] = tuple(own["auth"] or ())
    if header_check and not own["cors_origins"]:
        own["cors_origins"] = names(header_check)
    if own["always_cpu"] is not None and own["device"] == "auto":
        own["device"] = "cpu"
    if own["gpu_device_id"] is not None and own["device"] == "auto":
        own["device"] = f"cuda:{own['gpu_device_id']}"
    if own["all_in_fp16"] and own["all_in_fp32"]:
        raise SettingsError("--all-in-fp16 and --all-in-fp32 contradict each other; give one of them.")
    idle = (
        option_of(declared.name)
        for declared in fields(Flags)
        if not declared.metadata["works"] and own[declared.name] != declared.default
    )
    return ParsedFlags(Flags(**own), (*inert, *idle), parsed)


def flags_without_effect() -> dict[str, str]:
    """Flags from which nothing follows yet, with what they will do."""
    return {option_of(flag.name): flag.metadata["help"] for flag in fields(Flags) if not flag.metadata["works"]}


def option_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")
