# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Repository strings and URLs, compared with vectors that other code has computed."""

from __future__ import annotations

import pbs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopdev.errors import InvalidValueError
from loopdev.images.pbs.repository import Repository, parse_repository, parse_url
from loopdev.images.pbs.resolve import resolve_image, server_repository

VECTORS = pbs.VALUES["repository"]


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" not in v], ids=lambda v: v["in"])
def test_vectors(vector):
    found = parse_repository(vector["in"])
    assert vector["auth_id"] == found.auth_id
    assert vector["auth_id_given"] == found.auth_id_given
    assert (vector["host"], vector["port"]) == (found.host, found.port)
    assert (vector["store"], vector["display"]) == (found.store, str(found))


@pytest.mark.parametrize("text", [v["in"] for v in VECTORS if "error" in v])
def test_vectors_that_are_wrong(text):
    with pytest.raises(InvalidValueError, match="is no repository"):
        parse_repository(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ab",  # 3 characters at least
        "s" * 33,
        "-store",
        "host:0:store1",
        "host:65536:store1",
        "a b@pam@host:store1",
        "root@p@host:store1",
        "root@pam!-x@host:store1",
        "host.:store1",
        "-host:store1",
        "[::1:store1",
        "store1\n",
        "h:" * 120 + "store1",
        "root@" + "x" * 250 + ":store1",
    ],
)
def test_what_is_no_repository(text):
    with pytest.raises(InvalidValueError):
        parse_repository(text)


def test_parts():
    found = parse_repository("backup@pbs!map@[2001:db8::1]:1234:store1")
    assert found.is_token
    assert found.address == "2001:db8::1"
    assert found.server == "[2001:db8::1]:1234"
    assert not parse_repository("a!b@pbs@host:store1").is_token  # that is the user's own name


@pytest.mark.parametrize(
    ("text", "display", "rest"),
    [
        ("pbs://host/store1", "host:store1", ""),
        ("pbs://host:8008/store1/", "host:8008:store1", ""),
        (
            "pbs://backup@pbs@host:8007/store1/ns/a/vm/100/latest/drive-scsi0.img",
            "backup@pbs@host:8007:store1",
            "ns/a/vm/100/latest/drive-scsi0.img",
        ),
        ("pbs://a@b@pbs!t@[::1]/store1/vm/1", "a@b@pbs!t@[::1]:8007:store1", "vm/1"),
    ],
)
def test_urls(text, display, rest):
    repository, found = parse_url(text)
    assert (display, rest) == (str(repository), found)


@pytest.mark.parametrize("text", ["pbs://", "pbs://host", "pbs:///store1/x", "pbs://host/a/b"])
def test_what_is_no_url(text):
    with pytest.raises(InvalidValueError, match="is no URL"):
        parse_url(text)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_repository, "root@pam:s3cret@host:store1"),
        (parse_repository, "root@pam:s3:cret@x@host:8007:store1"),
        (parse_url, "pbs://root@pam:s3cret@host/store1"),
    ],
)
def test_a_password_in_it_is_not_repeated(parse, text):
    with pytest.raises(InvalidValueError) as caught:
        parse(text)
    assert "s3" not in str(caught.value)
    assert "s3" not in repr(caught.value)
    assert "host" in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    try:
        found = parse_repository(text)
    except InvalidValueError:
        return
    assert isinstance(found, Repository)
    assert parse_repository(str(found)).as_dict() == found.as_dict() | {
        # What is shown says all that it says.
        "host_given": found.host_given,
        "port_given": found.port_given or found.auth_id_given,
    }


def test_a_directory_is_no_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store1").mkdir()
    assert server_repository("store1") is None
    assert server_repository(str(tmp_path)) is None
    assert server_repository("./host:store1") is None
    assert str(server_repository("store2")) == "store2"


def test_the_environment_says_it(monkeypatch):
    monkeypatch.setenv("PBS_REPOSITORY", "backup@pbs@host:store1")
    assert str(server_repository(None)) == "backup@pbs@host:8007:store1"
    assert str(server_repository("pbs://other/store1")) == "other:store1"
    monkeypatch.delenv("PBS_REPOSITORY")
    assert server_repository(None) is None


def test_a_repository_that_is_said_twice():
    with pytest.raises(InvalidValueError, match="twice"):
        resolve_image("pbs://host/store1/vm/1/latest/a.img", "host:store1")
    with pytest.raises(InvalidValueError, match="more in it"):
        server_repository("pbs://host/store1/vm/1")
