"""Makes Focale's Python environment, once, and runs the program or its tests in it.

    python launch.py [flags]              the server: every flag goes to webui.py
    python launch.py generate "a prompt"  one run without a server; `history` works likewise
    python launch.py test [pytest args]   the tests

The environment is `.venv` beside this file, or the running interpreter's own if FOCALE_NO_VENV is set. It is
filled at the first start, and again when a requirements file changes. Standard library only; starting an
installed Focale costs two small file reads.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
OLDEST_PYTHON = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


class LaunchError(Exception):
    """The environment cannot be made; the message says what to do."""


def main(argv: list[str]) -> int:
    """Makes what is missing and hands over; returns only where the platform cannot replace a process."""
    if sys.version_info < OLDEST_PYTHON:
        oldest, here = (".".join(map(str, version[:2])) for version in (OLDEST_PYTHON, sys.version_info))
        raise LaunchError(f"Focale needs Python {oldest} or newer; this is {here}.")
    testing = argv[:1] == ["test"]
    prefix = sys.prefix if os.environ.get("FOCALE_NO_VENV") else os.path.join(ROOT, ".venv")
    python = ensure_environment(prefix)
    ensure_installed(python, prefix, os.path.join(ROOT, "requirements.txt"))
    if testing:
        ensure_installed(python, prefix, os.path.join(ROOT, "requirements-dev.txt"))
        os.chdir(ROOT)
        return run([python, "-m", "pytest", *test_arguments(argv[1:])])
    return run([python, os.path.join(ROOT, "webui.py"), *argv])


def test_arguments(argv: list[str]) -> list[str]:
    """Arguments of pytest: two processes side by side, one thread each, unless the caller chooses otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if any(argument.startswith(("-n", "--numprocesses", "--version", "--help", "-h")) for argument in argv):
        return argv
    return ["-n", "2", "--dist", "loadfile", "--max-worker-restart", "1", *argv]


def ensure_environment(prefix: str) -> str:
    """The Python of the environment in `prefix`, which is made if it is missing or its Python is gone."""
    if prefix == sys.prefix:
        return sys.executable
    python = os.path.join(prefix, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
    if not os.path.exists(python):
        say(f"Making the Python environment in {prefix} ...")
        if call([sys.executable, "-m", "venv", "--clear", prefix]) != 0:
            raise LaunchError(
                "Python cannot make an environment. On Debian and Ubuntu, `apt install python3-venv` helps; "
                "FOCALE_NO_VENV=1 installs into the running Python instead."
            )
    return python


def ensure_installed(python: str, prefix: str, requirements: str) -> None:
    """Installs a requirements file unless it is, word for word, the one that was installed last."""
    stamp = os.path.join(prefix, "installed-" + os.path.basename(requirements))
    wanted = read(requirements)
    if wanted is None:
        raise LaunchError(f"{requirements} is missing; get a complete copy of Focale.")
    if read(stamp) == wanted:
        return
    if os.path.exists(stamp):
        os.remove(stamp)
    say(f"Installing {os.path.basename(requirements)}; this happens once and may take minutes ...")
    torch = pinned_torch(wanted.decode())
    if torch:
        install_torch(python, torch)
    if pip_install(python, ["--requirement", requirements]) != 0:
        raise LaunchError("pip could not install everything; its last lines say why. The next start tries again.")
    compile_sources(python)
    with open(stamp, "wb") as file:
        file.write(wanted)


def compile_sources(python: str) -> None:
    """Compiles Focale's own modules once, as pip did with the installed ones; what cannot be written is left out.

    Python does that by itself at the first start, unless it may not write there or was told not to
    (PYTHONDONTWRITEBYTECODE): then every start would compile all of them again, which takes a fifth of it.
    """
    sources = [os.path.join(ROOT, name) for name in ("webui.py", "modules", "extensions")]
    call([python, "-m", "compileall", "-qq", *sources])


def pinned_torch(requirements: str) -> str:
    """The version of torch that a requirements file pins, or ""."""
    for line in requirements.splitlines():
        name, _, version = line.partition("==")
        if name.strip() == "torch":
            return version.strip()
    return ""


def install_torch(python: str, version: str) -> None:
    """Installs the build of torch that fits the machine, unless one is there."""
    nvidia = has_nvidia_gpu()
    if is_fitting(torch_version(python), version, nvidia):
        return
    attempts = torch_attempts(version, sys.platform, nvidia, os.environ.get("FOCALE_TORCH_INDEX", ""))
    for arguments in attempts:
        if pip_install(python, arguments) == 0:
            return
    tried = "; ".join("pip install " + " ".join(arguments) for arguments in attempts)
    raise LaunchError(
        f"torch {version} could not be installed. Tried: {tried}. "
        "Set FOCALE_TORCH_INDEX to a package index that has it, or install it into the environment yourself."
    )


def torch_attempts(version: str, platform: str, nvidia: bool, index: str = "") -> list[list[str]]:
    """Arguments of pip, to be tried in order, that bring a CUDA build to machines with an NVIDIA GPU only.

    A version with "+cpu" can only be a CPU build. On Linux PyPI's own build is the CUDA one, so "+cpu" is
    asked for by name: from the sources that pip is configured with, which may hold it, then from PyTorch's
    CPU index. On macOS and Windows PyPI's build is the CPU (or Metal) one.

    Args:
        version: the pinned version, without a build.
        platform: as `sys.platform`.
        nvidia: the machine has an NVIDIA GPU.
        index: a package index that the user chose; its build is taken as it is.
    """
    if index:
        return [[f"torch=={version}", "--index-url", index]]
    if nvidia and platform != "darwin":
        build = CUDA_INDEX.rpartition("/")[2]
        return [[f"torch=={version}+{build}", "--index-url", CUDA_INDEX], [f"torch=={version}"]]
    if platform.startswith("linux"):
        return [[f"torch=={version}+cpu"], [f"torch=={version}+cpu", "--index-url", CPU_INDEX]]
    return [[f"torch=={version}"]]


def is_fitting(installed: str, version: str, nvidia: bool) -> bool:
    """True if the installed torch ("" for none) may stay: the pinned version, no CPU build beside a GPU."""
    installed_version, _, build = installed.partition("+")
    return installed_version == version and not (nvidia and build == "cpu")


def has_nvidia_gpu() -> bool:
    """True if the driver of an NVIDIA GPU answers; a CUDA toolkit without a GPU does not count."""
    import shutil
    import subprocess

    if os.path.exists("/proc/driver/nvidia/version"):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "--list-gpus"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def torch_version(python: str) -> str:
    """The torch that an interpreter would import, such as "2.13.0+cpu", or ""."""
    import subprocess

    code = "import importlib.metadata as m\ntry: print(m.version('torch'))\nexcept m.PackageNotFoundError: pass"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def pip_install(python: str, arguments: list[str]) -> int:
    """Runs `pip install`; returns its exit code."""
    return call([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments])


def call(command: list[str]) -> int:
    """Runs a command to its end; returns its exit code."""
    import subprocess

    return subprocess.call(command)


def run(command: list[str]) -> int:
    """Becomes the command, so that signals and the exit code are its own.

    Windows cannot replace a process: there the command runs as a child, which gets Ctrl+C from the console.
    """
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    import subprocess

    with subprocess.Popen(command) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue


def read(path: str) -> bytes | None:
    """The bytes of a file, or None if there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def say(message: str) -> None:
    """One line for the person who waits."""
    print(message, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LaunchError as error:
        sys.exit(f"Focale cannot start: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
