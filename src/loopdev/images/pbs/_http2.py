# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""HTTP/2, as a client that downloads: bytes in, bytes out, no I/O. h2 does the protocol.

All but one thing of it: what is in DATA frames goes from the connection to where it is wanted,
and h2 never sees it. It would copy it three times, into memory that is new each time, which takes
6 to 18 ms for 4 MiB (receiving and decrypting takes less than 3). So credit for what was
received is given here, and h2 is told of a stream's end by a frame that ends it without data.
"""

from __future__ import annotations

import struct

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from h2.settings import SettingCodes, Settings

from loopdev.errors import ServerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

# What the official client uses; a link of any length is full with it.
WINDOW = (1 << 31) - 2
FRAME_MAX = 4 << 20
_FIRST_WINDOW = 65535  # RFC 9113, section 6.9.2
# Other frames are small. Header blocks are bounded by h2, too.
_OTHER_FRAME_MAX = 256 << 10
# Credit is given back in such pieces, in bytes.
_CREDIT = 16 << 20
_SKIP = 64 << 10
_ERROR_MAX = 64 << 10  # the text of a refusal
_FRAME = struct.Struct(">HBBBI")  # length in 16 + 8 bits, type, flags, stream
_HEAD = 9
_DATA, _RST_STREAM, _WINDOW_UPDATE = 0, 3, 8
_END_STREAM, _PADDED = 1, 8


class Reply:
    """What comes back for one request.

    Attributes:
        limit: More than this many bytes are refused.
        status: The HTTP status; 0: not there yet.
        length: How many bytes have come.
        ended: Whether no more of it will come.
        error: Why not, if it is not whole; "": nothing is wrong.
        too_long: Whether it is because of its limit.
    """

    __slots__ = (
        *("_buffer", "_expected", "ended", "error", "length", "limit", "status", "stream"),
        "too_long",
    )

    def __init__(self, stream: int, limit: int, buffer: bytearray) -> None:
        self.stream, self.limit, self._buffer = stream, limit, buffer
        self.status = self.length = 0
        self.error, self.too_long, self.ended = "", False, False
        self._expected: int | None = None

    @property
    def data(self) -> memoryview:
        """What has come; good until the buffer is taken."""
        return memoryview(self._buffer)[: self.length]

    @property
    def text(self) -> str:
        """What has come as a message for people."""
        return " ".join(bytes(self.data[:1000]).decode(errors="replace").split())

    def take_buffer(self) -> bytearray:
        """Give the memory away, for another request."""
        buffer, self._buffer, self.length = self._buffer, bytearray(), 0
        return buffer

    def begin(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Take in the head."""
        for name, value in headers:
            if name == b":status":
                self.status = int(value)
            elif name == b"content-length":
                self._expected = int(value)
        if self.status != 200:
            self.limit = _ERROR_MAX

    def room(self, count: int) -> memoryview | None:
        """Return where the next *count* bytes go; None: they are too many."""
        needed = self.length + count
        if needed > self.limit:
            self.error, self.too_long = f"is more than {self.limit} bytes", True
            return None
        if needed > len(self._buffer):
            known = min(self._expected or 0, self.limit)
            larger = bytearray(max(needed, known, min(2 * len(self._buffer), self.limit)))
            larger[: self.length] = memoryview(self._buffer)[: self.length]
            self._buffer = larger
        return memoryview(self._buffer)[self.length : needed]

    def end(self) -> None:
        """Be told that no more comes."""
        self.ended = True
        if not self.error and self._expected not in (None, self.length):
            self.error = f"is cut off: {self.length} bytes came, not {self._expected}"


class Downloads:
    """One connection.

    Args:
        server: Its name, for errors and requests.

    Attributes:
        pongs: Signs of life that came.
        progress: Frames of answers that came.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        config = h2.config.H2Configuration(client_side=True, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config)
        settings = {
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
            SettingCodes.MAX_FRAME_SIZE: FRAME_MAX,
        }
        self._h2.local_settings = Settings(client=True, initial_values=settings)
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(WINDOW - _FIRST_WINDOW)
        self._replies: dict[int, Reply] = {}
        self._out = b""
        self._credit = 0
        self._head = bytearray(_HEAD)
        self._other = bytearray()
        self._skipped = memoryview(bytearray(_SKIP))
        # The frame at hand: how much is left of it, and where the next bytes go.
        self._frame = (_DATA, 0, 0)
        self._left = 0
        self._target = memoryview(self._head)
        self._in_head = True
        self.pongs = self.progress = 0

    @property
    def room(self) -> int:
        """How many more requests the server takes at this moment."""
        return self._h2.remote_settings.max_concurrent_streams - len(self._replies)

    def request(self, path: str, limit: int, buffer: bytearray | None = None) -> Reply:
        """Begin a GET.

        Args:
            path: With its query.
            limit: Of the answer, in bytes.
            buffer: Memory for it; it is replaced where it is too small.
        """
        try:
            stream = self._h2.get_next_available_stream_id()
            headers = (
                (":method", "GET"),
                (":scheme", "https"),
                (":authority", self._server),
                (":path", path),
                ("content-type", "application/x-www-form-urlencoded"),
            )
            self._h2.send_headers(stream, headers, end_stream=True)
        except h2.exceptions.H2Error as exc:
            self._fail(exc)
        reply = Reply(stream, limit, bytearray() if buffer is None else buffer)
        self._replies[stream] = reply
        return reply

    def cancel(self, reply: Reply) -> None:
        """Want no more of a reply."""
        if self._replies.pop(reply.stream, None) is None:
            return
        if not self._in_head and self._frame[2] == reply.stream and self._frame[0] == _DATA:
            self._target = self._skipped[: min(self._left, _SKIP)]
        try:
            self._h2.reset_stream(reply.stream, 8)  # CANCEL
        except h2.exceptions.H2Error as exc:
            self._fail(exc)

    def ping(self) -> None:
        """Ask for a sign of life; it counts up *pongs*."""
        try:
            self._h2.ping(b"loopdev.")
        except h2.exceptions.H2Error as exc:
            self._fail(exc)

    def data_to_send(self) -> bytes:
        """Return what is to be sent."""
        out, self._out = self._out, b""
        return self._h2.data_to_send() + out

    def buffer(self) -> memoryview:
        """Return where the next bytes of the connection go; it is never empty."""
        return self._target

    def received(self, count: int) -> list[Reply]:
        """Be told that so many bytes were put there; return the replies that ended.

        Raises:
            ServerError: The server has broken the protocol, or says goodbye.
        """
        self._target = self._target[count:]
        if self._in_head:
            return self._begin_frame() if not self._target else []
        self._left -= count
        if self._target:
            return []
        if self._left:
            self._target = self._skipped[: min(self._left, _SKIP)]
            return []
        return self._end_frame()

    def _begin_frame(self) -> list[Reply]:
        high, low, kind, flags, stream = _FRAME.unpack(self._head)
        length = high << 8 | low
        self._in_head, self._left = False, length
        self._frame = (kind, flags, stream & 0x7FFFFFFF)
        if length > (FRAME_MAX if kind == _DATA else _OTHER_FRAME_MAX):
            self._broken(f"a frame of {length} bytes")
        self._target = self._where(kind, flags, length)
        return self._end_frame() if not length else []

    def _where(self, kind: int, flags: int, length: int) -> memoryview:
        reply = self._replies.get(self._frame[2])
        if kind == _DATA and (reply is None or reply.error):
            return self._skipped[: min(length, _SKIP)]
        if kind == _DATA and not flags & _PADDED and reply is not None:
            if not reply.status:
                self._broken("data without a head")
            place = reply.room(length)
            return self._skipped[: min(length, _SKIP)] if place is None else place
        self._other = bytearray(length)
        return memoryview(self._other)

    def _end_frame(self) -> list[Reply]:
        kind, flags, stream = self._frame
        length = _FRAME.unpack(self._head)[0] << 8 | self._head[2]
        self._in_head, self._target = True, memoryview(self._head)
        if kind != _DATA:
            return self._other_frame()
        self._give_credit(length)
        self.progress += 1
        reply = self._replies.get(stream)
        if reply is None:
            return []
        if not reply.error:
            reply.length += self._unpad(reply) if flags & _PADDED else length
        if not flags & _END_STREAM and not reply.error:
            return []
        if reply.error and not flags & _END_STREAM:
            self.cancel(reply)
            reply.ended = True
            return [reply]
        # So that h2 knows, too. By an empty DATA frame it would miss the content-length.
        self._h2.receive_data(_FRAME.pack(0, 4, _RST_STREAM, 0, stream) + bytes(4))
        del self._replies[stream]
        reply.end()
        return [reply]

    def _unpad(self, reply: Reply) -> int:
        padding = self._other[0] if self._other else len(self._other) + 1
        count = len(self._other) - 1 - padding
        if count < 0 or not reply.status:
            self._broken("a frame that is all padding")
        place = reply.room(count)
        if place is None:
            return 0
        place[:] = self._other[1 : 1 + count]
        return count

    def _give_credit(self, length: int) -> None:
        self._credit += length
        if self._credit >= _CREDIT:
            update = _FRAME.pack(0, 4, _WINDOW_UPDATE, 0, 0) + self._credit.to_bytes(4, "big")
            self._out += update
            self._credit = 0

    def _other_frame(self) -> list[Reply]:
        data, self._other = bytes(self._head) + bytes(self._other), bytearray()
        try:
            events = self._h2.receive_data(data)
        except (h2.exceptions.H2Error, ValueError) as exc:
            self._fail(exc)
        ended = []
        for event in events:
            reply = self._replies.get(getattr(event, "stream_id", 0) or 0)
            if isinstance(event, h2.events.PingAckReceived):
                self.pongs += 1
            elif isinstance(event, h2.events.ConnectionTerminated):
                raise ServerError(self._server, "has ended the session")
            elif reply is None:
                continue
            elif isinstance(event, h2.events.ResponseReceived):
                self.progress += 1
                try:
                    reply.begin(event.headers)
                except ValueError as exc:
                    self._fail(exc)
            elif isinstance(event, h2.events.StreamReset):
                reply.error = "was broken off by the server"
                reply.end()
                ended.append(reply)
            elif isinstance(event, h2.events.StreamEnded):
                reply.end()
                ended.append(reply)
        for reply in ended:
            self._replies.pop(reply.stream, None)
        return ended

    def _broken(self, what: str) -> NoReturn:
        raise ServerError(self._server, f"has broken the HTTP/2 protocol: {what}")

    def _fail(self, exc: Exception) -> NoReturn:
        reason = f"has broken the HTTP/2 protocol: {exc or type(exc).__name__}"
        raise ServerError(self._server, reason) from exc
