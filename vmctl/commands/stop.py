"""vmctl stop: ask a guest to shut down, or kill its VM; for one VM or all (*cat. 3.5*)."""

import errno

from vmctl.ending import FAILED, REQUESTED, TERMINATED, Result, announce, ask_end, conclude, finish
from vmctl.options import Given
from vmctl.session import Session
from vmctl.vmref import VmRef, parse_vmref
from vmd.client import Client
from vmd.errors import VMD_VM_STOP_INVALID
from vmd.ipc.messages.clients import StopRequest, VmInfo, WaitRequest

STOPPED, STOPPING = "stopped", "stopping"  # states of VmInfo

# Answers to a wait if the VM has ended after our request to stop, but before this one.
GONE = (errno.ENOENT, errno.EINVAL, VMD_VM_STOP_INVALID)


def run(session: Session, given: Given) -> int:
    """Stop the VM, or all VMs."""
    force, wait = given.has("-f"), given.has("-w")
    if given.has("-a"):
        return stop_all(session, force=force, wait=wait)
    ref = parse_vmref(given.operand)
    result = ask_end(session.client, ref, stop_request(ref, force=force, wait=wait), "stopping")
    conclude(session, result, forced=force and not wait)
    return finish(session, [result])


def stop_request(ref: VmRef, *, force: bool, wait: bool) -> StopRequest:
    """Return the request for one VM."""
    return StopRequest(vmid=ref.vmid, name=ref.name, force=force, wait=wait)


def stop_all(session: Session, *, force: bool, wait: bool) -> int:
    """Stop all VMs that run or wait for their start.

    Unlike vmd: with -w, all guests are asked before we wait for the first one, so that they shut down at the same time.
    A VM that is already stopping is not an error.
    """
    client = session.client
    vms = [vm for vm in client.list_vms() if vm.pid or vm.state != STOPPED]
    results: list[Result] = []
    if not wait:
        for vm in vms:
            results.append(ask_one(client, vm, force=force, doing="stopping"))
            conclude(session, results[-1], forced=force)
            if results[-1].interrupted:
                break
        return finish(session, results)
    asked: list[Result] = []
    for vm in vms:
        asked.append(ask_one(client, vm, force=force))
        if asked[-1].interrupted:
            break  # its answer may still come, and would be taken for the answer about the next VM
    for result in asked:
        ref = VmRef(name=result.name)
        if result.result == REQUESTED and not asked[-1].interrupted:
            ended = ask_end(client, ref, WaitRequest(name=ref.name), "stopping")
            if ended.code in GONE:
                ended = Result(vmid=result.vmid, name=result.name, result=TERMINATED, text="")
        else:
            announce("stopping", ref)
            ended = result
        conclude(session, ended)
        results.append(ended)
        if ended.interrupted:
            break
    return finish(session, results)


def ask_one(client: Client, vm: VmInfo, *, force: bool, doing: str = "") -> Result:
    """Ask for the end of one of several VMs, without waiting for it."""
    requested = Result(vmid=vm.vmid, name=vm.name, result=REQUESTED, text="")
    ref = VmRef(name=vm.name)
    if vm.state == STOPPING and not force:
        if doing:
            announce(doing, ref)
        return requested
    result = ask_end(client, ref, stop_request(ref, force=force, wait=False), doing)
    if result.result == FAILED and result.code == errno.EALREADY:
        return requested  # another request was faster
    return result
