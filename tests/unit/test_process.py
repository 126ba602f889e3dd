# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What a process makes of itself, as others see it: ps, /proc, and the environment it keeps."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import timeit

import pytest

from loopdev.errors import KernelError
from loopdev.kernel import libc, membarrier

START = "import os, sys; from loopdev.kernel import process as p; "


def run(program: str, *arguments: str, **options) -> list[str]:
    """Run a program in a new process and return the lines it prints."""
    command = [sys.executable, "-c", START + program, *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, **options
    ).stdout.splitlines()


SHOW = "os.system(f'ps -ww -o comm= -o args= -p {os.getpid()}'); print(os.environ['KEPT'])"


def test_title():
    lines = run(
        "print(p.set_title('loopdev: map disk.img')); " + SHOW,
        "an argument",
        env={**os.environ, "KEPT": "kept"},
    )
    ps = " ".join(line.rstrip() for line in lines if "loopdev" in line)
    assert "True" in lines
    assert ps.split() == ["loopdev:", "map", "di", "loopdev:", "map", "disk.img"]
    assert lines[-1] == "kept"


def test_a_long_title_is_cut_and_leaves_the_environment_alone():
    program = (
        "p.set_title('loopdev' * 1000); print(open('/proc/self/cmdline').read().rstrip(chr(0))); "
        "print(open('/proc/self/environ').read().count('KEPT=kept'))"
    )
    shown, kept = run(program, env={**os.environ, "KEPT": "kept"})
    room = len("\0".join((sys.executable, "-c", START + program)))
    assert shown == ("loopdev" * 1000)[:room]
    assert kept == "1"


def test_a_title_can_be_set_again_and_in_a_child():
    program = (
        "p.set_title('a long title, it is'); os.fork() or (p.set_title('short'), "
        "print(open('/proc/self/cmdline').read().rstrip(chr(0)), flush=True), os._exit(0)); "
        "os.wait(); print(open('/proc/self/cmdline').read().rstrip(chr(0)))"
    )
    assert run(program) == ["short", "a long title, it is"]


def test_titles_of_odd_characters():
    program = "print(p.set_title('b\\xfccher\\0\\udcff')); print(open('/proc/self/comm').read())"
    assert run(program)[:2] == ["True", "bücher ?"]


def test_oom_score():
    program = "print(p.protect_from_oom(700), open('/proc/self/oom_score_adj').read())"
    assert run(program)[0] == "True 700"
    assert run("print(p.protect_from_oom(5000))") == ["False"]


def may_use_resources() -> bool:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> 24 & 1)  # CAP_SYS_RESOURCE


def test_what_needs_a_capability_says_whether_it_worked():
    program = (
        "from loopdev.kernel import libc; "
        "print(p.protect_from_oom(-500), p.set_io_flusher(), libc.call('prctl', 58, 0, 0, 0, 0))"
        if may_use_resources()
        else "print(p.protect_from_oom(-500), p.set_io_flusher())"
    )
    expected = "True True 1" if may_use_resources() else "False False"
    assert run(program) == [expected]


def test_libc_passes_64_bits():
    """An offset beyond 32 bits arrives whole."""
    fd = os.memfd_create("loopdev-test")
    try:
        assert libc.call("fallocate", fd, 0, 5 << 32, 4096) == 0
        assert os.fstat(fd).st_size == (5 << 32) + 4096
    finally:
        os.close(fd)


def test_libc_reports_errno_and_remembers_functions():
    for _ in range(2):
        with pytest.raises(FileNotFoundError) as caught:
            libc.call("chdir", b"/there/is/none")
        assert caught.value.errno == errno.ENOENT
        assert libc.call("getpid") == os.getpid()
    with pytest.raises(OSError, match="no_such_function"):
        libc.call("no_such_function")


def test_libc_costs_little_to_import():
    assert run("print('ctypes' in sys.modules, '_ctypes' in sys.modules)") == ["False True"]


def test_barrier():
    membarrier.register()
    membarrier.register()
    membarrier.barrier()
    assert timeit.timeit(membarrier.barrier, number=100) < 1


def test_no_barrier(monkeypatch):
    monkeypatch.setattr(membarrier, "_NUMBERS", {})
    with pytest.raises(KernelError, match="no membarrier") as caught:
        membarrier.register()
    assert caught.value.errno == errno.ENOSYS
    monkeypatch.undo()
    monkeypatch.setattr(membarrier, "_GLOBAL_EXPEDITED", 1 << 20)
    with pytest.raises(KernelError, match="EINVAL"):
        membarrier.barrier()
