# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``loopdev``: what each subcommand does and prints, against sysfs and losetup(8)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import bound_to, counting_bytes
from oracle import losetup, make_gpt, partitions, run, sysfs, wait_until
from test_bad_input import (
    ODD_NAMES,
    exists,
    files_bound,
    free_number,
    in_namespace,
    is_bound,
    plain,
)

import loopdev as package

COMMAND = os.path.join(os.path.dirname(sys.executable), "loopdev")
COMMANDS = (
    *("attach", "detach", "list", "info", "holders"),
    *("resize", "rescan", "remove", "completion"),
)
MIB = 1 << 20
LOOP_GET_STATUS64 = 0x4C05
TABLE = "label: gpt\nstart=2048,size=4096,name=one\nstart=8192,size=4096,name=two\n"
TYPE = "0fc63daf-8483-4772-8e79-3d69d8477de4"  # what sfdisk takes for Linux data


# What the tests of wrong input use as well.


def loopdev(*words: object, **options) -> subprocess.CompletedProcess[str]:
    """Run the command, for at most 60 seconds."""
    options = {"capture_output": True, "timeout": 60, "errors": "surrogateescape", **options}
    arguments = [word if isinstance(word, bytes) else str(word) for word in words]
    return subprocess.run([COMMAND, *arguments], **options)


def ok(*words: object, **options) -> str:
    """Run the command, which must succeed and say nothing but its result."""
    done = loopdev(*words, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], exit_code: int, reason: str = "") -> str:
    """Check that a command failed with one clear message, and return it."""
    if done.returncode == 0 and done.stdout.startswith("/dev/loop"):
        run("losetup", "-d", done.stdout.strip())
    assert done.returncode == exit_code, done
    assert done.stdout == ""
    assert re.fullmatch(r"loopdev: [^\n]+\n", done.stderr), done.stderr
    assert done.stderr[:-1].isprintable()
    assert re.search(reason, done.stderr), done.stderr
    return done.stderr


def misused(done: subprocess.CompletedProcess[str], reason: str = "") -> None:
    """Check that a command complained about its arguments."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: loopdev")
    assert re.search(f"error: .*{reason}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def number_of(path: str) -> int:
    assert re.fullmatch(r"/dev/loop[0-9]+", path)
    return int(path.removeprefix("/dev/loop"))


def diskseq(path: str) -> str | None:
    return sysfs(number_of(path), "diskseq")


@contextlib.contextmanager
def attached(*words: object, **options):
    """Attach with the command, yield the device, and have losetup(8) detach what is left."""
    out = ok("attach", *words, **options)
    path = out.removesuffix("\n")
    number, seen = number_of(path), diskseq(path)
    try:
        yield path
    finally:
        if is_bound(number) and diskseq(path) == seen:
            run("losetup", "-d", path)
            wait_until(lambda: not is_bound(number) or diskseq(path) != seen)
        if number >= 1000 and exists(number):
            loopdev("remove", number)


def as_json(*words: object):
    return json.loads(ok(*words, "--json"))


@contextlib.contextmanager
def held_open(path: str):
    """A process that has the device open, until the block ends."""
    with open(path, "rb", buffering=0) as device:
        process = subprocess.Popen(["sleep", "1000"], stdin=device)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def mounted(path: str, directory: Path):
    """A filesystem on a device, mounted on a directory until the block ends."""
    run("mkfs.ext4", "-q", path)
    directory.mkdir()
    run("mount", path, directory)
    try:
        yield directory
    finally:
        if directory.is_mount():
            run("umount", directory)


# attach


def test_attach_prints_the_device_alone(counting_file):
    with attached(counting_file) as path:
        seen = losetup(path)
        assert seen["back-file"] == str(counting_file)
        assert seen["autoclear"] is seen["ro"] is seen["partscan"] is False
        assert (seen["offset"], seen["sizelimit"]) == (0, 0)
        assert Path(path).read_bytes() == counting_bytes(0, 128 << 10)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-o", "4096"], {"offset": 4096}),
        (["-o4096"], {"offset": 4096}),
        (["--offset=4KiB"], {"offset": 4096}),
        (["--offset", "4K"], {"offset": 4096}),
        (["-o", "1MiB"], {"offset": MIB}),
        (["--offset=1MiB"], {"offset": MIB}),
        (["--sizelimit", "1M"], {"sizelimit": MIB}),
        (["--sizelimit=128KB"], {"sizelimit": 128000}),
        (["-o", "1M", "--sizelimit", "64K"], {"offset": MIB, "sizelimit": 65536}),
        (["-b", "4096"], {"log-sec": 4096}),
        (["--sector-size=512"], {"log-sec": 512}),
        (["--sector-size", "1K"], {"log-sec": 1024}),
        (["-r"], {"ro": True}),
        (["--read-only"], {"ro": True}),
        (["-P"], {"partscan": True}),
        (["--partscan"], {"partscan": True}),
        (["-Pr"], {"partscan": True, "ro": True}),
        (["-rPo1M"], {"partscan": True, "ro": True, "offset": MIB}),
        (["--direct-io"], {"dio": True}),
        (["--direct-io=on"], {"dio": True}),
        (["--direct-io=off"], {"dio": False}),
        (["--no-lock", "-P"], {"partscan": True}),
        (["--timeout", "1"], {}),
        (["--timeout=0.5", "--force"], {}),
        (["--"], {}),
        (["-r", "--direct-io=off", "-b", "512", "--"], {"ro": True, "dio": False, "log-sec": 512}),
    ],
    ids=" ".join,
)
def test_attach_options(image, words, expected):
    """Each sets what it names, and nothing else."""
    with attached(*words, image) as path:
        seen = losetup(path)
        defaults = {"offset": 0, "sizelimit": 0, "ro": False, "partscan": False, "autoclear": False}
        for name, value in {**defaults, **expected}.items():
            assert seen[name] == value, name


def test_attach_options_after_the_file(image):
    with attached(image, "-r", "-o", "1M") as path:
        seen = losetup(path)
        assert (seen["ro"], seen["offset"]) == (True, MIB)


@pytest.mark.parametrize("text", ["512", "1k", "1K", "3KiB", "128KB", "1m", "1M", "2MiB", "2M"])
def test_sizes_are_those_of_losetup(image, text):
    theirs = run("losetup", "--show", "-f", "-r", "-o", text, image).strip()
    try:
        expected = losetup(theirs)["offset"]
    finally:
        run("losetup", "-d", theirs)
    with attached("-o", text, image) as path:
        assert losetup(path)["offset"] == expected


def loop_ref(path: str) -> bytes:
    with open(path, "rb", buffering=0) as device:
        status = fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(232))
    return status[56:120].split(b"\0")[0]


def test_attach_loop_ref(image):
    with attached("--loop-ref", "my image", image) as path:
        assert loop_ref(path) == b"my image"
        assert as_json("info", path)[0]["loop_ref"] == "my image"
    with attached(image) as path:
        assert loop_ref(path) == os.fsencode(image)[:63]


def test_attach_partscan(image):
    make_gpt(image, TABLE)
    with attached("-P", image) as path:
        number = number_of(path)
        expected = {1: (MIB, 2 * MIB), 2: (4 * MIB, 2 * MIB)}
        assert partitions(number) == expected
        for part, (_, size) in expected.items():
            assert run("blockdev", "--getsize64", f"{path}p{part}").strip() == str(size)
        ok("detach", path)
        assert files_bound(image.parent) == []


def test_attach_without_partscan_makes_no_nodes(image):
    make_gpt(image, TABLE)
    with attached(image) as path:
        assert partitions(number_of(path)) == {}


def test_attach_json(image, sector_size):
    make_gpt(image, TABLE)
    out = json.loads(ok("attach", "--json", "-P", "-b", sector_size, image))
    path = out["path"]
    try:
        assert out == as_json("list", path)[0] | {"partitions": out["partitions"]}
        assert out["backing_file"] == losetup(path)["back-file"] == str(image)
        assert {part["number"]: (part["start"], part["size"]) for part in out["partitions"]} == (
            partitions(number_of(path))
        )
    finally:
        run("losetup", "-d", path)


def test_attach_twice_gives_two_devices(image):
    with attached(image) as first, attached(image) as second:
        assert first != second
        assert files_bound(image.parent) == sorted([first, second])


def test_attach_reuse(image):
    with attached("--reuse", image) as first:
        seen = losetup(first), diskseq(first)
        assert ok("attach", "--reuse", image) == f"{first}\n"
        assert (losetup(first), diskseq(first)) == seen
        assert files_bound(image.parent) == [first]
        # Another part of the file is another device.
        with attached("--reuse", "-o", "1M", image) as second:
            assert second != first


def test_attach_number(image):
    with free_number() as number, attached("--number", number, image) as path:
        assert path == f"/dev/loop{number}"
        assert losetup(path)["back-file"] == str(image)
        ok("detach", path)
        assert not exists(number)
        assert not os.path.exists(path)


@pytest.mark.parametrize("form", ["{}", "loop{}", "/dev/loop{}"])
def test_attach_number_forms(image, form):
    with free_number() as number, attached("-n", form.format(number), image) as path:
        assert path == f"/dev/loop{number}"


@pytest.mark.parametrize("name", ["-r", "--json", "--direct-io", "-o=1", "--", "-1", "--version"])
def test_attach_file_that_looks_like_an_option(tmp_path, name):
    path = plain(tmp_path)
    path.rename(tmp_path / name)
    with attached("--", name, cwd=tmp_path) as device:
        assert losetup(device)["back-file"] == str(tmp_path / name)


def test_attach_relative_path(image):
    with attached(image.name, cwd=image.parent) as path:
        assert losetup(path)["back-file"] == str(image)


def test_attach_by_descriptor(counting_file):
    """A deleted file can be attached by one that the command inherits."""
    with open(counting_file, "r+b") as file:
        counting_file.unlink()
        fd = file.fileno()
        with attached(f"/dev/fd/{fd}", pass_fds=[fd]) as path:
            assert losetup(path)["back-file"] == f"{counting_file} (deleted)"
            assert Path(path).read_bytes() == counting_bytes(0, 128 << 10)


# list and info

KEYS = [
    *("path", "number", "backing_file", "offset", "sizelimit", "size", "sector_size"),
    *("read_only", "autoclear", "partscan", "direct_io", "diskseq", "loop_ref", "partitions"),
]
SAME = {
    "path": "name",
    "backing_file": "back-file",
    "offset": "offset",
    "sizelimit": "sizelimit",
    "sector_size": "log-sec",
    "read_only": "ro",
    "autoclear": "autoclear",
    "partscan": "partscan",
    "direct_io": "dio",
}


@pytest.mark.parametrize("command", ["list", "info"])
def test_json_says_what_others_say(image, sector_size, command):
    make_gpt(image, TABLE)
    words = ["-P", "-b", sector_size]
    if sector_size == 4096:
        words += ["-r", "--sizelimit", "16M", "--loop-ref", "x", "--direct-io=off"]
    with attached(*words, image) as path:
        (found,) = as_json(command, path)
        assert list(found) == KEYS
        seen = losetup(path)
        for ours, theirs in SAME.items():
            assert (type(found[ours]), found[ours]) == (type(seen[theirs]), seen[theirs]), ours
        number = number_of(path)
        assert found["number"] == number
        assert str(found["size"]) == run("blockdev", "--getsize64", path).strip()
        assert str(found["diskseq"]) == sysfs(number, "diskseq")
        assert os.fsencode(found["loop_ref"]) == loop_ref(path)
        parts = found["partitions"]
        assert {part["number"]: (part["start"], part["size"]) for part in parts} == (
            partitions(number)
        )
        assert [part["path"] for part in parts] == [f"{path}p1", f"{path}p2"]
        assert {tuple(part) for part in parts} == {
            ("number", "path", "start", "size", "type", "name", "uuid")
        }


def test_info_has_what_the_table_says(image):
    make_gpt(image, TABLE)
    with attached("-P", image) as path:
        (found,) = as_json("info", path)
        table = json.loads(run("sfdisk", "--json", image))["partitiontable"]["partitions"]
        assert [
            (part["name"], part["type"].upper(), part["uuid"].upper())
            for part in found["partitions"]
        ] == [(part["name"], part["type"], part["uuid"]) for part in table]
        text = ok("info", path)
        for word in ("one", "two", TYPE, f"{path}p2", str(image)):
            assert word in text


def test_info_for_people(image):
    with attached("-r", "-o", "1M", image) as path:
        lines = ok("info", path).splitlines()
        values = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert values["path"] == path
        assert values["offset"] == f"{MIB} (1M)"
        assert values["read only"] == "yes"
        assert values["backing file"] == str(image)


def test_list_is_a_table(image, counting_file):
    with attached("-r", image) as first, attached("-o", "4K", counting_file) as second:
        lines = ok("list", first, second).splitlines()
        assert len(lines) == 3
        assert lines[0].split()[:6] == ["NAME", "SIZE", "OFFSET", "SIZELIMIT", "SECTOR", "RO"]
        rows = {line.split()[0]: line.split() for line in lines[1:]}
        assert rows[first][1:3] == ["16M", "0"]
        assert rows[first][5] == "yes"
        assert rows[second][1:3] == ["124K", "4096"]
        assert rows[second][5] == "no"
        assert [rows[first][-1], rows[second][-1]] == [str(image), str(counting_file)]
        # The last column begins where its title does.
        column = lines[0].index("BACKING FILE")
        assert all(line[column - 1] == " " and line[column] == "/" for line in lines[1:])


def test_list_of_all_has_every_device_of_losetup(image):
    with attached(image) as path:
        found = {device["path"]: device for device in as_json("list")}
        assert found[path]["backing_file"] == str(image)
        assert [device["number"] for device in found.values()] == sorted(
            device["number"] for device in found.values()
        )
        assert f"{path} " in ok("list")


@pytest.mark.parametrize(("words", "expected"), [(["--json"], []), ([], None)])
def test_list_of_nothing(words, expected):
    hidden = in_namespace("mount -t tmpfs none /sys/devices/virtual/block", COMMAND, "list", *words)
    out = run(*hidden)
    assert (json.loads(out) if words else out) == (expected if words else "")


def test_list_of_one_file(image, counting_file):
    with attached(image) as first, attached("-r", image) as second, attached(counting_file):
        for name in (image, os.path.relpath(image)):
            found = [device["path"] for device in as_json("list", name)]
            assert sorted(found) == sorted([first, second])
        assert [device["path"] for device in as_json("list", first)] == [first]
        assert [device["path"] for device in as_json("list", number_of(second))] == [second]


def test_list_and_info_of_what_is_not_bound(image):
    with free_number(add=True) as number:
        assert ok("list", f"/dev/loop{number}") == ""
        assert as_json("list", number) == []
        refused(loopdev("info", number), 3, f"^loopdev: /dev/loop{number}: has no backing file")
    # A file that no device has is an answer, too.
    assert ok("list", image) == ""
    assert as_json("list", image) == []
    refused(loopdev("info", image), 3, "no loop device has this file")
    refused(loopdev("info", image.parent / "missing"), 3, "No such file")


def test_reader_that_leaves(image):
    """It is no failure of ours: no message."""
    with attached(image):
        read_end, write_end = os.pipe()
        os.close(read_end)
        try:
            done = loopdev("list", capture_output=False, stdout=write_end, stderr=subprocess.PIPE)
        finally:
            os.close(write_end)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# holders


def holders(*words: object) -> list[tuple[str, str, str, int | None]]:
    found = as_json("holders", *words)
    assert all(list(one) == ["kind", "name", "device", "pid"] for one in found)
    return [(one["kind"], one["name"], one["device"], one["pid"]) for one in found]


def test_holders_nobody(image):
    with attached(image) as path:
        assert holders(path) == []
        assert ok("holders", path) == ""


def test_holders_process(image):
    make_gpt(image, TABLE)
    with attached("-P", image) as path, held_open(path) as one, held_open(f"{path}p2") as two:
        name = os.path.basename(path)
        assert set(holders(path)) == {
            ("process", "sleep", name, one.pid),
            ("process", "sleep", f"{name}p2", two.pid),
        }
        lines = ok("holders", image).splitlines()
        assert lines[0].split() == ["DEVICE", "KIND", "PID", "NAME"]
        assert [name, "process", str(one.pid), "sleep"] in [line.split() for line in lines]


def test_holders_mount(image, tmp_path):
    with attached(image) as path, mounted(path, tmp_path / "mount point") as place:
        assert holders(path) == [("mount", str(place), os.path.basename(path), None)]
        assert str(place) in ok("holders", path)


def test_holders_mount_in_another_namespace(image, tmp_path):
    with attached(image) as path:
        run("mkfs.ext4", "-q", path)
        (place := tmp_path / "elsewhere").mkdir()
        words = in_namespace(f'mount {path} "{place}" && echo ready', "cat")
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline() == b"ready\n"
                assert not place.is_mount()
                name = os.path.basename(path)
                assert holders(path) == [("mount", str(place), name, process.pid)]
                message = refused(
                    loopdev("detach", "--timeout", "0", path), 4, re.escape(str(place))
                )
                assert str(process.pid) in message
                assert is_bound(number_of(path))
            finally:
                process.stdin.close()
                process.wait()


def test_holders_loop_device_on_top(image):
    with attached(image) as lower, attached(lower) as upper:
        name = os.path.basename(lower)
        assert holders(lower) == [("device", os.path.basename(upper), name, None)]
        refused(loopdev("detach", "--timeout", "0", lower), 4, os.path.basename(upper))
        assert is_bound(number_of(lower))
        assert losetup(lower)["autoclear"] is False


def test_holders_swap(image):
    # Swap is of the whole machine: the lowest priority, and only for a moment.
    with attached(image) as path:
        run("mkswap", path)
        if subprocess.run(["swapon", "-p", "0", path], capture_output=True).returncode != 0:
            pytest.skip("no swap may be added here")
        try:
            assert holders(path) == [("swap", path, os.path.basename(path), None)]
            refused(loopdev("detach", path), 4, f"swap {path}")
            assert is_bound(number_of(path))
        finally:
            run("swapoff", path)


def test_holders_of_what_is_no_loop_device(image):
    refused(loopdev("holders", image), 3, "no loop device has this file")
    refused(loopdev("holders", image.parent), 3, "no loop device has this file")


# resize, rescan, remove


def test_resize(image, sector_size):
    with attached("-b", sector_size, image) as path:
        os.truncate(image, 20 * MIB)
        assert run("blockdev", "--getsize64", path).strip() == str(16 * MIB)
        assert ok("resize", path) == f"{path} {20 * MIB}\n"
        assert run("blockdev", "--getsize64", path).strip() == str(20 * MIB)
        os.truncate(image, 8 * MIB)
        assert as_json("resize", image) == [{"path": path, "size": 8 * MIB}]
        assert run("blockdev", "--getsize64", path).strip() == str(8 * MIB)


def test_rescan(image):
    with attached("-P", image) as path:
        number = number_of(path)
        assert partitions(number) == {}
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", path, input=TABLE)
        assert ok("rescan", path) == f"{path}p1\n{path}p2\n"
        assert partitions(number) == {1: (MIB, 2 * MIB), 2: (4 * MIB, 2 * MIB)}
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--delete", path, "1")
        (left,) = as_json("rescan", path)
        assert (left["path"], left["start"], left["name"]) == (f"{path}p2", 4 * MIB, "two")
        assert partitions(number) == {2: (4 * MIB, 2 * MIB)}


def test_rescan_of_a_partition_in_use(image):
    make_gpt(image, TABLE)
    with attached("-P", image) as path, held_open(f"{path}p1"):
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--delete", path, "1")
        refused(loopdev("rescan", path), 4, f"^loopdev: {path}")
        assert 1 in partitions(number_of(path))


@pytest.mark.parametrize("form", ["{}", "loop{}", "/dev/loop{}"])
def test_remove(form):
    with free_number(add=True) as number:
        assert ok("remove", form.format(number)) == ""
        assert not exists(number)
        assert not os.path.exists(f"/dev/loop{number}")
        refused(loopdev("remove", form.format(number)), 3, str(number))


def test_remove_of_one_that_is_bound(image):
    with free_number() as number, attached("-n", number, image) as path:
        refused(loopdev("remove", path), 4, f"^loopdev: {path}: .*{image}")
        assert is_bound(number)


def test_remove_of_one_that_is_open():
    with free_number(add=True) as number, held_open(f"/dev/loop{number}"):
        refused(loopdev("remove", number), 4)
        assert exists(number)


@pytest.mark.parametrize("number", [1 << 20, 1 << 31, 1 << 64])
def test_remove_of_a_number_that_cannot_be(number):
    refused(loopdev("remove", number), 3, str(number))


@pytest.mark.parametrize("name", ["disk.img", "/dev/null", "loop", "", "-1"])
def test_remove_of_what_is_no_device(name):
    refused(loopdev("remove", "--", name), 2, "a loop device or its number")


# detach


@pytest.mark.parametrize("form", ["{path}", "{number}", "{file}"])
def test_detach(image, form):
    with attached(image) as path:
        number = number_of(path)
        assert ok("detach", form.format(path=path, number=number, file=image)) == ""
        assert files_bound(image.parent) == []


def test_detach_file_of_several_devices(image):
    with attached(image), attached("-o", "1M", image), attached("-r", image):
        ok("detach", image)
        assert files_bound(image.parent) == []


def test_detach_json(image, counting_file):
    with attached(image) as first, attached(counting_file) as second:
        assert as_json("detach", first, counting_file) == [
            {"path": first, "detached": True, "lazy": False},
            {"path": second, "detached": True, "lazy": False},
        ]


def test_detach_goes_on_after_a_failure(image, counting_file, tmp_path):
    """The exit code is that of the first one that failed."""
    third = tmp_path / "third.img"
    third.write_bytes(bytes(MIB))
    with (
        attached(image) as first,
        attached(counting_file) as second,
        attached(third) as busy,
        held_open(busy) as process,
    ):
        missing = tmp_path / "missing.img"
        done = loopdev("detach", "--timeout", "0", first, busy, missing, second)
        assert (done.returncode, done.stdout) == (4, "")
        one, two = done.stderr.splitlines()
        assert re.fullmatch(f"loopdev: {busy}: .*sleep.*{process.pid}.*", one)
        assert re.fullmatch(f"loopdev: {missing}: .*", two)
        assert files_bound(tmp_path) == [busy]
        assert losetup(busy)["autoclear"] is False
        done = loopdev("detach", "--timeout", "0", missing, busy)
        assert done.returncode == 3


def test_detach_of_a_mounted_device(image, tmp_path):
    with attached(image) as path, mounted(path, tmp_path / "mnt") as place:
        (place / "file").write_text("kept")
        before = losetup(path), diskseq(path)
        refused(loopdev("detach", path), 4, f"{path}: in use by mount on {place}")
        assert (losetup(path), diskseq(path)) == before
        assert (place / "file").read_text() == "kept"


def test_detach_of_a_mounted_partition(image, tmp_path):
    make_gpt(image, "label: gpt\nstart=2048,size=8192\nstart=12288\n")
    with attached("-P", image) as path, mounted(f"{path}p1", tmp_path / "mnt") as place:
        before = losetup(path), diskseq(path), partitions(number_of(path))
        refused(loopdev("detach", path), 4, re.escape(str(place)))
        assert (losetup(path), diskseq(path), partitions(number_of(path))) == before


def test_detach_lazily(image, tmp_path):
    with attached(image) as path, mounted(path, tmp_path / "mnt") as place:
        number, seen = number_of(path), diskseq(path)
        assert ok("detach", "--lazy", path) == ""
        assert is_bound(number)
        assert place.is_mount()
        run("umount", place)
        wait_until(lambda: diskseq(path) != seen or not is_bound(number))
        assert files_bound(tmp_path) == []


def test_detach_waits_for_the_last_user(image):
    with attached(image) as path, held_open(path) as process:
        words = [COMMAND, "detach", "--timeout", "60", path]
        with subprocess.Popen(words, stderr=subprocess.PIPE) as command:
            wait_until(lambda: is_waiting(command.pid))
            assert bound_to(str(image))
            process.kill()
            assert command.wait(timeout=60) == 0
            assert command.stderr.read() == b""
        assert bound_to(str(image)) == {}


def is_waiting(pid: int) -> bool:
    """Return whether a command has set up its signals and sleeps: clock_nanosleep, ppoll, ..."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
    if not caught & (1 << (signal.SIGTERM - 1)):
        return False
    return Path(f"/proc/{pid}/wchan").read_text() in ("hrtimer_nanosleep", "do_nanosleep")


def test_detach_of_what_is_not_bound(image):
    with free_number(add=True) as number:
        path = f"/dev/loop{number}"
        refused(loopdev("detach", path), 3, f"^loopdev: {path}: has no backing file")
        refused(loopdev("detach", number), 3, f"^loopdev: {path}: has no backing file")
        assert exists(number)
    refused(loopdev("detach", path), 3, f"^loopdev: {path}: ")
    refused(loopdev("detach", image), 3, f"^loopdev: {image}: no loop device has this file")


@pytest.mark.parametrize("command", ["detach", "info", "holders", "resize", "rescan"])
@pytest.mark.parametrize("name", ["/dev/null", "/dev/loop-control"])
def test_character_devices_are_no_loop_devices(command, name):
    refused(loopdev(command, name), 3, f"{name}: is not a loop device")


def test_partition_is_no_whole_device(image):
    make_gpt(image, TABLE)
    with attached("-P", image) as path:
        refused(loopdev("detach", f"{path}p1"), 3, f"{path}p1: is not a loop device")
        assert is_bound(number_of(path))


# Names that are odd.


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_name(tmp_path, name):
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.truncate(MIB)
    with attached(path) as device:
        number = number_of(device)
        raw = Path(f"/sys/block/loop{number}/loop/backing_file").read_bytes()
        assert raw == path + b"\n"
        for words in (["list", device], ["list", path]):
            out = ok(*words)
            assert len(out.splitlines()) == 2
            assert all(line.isprintable() for line in out.split("\n"))
        assert all(line.isprintable() for line in ok("info", path).split("\n"))
        for command in ("list", "info"):
            (found,) = as_json(command, path)
            assert os.fsencode(found["backing_file"]) == path
        assert holders(path) == []
        assert ok("detach", path) == ""
        assert files_bound(tmp_path) == []


def test_odd_mount_point(image, tmp_path):
    with attached(image) as path, mounted(path, tmp_path / "a\nb \t\x1b[31m\\040") as place:
        assert holders(path) == [("mount", str(place), os.path.basename(path), None)]
        out = ok("holders", path)
        assert len(out.splitlines()) == 2
        assert all(line.isprintable() for line in out.split("\n"))
        refused(loopdev("detach", path), 4, "mount on ")


def test_terminal_that_cannot_show_a_name(tmp_path):
    path = tmp_path / "bücher.img"
    path.write_bytes(bytes(MIB))
    with attached(path) as device:
        for encoding in ("ascii", "latin-1", "utf-8"):
            environ = {**os.environ, "PYTHONIOENCODING": encoding}
            for command in ("list", "info"):
                assert "cher.img" in ok(command, device, env=environ)


def test_deleted_file_by_its_former_path(image):
    with attached(image) as path:
        image.unlink()
        assert [one["path"] for one in as_json("list", image)] == [path]
        assert as_json("info", image)[0]["backing_file"] == f"{image} (deleted)"
        assert holders(image) == []
        ok("detach", image)
        assert files_bound(image.parent) == []


def test_deleted_file_by_a_path_with_links(image):
    (link := image.parent / "link").symlink_to(image.parent)
    with attached(link / image.name):
        image.unlink()
        ok("detach", link / image.name)
        assert files_bound(image.parent) == []


def test_deleted_file_of_several_devices(image):
    with attached(image), attached("-r", image):
        image.unlink()
        ok("detach", image)
        assert files_bound(image.parent) == []


def test_file_whose_name_ends_like_that_of_a_deleted_one(tmp_path):
    """It is there, and not what the other name was."""
    plain(tmp_path).rename(path := tmp_path / "disk.img (deleted)")
    with attached(path) as device:
        refused(loopdev("detach", tmp_path / "disk.img"), 3, "No such file")
        assert losetup(device)["back-file"] == str(path)


# The command as a whole.


def test_help_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for words in ([], *([command] for command in COMMANDS)):
        out = ok(*words, "--help")
        assert out.startswith("usage: loopdev")
        assert max(map(len, out.splitlines())) <= 100
        assert ok(*words, "-h") == out
        for line in out.splitlines():
            assert line == line.rstrip()
    for command in COMMANDS:
        assert f"loopdev {command}" in ok(command, "--help")
        assert f"\n    {command} " in ok("--help") or f"\n    {command}\n" in ok("--help")


def test_help_tells_the_exit_codes():
    assert re.search(r"exit codes:\n(.*\n)+.*7  no free device", ok("--help"))


def test_version():
    assert ok("--version") == f"loopdev {package.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["att", "disk.img"],
        ["--frobnicate"],
        ["list", "--frobnicate"],
        ["attach"],
        ["attach", "--off", "1", "disk.img"],
        ["attach", "one", "two"],
        ["attach", "disk.img", "--offset"],
        ["attach", "--json=yes", "disk.img"],
        ["attach", "--direct-io=perhaps", "disk.img"],
        ["attach", "-o", "1.5", "disk.img"],
        ["attach", "-o", "1X", "disk.img"],
        ["attach", "-n", "x", "disk.img"],
        ["attach", "--timeout", "soon", "disk.img"],
        ["attach", "--timeout", "nan", "disk.img"],
        ["detach"],
        ["detach", "--timeout", "-1", "disk.img"],
        ["info"],
        ["holders"],
        ["completion"],
        ["completion", "tcsh"],
    ],
    ids=" ".join,
)
def test_misuse(words):
    misused(loopdev(*words))


@pytest.mark.parametrize("command", ["list", "info"])
def test_main_can_be_called_again(command):
    """Subcommands are modules, some of them called like what Python has built in."""
    call = f"main([{command!r}, '--json', '99999'])"
    code = f"from loopdev.cli import main; first = {call}; raise SystemExit({call} != first)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(tmp_path, shell):
    script = tmp_path / "script"
    script.write_text(ok("completion", shell))
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", script.read_text())
    assert "sector-size" in script.read_text()
    if shutil.which(shell) is not None:
        run(shell, "-n", script)


@pytest.mark.parametrize("line", ["loopdev att", ""])
def test_bash_completes_a_command(tmp_path, line):
    """Also where somebody else sets the words, and not the line."""
    script = tmp_path / "script"
    script.write_text(ok("completion", "bash"))
    ask = (
        f'source "{script}"; COMP_LINE="{line}" COMP_WORDS=(loopdev att) COMP_CWORD=1; '
        'f=$(complete -p loopdev | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $f; echo "${COMPREPLY[@]}"'
    )
    assert run("bash", "-c", ask, timeout=20).split() == ["attach"]


def test_detach_by_file_leaves_another_attachment_alone(tmp_path):
    """While one device of the file is waited for, the next one is given another file."""
    image, other = plain(tmp_path), tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    with attached(image) as first, attached(image) as second:
        with open(first, "rb"):
            words = [COMMAND, "detach", "--timeout", "20", str(image)]
            command = subprocess.Popen(words, stderr=subprocess.PIPE)
            # It has let go of the first one: autoclear is set.
            wait_until(lambda: losetup(first)["autoclear"])
            run("losetup", "-d", second)
            wait_until(lambda: losetup(second) is None)
            run("losetup", second, other)
        assert command.wait(timeout=30) == 3
        assert b"another backing file" in command.stderr.read()
        command.stderr.close()
        assert losetup(second)["back-file"] == str(other)
        run("losetup", "-d", second)
