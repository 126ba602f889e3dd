# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What bash, zsh and fish offer for a word that is not complete: asked of the shells themselves."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LOOPDEV = str(Path(sys.executable).parent / "loopdev")

# What is offered goes into a file: on the terminal it is mixed with what was typed.
_ZSHRC = r"""
fpath+=({directory}); autoload -Uz compinit; compinit -D -u
compadd() {{
  if [[ ${{@[1,(i)(-|--)]}} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return; fi
  local -a _seen; builtin compadd -A _seen "$@"; print -l -- $_seen >> {directory}/offered
  builtin compadd "$@"
}}
PROMPT='READ''Y>'
"""
_BASHRC = r"""
source {script}
offered() {{ _loopdev "$@"; printf "%s\n" "${{COMPREPLY[@]}}" >> {found}; }}
complete -o bashdefault -F offered loopdev
bind "set bell-style none"
PS1='READ''Y>'
"""


def ask(shell: str, directory: Path, *words: str) -> list[str]:
    """Return what a shell offers for the last of the words behind ``loopdev``.

    Args:
        shell: "bash", "zsh" or "fish"; the test is skipped if it is not installed.
        directory: For the script; it is used as its user is told to.
        words: The last may be the beginning of one, or "".
    """
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    done = subprocess.run([LOOPDEV, "completion", shell], capture_output=True, text=True)
    assert done.returncode == 0
    path = directory / "_loopdev"
    path.write_text(done.stdout)
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](path, words)


def complete(shell: str, directory: Path, *words: str) -> list[str]:
    """Return what the words are when the last of them was completed: "bash" or "zsh"."""
    ask(shell, directory, *words)
    return (directory / "completed").read_text().splitlines()


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.path.dirname(LOOPDEV)}:{os.environ['PATH']}"}


def _bash(script: Path, words: tuple[str, ...]) -> list[str]:
    """Type it at a prompt: only there does bash take words apart, at each of many characters."""
    found, rc = script.with_name("offered"), script.with_name("bashrc")
    found.write_text("")
    rc.write_text(_BASHRC.format(script=script, found=found))
    _type(["bash", "--noprofile", "--rcfile", str(rc), "-i"], script.parent, words)
    return found.read_text().split()


def _fish(script: Path, words: tuple[str, ...]) -> list[str]:
    line = " ".join(["loopdev", *words])
    rows = _run(["fish", "--no-config", "-c"], f"source {script}; complete -C '{line}'")
    return [row.partition("\t")[0] for row in rows.splitlines()]


def _run(command: list[str], program: str) -> str:
    done = subprocess.run([*command, program], capture_output=True, text=True, env=_environment())
    assert done.stderr == ""
    return done.stdout


def _zsh(script: Path, words: tuple[str, ...]) -> list[str]:
    """Type it at a prompt: zsh completes nowhere else."""
    directory = script.parent
    (directory / ".zshrc").write_text(_ZSHRC.format(directory=directory))
    found = directory / "offered"
    found.write_text("")
    _type(["zsh", "-i"], directory, words)
    return [*dict.fromkeys(found.read_text().split())]


def _type(shell: list[str], directory: Path, words: tuple[str, ...]) -> None:
    """Type a line and the tabulator at a prompt, have what it is then written, and leave."""
    line, completed = " ".join(["loopdev", *words]), directory / "completed"
    begin, end = "\x01", "\x05"  # of the line: where the cursor goes
    keys = f"{line}\t{begin}printf '%s\\n' {end} >{completed}\nexit\n"
    terminal, inside = pty.openpty()
    with subprocess.Popen(
        shell,
        **dict.fromkeys(("stdin", "stdout", "stderr"), inside),
        env={
            **_environment(),
            "ZDOTDIR": str(directory),
            "TERM": "dumb",
            "HISTFILE": str(directory / "history"),
        },
        start_new_session=True,
    ):
        os.close(inside)
        _read(terminal, b"READY>")
        os.write(terminal, keys.encode())
        _read(terminal, None)
    os.close(terminal)


def _read(terminal: int, until: bytes | None) -> None:
    """Read what a shell writes, until that, or until it ends."""
    seen = b""
    while until is None or until not in seen:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # EIO: nobody has the other side any more
            data = b""
        if not data:
            assert until is None, seen
            return
        seen += data
