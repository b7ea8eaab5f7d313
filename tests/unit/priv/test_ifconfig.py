"""How answers and failures of pyroute2 are handled, without netlink."""

import errno
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2.netlink import NLM_F_DUMP_INTR
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkDumpInterrupted, NetlinkError

from vmd.errors import HostError
from vmd.priv.ifconfig import absent_is_fine, listed, trying
from vmd.priv.lists import DUMPS_MAX

Answer = list[int] | Exception


def dump(*answers: Answer) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that lists messages with these flags, or fails: one answer for each call."""
    left = list(answers)

    def listing() -> list[dict[str, Any]]:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [{"header": {"flags": flags}} for flags in answer]

    return listing


@pytest.mark.parametrize("broken", [[2, 2 | NLM_F_DUMP_INTR], NetlinkDumpInterrupted()], ids=["flag", "exception"])
def test_a_list_that_others_changed_is_read_again(broken: Answer) -> None:
    """An interface may be missing in it, and a bridge in use may look unused."""
    assert len(listed("list interfaces", dump(broken, broken, [2, 2, 2]))) == 3


def test_a_list_that_changes_each_time_is_given_up() -> None:
    """The list is not used."""
    with pytest.raises(HostError, match="list interfaces while others change them") as failed:
        listed("list interfaces", dump(*[[NLM_F_DUMP_INTR]] * DUMPS_MAX))

    assert failed.value.number == errno.EAGAIN


def test_a_list_that_is_refused_is_not_read_again() -> None:
    """The kernel's error says why."""
    with pytest.raises(HostError) as failed:
        listed("list routes", dump(NetlinkError(errno.EPERM)))

    assert failed.value.number == errno.EPERM


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NetlinkError(errno.EBUSY), errno.EBUSY),
        (NetlinkDecodeError(ValueError("nonsense")), errno.EPROTO),
        (TimeoutError(errno.ETIMEDOUT, "late"), errno.ETIMEDOUT),
    ],
    ids=["kernel", "nonsense", "late"],
)
def test_every_failure_is_a_host_error(error: Exception, code: int) -> None:
    """pyroute2 raises several kinds of exceptions, and priv only this one."""
    with pytest.raises(HostError, match="make bridge br0") as failed, trying("make bridge br0"):
        raise error

    assert failed.value.number == code


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ESRCH, errno.ENOENT])
def test_deleting_what_does_not_exist_is_no_error(code: int) -> None:
    """The kernel or another program may have deleted it."""
    with absent_is_fine():
        raise NetlinkError(code)


def test_deleting_without_permission_is_an_error() -> None:
    """Only missing objects are ignored."""
    with pytest.raises(NetlinkError), absent_is_fine():
        raise NetlinkError(errno.EPERM)
