"""Imports point one way, heavy libraries stay where they belong, and importing does nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The order of the story; a module may import, directly or through others, its own row and the rows above.
ORDER = (
    ("modules.errors", "modules.choices"),
    ("modules.params", "modules.settings", "modules.events", "modules.loads"),
    ("modules.request",),
    ("modules.images", "modules.files"),
    ("modules.prompts", "modules.presets", "modules.metadata", "modules.jobs"),
    ("modules.plan",),
    ("modules.engine", "modules.save", "modules.history"),
    ("modules.generate",),
    ("modules.handlers",),
    ("modules.extensions",),
    ("modules.ui", "extensions"),
    ("webui",),
)
RANKS = {name: rank for rank, row in enumerate(ORDER) for name in row}

# Library → the only places that may import it.
HOMES = {
    "torch": ("modules.engine",),
    "diffusers": ("modules.engine",),
    "transformers": ("modules.engine",),
    "torchsde": ("modules.engine",),
    "onnxruntime": ("modules.engine",),
    "gradio": ("modules.ui", "webui"),
    "fastapi": ("extensions.rest_api", "modules.serving", "webui"),
    "starlette": ("extensions.rest_api", "modules.serving", "webui"),
    "uvicorn": ("modules.serving", "webui"),
    "tinydb": ("modules.history",),
}
NEVER_IN_THE_WEB_PROCESS = ("torch", "transformers", "diffusers", "onnxruntime", "cv2", "pandas", "gradio")


def source_files() -> dict[str, Path]:
    """Module name → file, of everything the program consists of."""
    paths = [*ROOT.glob("modules/**/*.py"), *ROOT.glob("extensions/**/*.py"), *ROOT.glob("webui.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


SOURCES = source_files()


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what a file imports, at the top or inside functions; not what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def known(name: str) -> str | None:
    """The module of ours that an imported name is, or belongs to."""
    while name and name not in SOURCES:
        name = name.rpartition(".")[0]
    return name or None


IMPORTS = {name: sorted(set(imports(ast.parse(path.read_text("utf-8"))))) for name, path in SOURCES.items()}
GRAPH = {
    name: {found for imported in named if (found := known(imported)) and found != name}
    for name, named in IMPORTS.items()
}


def reached(start: str) -> dict[str, list[str]]:
    """Module → chain of imports that leads to it from `start`."""
    chains, waiting = {start: [start]}, [start]
    while waiting:
        at = waiting.pop(0)
        for target in sorted(GRAPH[at] - chains.keys()):
            chains[target] = [*chains[at], target]
            waiting.append(target)
    return chains


def rank(name: str) -> int | None:
    """Row of a module in the order, or None for a helper that has no fixed place."""
    while name:
        if name in RANKS:
            return RANKS[name]
        name = name.rpartition(".")[0]
    return None


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if rank(name) is not None))
def test_no_module_reaches_a_later_one(name: str) -> None:
    wrong = [
        " → ".join(chain)
        for target, chain in reached(name).items()
        if (later := rank(target)) is not None and later > (rank(name) or 0)
    ]
    assert not wrong, "imports point backwards:\n" + "\n".join(wrong)


def test_imports_have_no_circles() -> None:
    circles = [name for name in SOURCES if any(name in GRAPH[other] for other in reached(name) if other != name)]
    assert not circles, f"these import each other in a circle: {', '.join(sorted(circles))}"


@pytest.mark.parametrize("library", HOMES)
def test_library_is_imported_only_at_home(library: str) -> None:
    strangers = [
        name
        for name, named in IMPORTS.items()
        if any(imported.split(".")[0] == library for imported in named)
        and not any(is_at_home(name, home) for home in HOMES[library])
    ]
    assert not strangers, f"{library} is imported by {', '.join(strangers)}"


def is_at_home(name: str, home: str) -> bool:
    """True for the module itself, its sub-modules, and siblings such as `modules.history_log`."""
    return name == home or name.startswith((home + ".", home + "_"))


def test_the_checker_sees_imports_inside_functions_and_skips_those_of_type_checkers() -> None:
    code = "if TYPE_CHECKING:\n  import gradio\ndef f():\n  from torch import nn\nimport modules.errors as e\n"
    assert sorted(imports(ast.parse(code))) == ["modules.errors", "torch.nn"]


def web_modules() -> list[str]:
    """Modules of the web process that serve without the page."""
    worker_only = ("modules.engine", "modules.generate", "modules.tools", "modules.ui")
    return sorted(name for name in SOURCES if name != "webui" and not name.startswith(worker_only))


def test_web_process_without_page_imports_no_heavy_library_and_starts_nothing() -> None:
    script = (
        "import importlib, sys, threading\n"
        f"for name in {web_modules()!r}: importlib.import_module(name)\n"
        f"print([name for name in {NEVER_IN_THE_WEB_PROCESS!r} if name in sys.modules])\n"
        "print([thread.name for thread in threading.enumerate()])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "['MainThread']"]
