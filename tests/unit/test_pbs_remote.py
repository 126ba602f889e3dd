# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Images on a server: found, read, and read again whatever becomes of the connection."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import traceback
from pathlib import Path

import pbs
import pbs_server
import pytest

from loopdev import errors
from loopdev.images import open_image, resolve
from loopdev.images.pbs._wire import Connection
from loopdev.images.pbs.verify import verify_image

DISK = f"{pbs.SNAPSHOT}/{pbs.DISK}"
CHUNKS = "/chunk"
CHUNK = 256 << 10


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return pbs_server.make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(tmp_path, certificate, monkeypatch):
    path, fingerprint = certificate
    monkeypatch.setenv("PBS_PASSWORD", pbs_server.PASSWORD)
    monkeypatch.setenv("PBS_FINGERPRINT", pbs_server.with_colons(fingerprint))
    with pbs_server.PbsServer(pbs.copy_store(tmp_path), path) as running:
        yield running


@pytest.fixture
def image(server):
    """An opened image that has a session, and forgets nothing: each test reads other chunks."""
    with_timeout = []

    def open_it(timeout=20.0, source=DISK, **options):
        found = resolve(source, repository=server.repository, **options)
        opened = found.open()
        opened.serve(timeout, said.append, True)
        with_timeout.append((found, opened))
        opened.said = said
        return opened

    said: list[str] = []
    yield open_it
    for found, opened in with_timeout:
        opened.close()
        found.close()


def chunks(server, path=CHUNKS):
    return server.requests(path)


# Finding it


@pytest.mark.parametrize(
    "source",
    [
        DISK,
        f"pbs:{DISK}",
        f"vm/100/latest/{pbs.DISK}",
        f"{DISK}.fidx",
    ],
)
def test_an_image_is_the_same_as_in_the_directory(server, source):
    with Opened(source, server.repository) as image:
        assert image.read(0, image.size) == pbs.disk()
    assert server.requests("/download")[0].endswith("drive-scsi0.img.fidx")  # the index first


class Opened:
    def __init__(self, source, repository=None, **options):
        self.image = open_image(source, repository=repository, **options)

    def __enter__(self):
        return self.image

    def __exit__(self, *_):
        self.image.close()


def test_one_url(server):
    url = f"pbs://{pbs_server.USER}@127.0.0.1:{server.port}/{pbs_server.STORE}/{DISK}"
    with Opened(url) as image:
        assert image.read(4 << 20, 100) == pbs.disk()[4 << 20 : (4 << 20) + 100]


@pytest.mark.parametrize(
    ("name", "namespace"),
    [
        (f"{pbs.ENCRYPTED}/{pbs.DISK}", None),
        (f"vm/101/2024-01-03T03:04:05Z/{pbs.DISK}", "test"),
        (f"{pbs.SIGNED}/{pbs.DISK}", None),
        (f"vm/102/latest/{pbs.DISK}", "test/deep"),
    ],
)
def test_with_a_key_and_in_namespaces(server, name, namespace):
    options = {"namespace": namespace, "keyfile": pbs.KEY_FILE}
    with Opened(name, server.repository, **options) as image:
        assert image.read(0, image.size) == pbs.disk()


def test_what_it_is_called(server):
    found = resolve(DISK, repository=server.repository)
    try:
        assert found.description == f"{server.repository}: {DISK}"
        assert found.name == "vm-100-2024-01-02T03-04-05Z-drive-scsi0"
        again = resolve(DISK, repository=server.repository)
        assert again.identity == found.identity
        again.close()
    finally:
        found.close()


def test_an_api_token(server, monkeypatch):
    monkeypatch.setenv("PBS_PASSWORD", pbs_server.SECRET)
    with Opened(DISK, server.token_repository) as image:
        assert image.read(image.size - 10, 10) == pbs.disk()[-10:]
    assert not server.requests("/api2/json/access")  # a token needs no login


def test_zeros_are_not_fetched(server, image):
    assert image().read(0, 4 << 20) == bytes(4 << 20)
    assert not chunks(server)


def test_verify(server):
    with Opened(DISK, server.repository) as image:
        report = verify_image(image, 2)
        assert (report.chunks, report.damaged) == (3, ())
    assert len(chunks(server)) == 3  # zeros, too, are read


# What is refused

REFUSALS = [
    (f"vm/100/2020-01-01T00:00:00Z/{pbs.DISK}", {}, errors.ImageNotFoundError, "does not exist"),
    (f"vm/100/latest/{pbs.DISK}", {"namespace": "nope"}, errors.ImageNotFoundError, "namespace"),
    (f"vm/999/latest/{pbs.DISK}", {}, errors.ImageNotFoundError, "no such group: vm/999"),
    (f"{pbs.SNAPSHOT}/other.img", {}, errors.ImageNotFoundError, "there is drive-scsi0.img"),
    (f"{pbs.SNAPSHOT}/qemu-server.conf", {}, errors.InvalidValueError, "is a small file"),
    (f"{pbs.ENCRYPTED}/{pbs.DISK}", {}, errors.EncryptionKeyError, "missing key"),
    (
        f"{pbs.ENCRYPTED}/{pbs.DISK}",
        {"keyfile": pbs.OTHER_KEY_FILE},
        errors.EncryptionKeyError,
        "wrong key",
    ),
    (DISK, {"keyfile": "/nonexistent"}, errors.EncryptionKeyError, "No such file"),
    (DISK, {"fingerprint": "00"}, errors.InvalidValueError, "is no fingerprint"),
]


@pytest.mark.parametrize(("name", "options", "error", "text"), REFUSALS)
def test_refusals(server, name, options, error, text):
    with pytest.raises(error, match=text):
        resolve(name, repository=server.repository, **options)


def test_no_such_datastore(server):
    repository = server.repository.replace(pbs_server.STORE, "store9")
    for name in (DISK, f"vm/100/latest/{pbs.DISK}"):
        with pytest.raises(errors.ImageNotFoundError, match="no such datastore"):
            resolve(name, repository=repository)


def test_a_snapshot_that_is_locked(server):
    server.locked.add("vm/100")
    with pytest.raises(errors.DeviceBusyError, match="locked by another operation"):
        resolve(DISK, repository=server.repository)


def test_a_wrong_password(server, monkeypatch):
    monkeypatch.setenv("PBS_PASSWORD", "hunter2")
    with pytest.raises(errors.AccessDeniedError, match="permission check failed") as caught:
        resolve(DISK, repository=server.repository)
    assert caught.value.exit_code == 5
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_wrong_token(server, monkeypatch):
    monkeypatch.setenv("PBS_PASSWORD", "0000")
    with pytest.raises(errors.AccessDeniedError, match="authentication failed"):
        resolve(DISK, repository=server.token_repository)


def test_an_unprivileged_token(server, monkeypatch):
    monkeypatch.setenv("PBS_PASSWORD", pbs_server.SECRET)
    server.privileges[pbs_server.TOKEN] = {"audit"}
    with pytest.raises(errors.AccessDeniedError, match="no permissions on /datastore/store1"):
        resolve(DISK, repository=server.token_repository)
    server.privileges[pbs_server.TOKEN] = set()
    with pytest.raises(errors.AccessDeniedError, match="permission check failed"):
        resolve(f"vm/100/latest/{pbs.DISK}", repository=server.token_repository)


def test_a_second_factor(server):
    server.second_factor.add(pbs_server.USER)
    with pytest.raises(errors.AccessDeniedError, match="use an API token"):
        resolve(DISK, repository=server.repository)


@pytest.mark.parametrize("secret", ["a\x00b", "a\x7fb", "ü", 'a"b', "a b;c"])
def test_a_secret_with_any_characters(server, monkeypatch, secret):
    server.tokens[pbs_server.TOKEN] = secret
    monkeypatch.setenv("PBS_PASSWORD_FILE", "/dev/null")
    read, write = os.pipe()
    os.write(write, secret.encode() + b"\n")
    monkeypatch.delenv("PBS_PASSWORD")
    monkeypatch.setenv("PBS_PASSWORD_FD", str(read))
    try:
        with Opened(DISK, server.token_repository) as image:
            assert image.size == len(pbs.disk())
    finally:
        os.close(read)
        os.close(write)


def test_no_password(server, monkeypatch):
    monkeypatch.delenv("PBS_PASSWORD")
    with pytest.raises(errors.AccessDeniedError, match="PBS_PASSWORD is not set"):
        resolve(DISK, repository=server.repository)


def test_a_password_that_systemd_has(server, monkeypatch, tmp_path):
    monkeypatch.delenv("PBS_PASSWORD")
    monkeypatch.delenv("PBS_FINGERPRINT")
    fingerprint = os.fspath(tmp_path / "proxmox-backup-client.fingerprint")
    Path(fingerprint).write_text(pbs_server.with_colons(certificate_of(server)).upper())
    (tmp_path / "proxmox-backup-client.password").write_text(pbs_server.PASSWORD + "\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with Opened(DISK, server.repository) as image:
        assert image.size == len(pbs.disk())


def certificate_of(server) -> str:
    import ssl

    pem = ssl.get_server_certificate((server.host, server.port))
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


# Whether it is the right server


def test_a_certificate_that_is_not_known_is_shown(server, monkeypatch):
    monkeypatch.delenv("PBS_FINGERPRINT")
    with pytest.raises(errors.CertificateError, match="not trusted") as caught:
        resolve(DISK, repository=server.repository)
    expected = pbs_server.with_colons(certificate_of(server))
    assert caught.value.fingerprint == expected
    assert expected in str(caught.value)
    assert not server.log  # nothing was said to it


def test_another_certificate_than_expected(server, monkeypatch):
    monkeypatch.setenv("PBS_FINGERPRINT", pbs_server.with_colons("ab" * 32))
    with pytest.raises(errors.CertificateError, match="not the expected one") as caught:
        resolve(DISK, repository=server.repository)
    assert caught.value.fingerprint == pbs_server.with_colons(certificate_of(server))
    assert not server.log
    found = resolve(DISK, repository=server.repository, fingerprint=caught.value.fingerprint)
    found.close()


def test_a_valid_certificate_needs_no_fingerprint(server, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    for fingerprint in (None, pbs_server.with_colons("ab" * 32)):
        if fingerprint is None:
            monkeypatch.delenv("PBS_FINGERPRINT")
        else:
            monkeypatch.setenv("PBS_FINGERPRINT", fingerprint)
        with Opened(DISK, server.repository) as image:
            assert image.read(image.size - 4, 4) == pbs.disk()[-4:]


def test_a_valid_certificate_of_another_host(tmp_path, monkeypatch):
    path, _ = pbs_server.make_certificate(tmp_path, "other.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    monkeypatch.setenv("PBS_PASSWORD", pbs_server.PASSWORD)
    with pbs_server.PbsServer(pbs.copy_store(tmp_path), path) as server:
        with pytest.raises(errors.CertificateError, match=r"IP address mismatch"):
            resolve(DISK, repository=server.repository)


# Servers that are none


@pytest.mark.parametrize(
    ("repository", "text"),
    [
        ("no-such-host.invalid:store1", "unknown host"),
        ("127.0.0.1:1:store1", "nothing listens"),
        ("[::1]:1:store1", "cannot be connected to|unknown host"),
    ],
)
def test_no_server(monkeypatch, repository, text):
    monkeypatch.setenv("PBS_PASSWORD", "x")
    with pytest.raises(errors.ServerError, match=text) as caught:
        resolve(DISK, repository=repository)
    assert caught.value.exit_code == 9


def test_no_tls(server):
    server.faults.plain = True
    with pytest.raises(errors.ServerError, match="does not speak TLS"):
        resolve(DISK, repository=server.repository)


def test_a_server_that_says_nothing(server, monkeypatch):
    from loopdev.images.pbs import server as module

    server.faults.hangs = True
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.3)
    begin = time.monotonic()
    with pytest.raises(errors.ServerError, match="does not answer"):
        resolve(DISK, repository=server.repository)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/api2/json/access", 500, errors.ServerError),
        ("/api2/json/access", 401, errors.AccessDeniedError),
        ("/api2/json/reader", 500, errors.ServerError),
        ("/api2/json/reader", 403, errors.AccessDeniedError),
        ("/download?file-name=index", 500, errors.ServerError),
        ("/download?file-name=drive", 500, errors.ServerError),
        ("/download?file-name=drive", 404, errors.ServerError),
    ],
)
def test_a_server_that_refuses(server, path, status, error):
    server.faults.answers[path] = (status, "out of\norder")
    with pytest.raises(error, match="out of order") as caught:
        resolve(DISK, repository=server.repository)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"garbage": b"HTTP/1.1 200 OK\r\n\r\n" * 5}, "broken the HTTP/2 protocol"),
        ({"reset_after": 100}, "connection was lost|ended the connection"),
        ({"end_after": 50}, "connection was lost|ended the connection"),
        ({"end_after": 3000}, "connection was lost|ended the connection"),
        ({"goaway_after": 0}, "has ended the session"),
        ({"wrong_length": True}, "cut off"),
    ],
    ids=str,
)
def test_a_session_that_breaks_while_it_is_found(server, fault, text):
    for name, value in fault.items():
        setattr(server.faults, name, value)
    with pytest.raises(errors.ServerError, match=text):
        resolve(DISK, repository=server.repository)


# What happens later


@pytest.mark.parametrize(
    "fault",
    [
        {"reset_after": 100_000},
        {"end_after": 200_000},
        {"end_after": 100},
        {"goaway_after": 1},
        {"answers": {CHUNKS: (500, "trouble")}},
        {"answers": {CHUNKS: (401, "download chunk not allowed")}},
        {"wrong_length": True},
        {"garbage": b"\xff" * 100},
        {"upgrade": (400, "datastore is in maintenance mode")},
        {"upgrade": (500, "trouble")},
    ],
    ids=str,
)
def test_a_connection_that_breaks_is_made_again(server, image, fault):
    disk = os.urandom(4 * CHUNK)
    pbs.make_snapshot(server.store.root, "vm/300/2024-01-02T03:04:05Z", disk, CHUNK)
    opened = image(source=f"vm/300/latest/{pbs.DISK}")
    assert opened.read(0, 10) == disk[:10]
    # Each fault twice: the try after the first one fails, too.
    server.faults = pbs_server.Faults(times=2, **fault)
    server.drop()
    assert opened.read(CHUNK, 3 * CHUNK) == disk[CHUNK:]
    assert server.faults.times == 0, "the fault did not happen"


def test_the_index_is_downloaded_again_first(server, image):
    opened = image()
    opened.read(4 << 20, 10)
    server.log.clear()
    server.drop()
    opened.read(8 << 20, 10)
    session = [path.partition("=")[0] for kind, path in server.log if kind == "H2"]
    assert session == ["/download?file-name", "/chunk?digest"]


def test_a_server_that_is_restarted(server, image):
    opened = image()
    server.stop()
    result = []
    thread = threading.Thread(target=lambda: result.append(opened.read(4 << 20, 100)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "the read did not wait"
    server.start()
    thread.join(10)
    assert result == [pbs.disk()[4 << 20 : (4 << 20) + 100]]
    assert any("connected again" in line for line in opened.said)
    assert len(opened.said) <= 4, "it says the same again and again"


def test_only_the_timeout_makes_an_error(server, image):
    opened = image(timeout=1.0)
    server.stop()
    begin = time.monotonic()
    with pytest.raises(errors.ImageReadError, match=r"nothing listens|ended the connection"):
        opened.read(4 << 20, 100)
    assert 0.9 < time.monotonic() - begin < 3
    server.start()
    deadline = time.monotonic() + 20
    while True:
        try:
            assert opened.read(4 << 20, 4) == pbs.disk()[4 << 20 : (4 << 20) + 4]
            break
        except errors.ImageReadError:
            assert time.monotonic() < deadline, "it is not well again"


@pytest.mark.parametrize("fault", ["silent", "deaf"])
def test_silence_is_noticed(server, image, fault):
    opened = image(timeout=4.0)
    opened.read(4 << 20, 10)
    setattr(server.faults, fault, True)
    timer = threading.Timer(0.5, lambda: setattr(server.faults, fault, False))
    timer.start()
    begin = time.monotonic()
    # The connection is dead: only in another one there will be an answer.
    assert opened.read(8 << 20, 10) == pbs.disk()[8 << 20 : (8 << 20) + 10]
    timer.join()
    assert time.monotonic() - begin < 4
    assert any("answer" in line for line in opened.said)


def test_a_ticket_that_has_expired(server, image):
    opened = image()
    server.valid_from = int(time.time()) + 1
    while time.time() < server.valid_from:
        pass
    server.drop()
    assert opened.read(4 << 20, 4) == pbs.disk()[4 << 20 : (4 << 20) + 4]
    assert len(server.requests("/api2/json/access")) == 2


def test_a_ticket_is_renewed_with_itself_before_it_expires(server, monkeypatch):
    from loopdev.images.pbs import server as module
    from loopdev.images.pbs.repository import parse_repository

    known = module.find_server(parse_repository(server.repository))
    rest = module.Rest(known)
    rest.get("version")
    server.users[pbs_server.USER] = "changed"  # so that only the ticket can do it
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 3700)
    rest.get("version")
    assert len(server.requests("/api2/json/access")) == 2
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 3700 + 7200)
    with pytest.raises(errors.AccessDeniedError, match="was refused"):
        rest.get("version")
    rest.close()


def test_the_snapshot_is_removed_while_it_is_mapped(server, image):
    opened = image(timeout=1.0)
    shutil.rmtree(server.store.root / pbs.SNAPSHOT)
    server.drop()
    with pytest.raises(errors.ImageReadError, match="does not exist"):
        opened.read(4 << 20, 10)


def test_another_snapshot_in_its_place_is_not_read(server, image):
    opened = image(timeout=1.0)
    pbs.make_snapshot(server.store.root, pbs.SNAPSHOT, b"other" * 900_000, 4 << 20)
    server.drop()
    with pytest.raises(errors.ImageReadError, match="is not the one any more"):
        opened.read(4 << 20, 10)


# What is wrong with a chunk is that chunk's alone


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"wrong_bytes": True}, "checksum"),
        ({"too_much": (16 << 20) + 45}, "more than"),
        ({"too_much": 1000}, "magic number"),
        ({"answers": {CHUNKS: (400, 'reading file "x" failed')}}, "reading file"),
    ],
    ids=str,
)
def test_a_damaged_chunk(server, image, fault, text):
    opened = image()
    server.faults = pbs_server.Faults(times=1, **fault)
    begin = time.monotonic()
    with pytest.raises(errors.ImageReadError, match=text) as caught:
        opened.read(4 << 20, 10)
    assert time.monotonic() - begin < 5
    assert (caught.value.offset, caught.value.length) == (4 << 20, 4 << 20)
    assert opened.read(4 << 20, 10) == pbs.disk()[4 << 20 : (4 << 20) + 10]


def test_another_chunk_than_was_asked_for(server, image):
    opened = image()
    server.faults.swap = opened.index.digest(2).hex()
    with pytest.raises(errors.ImageReadError, match=r"bytes, not 4194304|decompress"):
        opened.read(4 << 20, 10)


def test_a_chunk_that_the_server_lost(server, image):
    opened = image()
    digest = opened.index.digest(1).hex()
    (server.store.root / ".chunks" / digest[:4] / digest).unlink()
    with pytest.raises(errors.ImageReadError, match=r"reading file .* failed"):
        opened.read(4 << 20, 10)
    assert opened.read(8 << 20, 10) == pbs.disk()[8 << 20 : (8 << 20) + 10]


# Many at once


def big_store(server, count=24):
    """Add a snapshot of many small chunks that are all different."""
    data = b"".join(bytes([n + 1]) * 4096 for n in range(count))
    pbs.make_snapshot(server.store.root, "vm/200/2024-01-02T03:04:05Z", data, 4096)
    return data


def test_many_threads_in_one_session_whatever_the_servers_limit(server, image):
    server.max_streams = 3
    data = big_store(server)
    opened = image(source=f"vm/200/latest/{pbs.DISK}")
    server.faults.latency = 0.02
    results: dict[int, bytes] = {}

    def read(n):
        results[n] = opened.read(n * 4096, 4096)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(results[n] for n in range(24)) == data
    assert len(server.requests("/api2/json/reader")) == 1
    assert len(chunks(server)) == 24


def test_many_threads_while_connections_break(server, image):
    data = big_store(server)
    opened = image(source=f"vm/200/latest/{pbs.DISK}", timeout=60.0)
    server.faults = pbs_server.Faults(end_after=20_000, times=10)
    results: dict[int, bytes] = {}

    def read(n):
        for number in (n, (n + 7) % 24, (n + 13) % 24):
            results[number] = opened.read(number * 4096, 4096)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(results[n] for n in range(24)) == data
    assert server.faults.times < 10


@pytest.fixture
def far(monkeypatch):
    """As if each server were 25 ms away."""
    monkeypatch.setattr(Connection, "delay", 0.025)


def read_all(opened, order):
    """Read chunks of 4096 bytes by a thread for each; return them by number."""
    results: dict[int, bytes] = {}

    def read(n):
        results[n] = opened.read(n * 4096, 4096)

    threads = [threading.Thread(target=read, args=(n,)) for n in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wait_for_sessions(server, count):
    deadline = time.monotonic() + 10
    while len(server.requests("/download?file-name=drive")) < count:
        assert time.monotonic() < deadline


@pytest.mark.usefixtures("far")
def test_a_server_that_is_far_has_more_connections(server, image):
    data = big_store(server)
    opened = image(source=f"vm/200/latest/{pbs.DISK}")
    assert opened.read(0, 4096) == data[:4096]
    wait_for_sessions(server, 3)
    server.faults.latency = 0.05
    found = read_all(opened, range(1, 24))
    assert b"".join(found[n] for n in range(1, 24)) == data[4096:]
    assert len(chunks(server)) == 24, "each is fetched once"
    assert server.sessions == 3
    # Each that has its share leaves the others theirs.
    assert server.busiest < 23


@pytest.mark.usefixtures("far")
def test_one_connection_of_several_breaks(server, image):
    data = big_store(server)
    opened = image(source=f"vm/200/latest/{pbs.DISK}")
    assert opened.read(0, 4096) == data[:4096]
    wait_for_sessions(server, 3)
    server.faults = pbs_server.Faults(latency=0.02, end_after=20_000, times=1)
    found = read_all(opened, range(24))
    assert b"".join(found[n] for n in range(24)) == data
    assert server.faults.times == 0, "the fault did not happen"
    wait_for_sessions(server, 4)


@pytest.mark.usefixtures("far")
def test_several_connections_that_are_all_gone_are_made_again(server, image):
    data = big_store(server)
    opened = image(source=f"vm/200/latest/{pbs.DISK}")
    assert opened.read(0, 4096) == data[:4096]
    wait_for_sessions(server, 3)
    server.drop()
    assert read_all(opened, [5]) == {5: data[5 * 4096 : 6 * 4096]}
    wait_for_sessions(server, 6)


@pytest.mark.usefixtures("far")
def test_several_connections_end_together(server, image):
    opened = image(source=f"vm/100/latest/{pbs.DISK}")
    opened.read(4 << 20, 10)
    opened.close()
    deadline = time.monotonic() + 5
    while server.sessions:
        assert time.monotonic() < deadline


def test_the_session_goes_to_one_process(server):
    """Of two forked processes one goes on with the session in which the image was found."""
    found = resolve(DISK, repository=server.repository)
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                opened = found.open()
                opened.serve(20.0, lambda _: None, True)
                code = 0 if opened.read(4 << 20, 4 << 20) == pbs.disk()[4 << 20 : 8 << 20] else 1
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    found.close()
    assert codes == [0, 0]
    assert len(server.requests("/api2/json/reader")) == 2  # and not 3
    assert len(server.requests("/api2/json/access")) == 1  # the ticket is everybody's


def test_an_image_goes_on_with_the_session_in_which_it_was_found(server):
    with Opened(DISK, server.repository) as image:
        image.read(4 << 20, 10)
    assert len(server.requests("/api2/json/reader")) == 1


def test_the_first_chunk_comes_with_the_index(server):
    data = os.urandom(2 * CHUNK)
    pbs.make_snapshot(server.store.root, "vm/300/2024-01-02T03:04:05Z", data, CHUNK)
    found = resolve(f"vm/300/latest/{pbs.DISK}", repository=server.repository)
    deadline = time.monotonic() + 5
    while not chunks(server):
        assert time.monotonic() < deadline
    opened = found.open()
    assert opened.read(0, 2 * CHUNK) == data
    assert len(chunks(server)) == 2  # and not three
    opened.close()
    found.close()


def test_a_session_that_nobody_wanted_ends(server):
    found = resolve(DISK, repository=server.repository)
    found.close()
    deadline = time.monotonic() + 5
    while server.sessions:
        assert time.monotonic() < deadline


def test_secrets_are_nowhere(server, monkeypatch):
    monkeypatch.setenv("PBS_PASSWORD", "s3cr3t")
    server.users[pbs_server.USER] = "s3cr3t"
    found = resolve(DISK, repository=server.repository)
    opened = found.open()
    ticket = found.server._ticket
    assert ticket
    for what in (found, opened, found.server):
        assert "s3cr3t" not in repr(what) + str(what)
        assert ticket not in repr(what) + str(what)
    opened.close()
    found.close()
