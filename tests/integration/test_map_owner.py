# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Maps that end with their owner: map_image() and --foreground; and a hundred that come and go."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from loads import Holder
from mapped import (
    COMMAND,
    MIB,
    ROOT,
    Map,
    Maps,
    empty_filesystem,
    kill,
    leftovers,
    loopdev,
    mounted,
    mounts,
    noise,
    ok,
    raw,
    read_all,
    run,
    store,
)
from oracle import wait_until

import loopdev as package
from loopdev.errors import DeviceBusyError, NameTakenError, NotMappedError


@pytest.fixture
def options(maps, tmp_path):
    """What map_image() is called with."""
    return {"name": maps.name(), "log": str(tmp_path / "log"), "workers": 2}


def test_with(options, tmp_path):
    [image] = raw(tmp_path, noise(MIB + 10))
    with package.map_image(image, **options) as mapping:
        assert (mapping.name, mapping.created) == (options["name"], True)
        assert read_all(mapping.device.path)[: MIB + 10] == noise(MIB + 10)
        assert mapping.device.size == MIB + 512
        assert mapping.name in repr(mapping)
    assert leftovers(options["name"]) == []


def test_with_a_datastore(options, tmp_path):
    source, _, repository = store(tmp_path, noise(MIB))
    with package.map_image(f"pbs:{source}", repository=str(repository), **options) as mapping:
        assert read_all(mapping.device.path) == noise(MIB)
    assert leftovers(options["name"]) == []


def test_with_and_an_exception(options, tmp_path):
    [image] = raw(tmp_path, noise(MIB))
    with pytest.raises(ZeroDivisionError), package.map_image(image, **options):
        1 / 0  # noqa: B018
    assert leftovers(options["name"]) == []


def test_with_and_somebody_else_unmaps(options, tmp_path):
    """It is what was wanted in the end, so it is no error."""
    [image] = raw(tmp_path, noise(MIB))
    with package.map_image(image, **options) as mapping:
        mapping.device.close()
        ok("unmap", options["name"])
    with pytest.raises(NotMappedError):
        mapping.unmap()


def test_with_and_the_device_is_in_use(options, tmp_path, monkeypatch):
    """It raises, but nobody has to come back: the device goes with its last user."""
    monkeypatch.setattr(
        package.Mapping.unmap,
        "__kwdefaults__",
        {
            "timeout": 0.2,
            "lazy": False,
            "force": False,
        },
    )
    [image] = raw(tmp_path, noise(MIB))
    with pytest.raises(DeviceBusyError, match="in use by"):
        with package.map_image(image, **options) as mapping:
            holder = Holder(mapping.device.path)
    assert leftovers(options["name"]) != []
    with holder:
        pass
    wait_until(lambda: leftovers(options["name"]) == [])


def test_unmap_and_busy(options, tmp_path):
    """It can be tried again; the device is open as it was."""
    [image] = raw(tmp_path, noise(MIB))
    with package.map_image(image, **options) as mapping:
        with Holder(mapping.device.path):
            with pytest.raises(DeviceBusyError):
                mapping.unmap(timeout=0.2)
            assert mapping.device.size == MIB
        mapping.unmap()
        assert leftovers(options["name"]) == []


def test_close(options, tmp_path):
    """A map that was not to stay ends when its owner lets it go."""
    [image] = raw(tmp_path, noise(MIB))
    package.map_image(image, **options).close()
    wait_until(lambda: leftovers(options["name"]) == [])


def test_persist(options, tmp_path):
    [image] = raw(tmp_path, noise(MIB))
    with package.map_image(image, persist=True, **options) as mapping:
        path = mapping.device.path
    assert read_all(path) == noise(MIB)
    with pytest.raises(NameTakenError):
        package.map_image(image, **options)
    again = package.map_image(image, once=True)
    assert (again.device.path, again.created) == (path, False)
    again.close()
    assert read_all(path) == noise(MIB)
    package.unmap(path)
    assert leftovers(options["name"]) == []


def test_maps_and_gc(options, tmp_path):
    [image] = raw(tmp_path, noise(MIB))
    with package.map_image(image, **options) as mapping:
        [info] = [info for info in package.maps() if info.name == options["name"]]
        assert (info.device, info.size) == (mapping.device.path, MIB)
        assert info.status == "serving"
        [line] = [line for line in mounts_of(info.name) if line.endswith("/image")]
        device = os.stat(line).st_dev
        assert info.connection == os.minor(device)
    assert options["name"] not in {info.name for info in package.maps()}


def mounts_of(name: str) -> list[str]:
    return [target for target in mounts() if f"/{name}/" in target]


OWNER = """
import sys, time, loopdev
mapping = loopdev.map_image(sys.argv[1], name=sys.argv[2], log=sys.argv[3])
print(mapping.device.path, flush=True)
time.sleep(99)
"""


@pytest.fixture
def owned(options, tmp_path):
    """A process that has a map."""
    [image] = raw(tmp_path, noise(MIB))
    words = [sys.executable, "-c", OWNER, image, options["name"], options["log"]]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    process.mapping = Map(options["name"], process.stdout.readline().strip())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_its_process_is_killed(owned):
    assert read_all(owned.mapping.device) == noise(MIB)
    owned.kill()
    owned.mapping.wait_gone(5)


def test_its_process_is_killed_while_the_device_is_in_use(owned):
    """Nobody comes back, so the device goes with its last user."""
    with Holder(owned.mapping.device):
        owned.kill()
        owned.wait()
        time.sleep(0.5)
        assert read_all(owned.mapping.device, direct=True) == noise(MIB)
    owned.mapping.wait_gone(10)


def test_its_process_and_the_supervisor_are_killed(owned):
    """Nothing ends it, but gc and the lists tell of it."""
    kill(owned.mapping.supervisor())
    owned.kill()
    wait_until(lambda: owned.mapping.info()["status"] == "unsupervised")
    ok("unmap", owned.mapping.name)


class Foreground:
    """loopdev map --foreground, while a ``with`` lasts."""

    def __init__(self, maps: Maps, *source: object) -> None:
        self._words = [COMMAND, "map", *map(str, source), "--foreground", "--name", maps.name()]

    def __enter__(self) -> Foreground:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(self._words, **pipes)
        self.mapping = Map(self._words[-1], self.process.stdout.readline().strip())
        return self

    def end(self, timeout: float = 10) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it said."""
        said = self.process.communicate(timeout=timeout)[1]
        return self.process.returncode, said

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_foreground(maps, tmp_path, number):
    with Foreground(maps, *raw(tmp_path, noise(MIB))) as foreground:
        assert read_all(foreground.mapping.device) == noise(MIB)
        foreground.process.send_signal(number)
        assert foreground.end() == (0, "")
        assert foreground.mapping.is_gone()


def test_foreground_and_unmap(maps, tmp_path):
    """It ends with its map, whoever ends that; and is in nobody's way."""
    with Foreground(maps, *raw(tmp_path, noise(MIB))) as foreground:
        ok("unmap", foreground.mapping.device)
        assert foreground.end() == (0, "")


def test_foreground_is_killed(maps, tmp_path):
    with Foreground(maps, *raw(tmp_path, noise(MIB))) as foreground:
        foreground.process.kill()
        foreground.mapping.wait_gone(5)


def test_foreground_and_the_device_is_in_use(maps, tmp_path):
    """It says who has it and goes on; afterwards it can be unmapped by anybody."""
    with Foreground(maps, empty_filesystem(tmp_path)) as foreground:
        with mounted(foreground.mapping.device, tmp_path / "mnt", "ro,noload") as where:
            foreground.process.send_signal(signal.SIGINT)
            assert f"in use by mount on {where}" in foreground.process.stderr.readline()
            assert (where / "lost+found").is_dir()
        ok("unmap", foreground.mapping.name, "--timeout", 1)
        assert foreground.end() == (0, "")


def test_foreground_shows_messages(maps, tmp_path):
    with Foreground(maps, *raw(tmp_path, noise(MIB))) as foreground:
        kill(foreground.mapping.workers()[0])
        line = foreground.process.stderr.readline()
        assert line.startswith(f"loopdev: {foreground.mapping.name}: worker ")
        assert "was killed by signal 9" in line
        foreground.process.send_signal(signal.SIGINT)
        assert foreground.end() == (0, "")


def test_the_command_lets_go_of_everything(maps, tmp_path):
    """Whoever waits for the end of its output is not kept waiting by the map's processes."""
    name = maps.name()
    script = f"{COMMAND} map {raw(tmp_path, noise(MIB))[0]} --name {name} | cat"
    out = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=20).stdout
    mapping = Map(name, out.strip())
    here = str(tmp_path)
    for pid in mapping.processes():
        opened = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert {link for link in opened if link.startswith(here)} == {f"{here}/raw.img"}
        assert os.readlink(f"/proc/{pid}/fd/1") == "/dev/null"
    ok("unmap", name)


def test_json(maps, tmp_path):
    name = maps.name()
    [image] = raw(tmp_path, noise(MIB))
    info = json.loads(ok("map", image, "--name", name, "--json"))
    assert (info["name"], info["source"], info["status"]) == (name, str(image), "serving")
    assert (info["size"], info["errors"], info["restarts"]) == (MIB, 0, 0)
    read_all(info["device"], direct=True)
    [after] = [i for i in json.loads(ok("maps", "--json")) if i["name"] == name]
    assert after["requests"] > info["requests"]
    assert after["bytes"] >= MIB
    assert after["hits"] + after["misses"] > 0
    assert after["uptime"] > info["uptime"]
    assert re.search(rf"^{name} +{info['device']} +1M +serving ", ok("maps"), re.MULTILINE)
    ok("unmap", name)


# The soak.


SOAK = f"soak-{os.getpid()}"


def census(directory: str) -> dict[str, object]:
    """Count what could be left; of other users of this machine as little as can be."""
    names = [name for name in os.listdir(ROOT) if name.startswith((SOAK, f".new-{SOAK}"))]
    return {
        "maps": sorted(names),
        "mounts": [target for target in mounts() if f"/{SOAK}-" in target],
        "devices": run("losetup", "-l", "-n", "-O", "BACK-FILE").count(SOAK),
        "processes": run("ps", "-eo", "args").count(f"map {SOAK}"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "files": sorted(os.listdir(directory)),
        "logs": [name for name in os.listdir("/var/log") if SOAK in name],
    }


def test_soak(maps, tmp_path):
    """A hundred cycles, by the command and by the library, with reads, kills, and by force."""
    data = noise(300_000)
    image, stored = raw(tmp_path, data), store(tmp_path, data, 65536)
    before = census(str(tmp_path))
    for turn in range(100):
        source = stored if turn % 2 else image
        name = f"{SOAK}-{turn % 7}"
        maps.names.append(name)
        if turn % 5 == 4:
            words = {"repository": str(source[2])} if len(source) > 1 else {}
            with package.map_image(source[0], name=name, **words) as mapping:
                assert read_all(mapping.device.path)[: len(data)] == data
            continue
        device = ok("map", *source, "--name", name).strip()
        assert read_all(device, direct=turn % 3 == 0)[: len(data)] == data
        if turn % 10 == 3:
            kill(Map(name, device).supervisor())
        ok("unmap", name, *(("--force",) if turn % 4 == 1 else ()))
    assert census(str(tmp_path)) == before


def test_nothing_is_left_by_what_failed(maps, tmp_path):
    """Fifty maps that cannot be made, for a reason that shows late."""
    [image] = raw(tmp_path, noise(MIB))
    name = maps.name()
    for _ in range(50):
        done = loopdev("map", image, "--name", name, "--partscan", "--sector-size", 2048 * MIB)
        assert done.returncode == 2
    assert leftovers(name) == []
