# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Messages of the broker: what can be said, what is refused, and errors across the wire."""

from __future__ import annotations

import errno
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loopdev
from loopdev import errors
from loopdev._holders import Holder
from loopdev.broker import messages
from loopdev.broker.messages import Attach, Detach, Hello, List, Resize, Sync
from loopdev.errors import LoopdevError, RemoteProtocolError

REQUESTS = [
    Hello(),
    Attach(),
    Attach(offset=512, sizelimit=4096, sector_size=4096, read_only=True, partscan=True),
    Attach(direct_io=False, force=True, directory=True, want_fd=True, lock=True),
    Detach(number=1000, diskseq=5, timeout=0.5),
    Detach(number=0, diskseq=None),
    Resize(number=1000, diskseq=(1 << 64) - 1),
    Sync(number=(1 << 20) - 1, diskseq=1),
    List(),
    List(after=1100),
]
DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs/broker-protocol.md"


@pytest.mark.parametrize("request_", REQUESTS, ids=repr)
def test_round_trip(request_):
    assert messages.parse_request(messages.encode_request(request_)) == request_


def test_defaults_may_be_left_out():
    assert messages.parse_request(b'{"v":1,"op":"attach"}') == Attach()
    assert messages.parse_request(b' {"op":"list","v":1} ') == List()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object in UTF-8"),
        (b"[]", "not a JSON object"),
        (b'{"v":1,"op":"hello"}{}', "more than one JSON object"),
        (b'\xc2\xa0{"v":1,"op":"hello"}', "not a JSON object"),
        (b"3", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", '"v" must be 1'),
        (b'{"v":2,"op":"hello"}', '"v" must be 1'),
        (b'{"v":"1","op":"hello"}', '"v" must be 1'),
        (b'{"v":true,"op":"hello"}', '"v" must be 1'),
        (b'{"v":1.0,"op":"hello"}', '"v" must be 1'),
        (b'{"v":1}', '"op" must be one of'),
        (b'{"v":1,"op":["hello"]}', '"op" must be one of'),
        (b'{"v":1,"op":"attach","op":"hello"}', "not a JSON object"),
        (b'{"v":1,"op":"hello","x":1}', "hello has no field 'x'"),
        (b'{"v":1,"op":"hello","offset":1}', "hello has no field"),
        (b'{"v":1,"op":"attach","offset":-1}', '"offset" must be bytes'),
        (b'{"v":1,"op":"attach","offset":9223372036854775808}', '"offset" must be bytes'),
        (b'{"v":1,"op":"attach","offset":true}', '"offset" must be bytes'),
        (b'{"v":1,"op":"attach","offset":1.0}', '"offset" must be bytes'),
        (b'{"v":1,"op":"attach","offset":null}', '"offset" must be bytes'),
        (b'{"v":1,"op":"attach","sector_size":0}', '"sector_size" must be bytes'),
        (b'{"v":1,"op":"attach","read_only":1}', '"read_only" must be true or false'),
        (b'{"v":1,"op":"attach","direct_io":"on"}', '"direct_io" must be true, false or null'),
        (b'{"v":1,"op":"detach","number":1}', 'detach needs "diskseq"'),
        (b'{"v":1,"op":"detach","diskseq":1}', 'detach needs "number"'),
        (b'{"v":1,"op":"sync","number":1048576,"diskseq":1}', '"number" must be'),
        (b'{"v":1,"op":"sync","number":1,"diskseq":-1}', '"diskseq" must be'),
        (b'{"v":1,"op":"detach","number":1,"diskseq":1,"timeout":61}', '"timeout" must be'),
        (b'{"v":1,"op":"detach","number":1,"diskseq":1,"timeout":NaN}', "not a JSON object"),
        (b'{"v":1,"op":"list","after":-2}', '"after" must be'),
        (b'{"v":1,"op":"hello"}' + b" " * 16384, "more than 16384 bytes"),
        (b"[" * 16000, "not a JSON object"),
        (b'{"v":' + b"9" * 9000 + b"}", "not a JSON object"),
    ],
)
def test_refused(data, reason):
    with pytest.raises(RemoteProtocolError) as caught:
        messages.parse_request(data)
    assert reason in caught.value.reason


@given(st.binary(max_size=300))
def test_any_bytes(data):
    try:
        request = messages.parse_request(data)
    except RemoteProtocolError:
        return
    assert messages.parse_request(messages.encode_request(request)) == request


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


# A busy machine makes values slowly at first.
_PATIENT = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


@_PATIENT
@given(st.dictionaries(st.sampled_from([*messages._CHECKS, "v", "op", "x"]), _JSON))
def test_any_object(fields):
    data = json.dumps({"v": 1, "op": "attach", **fields}).encode()
    try:
        request = messages.parse_request(data)
    except RemoteProtocolError:
        return
    assert messages.parse_request(messages.encode_request(request)) == request


@_PATIENT
@given(_JSON, _JSON)
def test_any_reply(result, error):
    for body in ({"result": result}, {"error": error}, {"error": {"type": error}}):
        try:
            found = messages.parse_reply(json.dumps({"v": 1, **body}).encode())
        except LoopdevError:
            continue
        assert isinstance(found, dict)


def test_result():
    assert messages.parse_reply(messages.encode_result({"size": 5})) == {"size": 5}


ERRORS = [
    errors.InvalidValueError("offset", 100, "must be a multiple of 512"),
    errors.BackingFileError(errno.EISDIR, "/tmp", "is a directory"),
    errors.ImageFormatError("/tmp/x", 512, "a damaged header"),
    errors.KernelError(errno.EIO, "/dev/loop1", "fsync"),
    errors.NotBoundError(errno.ENXIO, "/dev/loop1", "detach", "is no device of this connection"),
    errors.NotPermittedError(errno.EACCES, "loop1000", "creat"),
    errors.NoFreeDeviceError(10.0, 7),
    errors.WaitTimeoutError("/dev/loop1", "still bound", 3.0),
    errors.VerificationError("/dev/loop1", "size", 512, 1024),
    errors.RefusedError(errno.EDQUOT, "no more than 2 devices"),
    errors.DeviceBusyError(
        errno.EBUSY,
        "/dev/loop1",
        "detach",
        None,
        (Holder(kind="process", name="cat", device="loop1", pid=7),),
    ),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_the_wire(error):
    with pytest.raises(LoopdevError) as caught:
        messages.parse_reply(messages.encode_error(error))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
    assert caught.value.exit_code == error.exit_code
    if isinstance(error, errors.DeviceBusyError):
        assert caught.value.holders == error.holders


def test_whose_fault_it_is():
    """What the broker calls the other side's mistake is ours when we read it."""
    with pytest.raises(loopdev.LocalProtocolError, match="bad"):
        messages.parse_reply(messages.encode_error(RemoteProtocolError("bad")))


@pytest.mark.parametrize(
    "body",
    [
        {"type": "FutureError", "message": "of another age", "arguments": [1]},
        {"type": "InvalidValueError", "message": "of another age", "arguments": [1]},
        {"type": "annotations", "message": "of another age", "arguments": []},
        {
            "type": "DeviceBusyError",
            "message": "of another age",
            "arguments": [1, "a", "b", "c", [3]],
        },
        {"type": 5, "message": "of another age"},
    ],
)
def test_errors_of_a_newer_broker(body):
    with pytest.raises(LoopdevError) as caught:
        messages.parse_reply(json.dumps({"v": 1, "error": body}).encode())
    assert str(caught.value) == "of another age"


@pytest.mark.parametrize("data", [b"", b"{}", b'{"v":1}', b'{"v":1,"result":[]}', b"[]"])
def test_no_reply(data):
    with pytest.raises(RemoteProtocolError):
        messages.parse_reply(data)


def test_module_opens_and_sends_nothing():
    source = Path(messages.__file__).read_text()
    assert not re.search(r"^\s*(import|from) (os|socket|select|subprocess)\b", source, re.MULTILINE)


def test_document_names_every_field():
    text = DOCUMENT.read_text()
    for kind in (Hello, Attach, Detach, Resize, Sync, List):
        assert f"### {kind.op}" in text
        for name in kind.__annotations__:
            assert f"`{name}`" in text, name
    for value in (messages.MAX_REQUEST, messages.PAGE, messages.MAX_REPLY):
        assert str(value) in text


def test_examples_of_the_document():
    """Its requests are requests, and its replies replies."""
    text = DOCUMENT.read_text()
    asked = re.findall(r"^    → (.*)$", text, re.MULTILINE)
    answered = re.findall(r"^    ← (.*)$", text, re.MULTILINE)
    assert len(asked) >= 6
    assert len(answered) >= 6
    for line in asked:
        messages.parse_request(line.encode())
    for line in answered:
        if '"error"' not in line:
            messages.parse_reply(line.encode())
            continue
        with pytest.raises((loopdev.InvalidValueError, loopdev.DeviceBusyError)) as caught:
            messages.parse_reply(line.encode())
        assert str(caught.value) == json.loads(line)["error"]["message"]


def test_start_of_the_command_loads_no_broker():
    import subprocess

    code = (
        "import sys, loopdev.cli.attach, loopdev.cli.list; "
        "print([name for name in sys.modules if 'broker' in name or name == 'json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
