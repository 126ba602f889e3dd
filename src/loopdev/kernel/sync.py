# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""syncfs(2), which Python does not have."""

from __future__ import annotations

from loopdev.errors import kernel_error
from loopdev.kernel.libc import call


def syncfs(fd: int, path: str) -> None:
    """Return when everything written to a filesystem is on its disk.

    Args:
        fd: Any descriptor on the filesystem. Since Linux 5.8 errors of writing back are reported
            here, those since *fd* was opened: open it before what is to be vouched for is written.
        path: What *fd* is open on, for messages.

    Raises:
        KernelError: EIO, ENOSPC, EDQUOT: not all of it could be written.
    """
    try:
        call("syncfs", fd)
    except OSError as exc:
        raise kernel_error(exc, path, "syncfs") from exc
