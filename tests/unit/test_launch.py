"""Tests of launch.py: what it installs where, what it runs, and what it costs."""

import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import launch

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows cannot replace a process")


def version_pinned() -> str:
    return launch.pinned_torch(REQUIREMENTS)


def test_torch_is_pinned_to_one_release() -> None:
    assert version_pinned() == "2.13.0"
    assert launch.pinned_torch("torchsde==1\n# torch==9\n") == ""


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line for line in (ROOT / name).read_text("utf-8").splitlines() if line and not line.startswith("#")]
        assert [line for line in lines if line.count("==") != 1] == []


def test_linux_without_nvidia_asks_for_cpu_builds_by_name_only() -> None:
    attempts = launch.torch_attempts("2.13.0", "linux", nvidia=False)
    assert attempts == [["torch==2.13.0+cpu"], ["torch==2.13.0+cpu", "--index-url", launch.CPU_INDEX]]


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin"])
def test_no_machine_without_nvidia_is_sent_to_the_cuda_index(platform: str) -> None:
    attempts = launch.torch_attempts("2.13.0", platform, nvidia=False)
    assert "cu1" not in str(attempts)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_nvidia_machine_takes_the_cuda_index_first(platform: str) -> None:
    first = launch.torch_attempts("2.13.0", platform, nvidia=True)[0]
    assert first == ["torch==2.13.0+cu130", "--index-url", launch.CUDA_INDEX]


def test_mac_takes_the_only_build_there_is() -> None:
    assert launch.torch_attempts("2.13.0", "darwin", nvidia=True) == [["torch==2.13.0"]]


def test_users_own_index_is_taken_alone() -> None:
    attempts = launch.torch_attempts("2.13.0", "linux", nvidia=False, index="https://mine")
    assert attempts == [["torch==2.13.0", "--index-url", "https://mine"]]


@pytest.mark.parametrize(
    ("installed", "nvidia", "stays"),
    [
        ("", False, False),
        ("2.12.0+cpu", False, False),
        ("2.13.0+cpu", False, True),
        ("2.13.0+cpu", True, False),
        ("2.13.0+cu130", True, True),
        ("2.13.0", True, True),
        ("2.13.0", False, True),
    ],
)
def test_fitting_torch_stays(installed: str, nvidia: bool, stays: bool) -> None:
    assert launch.is_fitting(installed, "2.13.0", nvidia) is stays


class Machine:
    """Records the commands launch.py would run; `failing` are words of commands that fail."""

    def __init__(self, torch: str = "") -> None:
        self.commands: list[list[str]] = []
        self.torch = torch
        self.failing: tuple[str, ...] = ()

    def call(self, command: list[str]) -> int:
        self.commands.append(command)
        return int(any(word in command for word in self.failing))

    def pip(self) -> list[list[str]]:
        return [command[5:] for command in self.commands if command[1:4] == ["-m", "pip", "install"]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(launch, "call", made.call)
    monkeypatch.setattr(launch, "torch_version", lambda python: made.torch)
    monkeypatch.setattr(launch, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(launch.sys, "platform", "linux")
    monkeypatch.delenv("FOCALE_TORCH_INDEX", raising=False)
    return made


def requirements(folder: Path, text: str) -> str:
    (folder / "requirements.txt").write_text(text)
    return str(folder / "requirements.txt")


def test_installs_once_and_again_when_the_file_changes(tmp_path: Path, machine: Machine) -> None:
    file = requirements(tmp_path, "torch==2.13.0\nx==1\n")
    launch.ensure_installed("py", str(tmp_path), file)
    assert machine.pip() == [["torch==2.13.0+cpu"], ["--requirement", file]]
    before = len(machine.commands)
    launch.ensure_installed("py", str(tmp_path), file)
    assert len(machine.commands) == before
    machine.torch = "2.13.0+cpu"
    launch.ensure_installed("py", str(tmp_path), requirements(tmp_path, "torch==2.13.0\nx==2\n"))
    assert machine.pip()[2:] == [["--requirement", file]]


def test_installing_compiles_focale_itself_where_python_would_not(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(launch, "ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(launch, "call", lambda command: subprocess.call(command) if "compileall" in command else 0)
    launch.ensure_installed(sys.executable, str(tmp_path), requirements(tmp_path, "x==1\n"))
    assert list((tmp_path / "modules" / "__pycache__").glob("one.*.pyc"))


def test_failed_installation_is_tried_again_even_for_the_former_file(tmp_path: Path, machine: Machine) -> None:
    launch.ensure_installed("py", str(tmp_path), requirements(tmp_path, "x==1\n"))
    machine.failing = ("--requirement",)
    with pytest.raises(launch.LaunchError, match="next start tries again"):
        launch.ensure_installed("py", str(tmp_path), requirements(tmp_path, "x==2\n"))
    machine.failing = ()
    launch.ensure_installed("py", str(tmp_path), requirements(tmp_path, "x==1\n"))
    assert len(machine.pip()) == 3


def test_second_source_of_torch_is_tried_and_then_nothing_else(tmp_path: Path, machine: Machine) -> None:
    machine.failing = ("torch==2.13.0+cpu",)
    with pytest.raises(launch.LaunchError, match="FOCALE_TORCH_INDEX"):
        launch.ensure_installed("py", str(tmp_path), requirements(tmp_path, "torch==2.13.0\n"))
    assert [arguments[0] for arguments in machine.pip()] == ["torch==2.13.0+cpu", "torch==2.13.0+cpu"]


def test_missing_requirements_file_is_an_incomplete_copy(tmp_path: Path) -> None:
    with pytest.raises(launch.LaunchError, match="complete copy"):
        launch.ensure_installed("py", str(tmp_path), str(tmp_path / "requirements.txt"))


@posix_only
def test_environment_is_made_when_its_python_is_gone(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(tmp_path / "removed")
    assert launch.ensure_environment(str(tmp_path)) == str(tmp_path / "bin/python")
    assert machine.commands == [[sys.executable, "-m", "venv", "--clear", str(tmp_path)]]


def test_environment_that_cannot_be_made_names_a_way_out(tmp_path: Path, machine: Machine) -> None:
    machine.failing = ("venv",)
    with pytest.raises(launch.LaunchError, match="python3-venv"):
        launch.ensure_environment(str(tmp_path))


def test_running_environment_is_used_as_it_is(machine: Machine) -> None:
    assert launch.ensure_environment(sys.prefix) == sys.executable
    assert machine.commands == []


def copy_of_program(folder: Path, webui: str) -> Path:
    """A program folder with the real launch.py, an empty requirements file and a webui.py of the test's own."""
    (folder / "launch.py").write_bytes((ROOT / "launch.py").read_bytes())
    (folder / "webui.py").write_text(webui)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n")
    for name in ("requirements.txt", "requirements-dev.txt"):
        (folder / name).write_text("")
        (folder / ".venv" / f"installed-{name}").write_text("")
    return folder / "launch.py"


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "FOCALE_NO_VENV"}


@posix_only
def test_every_flag_and_the_exit_code_pass_through(tmp_path: Path) -> None:
    program = copy_of_program(tmp_path, "import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    flags = ["generate", "a red apple", "--out", "x.png", "--port=1"]
    done = subprocess.run(
        [sys.executable, program, *flags], capture_output=True, text=True, env=clean_environment(), timeout=60
    )
    assert (done.stdout.strip(), done.returncode) == (str(flags), 7)


@posix_only
def test_signal_reaches_the_program(tmp_path: Path) -> None:
    program = copy_of_program(
        tmp_path,
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "print('up', flush=True)\n"
        "signal.pause()\n",
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, env=clean_environment()) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"up\n"
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=60) == 3


@posix_only
def test_test_command_runs_pytest_with_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(launch, "ROOT", str(tmp_path))
    monkeypatch.setattr(launch, "run", lambda command: ran.append(command) or 5)
    monkeypatch.delenv("FOCALE_NO_VENV", raising=False)
    monkeypatch.chdir(ROOT)
    copy_of_program(tmp_path, "")
    assert launch.main(["test", "-k", "x"]) == 5
    side_by_side = ["-n", "2", "--dist", "loadfile", "--max-worker-restart", "1"]
    assert ran == [[str(tmp_path / ".venv/bin/python"), "-m", "pytest", *side_by_side, "-k", "x"]]
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("wish", [["-n", "0"], ["-n4"], ["--numprocesses=1"], ["--version"]])
def test_test_command_leaves_the_number_of_processes_to_who_names_it(wish: list[str]) -> None:
    assert launch.test_arguments(wish) == wish


def test_old_python_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.sys, "version_info", (3, 9, 1))
    with pytest.raises(launch.LaunchError, match=r"needs Python 3\.11 or newer; this is 3\.9\."):
        launch.main([])


@posix_only
def test_launching_what_is_installed_costs_little(tmp_path: Path) -> None:
    program = copy_of_program(tmp_path, "")
    python = str(tmp_path / ".venv/bin/python")
    direct = [cpu_seconds([python, str(tmp_path / "webui.py")]) for _ in range(7)]
    launched = [cpu_seconds([python, str(program)]) for _ in range(7)]
    cost = statistics.median(launched) - statistics.median(direct)
    assert cost < 0.05, f"launch.py itself takes {cost:.3f} s of processor time"


def cpu_seconds(command: list[str]) -> float:
    """Processor time of a command, which a busy machine does not change much."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=clean_environment(), timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
