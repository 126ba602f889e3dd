# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The kernel's headers, as the C compiler reads them, against our numbers and layouts."""

from __future__ import annotations

import importlib
import shutil
import struct
import subprocess

import pytest

import loopdev
import loopdev.loop
from loopdev.kernel import abi

INFO_FIELDS = (
    *("lo_device", "lo_inode", "lo_rdevice", "lo_offset", "lo_sizelimit", "lo_number"),
    *("lo_encrypt_type", "lo_encrypt_key_size", "lo_flags", "lo_file_name", "lo_crypt_name"),
    *("lo_encrypt_key", "lo_init[0]", "lo_init[1]"),
)
# Our name of each struct, and the C names of the fields in the order in which we pack them.
FIELDS = {
    "loop_info64": INFO_FIELDS,
    "loop_config": (
        *("fd", "block_size", *(f"info.{field}" for field in INFO_FIELDS)),
        *(f"__reserved[{i}]" for i in range(8)),
    ),
    "blkpg_ioctl_arg": ("op", "flags", "datalen", "data"),
    "blkpg_partition": ("start", "length", "pno", "devname", "volname"),
}
# Not macros, or there since kernels that nobody has headers of: no #ifdef can see these.
ENUMS = ("LO_FLAGS_READ_ONLY", "LO_FLAGS_AUTOCLEAR", "LO_FLAGS_PARTSCAN", "LO_FLAGS_DIRECT_IO")
OTHER_NAMES = {"BLKEXT_MAJOR": "BLOCK_EXT_MAJOR"}
MAY_BE_MISSING = {
    # Since Linux 5.8 and 5.15.
    *("LOOP_CONFIGURE", "LOOP_CONFIGURE_SETTABLE_FLAGS", "BLKGETDISKSEQ"),
}
CONSTANTS = {
    name: value for name, value in vars(abi).items() if name.isupper() and isinstance(value, int)
}


def program() -> str:
    lines = []
    for name in CONSTANTS:
        macro = OTHER_NAMES.get(name, name)
        line = f'printf("{name} %llu\\n", (unsigned long long) {macro});'
        lines += [line] if name in ENUMS else [f"#ifdef {macro}", line, "#endif"]
    for kind, fields in FIELDS.items():
        lines.append("#ifdef LOOP_CONFIGURE" if kind == "loop_config" else "")
        lines.append(f'printf("sizeof:{kind} %zu\\n", sizeof(struct {kind}));')
        for field in (*fields, "info") if kind == "loop_config" else fields:
            place = f"offsetof(struct {kind}, {field})"
            size = f"sizeof(((struct {kind} *) 0)->{field})"
            lines.append(f'printf("offsetof:{kind}.{field} %zu\\n", {place});')
            lines.append(f'printf("sizeof:{kind}.{field} %zu\\n", {size});')
        lines.append("#endif" if kind == "loop_config" else "")
    headers = ("stdio.h", "stddef.h", "linux/loop.h", "linux/fs.h", "linux/blkpg.h")
    includes = [f"#include <{header}>" for header in (*headers, "linux/major.h")]
    return "\n".join([*includes, "int main(void) {", *lines, "return 0; }", ""])


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """What the headers say, by name."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    place = tmp_path_factory.mktemp("abi")
    (place / "abi.c").write_text(program())
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", place / "abi", place / "abi.c"], check=True)
    out = subprocess.run([place / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, out.splitlines())}


def footprint(layout: struct.Struct, count: int, index: int) -> tuple[int, int]:
    """Return where one field lands, and over how many bytes: all its bits set, no other's."""
    for ones in (b"\xff" * layout.size, -1, (1 << 64) - 1, (1 << 32) - 1):
        # Text fields hold bytes, all others numbers: what is empty has to be of the same kind.
        values = [zero_of(layout, i) for i in range(count)]
        if isinstance(values[index], bytes) != isinstance(ones, bytes):
            continue
        values[index] = ones
        try:
            packed = layout.pack(*values)
        except struct.error:
            continue
        where = [i for i, byte in enumerate(packed) if byte]
        assert where == list(range(where[0], where[-1] + 1))
        return where[0], len(where)
    raise AssertionError(f"no value fits field {index} of {layout.format}")


def zero_of(layout: struct.Struct, index: int) -> bytes | int:
    return type(layout.unpack(bytes(layout.size))[index])()


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_constant_is_the_headers(headers, name):
    if name in MAY_BE_MISSING and name not in headers:
        pytest.skip(f"these headers are older than {name}")
    assert CONSTANTS[name] == headers[name]


@pytest.mark.parametrize("kind", FIELDS)
def test_struct_has_the_headers_layout(headers, kind):
    if f"sizeof:{kind}" not in headers:
        pytest.skip(f"these headers are older than struct {kind}")
    layout, fields = getattr(abi, kind), FIELDS[kind]
    assert len(layout.unpack(bytes(layout.size))) == len(fields)
    assert layout.size == headers[f"sizeof:{kind}"]
    for index, field in enumerate(fields):
        expected = headers[f"offsetof:{kind}.{field}"], headers[f"sizeof:{kind}.{field}"]
        assert (field, footprint(layout, len(fields), index)) == (field, expected)


def test_sizes_that_the_kernel_promises(headers):
    """Whatever headers are installed: these are part of the ABI."""
    assert headers["sizeof:loop_info64"] == abi.loop_info64.size == 232
    assert headers.get("sizeof:loop_config", 304) == abi.loop_config.size == 304
    assert headers.get("offsetof:loop_config.info", 8) == 8
    assert footprint(abi.loop_config, 24, 2)[0] == 8


def test_loop_exports_the_headers_constants(headers):
    exported = [name for name in loopdev.loop.__all__ if name.isupper()]
    assert len(exported) == 21
    for name in exported:
        assert (name, getattr(loopdev.loop, name)) == (name, headers.get(name, CONSTANTS[name]))


@pytest.mark.parametrize("module", ["loopdev", "loopdev.loop"])
def test_every_exported_name_is_there(module):
    package = importlib.import_module(module)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = loopdev.atach


def test_request_name():
    assert abi.request_name(0x4C0A) == "LOOP_CONFIGURE"
    assert abi.request_name(0x1261) == "BLKFLSBUF"
    assert abi.request_name(0xDEAD) == "0xdead"
