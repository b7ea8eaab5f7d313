"""The services of a `local interface` for its guest: answers to DHCP and router solicitations, and advertisements.

The name servers of a host change.  So the VM is asked for them at each request of the guest, and the answer to the
guest waits for that.
"""

import _thread
import posix as os
import time

from vmd.devices.vionet import dhcp, ra
from vmd.devices.vionet.ethernet import HEADER_BYTES, IP_ICMPV6, IP_UDP, IPV4, IPV6, TYPE
from vmd.ipc import devmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.devices.vionet.interface import Interface

    class Services(Protocol):
        """The part of the process that is used here."""

        figures: memoryview
        slot: memoryview

        def post(self, job: Callable[[], None]) -> None:
            """Call `job` on the main thread."""

        def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
            """Set the timer."""

IP_PROTOCOL = HEADER_BYTES + 9
IP_VERSION = HEADER_BYTES
IP_WITHOUT_OPTIONS = 0x45
UDP_PORTS = slice(HEADER_BYTES + 20, HEADER_BYTES + 24)
CLIENT_TO_SERVER = b"\0\x44\0\x43"
IPV6_NEXT = HEADER_BYTES + 6
ICMPV6_TYPE = HEADER_BYTES + 40
NAME_WORDS = devmsg.HOST_NAME_BYTES // 8
NAME_AT = devmsg.FIGURES_SLOT_BYTES // 8 - devmsg.FIGURES_HEAD - NAME_WORDS
PLACES = {name: place for place, name in enumerate(devmsg.COUNTER_NAMES)}
WAITING_MAX = 8  # answers; the request of another one is dropped, and the guest repeats it


class LocalNetwork:
    """The other end of the guest's link.

    The thread that moves frames calls `concerns` and `answer`; while the kernel moves them, the main thread does.  All
    other methods are called on the main thread.
    """

    look_bytes = ICMPV6_TYPE + 1
    frame_max = dhcp.FRAME_MAX

    def __init__(
        self,
        interface: "Interface",
        inject: "Callable[[bytes], None]",
        services: "Services",
        tell: "Callable[[bytes], None]",
    ) -> None:
        """`inject` sends a frame to the guest, `tell` a message to the VM."""
        self.interface = interface
        self.inject = inject
        self.services = services
        self.tell = tell
        self.waiting: list[Callable[[], None]] = []  # answers that wait for name servers
        self.asked = False  # ASK_RESOLVERS was sent, and not answered yet
        self.initial = 0  # number of initial advertisements that are left
        # `life` counts `begin` and `end`; `leased` is its value when LEASE was last sent.
        self.life = self.leased = 0
        self.answered = {dhcp.OFFER: 0, dhcp.ACK: 0, dhcp.NAK: 0, dhcp.BOOTP_TYPE: 0}
        self.unanswered = dict.fromkeys(dhcp.REASONS, 0)
        self.lease_s = self.lease_requested = 0
        self.lease_name = b""
        self.solicited = self.unsolicited = 0
        self.showing = _thread.allocate_lock()

    @property
    def routes(self) -> bool:
        """Whether this interface advertises a router to the guest."""
        return bool(self.interface.prefix6 and self.interface.host_lladdr)

    # --- on the thread that moves frames ---------------------------------------------------------------------------

    def concerns(self, start: bytes) -> bool:
        """Return whether a frame with these first bytes may be for us: `answer` has to look at it."""
        kind = start[TYPE]
        if kind == IPV4:
            if start[IP_PROTOCOL : IP_PROTOCOL + 1] != bytes((IP_UDP,)):
                return False
            return start[IP_VERSION] != IP_WITHOUT_OPTIONS or start[UDP_PORTS] == CLIENT_TO_SERVER
        return (
            kind == IPV6
            and start[IPV6_NEXT : IPV6_NEXT + 1] == bytes((IP_ICMPV6,))
            and start[ICMPV6_TYPE : ICMPV6_TYPE + 1] == bytes((ra.ROUTER_SOLICITATION,))
        )

    def answer(self, frame: bytes, sum_missing: bool) -> bool:
        """Answer a frame, if it is for us; return whether it is."""
        interface = self.interface
        if frame[TYPE] == IPV6:
            if not self.routes or not ra.is_solicitation(frame, interface, sum_missing=sum_missing):
                return False
            self._when_known(self._advertise_solicited)
            return True
        try:
            reply = dhcp.answer(frame, interface, sum_missing=sum_missing)
        except dhcp.Unanswered as unanswered:
            self.unanswered[unanswered.reason] += 1
            if unanswered.reason in (dhcp.RELEASED, dhcp.DECLINED):
                self.lease_s = self.lease_requested = 0
                self.lease_name = b""
            self.show()
            return False
        if reply is None:
            return False
        request = reply.request
        self._when_known(lambda: self._reply(request))
        return True

    def _when_known(self, job: "Callable[[], None]") -> None:
        """Call `job` when the name servers are known, unless the driver has reset the device by then."""
        if self.interface.asks:
            life = self.life  # it does not change while a thread serves
            self.services.post(lambda: self._wait(job) if life == self.life else None)
        else:
            job()

    # --- on either thread ----------------------------------------------------------------------------------------

    def _reply(self, request: dhcp.Request) -> None:
        """Answer a request.  The caller has found out that it gets an answer."""
        reply = dhcp.Reply(request, dhcp.decide(request, self.interface), self.interface)
        self.answered[reply.kind] += 1
        if reply.lease:
            self.lease_s = int(time.time())
            self.lease_requested = int.from_bytes(reply.requested, "big")
            self.lease_name = request.host_name
            if self.leased != self.life:
                self.leased = self.life
                self.tell(devmsg.TYPE.pack(devmsg.LEASE))
        self.show()
        self.inject(reply.frame)

    def _advertise_solicited(self) -> None:
        self.solicited += 1
        self.show()
        self.inject(ra.advertisement(self.interface))

    # --- on the main thread --------------------------------------------------------------------------------------

    def _wait(self, job: "Callable[[], None]") -> None:
        """Add an answer that waits for name servers; ask the VM for them, unless a question is open already."""
        if len(self.waiting) < WAITING_MAX:
            self.waiting.append(job)
        if not self.asked:
            self.asked = True
            self.tell(devmsg.TYPE.pack(devmsg.ASK_RESOLVERS))

    def go_on(self, interface: "Interface") -> None:
        """Send the answers that wait for name servers."""
        changed = interface.dns6 != self.interface.dns6
        self.interface = interface
        self.asked = False
        waiting, self.waiting = self.waiting, []
        for job in waiting:
            try:
                job()
            except dhcp.Unanswered as unanswered:  # the new name servers may make the answer too long
                self.unanswered[unanswered.reason] += 1
                self.show()
        if changed and self.routes:
            self.unsolicited += 1
            self.show()
            self.inject(ra.advertisement(interface))

    def begin(self) -> None:
        """A driver is active: send it router advertisements soon, even if it does not ask (RFC 4861, 6.2.4)."""
        self.life += 1
        self.initial = ra.INITIAL_COUNT
        self._plan(1.0)

    def end(self) -> None:
        """The driver has reset the device: drop the answers that wait."""
        self.life += 1
        self.waiting = []

    def _plan(self, delay_s: float) -> None:
        life = self.life
        self.services.call_after(delay_s, lambda: self._advertise() if life == self.life else None)

    def _advertise(self) -> None:
        if self.routes:
            self.unsolicited += 1
            self.show()
            self.inject(ra.advertisement(self.interface))
        if self.initial > 1:
            self.initial -= 1
            self._plan(ra.INITIAL_INTERVAL_S)
        else:
            # A random interval, so that not all interfaces of a host send at once.
            self._plan(ra.INTERVAL_S * (0.75 + os.urandom(1)[0] / 512))

    def show(self) -> None:
        """Store counters and host name in shared memory; on either thread."""
        figures = self.services.figures
        with self.showing:
            for name, value in self.counters().items():
                figures[PLACES[name]] = value
            slot, lease_name = self.services.slot, self.lease_name
            for place in range(NAME_WORDS):
                slot[NAME_AT + place] = int.from_bytes(lease_name[8 * place : 8 * place + 8], "little")

    def counters(self) -> dict[str, int]:
        """Return the counters by their names in `devmsg.COUNTER_NAMES`."""
        return {
            "dhcp_offers": self.answered[dhcp.OFFER],
            "dhcp_acks": self.answered[dhcp.ACK],
            "dhcp_naks": self.answered[dhcp.NAK],
            "dhcp_bootp": self.answered[dhcp.BOOTP_TYPE],
            "ra_sent": self.solicited + self.unsolicited,
            "lease_s": self.lease_s,
            "lease_requested": self.lease_requested,
            **self.unanswered,
        }
