# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What there is to map in a datastore."""

from __future__ import annotations

from loopdev._value import Value
from loopdev.errors import ImageFormatError, ImageNotFoundError
from loopdev.images.pbs import names
from loopdev.images.pbs.datastore import Datastore
from loopdev.images.pbs.resolve import missing, server_repository

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loopdev.images.pbs.manifest import Manifest
    from loopdev.images.pbs.names import Group, Snapshot
    from loopdev.images.pbs.repository import Repository


class ImageInfo(Value):
    """An image in a snapshot; *source* is its whole name, *size* is bytes."""

    name: str
    source: str
    size: int
    crypt_mode: str


class SnapshotInfo(Value):
    """A snapshot.

    Attributes:
        snapshot: Its whole name, with its namespace.
        time: Unix seconds.
        fingerprint: That of the key it was made with.
        verification: What the server's last verification found: "ok" or "failed".
        error: Why its manifest cannot be read; then nothing else is known.
    """

    snapshot: str
    namespace: str
    type: str
    id: str
    time: int
    protected: bool
    signed: bool = False
    fingerprint: str | None = None
    verification: str | None = None
    notes: str = ""
    images: tuple[ImageInfo, ...] = ()
    error: str | None = None


def list_snapshots(
    repository: str | None = None,
    namespace: str = "",
    groups: Sequence[str] = (),
    fingerprint: str | None = None,
) -> list[SnapshotInfo]:
    """Return the snapshots of a datastore, by group, the oldest first.

    Args:
        repository: Its directory, or where it is on a server; None: PBS_REPOSITORY says it.
        namespace: Only what is in it, and in those below.
        groups: Only those, such as "vm/100".
        fingerprint: That of the server's certificate; see :func:`loopdev.images.resolve`.

    Raises:
        ImageNotFoundError: There is no such datastore, namespace or group.
        InvalidValueError: A name cannot be one.
        ServerError: The server cannot be reached, or refuses.
    """
    server = server_repository(repository)
    if server is not None:
        return _list_on_server(server, namespace, groups, fingerprint)
    store = Datastore.open(repository)
    found = []
    for group in _groups(store, namespace, groups):
        for snapshot in store.snapshots(group):
            try:
                found.append(_describe(store, snapshot))
            except ImageNotFoundError:
                pass  # it was removed meanwhile
    return found


def _list_on_server(
    repository: Repository, namespace: str, groups: Sequence[str], fingerprint: str | None
) -> list[SnapshotInfo]:
    try:
        from loopdev.images.pbs.catalog import Catalog
        from loopdev.images.pbs.server import Rest, find_server
    except ImportError as exc:
        raise missing(exc) from exc
    rest = Rest(find_server(repository, fingerprint))
    try:
        return Catalog(rest).list_snapshots(namespace, groups)
    finally:
        rest.close()


def _groups(store: Datastore, namespace: str, groups: Sequence[str]) -> Iterator[Group]:
    if groups:
        yield from (names.parse_group(group, namespace) for group in groups)
        return
    for inside in (names.check_namespace(namespace), *store.namespaces(namespace)):
        yield from store.groups(inside)


def _describe(store: Datastore, snapshot: Snapshot) -> SnapshotInfo:
    manifest, error = None, None
    try:
        manifest = store.manifest(snapshot)
    except ImageFormatError as exc:
        error = str(exc)
    made_with = manifest.fingerprint if manifest else None
    return SnapshotInfo(
        snapshot=snapshot.full_name,
        namespace=snapshot.namespace,
        type=snapshot.type,
        id=snapshot.id,
        time=snapshot.time,
        protected=store.is_protected(snapshot),
        signed=manifest is not None and manifest.signature is not None,
        fingerprint=made_with.hex(":") if made_with is not None else None,
        verification=manifest.verification if manifest else None,
        notes=manifest.notes if manifest else "",
        images=tuple(_images(manifest, snapshot)) if manifest else (),
        error=error,
    )


def _images(manifest: Manifest, snapshot: Snapshot) -> Iterator[ImageInfo]:
    for entry in manifest.files:
        name = entry.filename.removesuffix(names.INDEX_SUFFIX)
        if name != entry.filename:
            yield ImageInfo(
                name=name,
                source=f"{snapshot.full_name}/{name}",
                size=entry.size,
                crypt_mode=entry.crypt_mode,
            )
