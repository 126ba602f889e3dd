# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Each way to say a password, a token's secret or a fingerprint: it works, and nobody sees it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from http_proxy import HttpProxy
from server_maps import DISK, LOOPDEV, MAPS, NAME, Maps, content, padded, wait_for

import pbs  # isort: skip - it is found through server_maps
import pbs_server  # isort: skip

WAYS = ["", "_FD", "_FILE", "_CMD", "credential"]
SECRETS = {"password": pbs_server.PASSWORD, "token": pbs_server.SECRET}
PROMPTS = {"password": "Password of backup@pbs at ", "token": "Secret of backup@pbs!map at "}
WRONG = "hunter2 hunter2"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return pbs_server.make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(tmp_path, certificate):
    path, fingerprint = certificate
    with pbs_server.PbsServer(pbs.copy_store(tmp_path), path) as running:
        running.fingerprint = pbs_server.with_colons(fingerprint)
        yield running


@pytest.fixture
def maps(server, tmp_path):
    with Maps(server, tmp_path / "map.log") as found:
        found.environment = {
            name: value for name, value in found.environment.items() if name != "PBS_PASSWORD"
        }
        yield found


def repository(maps, who: str) -> list[str]:
    server = maps.server
    text = server.repository if who == "password" else server.token_repository
    return ["--repository", text]


@dataclass
class Given:
    """What a process gets that something is said to: variables and a descriptor."""

    environment: dict[str, str]
    fds: tuple[int, ...] = ()


def give(way: str, name: str, value: str, directory: Path) -> Given:
    """Say *value* to a process, as a variable's value or by one of its other forms.

    Args:
        way: One of WAYS.
        name: Of the variable.
        value: What to say.
        directory: For what is written.
    """
    directory = directory / name
    directory.mkdir()
    if way == "_FD":
        reading, writing = os.pipe()
        os.write(writing, f"{value}\nmore\n".encode())
        os.close(writing)
        return Given({name + way: str(reading)}, (reading,))
    if way == "":
        return Given({name: value})
    credential = name.removeprefix("PBS_").lower()
    path = directory / f"proxmox-backup-client.{credential}"
    path.write_text(f"{value}\n")
    values = {
        "_FILE": {f"{name}_FILE": str(path)},
        "_CMD": {f"{name}_CMD": f"cat '{path}'"},
        "credential": {"CREDENTIALS_DIRECTORY": str(directory)},
    }
    return Given(values[way])


@pytest.fixture
def say(tmp_path):
    """A function that says something as give() does; descriptors are closed at the end."""
    fds: list[int] = []

    def say_it(way: str, name: str, value: str) -> Given:
        given = give(way, name, value, tmp_path)
        fds.extend(given.fds)
        return given

    yield say_it
    for fd in fds:
        os.close(fd)


def all_that_others_see(maps) -> bytes:
    """Return all arguments, mounts, the registry's files and the log."""
    places = [*Path("/proc").glob("[0-9]*/cmdline"), Path("/proc/self/mountinfo"), maps.log]
    places += [path for path in (MAPS / NAME).iterdir() if path.name != "image"]
    found = b""
    for place in places:
        try:
            found += place.read_bytes()
        except OSError:
            continue  # a process that is gone, a log without a line
    return found


def make_it_log_in_again(maps) -> None:
    """Take the ticket and the connections away, and wait until it is well again."""
    before = len(maps.server.requests("/api2/json/reader"))
    maps.server.valid_from = time.time() + 1
    maps.server.drop()
    wait_for(lambda: time.time() > maps.server.valid_from)
    wait_for(lambda: len(maps.server.requests("/api2/json/reader")) > before, 20)
    wait_for(lambda: maps.log.exists() and "connected again" in maps.log.read_text(), 20)


@pytest.mark.parametrize("who", SECRETS)
@pytest.mark.parametrize("way", WAYS)
def test_a_secret_by_each_way(maps, say, way, who):
    """Also when it is needed once more, long after it was said."""
    secret = SECRETS[who]
    given = say(way, "PBS_PASSWORD", secret)
    words = maps.words(DISK, *repository(maps, who))
    done = maps.run(*words, environment=given.environment, pass_fds=given.fds)
    assert done.returncode == 0, done.stderr
    assert content(done.stdout.strip()) == padded(pbs.disk())
    make_it_log_in_again(maps)
    seen = all_that_others_see(maps) + done.stdout.encode() + done.stderr.encode()
    assert secret.encode() not in seen
    assert b"CSRF" not in seen
    assert b"PBS:backup" not in seen
    maps.unmap()


def test_no_process_of_a_map_keeps_the_descriptor(maps, say):
    given = say("_FD", "PBS_PASSWORD", pbs_server.PASSWORD)
    pipe = os.readlink(f"/proc/self/fd/{given.fds[0]}")
    done = maps.run(*maps.words(DISK), environment=given.environment, pass_fds=given.fds)
    assert done.returncode == 0, done.stderr
    kept = [path for pid in maps.processes() for path in Path(f"/proc/{pid}/fd").iterdir()]
    assert len(kept) > 10
    assert pipe not in [os.readlink(path) for path in kept]


@pytest.mark.parametrize("who", SECRETS)
@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_secret_by_each_way(maps, say, way, who):
    given = say(way, "PBS_PASSWORD", WRONG)
    words = maps.words(DISK, *repository(maps, who))
    done = maps.run(*words, environment=given.environment, pass_fds=given.fds)
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1
    assert WRONG not in done.stderr
    assert not (MAPS / NAME).exists()
    assert not maps.log.exists()


@pytest.mark.parametrize("who", SECRETS)
@pytest.mark.parametrize("way", WAYS)
def test_a_traceback_has_no_secret(maps, say, way, who):
    given = say(way, "PBS_PASSWORD", WRONG)
    code = "import loopdev.images, sys; loopdev.images.resolve(sys.argv[1], repository=sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, DISK, repository(maps, who)[1]],
        env=maps.environment | given.environment | {"LOOPDEV_DEBUG": "1"},
        pass_fds=given.fds,
        capture_output=True,
        text=True,
    )
    assert "Traceback" in done.stderr
    assert "AccessDeniedError" in done.stderr
    assert WRONG not in done.stderr


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"PBS_PASSWORD_FD": "99"}, "PBS_PASSWORD_FD: [Errno 9]"),
        ({"PBS_PASSWORD_FILE": "/nowhere"}, "/nowhere: No such file"),
        ({"PBS_PASSWORD_CMD": f"sh -c 'echo {WRONG}; exit 3'"}, "PBS_PASSWORD_CMD: ended with 3"),
        ({"CREDENTIALS_DIRECTORY": "/nowhere"}, "PBS_PASSWORD is not set"),
        ({"PBS_FINGERPRINT_FILE": "/nowhere", "PBS_FINGERPRINT": None}, "/nowhere: No such file"),
    ],
)
def test_a_way_that_leads_nowhere(maps, environment, text):
    done = maps.run(*maps.words(DISK), environment=environment)
    assert done.returncode == 5
    assert text in done.stderr
    assert WRONG not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not maps.server.log


@pytest.mark.parametrize("way", WAYS)
def test_a_fingerprint_by_each_way(maps, say, way):
    given = say(way, "PBS_FINGERPRINT", maps.server.fingerprint.upper())
    environment = {"PBS_FINGERPRINT": None, "PBS_PASSWORD": pbs_server.PASSWORD}
    words = maps.words(DISK)
    done = maps.run(*words, environment=environment | given.environment, pass_fds=given.fds)
    assert done.returncode == 0, done.stderr
    assert content(done.stdout.strip()) == padded(pbs.disk())


def test_both_are_credentials(maps, tmp_path):
    for name, value in (
        ("password", pbs_server.PASSWORD),
        ("fingerprint", maps.server.fingerprint),
    ):
        (tmp_path / f"proxmox-backup-client.{name}").write_text(value)
    environment = {"PBS_FINGERPRINT": None, "CREDENTIALS_DIRECTORY": str(tmp_path)}
    done = maps.run(*maps.words(DISK), environment=environment)
    assert done.returncode == 0, done.stderr
    assert content(done.stdout.strip()) == padded(pbs.disk())


def test_a_login_at_a_proxy(maps):
    with HttpProxy() as proxy:
        proxy.credentials = "me:hunter2"
        environment = {"PBS_PASSWORD": pbs_server.PASSWORD}
        environment["ALL_PROXY"] = f"http://me:hunter2@127.0.0.1:{proxy.port}"
        done = maps.run(*maps.words(DISK), environment=environment)
        assert done.returncode == 0, done.stderr
        assert content(done.stdout.strip()) == padded(pbs.disk())
        make_it_log_in_again(maps)
        assert b"hunter2" not in all_that_others_see(maps)
        proxy.credentials = "changed"
        maps.server.drop()
        wait_for(lambda: "407" in maps.log.read_text())
        assert "hunter2" not in maps.log.read_text()
        maps.unmap()


# At a terminal


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.seen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                os.execve(words[0], words, environment)
            finally:
                os._exit(127)

    def wait_for(self, text: str) -> None:
        """Read what it writes until that came."""
        while text not in self.seen:
            more = self._read()
            assert more, self.seen
            self.seen += more

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    @property
    def shows_what_is_typed(self) -> bool:
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def end(self) -> int:
        """Read the rest, and return its exit code."""
        while more := self._read():
            self.seen += more
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> str:
        try:
            return os.read(self._fd, 4096).decode()
        except OSError:
            return ""  # EIO: nobody has the other side any more


@pytest.fixture
def ask(maps):
    """A function that runs the command at a terminal, up to its question for a secret."""

    def ask_it(who: str = "password", words: list[str] | None = None) -> Terminal:
        if words is None:
            words = maps.words(DISK, *repository(maps, who))
        terminal = Terminal([LOOPDEV, *words], maps.environment)
        terminal.wait_for(f"{PROMPTS[who]}127.0.0.1:{maps.server.port}: ")
        assert not terminal.shows_what_is_typed
        return terminal

    return ask_it


@pytest.mark.parametrize("who", SECRETS)
def test_who_sits_at_the_terminal_is_asked(maps, ask, who):
    secret = SECRETS[who]
    terminal = ask(who)
    terminal.type(f"{secret}\n")
    terminal.wait_for("/dev/loop")
    assert terminal.end() == 0
    device = terminal.seen.split()[-1]
    assert content(device) == padded(pbs.disk())
    make_it_log_in_again(maps)
    assert secret.encode() not in all_that_others_see(maps) + terminal.seen.encode()
    maps.unmap()


def test_what_is_asked_is_no_output(maps, ask, tmp_path):
    """Who uses what the command prints gets the device, and nothing else."""
    output = tmp_path / "output"
    script = 'exec "$0" "$@" >"$OUTPUT" 2>&1'
    maps.environment["OUTPUT"] = str(output)
    words = maps.words(DISK)
    terminal = Terminal(["/bin/sh", "-c", script, LOOPDEV, *words], maps.environment)
    terminal.wait_for(PROMPTS["password"])
    terminal.type(f"{pbs_server.PASSWORD}\n")
    assert terminal.end() == 0
    assert output.read_text().startswith("/dev/loop")
    assert len(output.read_text().split()) == 1


def test_lists_ask_as_well(maps, ask):
    terminal = ask(words=["snapshots", *repository(maps, "password")])
    terminal.type(f"{pbs_server.PASSWORD}\n")
    assert terminal.end() == 0
    assert pbs.SNAPSHOT in terminal.seen


@pytest.mark.parametrize("who", SECRETS)
def test_a_wrong_answer_is_the_last(maps, ask, who):
    """As with the official client: who is not believed is not asked again."""
    terminal = ask(who)
    terminal.type(f"{WRONG}\n")
    assert terminal.end() == 5
    assert terminal.seen.count(PROMPTS[who]) == 1
    assert "loopdev: 127.0.0.1" in terminal.seen
    assert WRONG not in terminal.seen
    assert not (MAPS / NAME).exists()


def test_no_answer(maps, ask):
    terminal = ask()
    terminal.type("\x04")
    assert terminal.end() == 5
    assert terminal.seen.splitlines()[1].startswith("loopdev: 127.0.0.1")
    assert "no password was given" in terminal.seen
    assert not maps.server.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_the_question(maps, ask, number):
    terminal = ask()
    if number == signal.SIGINT:
        terminal.type("half a pass\x03")
    else:
        os.kill(terminal.pid, number)
    terminal.wait_for("\n")
    wait_for(lambda: terminal.shows_what_is_typed)
    assert terminal.end() == 128 + number
    assert "Traceback" not in terminal.seen
    assert not maps.server.log
    assert not (MAPS / NAME).exists()


def test_nobody_is_asked_whether_a_certificate_is_right(maps, ask):
    """It is refused, and said how to pin it; the password was not sent."""
    del maps.environment["PBS_FINGERPRINT"]
    terminal = ask()
    terminal.type(f"{pbs_server.PASSWORD}\n")
    assert terminal.end() == 9
    assert f"its fingerprint is {maps.server.fingerprint}" in terminal.seen
    assert not maps.server.log
