# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Downloads over HTTP/2, without a network: the other side is h2's server, or bytes by hand."""

from __future__ import annotations

import os

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hyperframe.frame import DataFrame, GoAwayFrame, SettingsFrame
from hypothesis import given
from hypothesis import strategies as st

from loopdev.errors import ServerError
from loopdev.images.pbs._http2 import WINDOW, Downloads, Reply


class Peer:
    """A client, and h2's server; what one sends, the other gets."""

    def __init__(self, max_streams: int | None = None) -> None:
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self.server = h2.connection.H2Connection(config)
        if max_streams is not None:
            code = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS
            values = {code: max_streams}
            self.server.local_settings = h2.settings.Settings(client=False, initial_values=values)
        self.server.initiate_connection()
        self.client = Downloads("host:8007")
        self.ended: list[Reply] = []
        self.events: list[h2.events.Event] = []
        self.exchange()

    def exchange(self, step: int = 1 << 30) -> None:
        for _ in range(2):
            self.give(self.server.data_to_send(), step)
            self.events += self.server.receive_data(self.client.data_to_send())

    def give(self, data: bytes, step: int = 1 << 30) -> None:
        while data:
            buffer = self.client.buffer()
            count = min(step, len(buffer), len(data))
            buffer[:count] = data[:count]
            self.ended += self.client.received(count)
            data = data[count:]

    def answer(self, stream: int, body: bytes, frame: int = 16384, **options: object) -> None:
        headers = [(":status", str(options.get("status", 200)))]
        if "length" in options:
            headers.append(("content-length", str(options["length"])))
        self.server.send_headers(stream, headers)
        for at in range(0, len(body) or 1, frame):
            last = at + frame >= len(body)
            padding = options.get("padding")
            self.server.send_data(stream, body[at : at + frame], last, padding)  # type: ignore[arg-type]


def test_an_answer():
    peer = Peer()
    reply = peer.client.request("/chunk?digest=00", 1 << 20)
    peer.exchange()
    (request,) = [e for e in peer.events if isinstance(e, h2.events.RequestReceived)]
    headers = dict(request.headers)
    assert headers[":path"] == "/chunk?digest=00"
    assert headers[":method"] == "GET"
    assert headers[":scheme"] == "https"
    body = os.urandom(100_000)
    peer.answer(reply.stream, body, length=len(body))
    peer.exchange()
    assert peer.ended == [reply]
    assert (reply.status, reply.error) == (200, "")
    assert bytes(reply.data) == body


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_however_it_is_cut(step):
    peer = Peer()
    reply = peer.client.request("/x", 1 << 20)
    peer.exchange()
    body = os.urandom(20_000)
    peer.answer(reply.stream, body, frame=5000)
    peer.exchange(step)
    assert bytes(reply.data) == body
    assert peer.ended == [reply]


def test_many_at_once_each_gets_its_own():
    peer = Peer()
    replies = [peer.client.request(f"/{n}", 1 << 20) for n in range(20)]
    peer.exchange()
    for reply in replies:
        peer.server.send_headers(reply.stream, [(":status", "200")])
    for part in range(3):
        for n, reply in enumerate(replies):
            peer.server.send_data(reply.stream, bytes([n, part]) * 10, end_stream=part == 2)
    peer.exchange(step=13)
    assert peer.ended == replies
    for n, reply in enumerate(replies):
        assert bytes(reply.data) == b"".join(bytes([n, part]) * 10 for part in range(3))


def test_memory_is_used_again():
    peer = Peer()
    first = peer.client.request("/a", 1 << 20)
    peer.exchange()
    peer.answer(first.stream, b"x" * 5000)
    peer.exchange()
    buffer = first.take_buffer()
    second = peer.client.request("/b", 1 << 20, buffer)
    peer.exchange()
    peer.answer(second.stream, b"y" * 100)
    peer.exchange()
    assert bytes(second.data) == b"y" * 100
    assert second.data.obj is buffer
    assert second.take_buffer() is buffer


def test_an_empty_answer():
    peer = Peer()
    reply = peer.client.request("/x", 10)
    peer.exchange()
    peer.server.send_headers(reply.stream, [(":status", "200")], end_stream=True)
    peer.exchange()
    assert peer.ended == [reply]
    assert bytes(reply.data) == b""


def test_padding_is_no_data():
    peer = Peer()
    reply = peer.client.request("/x", 1000)
    peer.exchange()
    peer.answer(reply.stream, b"abc" * 100, frame=100, padding=50)
    peer.exchange(step=3)
    assert bytes(reply.data) == b"abc" * 100


def test_the_text_of_a_refusal():
    peer = Peer()
    reply = peer.client.request("/x", 10)
    peer.exchange()
    peer.answer(reply.stream, b"download chunk ab\n not allowed", status=401)
    peer.exchange()
    assert (reply.status, reply.text) == (401, "download chunk ab not allowed")


def test_more_than_allowed_is_broken_off_and_dropped():
    peer = Peer()
    reply, other = peer.client.request("/x", 1000), peer.client.request("/y", 1000)
    peer.exchange()
    peer.server.send_headers(reply.stream, [(":status", "200")])
    for _ in range(4):
        peer.server.send_data(reply.stream, bytes(300))
    peer.give(peer.server.data_to_send())
    assert peer.ended == [reply]
    assert reply.too_long
    assert reply.length <= 1000
    peer.exchange()
    assert [e.stream_id for e in peer.events if isinstance(e, h2.events.StreamReset)] == [1]
    peer.answer(other.stream, b"good")
    peer.exchange()
    assert bytes(other.data) == b"good"


@pytest.mark.parametrize("told", [4, 6])
def test_another_length_than_was_told(told):
    peer = Peer()
    reply = peer.client.request("/x", 1000)
    peer.exchange()
    peer.server.send_headers(reply.stream, [(":status", "200"), ("content-length", str(told))])
    peer.give(peer.server.data_to_send())
    frame = DataFrame(reply.stream, b"12345")
    frame.flags.add("END_STREAM")
    peer.give(frame.serialize())
    assert peer.ended == [reply]
    assert f"5 bytes came, not {told}" in reply.error


def test_a_stream_that_the_server_breaks_off():
    peer = Peer()
    reply = peer.client.request("/x", 1000)
    peer.exchange()
    peer.server.send_headers(reply.stream, [(":status", "200")])
    peer.server.send_data(reply.stream, b"begun")
    peer.server.reset_stream(reply.stream, 2)
    peer.exchange()
    assert peer.ended == [reply]
    assert "broken off" in reply.error


def test_what_is_cancelled_is_dropped_in_the_middle_of_a_frame():
    peer = Peer()
    reply, other = peer.client.request("/x", 1 << 20), peer.client.request("/y", 1 << 20)
    peer.exchange()
    peer.answer(reply.stream, b"x" * 10_000)
    peer.answer(other.stream, b"y" * 10_000)
    data = peer.server.data_to_send()
    peer.give(data[:5000])
    assert reply.length == 0  # the frame is not whole
    peer.client.cancel(reply)
    peer.client.cancel(reply)  # does nothing
    peer.give(data[5000:])
    assert peer.ended == [other]
    assert bytes(other.data) == b"y" * 10_000
    assert peer.client.room == 100  # all that h2's server takes


def test_the_servers_limit_of_streams():
    peer = Peer(max_streams=3)
    replies = [peer.client.request(f"/{n}", 10) for n in range(3)]
    assert peer.client.room == 0
    peer.exchange()
    peer.answer(replies[0].stream, b"x")
    peer.exchange()
    assert peer.client.room == 1


def test_windows_are_large_and_credit_comes_back():
    peer = Peer()
    reply = peer.client.request("/x", 1 << 30)
    peer.exchange()
    # A link of 50 ms and 1 Gbit/s holds 6.25 MB.
    assert peer.server.local_flow_control_window(reply.stream) == WINDOW
    assert peer.server.max_outbound_frame_size == 4 << 20
    peer.server.send_headers(reply.stream, [(":status", "200")])
    for _ in range(12):
        peer.server.send_data(reply.stream, bytes(4 << 20))
        peer.exchange()
    before = peer.server.outbound_flow_control_window
    assert before > WINDOW - (16 << 20) - 1, "no credit came back"


def test_a_sign_of_life():
    peer = Peer()
    peer.client.ping()
    peer.exchange()
    assert peer.client.pongs == 1


def test_goodbye():
    peer = Peer()
    peer.client.request("/x", 10)
    peer.exchange()
    peer.server.close_connection()
    with pytest.raises(ServerError, match="ended the session"):
        peer.give(peer.server.data_to_send())


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff" * 9,
        DataFrame(1, b"no head before it").serialize(),
        b"\x40\x00\x01" + b"\x00\x00" + b"\x00\x00\x00\x01",  # data of 4 MiB and one
        b"\x05\x00\x00" + b"\x01\x04" + b"\x00\x00\x00\x01",  # a head of 320 KiB
        b"\x00\x00\x00" + b"\x00\x08" + b"\x00\x00\x00\x01",  # padding without a length
        b"\x00\x00\x05" + b"\x01\x04" + b"\x00\x00\x00\x01" + b"\xff" * 5,  # no HPACK
        SettingsFrame(0, settings={5: 1}).serialize(),
        b"\x00\x00\x05" + b"\x05\x04" + b"\x00\x00\x00\x01" + b"\x00\x00\x00\x02\x88",  # a push
    ],
    ids=lambda data: data[:9].hex(),
)
def test_what_breaks_the_protocol(data):
    peer = Peer()
    peer.client.request("/x", 1000)
    peer.exchange()
    with pytest.raises(ServerError, match="broken the HTTP/2 protocol"):
        peer.give(data)


@pytest.mark.parametrize("status", ["abc", "99999999999999999999x"])
def test_a_status_that_is_none(status):
    peer = Peer()
    reply = peer.client.request("/x", 1000)
    peer.exchange()
    peer.server.config.validate_outbound_headers = False
    peer.server.send_headers(reply.stream, [(":status", status)])
    with pytest.raises(ServerError):
        peer.exchange()


@given(data=st.binary(max_size=300), step=st.integers(1, 40))
def test_any_bytes_are_taken_or_refused(data, step):
    peer = Peer()
    replies = [peer.client.request("/x", 100) for _ in range(3)]
    peer.exchange()
    try:
        peer.give(data, step)
    except ServerError:
        return
    assert all(reply.length <= 100 for reply in replies)


@given(
    frames=st.lists(
        st.tuples(st.sampled_from([1, 3, 5, 7]), st.binary(max_size=60), st.booleans()), max_size=20
    )
)
def test_any_order_of_data_ends_each_reply_once(frames):
    peer = Peer()
    replies = {reply.stream: reply for reply in (peer.client.request("/x", 100) for _ in range(3))}
    peer.exchange()
    for stream in replies:
        peer.server.send_headers(stream, [(":status", "200")])
    peer.exchange()
    expected: dict[int, bytes] = dict.fromkeys(replies, b"")
    over: set[int] = set()
    for stream, data, last in frames:
        frame = DataFrame(stream, data)
        if last:
            frame.flags.add("END_STREAM")
        peer.give(frame.serialize())
        if stream in expected and stream not in over:
            if len(expected[stream]) + len(data) > 100:
                over.add(stream)
            else:
                expected[stream] += data
                if last:
                    over.add(stream)
    assert sorted(reply.stream for reply in peer.ended) == sorted(over)
    assert {s: bytes(r.data) for s, r in replies.items()} == expected


def test_memory_handed_out_is_never_more_than_the_limit():
    peer = Peer()
    reply = peer.client.request("/x", 1000)
    peer.exchange()
    peer.server.send_headers(reply.stream, [(":status", "200"), ("content-length", str(1 << 40))])
    peer.server.send_data(reply.stream, b"x")
    peer.exchange()
    assert len(reply.take_buffer()) <= 1000


def test_goaway_by_hand_with_garbage_behind_it():
    peer = Peer()
    frame = GoAwayFrame(0, last_stream_id=0, error_code=0, additional_data=b"bye").serialize()
    with pytest.raises(ServerError):
        peer.give(frame + b"\xff" * 50)
