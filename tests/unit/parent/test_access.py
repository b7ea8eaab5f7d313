"""Whose rights a caller has."""

import errno
import grp
import os
import pwd
from types import SimpleNamespace

import pytest

from vmd.config.model import Owner
from vmd.errors import OperatorError
from vmd.ipc.messages.clients import Caller
from vmd.parent.access import (
    NOGROUP,
    groups_of,
    in_group,
    may_control,
    not_allowed,
    owner_text,
    require_root,
    rights_of,
)

USERS = {1000: ("ann", 100), 1001: ("bob", 101)}
GROUPS = {100: ("users", []), 101: ("bob", []), 102: ("vms", ["ann"])}


@pytest.fixture
def _users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host have these users and groups only."""

    def getpwuid(uid: int) -> SimpleNamespace:
        name, gid = USERS[uid]
        return SimpleNamespace(pw_name=name, pw_gid=gid)

    def getgrgid(gid: int) -> SimpleNamespace:
        name, members = GROUPS[gid]
        return SimpleNamespace(gr_name=name, gr_mem=members)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr(grp, "getgrgid", getgrgid)


pytestmark = pytest.mark.usefixtures("_users")


def caller(uid: int) -> Caller:
    """Return a caller."""
    return Caller(uid=uid, gid=7, pid=1)


@pytest.mark.parametrize(
    ("uid", "gid", "is_member"),
    [
        (1000, 100, True),  # the primary group
        (1000, 102, True),  # a member
        (1001, 102, False),
        (1001, 100, False),
        (1000, 103, False),  # no such group
        (1002, 100, False),  # no such user
        (1002, 102, False),
    ],
)
def test_the_groups_of_a_user(uid: int, gid: int, is_member: bool) -> None:
    """The group of the user, and each that has the user as a member."""
    assert in_group(uid, gid) is is_member


@pytest.mark.parametrize(
    ("uid", "owner", "allowed"),
    [
        (0, (1000, None), True),
        (1000, (1000, None), True),
        (1, (1000, None), False),
        (1001, (1000, None), False),
        (1000, (0, 102), True),
        (1001, (0, 102), False),
        (1001, (0, 101), True),
    ],
)
def test_root_the_owner_and_the_owning_group_control_a_vm(
    uid: int, owner: tuple[int, int | None], allowed: bool
) -> None:
    """Nobody else does."""
    assert may_control(caller(uid), *owner) is allowed


@pytest.mark.parametrize("uid", [0, 1, 1000])
def test_what_only_root_may_do(uid: int) -> None:
    """The error says what."""
    if not uid:
        require_root(caller(0), "stop the daemon")
        return
    with pytest.raises(OperatorError, match="only root may stop the daemon") as refused:
        require_root(caller(uid), "stop the daemon")
    assert refused.value.number == errno.EPERM


def test_a_refusal_names_the_caller_and_the_owner() -> None:
    """By their names, as far as the host has some."""
    refused = not_allowed(caller(1001), "stop vm a", 1000, 102)
    assert (refused.number, str(refused)) == (errno.EPERM, "bob may not stop vm a: its owner is ann:vms")
    assert [owner_text(1000, None), owner_text(1002, 103), owner_text(1002, None)] == ["ann", "1002:103", "1002"]


@pytest.mark.parametrize(
    ("who", "rights"),
    [(None, None), (caller(0), None), (caller(1), Owner(uid=1, gid=7)), (caller(1000), Owner(uid=1000, gid=7))],
)
def test_files_are_opened_with_the_rights_of_their_user(who: Caller | None, rights: Owner | None) -> None:
    """Those of vm.conf and of root with those of root."""
    assert rights_of(who) == rights


def test_the_groups_of_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the user database, and that of the connection.  A user who is not there has only the latter."""
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [name, gid])

    assert groups_of(1000, 7) == ["ann", 7]
    assert groups_of(1002, 7) == [7]
    assert NOGROUP == (1 << 16) - 2  # nogroup of every distribution, and the overflow id of the kernel
