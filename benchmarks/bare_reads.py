# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most: chunks received from a server, checked, decoded, and no more.

There is no map, no device, no cache and no thread. Each process has a connection of its own, and
so many requests under way.

Usage: python benchmarks/bare_reads.py REPOSITORY SOURCE PROCESSES DEPTH NUMBER...
NUMBER is that of a chunk. Prints how many chunks came in a second.
"""

from __future__ import annotations

import os
import sys
import time
from _hashlib import openssl_sha256

from loopdev.images import resolve
from loopdev.images.pbs import blob
from loopdev.images.pbs._http2 import Reply
from loopdev.images.pbs.remote import RemoteSource
from loopdev.images.pbs.session import Session

LIMIT = 60.0
MOST = 16 << 20


def connect(source: RemoteSource) -> Session:
    """Return a session that gives out the chunks."""
    deadline = time.monotonic() + LIMIT
    session = Session.open(source.server, source.snapshot, deadline)
    session.finish([session.download(source.filename, MOST)], deadline)
    return session


def read(source: RemoteSource, session: Session, depth: int, numbers: list[int]) -> None:
    """Read chunks, *depth* at a time."""
    buffer = memoryview(bytearray(source.index.chunk_size))
    spare, active = [bytearray() for _ in range(depth)], dict[Reply, bytes]()
    wanted = [
        source.index.digest(n) for n in numbers if source.index.digest(n) != source.zero_digest
    ]
    while wanted or active:
        while wanted and spare:
            digest = wanted.pop()
            reply = session.get(f"/chunk?digest={digest.hex()}", MOST, spare.pop())
            active[reply] = digest
        for reply in session.round(LIMIT):
            digest = active.pop(reply)
            blob.decode_into(reply.data, buffer)
            if openssl_sha256(buffer).digest() != digest:
                raise SystemExit("another chunk came")
            spare.append(reply.take_buffer())


def main() -> int:
    """Have the processes connect, and time them from then on."""
    repository, name, processes, depth, *numbers = sys.argv[1:]
    source = resolve(name, repository=repository)
    assert isinstance(source, RemoteSource)
    count, chunks = int(processes), [int(number) for number in numbers]
    ready, start = os.pipe(), os.pipe()
    children = []
    for first in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            session = connect(source)
            os.close(start[1])
            os.write(ready[1], b"r")
            os.read(start[0], 1)  # until it is closed
            read(source, session, int(depth), chunks[first::count])
            os._exit(0)
    for _ in children:
        os.read(ready[0], 1)
    begin = time.perf_counter()
    os.close(start[1])
    if any(os.waitpid(child, 0)[1] for child in children):
        return 1
    print(len(chunks) / (time.perf_counter() - begin))
    return 0


if __name__ == "__main__":
    sys.exit(main())
