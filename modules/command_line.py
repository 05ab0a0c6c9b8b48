"""The command line without a server: `generate "a red apple" --out apple.png`, through the one door."""

import argparse
import asyncio
import json
import logging
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from modules.choices import Source
from modules.errors import FocaleError, SettingsError
from modules.events import Failed, ImageSaved, Noticed, Progress, Stopped
from modules.extensions import Services
from modules.flags import build_parser
from modules.request import GenerationRequest
from modules.settings import Settings

BAR_WIDTH = 30


def main(argv: Sequence[str]) -> int:
    """Run `generate`; returns the exit code: 0 for pictures, 1 for a failure, 2 for a wrong command line."""
    parser = generate_parser()
    known, server_flags = parser.parse_known_args(argv)
    try:
        request = request_of(known)
        settings = Settings.load(server_flags)
    except (SettingsError, FocaleError) as error:
        parser.exit(2, f"{error}\n")
    except ValidationError as error:
        parser.exit(2, "".join(f"{_flag(str(item['loc'][0]))}: {item['msg']}\n" for item in error.errors()))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings.prepare()
    from modules.assembly import build_services  # after the command line is known to be right

    return asyncio.run(_generate(build_services(settings, inline=True), _with_defaults(request, settings), known.out))


def generate_parser() -> argparse.ArgumentParser:
    """The parser of `generate`: the prompt, `--out`, and every request parameter as a flag.

    Flags of the server, such as `--output-path`, are accepted too.
    """
    parser = argparse.ArgumentParser(
        prog="launch.py generate",
        description="Make pictures without a server.",
        epilog="Flags of the server that concern models, devices and folders work here as well.",
        allow_abbrev=False,
    )
    parser.add_argument("words", metavar="PROMPT", help=GenerationRequest.model_fields["prompt"].description)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="Copy the picture here; several get a number before the suffix."
    )
    server_flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    for name, declared in GenerationRequest.model_fields.items():
        if name != "prompt" and _flag(name) not in server_flags:
            parser.add_argument(
                _flag(name), dest=name, metavar="VALUE", default=argparse.SUPPRESS,
                help=(declared.description or "").replace("%", "%%"),
            )  # fmt: skip
    return parser


def request_of(parsed: argparse.Namespace) -> GenerationRequest:
    """The request that a parsed command line means.

    Lists are JSON or comma separated; everything else is read as the API reads text.

    Raises:
        pydantic.ValidationError: a value does not fit.
    """
    sent: dict[str, Any] = {"prompt": parsed.words}
    for name in GenerationRequest.model_fields:
        if name != "prompt" and hasattr(parsed, name):
            sent[name] = _value(name, getattr(parsed, name))
    if parsed.out is not None and "output_format" not in sent and parsed.out.suffix:
        sent["output_format"] = parsed.out.suffix.removeprefix(".")
    return GenerationRequest.model_validate(sent)


def _value(name: str, text: str) -> object:
    is_list = isinstance(GenerationRequest.model_fields[name].get_default(call_default_factory=True), tuple)
    if not is_list:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return [part.strip() for part in text.split(",") if part.strip()]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_defaults(request: GenerationRequest, settings: Settings) -> GenerationRequest:
    """The request over the configured defaults; whoever names a preset here wants its files as well."""
    defaults: dict[str, object] = {**settings.request_defaults(), "download_missing": bool(settings.preset)}
    missing = {name: value for name, value in defaults.items() if name not in request.model_fields_set}
    return request.changed(**missing)


async def _generate(services: Services, request: GenerationRequest, out: Path | None) -> int:
    """Run one request to its end and copy its pictures."""
    task_id = uuid.uuid4().hex
    services.jobs.run_only(task_id)  # what a server left waiting is the server's
    saved: list[ImageSaved] = []
    bar = ProgressBar(sys.stderr)
    await services.jobs.start()
    try:
        job = await services.handlers.submit(request, source=Source.CLI, task_id=task_id)
        failure = ""
        async for _number, event in services.handlers.follow(job):
            if isinstance(event, Progress):
                bar.show(event)
            elif isinstance(event, Noticed):
                bar.say(event.message)
            elif isinstance(event, ImageSaved):
                saved.append(event)
            elif isinstance(event, Failed):
                failure = event.error
            elif isinstance(event, Stopped):
                failure = "Stopped."
        bar.end()
    except FocaleError as error:
        failure = str(error)
    finally:
        await services.jobs.close()
        services.history.close()
    for picture in _copied(services.settings.paths.outputs, saved, out):
        sys.stdout.write(f"{picture}\n")
    if failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    return 0


def _copied(root: Path, saved: Sequence[ImageSaved], out: Path | None) -> list[Path]:
    """Where the pictures are, after copying them to `out` if one was named."""
    sources = [root / picture.path for picture in saved]
    if out is None:
        return sources
    targets = []
    for index, source in enumerate(sources):
        target = out if len(sources) == 1 else out.with_name(f"{out.stem}-{index}{out.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        targets.append(target)
    return targets


class ProgressBar:
    """One line on a terminal that is rewritten at every step; silent where there is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        """Write to `stream`."""
        self._stream = stream
        self._is_terminal = stream.isatty()

    def show(self, progress: Progress) -> None:
        """Draw the bar at this progress."""
        if self._is_terminal:
            filled = "█" * (progress.percent * BAR_WIDTH // 100)
            self._stream.write(f"\r\033[K{filled:<{BAR_WIDTH}} {progress.percent:3d} % {progress.message}")
            self._stream.flush()

    def say(self, message: str) -> None:
        """A sentence on a line of its own."""
        self._stream.write(("\r\033[K" if self._is_terminal else "") + message + "\n")

    def end(self) -> None:
        """Clear the line."""
        if self._is_terminal:
            self._stream.write("\r\033[K")
