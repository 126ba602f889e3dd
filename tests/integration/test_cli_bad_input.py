# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``loopdev`` and wrong input: one line on stderr, its exit code, nothing bound."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import bound_to, counting_bytes
from oracle import losetup, partitions, run, sysfs, wait_until
from test_bad_input import (
    AS_NOBODY,
    CASES,
    DAMAGED,
    MIB,
    NO_LOOP_CONTROL,
    NOBODY,
    READ_ONLY_MOUNT,
    UNWRITABLE,
    a_missing,
    damaged,
    exists,
    files_bound,
    free_number,
    in_namespace,
    is_bound,
    names,
    plain,
    public_directory,
)
from test_cli import (
    COMMAND,
    attached,
    diskseq,
    held_open,
    is_waiting,
    loopdev,
    misused,
    number_of,
    ok,
    refused,
)

# Every command that names a device.
DEVICE_COMMANDS = ["detach", "info", "holders", "list", "resize", "rescan"]


def as_words(options: dict[str, object]) -> list[str]:
    """Return the options of the command for those of attach()."""
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [option, str(value)]
    return words


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["", "json"])
@pytest.mark.timeout(60)
def test_refused(tmp_path, case, more):
    path = case.make(tmp_path)
    done = loopdev("attach", *as_words(case.options), *more, path)
    if any(isinstance(value, int) and value < 0 for value in case.options.values()):
        (option,) = case.options
        misused(done, f"--{option.replace('_', '-')}: not a valid .*'{case.options[option]}'")
    else:
        refused(done, case.exit_code, case.reason.format(file=re.escape(str(path))))
    assert files_bound(tmp_path) == []


@pytest.mark.parametrize("option", ["-o", "--sizelimit", "-b", "-n", "--timeout"])
@pytest.mark.parametrize("form", ["separate", "joined"])
def test_negative_values(image, option, form):
    joined = f"{option}=-512" if option.startswith("--") else f"{option}-512"
    words = [joined] if form == "joined" else [option, "-512"]
    misused(loopdev("attach", *words, image), f"{option}.*: not a valid .*'-512'")
    assert files_bound(image.parent) == []


def test_negative_timeout_of_detach(image):
    with attached(image) as path:
        misused(loopdev("detach", "--timeout", "-1", path), "--timeout")
        assert is_bound(number_of(path))


@pytest.mark.parametrize("command", DEVICE_COMMANDS)
@pytest.mark.parametrize("name", ["-1", "missing.img", "", "99999999999", str(1 << 64), "loop"])
def test_no_such_device(tmp_path, command, name):
    done = loopdev(command, "--", name, cwd=tmp_path)
    if command == "list" and name.isdecimal():
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return
    refused(done, 3, re.escape(name) if name else "''")


@pytest.mark.parametrize("kind", ["directory", "fifo", "file"])
@pytest.mark.parametrize("command", DEVICE_COMMANDS)
@pytest.mark.timeout(30)
def test_file_that_no_device_has(tmp_path, command, kind):
    path = tmp_path / kind
    {"directory": Path.mkdir, "fifo": os.mkfifo, "file": Path.touch}[kind](path)
    if command == "list":
        assert (ok("list", path), ok("list", "--json", path)) == ("", "[]\n")
        return
    refused(loopdev(command, path), 3, f"^loopdev: {path}: no loop device has this file")


def test_empty_path(tmp_path):
    """It is no name of the current directory."""
    refused(loopdev("attach", "", cwd=tmp_path), 3, "No such file")


@pytest.mark.parametrize("size", [1000, 4608])
def test_force_takes_a_file_that_is_too_long(tmp_path, size):
    path = plain(tmp_path, size)
    sector = 512 if size == 1000 else 4096
    with attached("--force", "-b", sector, path) as device:
        assert losetup(device)["log-sec"] == sector
        assert sysfs(number_of(device), "size") == str(size // 512)


def test_closed_descriptor():
    refused(loopdev("attach", "/dev/fd/99"), 3, "^loopdev: /dev/fd/99: No such file")


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_file_that_cannot_be_written(image, kind):
    make, _, exit_code = UNWRITABLE[kind]
    with make(image) as path:
        refused(loopdev("attach", path), exit_code, f"{path}: .*read-only")
        with attached("-r", path) as device:
            assert losetup(device)["ro"] is True


def test_file_on_a_read_only_mount(image):
    words = in_namespace(READ_ONLY_MOUNT, COMMAND, "attach", image)
    environ = {**os.environ, "PLACE": str(image.parent)}
    done = subprocess.run(words, capture_output=True, text=True, env=environ)
    refused(done, 6, f"{image}: .*read-only")
    assert files_bound(image.parent) == []


# Without the right.


def as_nobody(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process without privileges."""
    code = f"{AS_NOBODY}\nfrom loopdev.cli import entry\nentry()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [[], ["-r"]], ids=["", "read-only"])
def test_file_that_may_not_be_read(words):
    with public_directory() as place:
        path = plain(place)
        path.chmod(0)
        refused(as_nobody("attach", *words, path), 5, f"^loopdev: {path}: .*Permission denied")


def test_no_right_to_use_loop_devices(image):
    with public_directory() as place, attached(image) as device, free_number(add=True) as number:
        path = plain(place)
        os.chown(path, NOBODY, NOBODY)
        refused(as_nobody("attach", path), 5, "^loopdev: /dev/loop.*Permission denied")
        refused(as_nobody("attach", "-n", number, path), 5, "Permission denied")
        assert not is_bound(number)
        for command in ("detach", "info", "resize", "rescan"):
            refused(as_nobody(command, device), 5, f"^loopdev: {device}: .*Permission denied")
        refused(as_nobody("remove", number), 5, "Permission denied")
        assert exists(number)
        assert losetup(device)["back-file"] == str(image)


def test_listing_needs_no_right(image):
    with attached(image) as device:
        done = as_nobody("list", device)
        assert (done.returncode, done.stderr) == (0, "")
        assert device in done.stdout


@pytest.mark.parametrize("words", [["attach"], ["attach", "-n", "7000"], ["attach", "--reuse"]])
def test_no_loop_control(image, words):
    command = in_namespace(NO_LOOP_CONTROL, COMMAND, *words, image)
    done = subprocess.run(command, capture_output=True, text=True)
    refused(done, 3, "^loopdev: /dev/loop-control: .*No such file")
    assert files_bound(image.parent) == []


def test_no_loop_control_is_needed_for_a_device_that_there_is(image):
    with free_number(add=True) as number:
        make = f'mount -t tmpfs none /dev && mknod /dev/loop{number} b 7 {number} && exec "$@"'
        words = ["unshare", "-m", "sh", "-c", make, "sh", COMMAND, "attach", "-n", str(number)]
        done = subprocess.run([*words, image], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, f"/dev/loop{number}"), done.stderr
        assert files_bound(image.parent) == [f"/dev/loop{number}"]
        run("losetup", "-d", f"/dev/loop{number}")


def test_remove_without_loop_control():
    command = in_namespace(NO_LOOP_CONTROL, COMMAND, "remove", 7)
    done = subprocess.run(command, capture_output=True, text=True)
    refused(done, 3, "^loopdev: /dev/loop-control: .*No such file")


# Numbers, and loop devices as backing.


def test_wanted_device_is_taken(image, counting_file):
    with free_number() as number, attached("-n", number, image) as device:
        seen = losetup(device), diskseq(device)
        refused(loopdev("attach", "-n", number, counting_file), 4, f"{device}: .*{image}")
        assert (losetup(device), diskseq(device)) == seen
        assert files_bound(image.parent) == [device]


def test_wanted_device_is_taken_by_an_odd_file(tmp_path, image):
    path = os.fsencode(tmp_path) + b"/a\nb\x1b\xff"
    with open(path, "wb") as file:
        file.truncate(MIB)
    with free_number() as number, attached("-n", number, path):
        refused(loopdev("attach", "-n", number, image), 4, r"a\\x0ab\\x1b\\xff")
        refused(loopdev("remove", number), 4, r"a\\x0ab\\x1b\\xff")


@pytest.mark.parametrize("words", [[], ["--direct-io"]])
def test_refused_file_leaves_no_number(tmp_path, words):
    with free_number() as number:
        refused(loopdev("attach", *words, "-n", number, plain(tmp_path, 1000)), 6)
        assert not exists(number)
        assert not os.path.exists(f"/dev/loop{number}")


def test_device_on_itself():
    with free_number(add=True) as number:
        done = loopdev("attach", "-n", number, f"/dev/loop{number}")
        refused(done, 6, f"^loopdev: /dev/loop{number}: ")
        assert not is_bound(number)


def test_device_on_itself_by_way_of_another(image):
    with attached(image) as lower, attached(lower) as upper:
        done = loopdev("attach", "-n", number_of(lower), upper)
        refused(done, 4, f"^loopdev: {lower}: .*{image}")
        assert losetup(lower)["back-file"] == str(image)


def test_unbound_loop_device_as_backing():
    with free_number(add=True) as number:
        refused(loopdev("attach", f"/dev/loop{number}"), 6, f"^loopdev: /dev/loop{number}: ")


def test_bound_loop_device_as_backing(counting_file):
    with attached(counting_file) as lower, attached("-o", "4096", lower) as upper:
        assert losetup(upper)["back-file"] == lower
        assert Path(upper).read_bytes() == counting_bytes(4096, (128 << 10) - 4096)


def test_character_device_with_the_number_of_a_loop_device(image, tmp_path):
    """Numbers of character and block devices are two things: 7:N is /dev/vcsN, too."""
    with attached(image) as lower, attached(lower) as upper:
        other = tmp_path / "vcs"
        os.mknod(other, stat.S_IFCHR | 0o600, os.stat(lower).st_rdev)
        refused(loopdev("detach", other), 3)
        assert is_bound(number_of(upper))


# Damaged partition tables.


@damaged
def test_damaged_table_is_refused_with_partscan(tmp_path, make):
    path = make(tmp_path)
    refused(loopdev("attach", "-P", path), 6, f"^loopdev: {path}: .*{DAMAGED[make]}")
    assert files_bound(tmp_path) == []


@damaged
def test_damaged_table_is_no_matter_without_partscan(tmp_path, make):
    path = make(tmp_path)
    with attached(path) as device:
        assert sysfs(number_of(device), "size") == str(path.stat().st_size // 512)
        assert partitions(number_of(device)) == {}
        refused(loopdev("rescan", device), 6, f"^loopdev: {device}: .*{DAMAGED[make]}")
        assert partitions(number_of(device)) == {}


# Output that cannot be written.


def with_shell(script: str, *words: object, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    command = [shell, "-c", script, shell, COMMAND, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("where", [">&-", ">/dev/full", ">&- <&-"])
@pytest.mark.parametrize("words", [[], ["--json"], ["-P"], ["--reuse"]], ids=" ".join)
def test_attach_that_cannot_tell_the_device(image, where, words):
    """Nobody would detach it."""
    done = with_shell(f'exec "$@" {where}', "attach", *words, image)
    assert files_bound(image.parent) == []
    refused(done, 1, "^loopdev: standard output: ")


def test_attach_to_a_reader_that_left(image):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = loopdev("attach", image, capture_output=False, stdout=write_end)
    finally:
        os.close(write_end)
    assert done.returncode == 128 + signal.SIGPIPE
    assert files_bound(image.parent) == []


def test_reuse_that_cannot_tell_the_device(image):
    """It was there before, so it stays."""
    with attached(image) as device:
        seen = losetup(device), diskseq(device)
        refused(with_shell('exec "$@" >/dev/full', "attach", "--reuse", image), 1)
        assert (losetup(device), diskseq(device)) == seen


@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
@pytest.mark.parametrize("command", ["list", "info"])
def test_list_that_cannot_be_written(image, where, command):
    with attached(image) as device:
        refused(with_shell(f'exec "$@" {where}', command, device), 1, "standard output")


def test_detach_that_has_nothing_to_print(image):
    """It needs no standard output."""
    with attached(image) as device:
        done = with_shell('exec "$@" >&- <&-', "detach", device)
        assert (done.returncode, done.stderr) == (0, "")
        assert files_bound(image.parent) == []


def test_message_never_goes_to_standard_output(tmp_path):
    done = with_shell('exec "$@" 2>&-', "attach", a_missing(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("exclusive", [False, True])
def test_signal_while_detach_waits(image, number, exclusive):
    """The device is as it was: it does not go when its last user does."""
    with attached(image) as path:
        before = losetup(path), diskseq(path)
        flags = os.O_RDONLY | (os.O_EXCL if exclusive else 0)
        user = os.open(path, flags)
        try:
            words = [COMMAND, "detach", "--timeout", "60", path]
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
                wait_until(lambda: is_waiting(command.pid))
                command.send_signal(number)
                assert command.wait(timeout=30) == 128 + number
                assert command.stdout.read() == b""
                assert b"Traceback" not in command.stderr.read()
            assert (losetup(path), diskseq(path)) == before
        finally:
            os.close(user)
        assert (losetup(path), diskseq(path)) == before


def test_signal_while_a_partitioned_device_waits(tmp_path):
    """Its partitions are back as well."""
    path = plain(tmp_path, 16 * MIB)
    run("sfdisk", "-q", path, input="label: gpt\nstart=2048,size=4096\n")
    with attached("-P", path) as device:
        before = losetup(device), partitions(number_of(device))
        assert before[1] == {1: (MIB, 2 * MIB)}
        with (
            held_open(device),
            subprocess.Popen([COMMAND, "detach", "--timeout", "60", device]) as command,
        ):
            wait_until(lambda: is_waiting(command.pid))
            command.terminate()
            assert command.wait(timeout=30) == 128 + signal.SIGTERM
        assert (losetup(device), partitions(number_of(device))) == before


def test_signal_while_attach_waits(image):
    """A device that is locked is waited for; no device is bound then."""
    with free_number(add=True) as number:
        user = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_EXCL)
        try:
            words = [COMMAND, "attach", "--timeout", "60", "-n", str(number), image]
            with subprocess.Popen(words, stdout=subprocess.PIPE) as command:
                wait_until(lambda: is_waiting(command.pid))
                command.terminate()
                assert command.wait(timeout=30) == 128 + signal.SIGTERM
                assert command.stdout.read() == b""
        finally:
            os.close(user)
        assert not is_bound(number)
        assert bound_to(str(image)) == {}


def test_attach_gives_up_in_time(image):
    with free_number(add=True) as number:
        user = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_EXCL)
        try:
            done = loopdev("attach", "--timeout", "0.1", "-n", number, image)
        finally:
            os.close(user)
        refused(done, 7)
        assert exists(number)
        assert not is_bound(number)


# Names that are odd.


@pytest.mark.parametrize("command", ["attach", *DEVICE_COMMANDS])
def test_odd_name_in_a_message(tmp_path, command):
    path = os.fsencode(tmp_path) + b"/a\nb\tc\x1b[31m\xff\xc2\x9b"
    message = refused(loopdev(command, path), 3, r"a\\x0ab\\x09c\\x1b\[31m\\xff\\xc2\\x9b")
    assert message.isascii()


def test_odd_name_in_a_usage_error():
    done = loopdev("attach", "one", b"t\nw\x1b[31mo\xff")
    misused(done, "unrecognized arguments")
    assert "\x1b" not in done.stderr


def test_table_of_several_odd_files(tmp_path):
    with attached(plain(tmp_path)) as one:
        odd = os.fsencode(tmp_path) + b"/\nloop0 \x1b[2J"
        with open(odd, "wb") as file:
            file.truncate(MIB)
        with attached(odd) as two:
            lines = ok("list", one, two).splitlines()
            assert len(lines) == 3
            assert sorted(line.split()[0] for line in lines[1:]) == sorted([one, two])
