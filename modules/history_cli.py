"""The `history` commands: check, compact, export, import, prune."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TextIO

from modules.errors import FocaleError
from modules.history import FILE_NAME, History
from modules.history_check import Report, check
from modules.history_import import import_file
from modules.outputs import delete_picture
from modules.settings import Settings

_SHOWN: Final = 20
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_DAY_MS: Final = 86_400_000


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure or a check that found something, 2 for a wrong line.

    Flags of the server say where the output folder is: `history check --output-path DIR`.
    """
    parser = history_parser()
    asked, server_flags = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        folder = Settings.load(server_flags).paths.outputs
        return _COMMANDS[asked.command](folder, asked)
    except FocaleError as error:
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        sys.stderr.write(f"{error.filename or folder}: {error.strerror or error}\n")
    return 1


def history_parser() -> argparse.ArgumentParser:
    """The parser of the `history` commands."""
    parser = argparse.ArgumentParser(
        prog="launch.py history",
        description="Look after the records of all tasks.",
        epilog="Flags of the server such as --output-path work here as well.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checking = commands.add_parser("check", help="Compare the records with the pictures; changes nothing.")
    checking.add_argument("--all", action="store_true", help=f"Name every fault, not the first {_SHOWN} of a kind.")
    commands.add_parser("compact", help="Rewrite the history without what was changed or removed since.")
    exporting = commands.add_parser("export", help="Write all records as JSON lines, oldest first.")
    exporting.add_argument("--out", type=Path, metavar="FILE", help="A new file; standard output if left out.")
    importing = commands.add_parser("import", help="Add the records of another history.")
    importing.add_argument(
        "file", type=Path, metavar="FILE", help="FooocusAPI's db.sqlite3, a TinyDB JSON file, or an exported history."
    )
    pruning = commands.add_parser("prune", help="Remove the oldest records of ended tasks.")
    pruning.add_argument("--keep", type=_count, metavar="N", help="Keep the newest N.")
    pruning.add_argument("--older-than", type=_count, metavar="DAYS", help="Remove those queued longer ago.")
    pruning.add_argument("--max-bytes", type=_bytes, metavar="SIZE", help="Let the records take this much, as 200M.")
    pruning.add_argument("--pictures", action="store_true", help="Remove their pictures too.")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _bytes(text: str) -> int:
    """Bytes of "200M", "1GiB", "5000"."""
    number = text.lower().removesuffix("ib").removesuffix("b")
    unit = number[-1:] if number[-1:] in ("k", "m", "g") else ""
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        size = -1
    if size < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5000, 200M or 1G")
    return int(size)


def _check(folder: Path, asked: argparse.Namespace) -> int:
    report = check(folder)
    sys.stdout.write("\n".join(_lines(report, everything=asked.all)) + "\n")
    return 0 if report.is_clean else 1


def _lines(report: Report, *, everything: bool) -> list[str]:
    """A report in words."""
    missing = [f"{path} of task {task}" for task, path in report.missing]
    lines = [f"{report.records} records and {report.pictures} pictures were looked at."]
    if report.torn_bytes:
        lines.append(f"The log ends with {report.torn_bytes} bytes of an unfinished transaction, which is harmless.")
    for title, faults in (
        ("Damaged stretches of the log", report.damaged),
        ("Records whose picture is gone", missing),
        ("Pictures without a record", report.orphans),
        ("Tasks with two records", report.twice),
    ):
        shown = list(faults if everything else faults[:_SHOWN])
        lines += [f"{title}: {len(faults)}", *(f"  {fault}" for fault in shown)]
        if len(shown) < len(faults):
            lines.append(f"  and {len(faults) - len(shown)} more; see them with --all.")
    return lines


def _compact(folder: Path, _: argparse.Namespace) -> int:
    _must_exist(folder)
    with History(folder) as history:
        before = history.storage.size
        history.storage.compact()
        sys.stdout.write(f"The history took {before} bytes and takes {history.storage.size} now.\n")
    return 0


def _export(folder: Path, asked: argparse.Namespace) -> int:
    with History(folder, read_only=True) as history:
        if asked.out is None:
            _write_lines(history, sys.stdout)
        else:
            with asked.out.open("x", encoding="utf-8") as file:
                _write_lines(history, file)
            sys.stdout.write(f"{len(history)} records are in {asked.out}.\n")
    return 0


def _write_lines(history: History, file: TextIO) -> None:
    for record in history.each():
        file.write(record.model_dump_json() + "\n")


def _import(folder: Path, asked: argparse.Namespace) -> int:
    with History(folder) as history:
        imported = import_file(history, asked.file)
    sys.stdout.write(
        f"{imported.added} records were added, {imported.known} were known, {imported.unusable} could not be used.\n"
    )
    return 0


def _prune(folder: Path, asked: argparse.Namespace) -> int:
    if asked.keep is None and asked.older_than is None and asked.max_bytes is None:
        sys.stderr.write("Say what may stay: --keep N, --older-than DAYS or --max-bytes SIZE.\n")
        return 2
    _must_exist(folder)
    before = None if asked.older_than is None else time.time_ns() // 1_000_000 - asked.older_than * _DAY_MS
    with History(folder) as history:
        gone = history.prune(keep=asked.keep, before_mills=before, max_bytes=asked.max_bytes)
        paths = [path for record in gone for path in record.result] if asked.pictures else []
        deleted = sum(delete_picture(folder, path) for path in paths)
        sys.stdout.write(f"{len(gone)} records and {deleted} pictures were removed.\n")
        history.storage.compact()  # last, for a full disk may have room for it only now
    return 0


def _must_exist(folder: Path) -> None:
    """Raise OSError when there is no history, rather than begin one."""
    (folder / FILE_NAME).stat()


_COMMANDS: Final[Mapping[str, Callable[[Path, argparse.Namespace], int]]] = {
    "check": _check,
    "compact": _compact,
    "export": _export,
    "import": _import,
    "prune": _prune,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
