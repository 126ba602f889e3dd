# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The policy's file: what it can say, and what is refused with its place."""

from __future__ import annotations

import grp
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopdev import Policy, PolicyError, Rule
from loopdev.broker import policy
from loopdev.broker.policy import DEFAULT, PolicyFile, load, parse

FULL = """
first_number = 2000

[[rule]]
uid = [0, 1000]
gid = 5
connections = 10
devices = 4
bytes = "10GiB"
requests_per_second = 50
read_only = true
partscan = false
want_fd = false
block_devices = true
lock = true
node_owner = [0, 6]
node_mode = 0o660

[[rule]]
uid = "all"
devices = "unlimited"
bytes = "unlimited"
requests_per_second = "unlimited"
node_owner = "client"
"""


def test_everything():
    found = parse(FULL)
    assert found == Policy(
        first_number=2000,
        rules=(
            Rule(
                uids=frozenset({0, 1000}),
                gids=frozenset({5}),
                connections=10,
                devices=4,
                bytes=10 << 30,
                requests_per_second=50,
                read_only=True,
                partscan=False,
                want_fd=False,
                block_devices=True,
                lock=True,
                node_owner=(0, 6),
                node_mode=0o660,
            ),
            Rule(devices=None, bytes=None, requests_per_second=None),
        ),
    )


def test_defaults_of_a_rule():
    rule = parse("[[rule]]\nuid = 7\n").rules[0]
    assert (rule.connections, rule.devices, rule.bytes) == (256, 16, None)
    assert (rule.requests_per_second, rule.node_mode, rule.node_owner) == (1000, 0o600, None)
    assert not rule.block_devices
    assert not rule.read_only


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no [[rule]]"),
        ("rule = 3", "must be written as [[rule]]"),
        ("[rule]\nuid = 1", "must be written as [[rule]]"),
        ("x = 1\n[[rule]]\nuid = 1", "unknown key 'x'"),
        ("[[rule]]\nuid = 1\ndevice = 3", "rule 1: unknown key 'device'"),
        ("[[rule]]\nuid = 1\n[[rule]]\ndevices = 3", "rule 2 does not say whom it is for"),
        ("[[rule]]\nuid = -1", "rule 1: uid must be a number, a name"),
        ("[[rule]]\nuid = 4294967295", "rule 1: uid must be a number, a name"),
        ("[[rule]]\nuid = true", "rule 1: uid must be a number, a name"),
        ("[[rule]]\nuid = 1.5", "rule 1: uid must be a number, a name"),
        ('[[rule]]\nuid = "no such user"', "rule 1: uid names nobody: 'no such user'"),
        ('[[rule]]\ngid = ["no such group"]', "rule 1: gid names nobody: 'no such group'"),
        ("[[rule]]\nuid = 1\ndevices = -1", "rule 1: devices must be a number, 0 or more"),
        ('[[rule]]\nuid = 1\ndevices = "many"', "rule 1: devices must be a number, 0 or more"),
        ("[[rule]]\nuid = 1\nconnections = true", "rule 1: connections must be a number"),
        ('[[rule]]\nuid = 1\nbytes = "10 GiB"', "rule 1: bytes must be bytes"),
        ('[[rule]]\nuid = 1\nbytes = "10GB"', "rule 1: bytes must be bytes"),
        ('[[rule]]\nuid = 1\nbytes = "GiB"', "rule 1: bytes must be bytes"),
        ("[[rule]]\nuid = 1\nread_only = 1", "rule 1: read_only must be true or false"),
        ("[[rule]]\nuid = 1\nnode_mode = 0o1777", "rule 1: node_mode must be permissions"),
        ('[[rule]]\nuid = 1\nnode_mode = "660"', "rule 1: node_mode must be permissions"),
        ("[[rule]]\nuid = 1\nnode_owner = [1]", "rule 1: node_owner must be"),
        ('[[rule]]\nuid = 1\nnode_owner = "root"', "rule 1: node_owner must be"),
        ("first_number = 3\n[[rule]]\nuid = 1", "first_number must be from 8"),
        ("first_number = 1048576\n[[rule]]\nuid = 1", "first_number must be from 8"),
        ("[[rule]\n", "is not TOML: "),
        ("uid = 1\nuid = 2", "is not TOML: "),
    ],
)
def test_mistakes(text, reason):
    with pytest.raises(PolicyError) as caught:
        parse(text, "/etc/policy.toml")
    assert caught.value.path == "/etc/policy.toml"
    assert reason in caught.value.reason
    assert str(caught.value).startswith("/etc/policy.toml: ")


def test_names():
    user, group = pwd.getpwall()[0], grp.getgrall()[0]
    rule = parse(f'[[rule]]\nuid = ["{user.pw_name}"]\ngid = "{group.gr_name}"\n').rules[0]
    assert (rule.uids, rule.gids) == (frozenset({user.pw_uid}), frozenset({group.gr_gid}))


@pytest.mark.parametrize(
    ("rule", "uid", "groups", "fits"),
    [
        (Rule(uids=frozenset({5})), 5, {1}, True),
        (Rule(uids=frozenset({5})), 6, {1}, False),
        (Rule(gids=frozenset({5})), 0, {1, 5}, True),
        (Rule(gids=frozenset({5})), 5, {1}, False),
        (Rule(uids=frozenset({5}), gids=frozenset({1})), 5, {1}, True),
        (Rule(uids=frozenset({5}), gids=frozenset({1})), 5, {2}, False),
        (Rule(uids=frozenset({5}), gids=frozenset({1})), 6, {1}, False),
        (Rule(), 4711, set(), True),
        (policy.NOTHING, 0, {0}, False),
    ],
)
def test_whom_a_rule_fits(rule, uid, groups, fits):
    assert rule.fits(uid, groups) is fits


def test_first_rule_that_fits_counts():
    found = parse('[[rule]]\nuid = 5\ndevices = 1\n[[rule]]\nuid = "all"\ndevices = 2\n')
    assert found.rule_for(5, {5}).devices == 1
    assert found.rule_for(6, {5}).devices == 2
    assert parse("[[rule]]\nuid = 5\n").rule_for(6, {6}) is None


def test_default_is_root_alone():
    assert DEFAULT.rule_for(1000, {0}) is None
    rule = DEFAULT.rule_for(0, {0})
    assert (rule.devices, rule.bytes, rule.requests_per_second) == (None, None, None)


def test_file(tmp_path):
    path = tmp_path / "policy.toml"
    with pytest.raises(PolicyError, match="cannot be read: No such file"):
        load(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="is not UTF-8"):
        load(str(path))
    path.write_text(FULL)
    assert load(str(path)) == parse(FULL)


def test_reload_keeps_what_was_good(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("[[rule]]\nuid = 1\n")
    file = PolicyFile(path)
    status = path.stat()
    assert file.identity == (status.st_dev, status.st_ino)
    path.write_text("[[rule]]\nuid = 2\n")
    file.reload()
    assert file.policy.rules[0].uids == frozenset({2})
    path.write_text("[[rule]]\n")
    with pytest.raises(PolicyError):
        file.reload()
    assert file.policy.rules[0].uids == frozenset({2})


def test_policy_without_a_file():
    for source in (None, Policy(rules=(Rule(),))):
        file = PolicyFile(source)
        file.reload()
        assert file.policy == (source or DEFAULT)
        assert file.identity is None


def test_example_is_a_policy():
    example = Path(__file__).resolve().parent.parent.parent / "systemd/policy.toml"
    found = load(str(example))
    assert found.rule_for(0, {0}) is not None


_VALUES = st.one_of(
    st.integers(-5, 1 << 40), st.booleans(), st.text(max_size=5).map(lambda s: s.replace('"', ""))
)


@given(st.dictionaries(st.sampled_from(sorted(policy._KEYS)), _VALUES))
def test_any_value(fields):
    lines = [
        f"{key} = {str(value).lower() if not isinstance(value, str) else repr(value)}"
        for key, value in fields.items()
    ]
    try:
        found = parse("\n".join(["[[rule]]", *lines]))
    except PolicyError:
        return
    assert len(found.rules) == 1
