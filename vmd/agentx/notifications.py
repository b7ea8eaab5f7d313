"""Notifications (RFC 7666) about changes of a VM's state.  The agent makes traps of them.

While there is no agent, the latest notifications wait for one.
"""

import time
from collections import deque

from vmd.agentx import mib, pdu
from vmd.log import RateLimit, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.agentx.pdu import Oid
    from vmd.agentx.session import Session
    from vmd.ipc.loop import Loop, Timer
    from vmd.ipc.messages.agentx import AgentxChanged

SNMP_TRAP_OID: "Oid" = (1, 3, 6, 1, 6, 3, 1, 1, 4, 1, 0)
# The notification of a single VM by VirtualMachineOperState.  The number of the bulk notification is larger by
# BULK_OFFSET.  Other states have no notification.
RUNNING, SHUTTING_DOWN, SHUTDOWN, PAUSED, SUSPENDING, RESUMING, MIGRATING, CRASHED, DELETED = 1, 2, 3, 4, 5, 7, 8, 9, 10
BULK_OFFSET = 10
OF_STATE = {
    mib.RUNNING: RUNNING, mib.SHUTTING_DOWN: SHUTTING_DOWN, mib.SHUTDOWN: SHUTDOWN, mib.PAUSED: PAUSED,
    mib.SUSPENDING: SUSPENDING, mib.RESUMING: RESUMING, mib.MIGRATING: MIGRATING, mib.CRASHED: CRASHED,
}  # fmt: skip
KEPT_MAX, KEPT_S = 100, 60.0  # notifications kept while there is no agent, and for how long
BULK_S = 1.0  # changes of several VMs within that time become one notification
BURST, INTERVAL_S = 1000, 0.02
VMS_MAX = 1 << 16  # VM ids that have a bit in a VirtualMachineList


class Notifications:
    """Sends the notifications that `switches` enable.  If there are too many, it drops some and logs how many."""

    def __init__(self, loop: "Loop", switches: "dict[Oid, bool]") -> None:
        self.loop = loop
        self.switches = switches
        self.session: Session | None = None
        self.limit = RateLimit(BURST, INTERVAL_S)
        self._kept: deque[tuple[float, AgentxChanged]] = deque(maxlen=KEPT_MAX)
        self._affected: dict[int, set[int]] = {}  # ids of VMs by notification
        self._bulk: Timer | None = None

    def begin(self, session: "Session") -> None:
        """There is an agent: send it the notifications that were kept."""
        self.session = session
        kept, self._kept = list(self._kept), deque(maxlen=KEPT_MAX)
        for at_s, change in kept:
            if time.monotonic() - at_s < KEPT_S:
                self.add(change)

    def end(self) -> None:
        """The agent is gone."""
        self.session = None

    def add(self, change: "AgentxChanged") -> None:
        """Send, or keep, the notification about a change."""
        number = DELETED if change.deleted else OF_STATE.get(mib.oper_state(change.state))
        if number is None:
            return
        if self.session is None:
            self._kept.append((time.monotonic(), change))
            return
        if self.switches[mib.BULK]:
            self._affected.setdefault(number, set()).add(change.vmid)
            if self._bulk is None:
                self._bulk = self.loop.call_later(BULK_S, self._send_bulk)
        if self.switches[mib.PER_VM] and self._allowed():
            self.session.notify(of_one(number, change))

    def _send_bulk(self) -> None:
        self._bulk = None
        affected, self._affected = self._affected, {}
        for number, vms in affected.items():
            if self.session is not None and self._allowed():
                self.session.notify(of_many(number, vms))

    def _allowed(self) -> bool:
        if not self.limit.allow():
            return False
        if self.limit.suppressed:
            log.warn(f"{self.limit.suppressed} notifications were not sent: too much happened at a time")
            self.limit.suppressed = 0
        return True


def of_one(number: int, change: "AgentxChanged") -> bytes:
    """Return a notification of one VM: vmName, vmUUID, vmOperState, and vmPersistent if it is deleted."""
    index = (change.vmid,)
    binds = [
        head(number),
        pdu.bind(pdu.OCTET_STRING, mib.NAME + index, mib.text(change.name)),
        pdu.bind(pdu.OCTET_STRING, mib.UUID + index, b""),
        pdu.bind(pdu.INTEGER, mib.OPER_STATE + index, mib.oper_state(change.state)),
    ]
    if change.deleted:
        binds.append(pdu.bind(pdu.INTEGER, mib.PERSISTENT + index, mib.persistent(change.persistent)))
    return b"".join(binds)


def of_many(number: int, vms: set[int]) -> bytes:
    """Return a notification of many VMs: vmAffectedVMs."""
    return head(number + BULK_OFFSET) + pdu.bind(pdu.OCTET_STRING, mib.AFFECTED, affected(vms))


def head(number: int) -> bytes:
    """Return the variable that identifies the notification (snmpTrapOID)."""
    return pdu.bind(pdu.OBJECT_IDENTIFIER, SNMP_TRAP_OID, (*mib.NOTIFICATIONS, number))


def affected(vms: set[int]) -> bytes:
    """Return a VirtualMachineList: a bit for each id.  Id 1 has the highest bit of the first byte."""
    bits = bytearray(max(min(max(vms), VMS_MAX) + 7 >> 3, 1))
    for vmid in vms:
        if 1 <= vmid <= VMS_MAX:
            bits[vmid - 1 >> 3] |= 0x80 >> (vmid - 1 & 7)
    return bytes(bits)
