# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Servers behind an HTTP proxy, as ALL_PROXY says it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback

import pbs
import pbs_server
import pytest
from http_proxy import HttpProxy

from loopdev import errors
from loopdev.images import open_image, resolve
from loopdev.images.pbs._proxy import Proxy, find_proxy, parse_proxy

DISK = f"{pbs.SNAPSHOT}/{pbs.DISK}"


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
def proxy(monkeypatch):
    with HttpProxy() as running:
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{running.port}")
        yield running


@pytest.mark.parametrize(
    ("text", "host", "port", "user"),
    [
        ("proxy", "proxy", 1080, ""),
        ("proxy:3128", "proxy", 3128, ""),
        ("http://proxy.example:1", "proxy.example", 1, ""),
        ("HTTP://proxy:65535/", "proxy", 65535, ""),
        ("10.0.0.1:8080", "10.0.0.1", 8080, ""),
        ("http://[fd00::1]:8080", "fd00::1", 8080, ""),
        ("[::1]", "::1", 1080, ""),
        ("me:secret@proxy", "proxy", 1080, "me:secret"),
        ("http://me:se@cr:et@proxy:3128", "proxy", 3128, "me:se@cr:et"),
        ("me@proxy", "proxy", 1080, "me"),
        ("me:50%25@proxy", "proxy", 1080, "me:50%25"),
    ],
)
def test_what_is_a_proxy(text, host, port, user):
    assert parse_proxy(text) == Proxy(host=host, port=port, user=user)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("socks5://me:hunter2@proxy:1080", "socks5"),
        ("https://me:hunter2@proxy", "https"),
        ("http://", "is no proxy"),
        ("http://me:hunter2@", "is no proxy"),
        ("me:hunter2@proxy:0", "is no proxy"),
        ("me:hunter2@proxy:65536", "is no proxy"),
        ("me:hunter2@proxy:port", "is no proxy"),
        ("me:hunter2@proxy/path", "is no proxy"),
        ("me:hunter2 @proxy", "is no proxy"),
        ("proxy:1:2", "is no proxy"),
        ("fd00::1", "is no proxy"),
        ("prox\r\ny", "is no proxy"),
    ],
)
def test_what_is_none(text, reason):
    with pytest.raises(errors.InvalidValueError, match=reason) as caught:
        parse_proxy(text)
    assert str(caught.value).startswith("ALL_PROXY ")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_password_is_not_shown():
    assert repr(parse_proxy("me:hunter2@proxy:3128")) == "Proxy(proxy:3128)"


@pytest.mark.parametrize("value", [None, ""])
def test_no_proxy(monkeypatch, value):
    monkeypatch.delenv("ALL_PROXY", raising=False)
    if value is not None:
        monkeypatch.setenv("ALL_PROXY", value)
    assert find_proxy() is None


def test_all_of_it_goes_through_the_proxy(server, proxy):
    image = open_image(DISK, repository=server.repository)
    assert image.read(0, 1 << 24) == pbs.disk()
    image.close()
    assert len(proxy.asked) >= 2
    assert set(proxy.asked) == {f"127.0.0.1:{server.port}"}
    assert len(server.requests("/api2/json/reader")) == 1


def test_the_proxy_looks_up_the_name(server, proxy):
    proxy.names["nowhere.invalid"] = "127.0.0.1"
    image = open_image(DISK, repository=server.repository.replace("127.0.0.1", "nowhere.invalid"))
    assert image.read(0, 512) == pbs.disk()[:512]
    image.close()
    assert set(proxy.asked) == {f"nowhere.invalid:{server.port}"}


def test_the_certificate_is_that_of_the_server(server, proxy, monkeypatch):
    monkeypatch.delenv("PBS_FINGERPRINT")
    with pytest.raises(errors.CertificateError) as caught:
        resolve(DISK, repository=server.repository)
    assert caught.value.server == f"127.0.0.1:{server.port}"


def test_a_session_is_made_again_through_it(server, proxy):
    found = resolve(DISK, repository=server.repository)
    image = found.open()
    said: list[str] = []
    image.serve(20.0, said.append, True)
    server.drop()
    assert image.read(0, 1 << 24) == pbs.disk()
    assert len(server.requests("/api2/json/reader")) == 2
    image.close()
    found.close()


def test_a_login_at_the_proxy(server, proxy, monkeypatch):
    proxy.credentials = "me:hunter2@:x"
    with pytest.raises(errors.ServerError, match=r"Proxy Authentication Required \(407\)"):
        resolve(DISK, repository=server.repository)
    monkeypatch.setenv(
        "ALL_PROXY", f"http://me:wrong hunter2@127.0.0.1:{proxy.port}".replace(" ", "")
    )
    with pytest.raises(errors.ServerError, match="407") as caught:
        resolve(DISK, repository=server.repository)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("ALL_PROXY", f"me:hunter2@:x@127.0.0.1:{proxy.port}")
    image = open_image(DISK, repository=server.repository)
    assert image.read(0, 512) == pbs.disk()[:512]
    image.close()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 403 Not\x1b[31m you\r\n\r\n", r"does not let us through: Not.* \(403\)"),
        (b"HTTP/1.1 503\r\n\r\n", r"no reason given \(503\)"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "is no HTTP proxy"),
        (b"SSH-2.0-x\r\n\r\n", "is no HTTP proxy"),
        (b"\xff" * 20000, "is no HTTP proxy"),
        (b"HTTP/1.1 200 OK\r\n", "has ended the connection"),
        (b"", "has ended the connection"),
    ],
)
def test_a_proxy_that_is_none(server, proxy, answer, text):
    proxy.answer = answer
    with pytest.raises(errors.ServerError, match=text) as caught:
        resolve(DISK, repository=server.repository)
    assert caught.value.server == f"127.0.0.1:{server.port}"
    assert f"the proxy 127.0.0.1:{proxy.port}" in caught.value.reason
    assert not server.log


def test_a_proxy_that_says_nothing(server, proxy, monkeypatch):
    from loopdev.images.pbs import server as module

    proxy.answer, proxy.stays = b"", True
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.3)
    begin = time.monotonic()
    with pytest.raises(errors.ServerError, match="does not answer"):
        resolve(DISK, repository=server.repository)
    assert time.monotonic() - begin < 5


def test_no_server_behind_the_proxy(server, proxy):
    server.stop()
    with pytest.raises(errors.ServerError, match="Bad Gateway"):
        resolve(DISK, repository=server.repository)


def test_nothing_listens_where_the_proxy_should_be(server, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "127.0.0.1:1")
    with pytest.raises(errors.ServerError, match=r"through the proxy: .*nothing listens"):
        resolve(DISK, repository=server.repository)


def test_who_has_no_proxy_imports_nothing_for_it(server):
    program = (
        "import sys, loopdev.images as images\n"
        "images.resolve(sys.argv[1], repository=sys.argv[2])\n"
        "print('loopdev.images.pbs._proxy' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ALL_PROXY"}
    done = subprocess.run(
        [sys.executable, "-c", program, DISK, server.repository],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
