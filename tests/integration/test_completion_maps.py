# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What shells offer for ``loopdev unmap``: what is mapped."""

from __future__ import annotations

import os

import pytest
from shells import ask

import loopdev


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_and_devices(tmp_path, counting_file, shell):
    name = f"completed-{os.getpid()}"
    with loopdev.map_image(counting_file, name=name) as mapping:
        path = mapping.device.path
        assert ask(shell, tmp_path, "unmap", "completed-") == [name]
        assert path in ask(shell, tmp_path, "unmap", "--lazy", "/dev/loo")
        assert {name, path} <= set(ask(shell, tmp_path, "unmap", ""))
    assert ask(shell, tmp_path, "unmap", "completed-") == []
