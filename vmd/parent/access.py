"""Who may do what (*cat. 4.8*).  Only the parent decides that, by user ids that come from the kernel."""

import errno
import grp
import os
import pwd

from vmd.config.model import Owner
from vmd.errors import OperatorError
from vmd.ipc.messages.clients import Caller, Request
from vmd.ipc.routes import BY_CLASS, Who

NOGROUP = 65534


def in_group(uid: int, gid: int) -> bool:
    """Return whether a user is in a group, by their primary gid or by the member list of the group."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return False
    if user.pw_gid == gid:
        return True
    try:
        return user.pw_name in grp.getgrgid(gid).gr_mem
    except KeyError:
        return False


def may_control(caller: Caller, owner_uid: int, owner_gid: int | None) -> bool:
    """Return whether the caller is root, the owner, or in the owning group."""
    if caller.uid in (0, owner_uid):
        return True
    return owner_gid is not None and in_group(caller.uid, owner_gid)


def not_allowed(caller: Caller, what: str, owner_uid: int, owner_gid: int | None) -> OperatorError:
    """Return the error for a request that only root and the owner may make."""
    owner = owner_text(owner_uid, owner_gid)
    return OperatorError(errno.EPERM, f"{owner_text(caller.uid, None)} may not {what}: its owner is {owner}")


def require_allowed(request: Request, caller: Caller) -> None:
    """Raise OperatorError(EPERM) if only root may make this request, and the caller is not root.

    Requests for owners are checked where their VM is looked up.
    """
    if BY_CLASS[type(request)].who is Who.ROOT:
        require_root(caller, f"ask for a {type(request).__name__}")


def require_root(caller: Caller, what: str) -> None:
    """Raise OperatorError(EPERM) unless the caller is root."""
    if caller.uid != 0:
        raise OperatorError(errno.EPERM, f"only root may {what}")


def rights_of(caller: Caller | None) -> Owner | None:
    """Return with whose rights the files that a caller has named are opened.

    None is root: for root, and for vm.conf, where there is no caller.
    """
    return Owner(uid=caller.uid, gid=caller.gid) if caller is not None and caller.uid else None


def groups_of(uid: int, gid: int) -> list[int]:
    """Return the groups of a user in the user database, and `gid`, the group of their connection."""
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return [gid]


def owner_text(uid: int, gid: int | None) -> str:
    """Return `user` or `user:group`.  An id without a name is shown as a number."""
    try:
        text = pwd.getpwuid(uid).pw_name
    except KeyError:
        text = str(uid)
    if gid is None:
        return text
    try:
        return f"{text}:{grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"{text}:{gid}"
