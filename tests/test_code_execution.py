"""The fence around programs that a model wrote: what passes, what is stopped, what is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from btx.errors import UserError
from btx.evaluation import code_execution
from btx.evaluation.code_execution import Limits, Outcome, check_code_execution, fences_text, run_program, run_programs

SHORT = Limits(seconds=5, cpu_s=1, memory_bytes=1 << 28)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs the resource limits of a POSIX system")


def test_a_program_passes_only_if_it_runs_to_its_end() -> None:
    programs = ["assert sorted([2, 1]) == [1, 2]", "assert 1 == 2", "raise SystemExit(0)\nassert False",
                "import os\nos._exit(0)", "def broken(:", "import ctypes\nctypes.string_at(0)"]  # fmt: skip
    outcomes = run_programs(programs)
    assert outcomes[0] == Outcome(True, "")
    assert not any(outcome.passed for outcome in outcomes[1:])
    why = [outcome.why for outcome in outcomes[1:]]
    assert [text.partition(":")[0].partition(" (")[0] for text in why] == [
        "AssertionError", "it left before its end", "it left before its end", "SyntaxError", "signal SIGSEGV",
    ]  # fmt: skip


def test_a_forged_report_is_no_pass() -> None:
    forged = """
import os
for descriptor in range(64):
    try:
        os.write(descriptor, b'{"token": "", "why": "", "fences": {}}')
    except OSError:
        pass
os._exit(0)
"""
    assert not run_program(forged).passed


def test_an_endless_loop_and_a_long_sleep_end_when_their_time_is_up() -> None:
    started = time.monotonic()
    busy, asleep = run_programs(["while True: pass", "import time\ntime.sleep(60)"],
                                limits=Limits(seconds=1.5, cpu_s=1))  # fmt: skip
    assert busy.why in ("signal SIGKILL", "signal SIGXCPU", "time")
    assert asleep.why == "time"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("program", "error"), [
    ("held = bytearray(1 << 30)", "MemoryError"),
    ("import os\nwhile True: os.fork()", "BlockingIOError"),
    ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
    ("import subprocess, sys\nsubprocess.run([sys.executable, '--version'])", ("BlockingIOError", "PermissionError")),
    ("with open('large', 'wb') as file: file.write(bytes(1 << 21))", "OSError"),
    ("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))", ("ValueError", "PermissionError")),
    ("files = [open('program.py') for _ in range(99)]", "OSError"),
    ("input()", "EOFError"),
])  # fmt: skip
def test_what_a_program_takes_too_much_of_is_refused(program: str, error: str | tuple[str, ...]) -> None:
    if "bytearray" in program and not check_code_execution()["memory"]:
        pytest.skip("this system does not limit the address space")
    outcome = run_program(program, SHORT)
    assert not outcome.passed
    assert outcome.why.startswith(error), outcome


def test_a_program_may_write_in_its_own_folder_which_is_gone_afterwards(monkeypatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    assert run_program("with open('a', 'w') as file: file.write('b')\nassert open('a').read() == 'b'").passed
    assert not run_program("open('left', 'w').write('x')\nimport os\nos.abort()").passed
    assert list(base.iterdir()) == []
    base.rmdir()


@pytest.mark.parametrize("program", [
    "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')",  # deeper than calls and open files go
    "import os\nos.mkdir('a')\nos.mkdir('a/b')\nopen('a/b/c', 'w').close()\nfor x in ('a/b', 'a', '.'): os.chmod(x, 0)",
    "import os\nos.mkfifo('f')\nos.symlink('/etc', 'l')\nos.mkdir('\\udcff\\n')",
    "import socket\nsocket.socket(socket.AF_UNIX).bind('s')",
])  # fmt: skip
def test_whatever_a_program_makes_of_its_folder_it_goes(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", base)
        outcome = run_program(program)
        assert outcome.passed, outcome
        assert list(Path(base).iterdir()) == []


@pytest.mark.parametrize("call", [
    "shmget(4242, 1 << 20, 0o1777)", "msgget(4242, 0o1777)", "semget(4242, 1, 0o1777)",  # they would stay
    "unshare(0x10000000)", "unshare(0x08000000)",  # a user namespace and one of shared memory
])  # fmt: skip
def test_nothing_outlives_a_program_and_it_makes_no_namespaces(call: str) -> None:
    if not check_code_execution()["calls"]:
        pytest.skip("this system has no seccomp")
    refused = (
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{call} < 0 and ctypes.get_errno() == 1"
    )
    assert run_program(refused).passed


@pytest.mark.parametrize(("program", "why"), [
    ("import os\nos.kill(os.getpid(), 39)", "signal 39"),  # a real-time signal, which Python has no name for
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "time"),
    ("import os\nfor d in range(3, 64):\n    try: os.write(d, b'[' * 200_000)\n    except OSError: pass\nos._exit(0)",
     "it left before its end (exit code 0)"),  # JSON deeper than the reader
])  # fmt: skip
def test_no_end_of_a_program_ends_the_evaluation(program: str, why: str) -> None:
    assert run_program(program, Limits(seconds=1 if why == "time" else 10)) == Outcome(False, why)


def test_nothing_outside_its_folder_is_written_changed_or_removed(tmp_path: Path) -> None:
    if not check_code_execution()["writes"]:
        pytest.skip("this kernel has no landlock")
    with tempfile.TemporaryDirectory() as outside:  # everyone may write here: what stops a program is the fence
        Path(outside).chmod(0o777)
        victim = Path(outside) / "victim"
        victim.write_text("whole")
        victim.chmod(0o666)
        program = f"""
import os
victim, new = {str(victim)!r}, {outside + "/new"!r}
for act in (lambda: open(victim, "w"), lambda: open(new, "w"), lambda: os.remove(victim), lambda: os.mkdir(new),
            lambda: os.truncate(victim, 0), lambda: os.rename("program.py", new), lambda: os.link("program.py", new)):
    try:
        act()
    except OSError:
        continue
    os._exit(3)
"""
        assert run_program(program).passed
        assert victim.read_text() == "whole"
        assert list(Path(outside).iterdir()) == [victim]


def test_no_network_is_reached() -> None:
    if not check_code_execution()["network"]:
        pytest.skip("this system gives no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        connect = f"import socket\nsocket.create_connection({address!r}, timeout=2)"
        done = subprocess.run([code_execution.sys.executable, "-c", connect], timeout=20)
        assert done.returncode == 0, "without the fence it is reached"
        assert not run_program(connect).passed


def test_the_environment_and_installed_packages_stay_outside(monkeypatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    assert run_program("import os\nassert set(os.environ) <= {'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE'}").passed
    assert "ModuleNotFoundError" in run_program("import numpy\nimport torch").why
    assert run_program("import os\nassert os.geteuid() != 0").passed


def test_the_check_says_what_holds_and_refuses_a_machine_where_programs_do_not_run(monkeypatch) -> None:
    fences = check_code_execution()
    assert {"cpu", "file_size", "processes"} <= {name for name, holds in fences.items() if holds}
    assert "no new processes" in fences_text(fences)
    assert "NETWORK NOT CUT OFF" in fences_text(fences | {"network": False})
    check_code_execution.cache_clear()
    monkeypatch.setattr(code_execution, "PROBE", "import nothing_of_this_name")
    with pytest.raises(UserError, match="nothing_of_this_name"):
        check_code_execution()
    check_code_execution.cache_clear()
