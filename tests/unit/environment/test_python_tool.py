"""The python tool really runs code, under every isolation that works on this machine."""

import dataclasses
import errno
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from a2tgpo.config.python import PythonConfig
from a2tgpo.environment.sandbox import file_access, launcher, syscall_filter
from a2tgpo.environment.sandbox.isolation import ISOLATIONS, Sandbox, build_sandbox
from a2tgpo.environment.sandbox.output import BoundedOutput
from a2tgpo.environment.sandbox.process import MAX_CODE_BYTES, SandboxError, SandboxProcess
from a2tgpo.environment.tool import ToolError
from a2tgpo.environment.tools.python import NO_OUTPUT, Python, PythonSession
from a2tgpo.io.errors import ConfigError

NOT_PERMITTED = "PermissionError: [Errno 1] Operation not permitted"
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@functools.cache
def sandbox_of(isolation: str) -> Sandbox | str:
    """Return a sandbox, which all tests of this process share, or skip the test with the reason why there is none."""
    try:
        return build_sandbox(PythonConfig(isolation=isolation))
    except ConfigError as error:
        return str(error)


@pytest.fixture(params=ISOLATIONS)
def sandbox(request):
    found = sandbox_of(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def answer(sandbox, code, **settings):
    tool = Python(PythonConfig(**settings), sandbox)
    (text,) = tool.call(textwrap.dedent(code))
    return text


def answer_at_deadline(sandbox, code, begins, **settings):
    """Return the answer to endless code that has begun to print. A loaded machine may need a later deadline
    for this.
    """
    text = ""
    for timeout_s in (0.5, 4.0, 30.0):
        text = answer(sandbox, code, timeout_s=timeout_s, **settings)
        if text.startswith(begins):
            break
    return text.replace(f"more than {timeout_s:g} s", "its limit")


def test_at_least_one_isolation_works_on_this_machine():
    assert not isinstance(sandbox_of("auto"), str), sandbox_of("auto")


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print('a')\n1 + 1", "a\n2"),
        ("x = 3", NO_OUTPUT),
        ("None", NO_OUTPUT),
        ("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)", "out\nerr"),
        ("print('é', '\\ud800')", "é ?"),
        ("import os\nopen('a', 'w').write('kept')\nos.listdir('.')", "['a']"),
        ("if __name__ == '__main__':\n    print('main')", "main"),
        ("import sys\nsys.stdout.close()", NO_OUTPUT),
    ],
)
def test_a_call_returns_what_the_code_prints_and_its_last_value(code, printed):
    sandbox = sandbox_of("auto")
    assert answer(sandbox, code) == printed


@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero"),
        ("for", "SyntaxError: invalid syntax"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import torch", "ModuleNotFoundError: No module named 'torch'"),
        ("import os\nos._exit(3)", "Error: the code ended its process with exit code 3"),
        ("import ctypes\nctypes.string_at(0)", "Error: the process was ended by SIGSEGV"),
        ("#" * MAX_CODE_BYTES + "#", f"Error: the code has more than {MAX_CODE_BYTES} bytes"),
    ],
)
def test_an_error_of_the_code_is_an_answer_of_its_own_lines_only(code, last_line):
    text = answer(sandbox_of("auto"), code)
    assert text.splitlines()[-1] == last_line
    assert "launcher" not in text


def test_network_is_refused(sandbox):
    text = answer(
        sandbox,
        """
        import socket, urllib.request
        for reach in (
            lambda: socket.create_connection(("127.0.0.1", 9), timeout=2),
            lambda: socket.socket(socket.AF_UNIX),
            lambda: urllib.request.urlopen("http://192.0.2.1"),
        ):
            try:
                print("reached", reach())
            except OSError as error:
                print(type(error).__name__)
        """,
    )
    assert re.fullmatch(r"(PermissionError|URLError|gaierror)(\n(PermissionError|URLError)){2}", text)


def test_an_endless_loop_and_an_endless_sleep_are_ended(sandbox):
    for code in (
        "print('begun')\nwhile True: pass",
        "print('begun', flush=True)\nimport time\ntime.sleep(99)",
    ):
        text = answer_at_deadline(sandbox, code, "begun")
        assert text == "begun\n\nError: the code ran for its limit and was ended"


def test_memory_past_its_limit_is_refused(sandbox):
    code = "try:\n    x = bytearray(1 << 30)\nexcept MemoryError:\n    print('no memory')"
    assert answer(sandbox, code) == "no memory"


def test_output_without_end_is_bounded(sandbox):
    text = answer_at_deadline(sandbox, "while True: print('y' * 99)", "y" * 99, max_output_chars=1000)
    assert len(text) < 1200
    assert text.startswith("y" * 99) and text.endswith("was ended") and "left out" in text


def test_a_file_of_two_megabytes_is_refused(sandbox):
    text = answer(sandbox, "open('big', 'wb').write(bytes(2 << 20))")
    assert text.splitlines()[-1] == "OSError: [Errno 27] File too large"


def test_a_fork_bomb_ends_at_its_first_fork(sandbox):
    assert answer(sandbox, "import os\nwhile True: os.fork()").endswith(NOT_PERMITTED)
    assert answer(sandbox, "import subprocess\nsubprocess.run('ls')").endswith(NOT_PERMITTED)


def test_threads_run_and_end_with_the_call(sandbox):
    code = """
        import threading, time
        def write():
            while True:
                time.sleep(0.01)
        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads: thread.start()
        print(threading.active_count())
        """
    assert answer(sandbox, code) == "4"
    bomb = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()"
    assert answer(sandbox, bomb).endswith("RuntimeError: can't start new thread")


def test_code_cannot_leave_its_session_or_reach_other_processes(sandbox):
    code = f"""
        import os, resource
        for reach in (
            os.setsid,
            lambda: os.kill(-1, 9),
            lambda: os.kill({os.getpid()}, 0),
            lambda: os.kill(os.getppid(), 0),
            lambda: resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE),
            lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        ):
            try:
                print("reached", reach())
            except (OSError, ValueError) as error:
                print(type(error).__name__)
        """
    allowed = ("PermissionError", "ProcessLookupError", "ValueError")
    lines = answer(sandbox, code).splitlines()
    # Under bwrap the code can create a session, which ends with the PID namespace.
    if sandbox.isolation == "bwrap":
        lines = lines[1:]
    assert lines and all(line in allowed for line in lines), lines


def test_no_signal_reaches_the_trainer_and_nothing_outlives_it(sandbox):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    code = f"""
        import ctypes, fcntl, os, signal
        print(ctypes.CDLL(None).prctl(1, 0, 0, 0, 0))
        end, begin = os.pipe()
        try:
            fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGUSR1)
            fcntl.fcntl(end, fcntl.F_SETFL, os.O_ASYNC)
            fcntl.fcntl(end, fcntl.F_SETOWN, {os.getpid()})
            os.write(begin, b"x")
            print("sent")
        except OSError as error:
            print(type(error).__name__)
        """
    text = answer(sandbox, code)
    signal.signal(signal.SIGUSR1, before)
    assert text in ("-1\nPermissionError", "-1\nProcessLookupError") and not received


def test_files_of_the_trainer_are_hidden(sandbox, tmp_path):
    if sandbox.isolation != "bwrap" and not file_access.has_landlock():
        pytest.skip("this kernel has no Landlock")
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    code = f"""
        import os
        for reach in (
            lambda: open({str(secret)!r}).read(),
            lambda: open({str(secret)!r}, "w"),
            lambda: os.remove({str(secret)!r}),
            lambda: os.chmod({str(tmp_path)!r}, 0),
            lambda: open({launcher.__file__!r}, "a"),
            lambda: os.listdir({str(Path.home())!r}).index(".bashrc"),
        ):
            try:
                print("reached", reach())
            except (OSError, ValueError) as error:
                pass
        """
    assert answer(sandbox, code) == NO_OUTPUT
    assert secret.read_text() == "a secret"


def test_code_cannot_change_attributes_of_files_that_it_cannot_open(sandbox, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.touch(0o600)
    os.utime(secret, (1, 1))
    everyone = (
        "0200000001000600ffffffff04000600ffffffff20000600ffffffff"  # rw-rw-rw- as an access control list
    )
    code = f"""
        import os
        for change in (
            lambda: os.setxattr({str(secret)!r}, "system.posix_acl_access", bytes.fromhex({everyone!r})),
            lambda: os.utime({str(secret)!r}, (5, 5)),
        ):
            try:
                print("changed", change())
            except OSError:
                pass
        """
    assert answer(sandbox, code) == NO_OUTPUT
    assert secret.stat().st_mode & 0o777 == 0o600 and secret.stat().st_mtime == 1


def test_code_can_use_asyncio_but_no_datagrams_to_other_processes(sandbox):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"{folder}/socket")
        server.setblocking(False)
        code = f"""
            import asyncio, socket
            asyncio.run(asyncio.sleep(0))
            try:
                socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b"x", {folder + "/socket"!r})
            except OSError:
                print("refused")
            """
        assert answer(sandbox, code) == "refused"
        with pytest.raises(BlockingIOError):
            server.recv(1)


def test_nothing_is_left_after_a_call(sandbox, tmp_path):
    marker = tmp_path / "packages"
    marker.mkdir()
    own = Sandbox(PythonConfig(packages=str(marker), timeout_s=0.5), sandbox.isolation)
    tool = Python(PythonConfig(packages=str(marker), timeout_s=0.5), own)
    open_before = len(os.listdir("/proc/self/fd"))
    tool.call("import time\nopen('file', 'w')\ntime.sleep(99)")
    tool.call("1")
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert not list(Path("/tmp").glob("a2tgpo-python-*/file"))
    assert await_end_of(str(marker))
    tool.close()


def test_folders_of_any_depth_are_removed_after_a_call(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """
        import os
        os.makedirs("b/c")
        os.mkdir("locked", 0)
        os.symlink("/", "b/c/root")
        for _ in range(3000):
            open("file", "w").close()
            os.mkdir("a")
            os.chdir("a")
        print("nested")
        """
    try:
        assert answer(sandbox, code, timeout_s=60.0) == "nested"
        assert not list(tmp_path.iterdir())
    finally:  # pytest cannot remove such a folder
        subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)


def test_processes_end_with_the_trainer_even_if_it_is_killed(sandbox, tmp_path):
    marker = tmp_path / "packages"
    marker.mkdir()
    program = textwrap.dedent(
        f"""
        import time
        from a2tgpo.config.python import PythonConfig
        from a2tgpo.environment.sandbox.isolation import Sandbox
        sandbox = Sandbox(PythonConfig(packages={str(marker)!r}), {sandbox.isolation!r})
        process = sandbox.start()
        print("started", flush=True)
        process.run("import time\\ntime.sleep(99)", timeout_s=99.0, max_output_chars=100)
        """
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed trainer leaves its folders behind
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert trainer.stdout.readline() == b"started\n"
    assert str(marker) in all_commands()
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert await_end_of(str(marker))


def all_commands() -> str:
    """Return the command lines of all processes of the machine except this one."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((folder / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


def await_end_of(marker: str) -> bool:
    """Return whether, within 30 s, no process has `marker` in its command line."""
    deadline = time.monotonic() + 30
    while marker in all_commands() and time.monotonic() < deadline:
        time.sleep(0.02)
    return marker not in all_commands()


def test_calls_of_a_session_share_variables_until_their_process_is_ended():
    config = PythonConfig(stateful=True, timeout_s=30.0)
    session = PythonSession(config, sandbox_of("auto"))
    assert session.call("x = 41\ndef f(): return x + 1") == [NO_OUTPUT]
    assert session.call("f()") == ["42"]
    assert session.call("raise SystemExit") == [NO_OUTPUT]
    assert session.call("x") == ["41"]
    session._config = dataclasses.replace(config, timeout_s=0.5)
    (late,) = session.call("while True: pass")
    assert late == "Error: the code ran for more than 0.5 s and was ended; its variables are lost"
    session._config = config
    assert session.call("x")[0].endswith("NameError: name 'x' is not defined")
    session.close()


def test_code_that_pretends_to_have_ended_cannot_block_the_next_call():
    session = PythonSession(PythonConfig(stateful=True, timeout_s=1.0), sandbox_of("auto"))
    pretend = """
        import fcntl, os, time
        for pipe in range(3, 64):
            try:
                if fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
                else:
                    os.write(pipe, b".")
            except OSError:
                pass
        time.sleep(99)
        """
    session.call(textwrap.dedent(pretend))
    (late,) = session.call("#" * MAX_CODE_BYTES)
    assert late == "Error: the code ran for more than 1 s and was ended; its variables are lost"
    assert session.call("6 * 7") == ["42"]
    session.close()


def test_calls_that_are_no_session_share_nothing():
    tool = Python(PythonConfig(), sandbox_of("auto"))
    tool.call("x = 1\nopen('file', 'w')")
    assert tool.call("import os\nos.listdir('.')") == ["[]"]
    assert tool.call("x")[0].endswith("NameError: name 'x' is not defined")


def test_packages_of_the_named_folder_can_be_imported(sandbox, tmp_path):
    (tmp_path / "arithmetic").mkdir()
    (tmp_path / "arithmetic" / "__init__.py").write_text("")
    (tmp_path / "arithmetic" / "more.py").write_text("ANSWER = 42")
    (tmp_path / "json.py").write_text("raise ImportError('it hides the standard library')")
    config = PythonConfig(packages=str(tmp_path))
    own = Sandbox(config, sandbox.isolation)
    assert Python(config, own).call("import json, arithmetic.more\narithmetic.more.ANSWER") == ["42"]
    own.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
@pytest.mark.parametrize("isolation", ["namespace", "seccomp"])
def test_isolation_works_for_a_user_without_rights(isolation, tmp_path_factory):
    python = shutil.which("python3.11", path="/usr/bin") or shutil.which("python3.12", path="/usr/bin")
    if python is None:
        pytest.skip("there is no Python of the system, which such a user could read")
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    try:
        for file in (launcher.__file__, file_access.__file__, syscall_filter.__file__):
            shutil.copy(file, folder)
        inside = folder / "inside"
        inside.mkdir()
        for path in (folder, inside):
            os.chown(path, 65534, 65534)
        own = Sandbox(PythonConfig(), isolation)
        process = SandboxProcess(
            [python, "-P", "-s", "-S", "-B", str(folder / "launcher.py"), own._settings(str(inside))],
            environment={"LANG": "C.UTF-8"},
            start=functools.partial(subprocess.Popen, user=65534, group=65534, extra_groups=[]),
        )
        code = "import os\nopen('a', 'w')\nprint(os.getuid(), os.listdir('.'))\nos.fork()"
        output, end = process.run(code, timeout_s=10.0, max_output_chars=1000)
        process.close()
        own.close()
        assert end is None
        assert output.startswith("65534 ['a']\n") and output.rstrip().endswith(NOT_PERMITTED)
    finally:
        shutil.rmtree(folder)


def test_an_isolation_that_does_not_work_is_refused_in_one_line_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        build_sandbox(PythonConfig(isolation="bwrap"))
    assert str(caught.value) == (
        "python.isolation is 'bwrap', which does not work on this machine (bwrap: there is no program bwrap); "
        "see docs/tools.md for what each isolation needs"
    )
    with pytest.raises(ConfigError, match=r"python\.packages is '/nowhere'; allowed: an existing folder"):
        build_sandbox(PythonConfig(packages="/nowhere"))


@pytest.mark.parametrize("isolation", ["namespace", "seccomp"])
def test_a_full_disk_fails_the_call_and_not_the_run(isolation, monkeypatch):
    def refuse(prefix):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    tool = Python(PythonConfig(), Sandbox(PythonConfig(), isolation))
    with pytest.raises(ToolError, match="no folder for the code: No space left on device"):
        tool.call("1")


def test_a_process_that_does_not_start_says_why():
    with pytest.raises(SandboxError, match="No such file"):
        SandboxProcess(["/no/such/program"], environment={})
    with pytest.raises(SandboxError, match="no luck"):
        SandboxProcess(["/bin/sh", "-c", "echo no luck"], environment={})


@pytest.mark.parametrize("machine", sorted(HEADERS))
def test_the_filter_names_system_calls_by_the_numbers_of_the_kernels_headers(machine):
    if not HEADERS[machine].is_file():
        pytest.skip(f"there is no {HEADERS[machine]}")
    lines = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    numbers = {name: int(number) for name, number in lines}
    known = {
        name: number for name, number in syscall_filter.refused_calls(machine).items() if name in numbers
    }
    assert known == {name: numbers[name] for name in known}
    assert len(known) > 20


def test_bounded_output_keeps_the_beginning_and_the_end():
    output = BoundedOutput(10)
    for number in range(1000):
        output.add(f"{number:05d}".encode())
    text = output.text()
    assert text.startswith("00000") and text.endswith("00999") and len(text) < 70
    short = BoundedOutput(10)
    short.add("ééééé".encode())
    short.add("ééééé".encode())
    assert short.text() == "é" * 10
