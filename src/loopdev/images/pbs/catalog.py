# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What is in a datastore on a server, by its REST calls.

Source: src/api2/admin/{datastore,namespace}.rs.
"""

from __future__ import annotations

from loopdev.errors import ImageNotFoundError, ServerError
from loopdev.images.pbs import names
from loopdev.images.pbs.listing import ImageInfo, SnapshotInfo
from loopdev.images.pbs.manifest import NONE
from loopdev.images.pbs.names import TYPES, Group, Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from loopdev.images.pbs.server import Rest

Listed = dict[str, "Any"]


class Catalog:
    """The datastore that a server's repository names.

    Args:
        rest: Whom to ask; it stays its owner's.
    """

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._path = f"admin/datastore/{rest.server.repository.store}"

    def list_snapshots(self, namespace: str, groups: Sequence[str]) -> list[SnapshotInfo]:
        """Return snapshots; see :func:`loopdev.images.pbs.listing.list_snapshots`."""
        wanted = [names.parse_group(group, namespace) for group in groups]
        if wanted:
            listed = [(group.namespace, self._of_group(group)) for group in wanted]
        else:
            inside = self._namespaces(names.check_namespace(namespace))
            listed = [(name, self._of_namespace(name)) for name in inside]
        return [_describe(name, raw) for name, found in listed for raw in found]

    def latest(self, group: Group) -> Snapshot:
        """Return the newest snapshot of a group.

        Raises:
            ImageNotFoundError: There is none.
        """
        return group.snapshot(_number(self._of_group(group)[-1], "backup-time"))

    def _of_group(self, group: Group) -> list[Listed]:
        found = self._list(
            "snapshots", ns=group.namespace, backup_type=group.type, backup_id=group.id
        )
        if not found:
            inside = f"ns/{group.namespace}/" if group.namespace else ""
            raise ImageNotFoundError("group", f"{inside}{group}")
        complete = _complete(found)
        if not complete:
            raise ImageNotFoundError("snapshot", f"{group}/{names.LATEST}")
        return complete

    def _of_namespace(self, namespace: str) -> list[Listed]:
        return _complete(self._list("snapshots", ns=namespace))

    def _namespaces(self, parent: str) -> list[str]:
        """Return a namespace and all below it; a server without them has the root."""
        found = self._list("namespace", parent=parent)
        inside = {_text(raw, "ns") for raw in found} | {parent}
        return sorted(filter(names.is_namespace, inside), key=lambda name: name.split("/"))

    def _list(self, call: str, **parameters: str | int) -> list[Listed]:
        data = self._rest.get(f"{self._path}/{call}", **parameters)
        if not isinstance(data, list) or not all(isinstance(raw, dict) for raw in data):
            raise ServerError(self._rest.server.name, f"has answered no list of {call}")
        try:
            for raw in data if call == "snapshots" else ():
                _text(raw, "backup-type"), _text(raw, "backup-id"), _number(raw, "backup-time")
                _files(raw)
        except ValueError as exc:
            reason = f"has answered a list of {call} with {exc} missing or wrong"
            raise ServerError(self._rest.server.name, reason) from exc
        return data


def _complete(found: list[Listed]) -> list[Listed]:
    """Return those that are complete, as a directory lists them: the oldest of a group first."""

    def order(raw: Listed) -> tuple[int, tuple[int, str], int]:
        kind, name = TYPES.index(raw["backup-type"]), names.as_number(raw["backup-id"])
        return kind, name, raw["backup-time"]

    there = [raw for raw in found if names.MANIFEST in [name for name, _ in _files(raw)]]
    known = [
        raw for raw in there if raw["backup-type"] in TYPES and names.is_safe(raw["backup-id"])
    ]
    return sorted(known, key=order)


def _describe(namespace: str, raw: Listed) -> SnapshotInfo:
    group = Group(namespace=namespace, type=raw["backup-type"], id=raw["backup-id"])
    snapshot = group.snapshot(raw["backup-time"])
    fingerprint = raw.get("fingerprint")
    state = raw.get("verification")
    images = list(_images(snapshot, raw))
    # Of a manifest that it cannot read the server knows the names of files, and nothing else.
    damaged = any(image is None for image in images)
    return SnapshotInfo(
        snapshot=snapshot.full_name,
        namespace=namespace,
        type=group.type,
        id=group.id,
        time=snapshot.time,
        protected=raw.get("protected") is True,
        signed=fingerprint is not None,
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        verification=_text(state, "state") if isinstance(state, dict) else None,
        notes=_text(raw, "comment") if raw.get("comment") is not None else "",
        images=() if damaged else tuple(image for image in images if image is not None),
        error=f"{snapshot.full_name}: the server cannot read the manifest" if damaged else None,
    )


def _images(snapshot: Snapshot, raw: Listed) -> Iterator[ImageInfo | None]:
    for filename, file in _files(raw):
        name = filename.removesuffix(names.INDEX_SUFFIX)
        if name != filename:
            size = file.get("size")
            mode = file.get("crypt-mode") or NONE
            yield (
                None
                if not isinstance(size, int)
                else ImageInfo(
                    name=name,
                    source=f"{snapshot.full_name}/{name}",
                    size=size,
                    crypt_mode=str(mode),
                )
            )


def _files(raw: Listed) -> list[tuple[str, Listed]]:
    files = raw.get("files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise ValueError("files")
    return [(_text(file, "filename"), file) for file in files]


def _text(raw: Listed, name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise ValueError(name)  # noqa: TRY004 - it is the server's mistake
    return value


def _number(raw: Listed, name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or not 0 <= value < 1 << 40:
        raise ValueError(name)
    return value
