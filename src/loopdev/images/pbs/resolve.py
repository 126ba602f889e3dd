# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Which datastore is meant: a directory here, or one on a server."""

from __future__ import annotations

import os

from loopdev.errors import InvalidValueError, MissingExtraError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs.local import PbsSource
    from loopdev.images.pbs.remote import RemoteSource
    from loopdev.images.pbs.repository import Repository

_VARIABLE = "PBS_REPOSITORY"
_PREFIX, _SCHEME = "pbs:", "pbs://"
_LIBRARIES = ("cryptography", "h11", "h2", "hpack", "hyperframe", "zstandard")


def server_repository(given: str | None) -> Repository | None:
    """Return the repository on a server that is meant; None: it is a directory, or nothing is said.

    What has a slash in it is a directory, or a URL; so is what is a directory.

    Args:
        given: What the user said; None: PBS_REPOSITORY says it.

    Raises:
        InvalidValueError: It is neither.
    """
    text = given if given is not None else os.environ.get(_VARIABLE)
    if not text or (not text.startswith(_SCHEME) and ("/" in text or os.path.isdir(text))):
        return None
    from loopdev.images.pbs.repository import parse_repository, parse_url

    if not text.startswith(_SCHEME):
        return parse_repository(text)
    repository, rest = parse_url(text)
    if rest:
        raise InvalidValueError("repository", text, "has more in it than a datastore")
    return repository


def resolve_image(
    text: str,
    given: str | None,
    namespace: str = "",
    keyfile: str | None = None,
    fingerprint: str | None = None,
) -> PbsSource | RemoteSource:
    """Find an image in a datastore; see :func:`loopdev.images.resolve`."""
    if text.startswith(_SCHEME):
        from loopdev.images.pbs.repository import parse_url

        repository, name = parse_url(text)
        if given is not None:
            reason = "is said twice: by the URL, too"
            raise InvalidValueError("repository", given, reason)
    else:
        found, name = server_repository(given), text.removeprefix(_PREFIX)
        if found is None:
            from loopdev.images.pbs.local import resolve_pbs

            return resolve_pbs(name, given, namespace, keyfile)
        repository = found
    try:
        from loopdev.images.pbs.remote import resolve_remote
    except ImportError as exc:
        raise missing(exc) from exc
    return resolve_remote(name, repository, namespace, keyfile, fingerprint)


def missing(exc: ImportError) -> ImportError:
    """Return the error for a library that is not installed; a bug of ours stays one."""
    return MissingExtraError("pbs") if (exc.name or "").split(".")[0] in _LIBRARIES else exc
