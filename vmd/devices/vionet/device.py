"""A virtio network device (virtio 1.2, 5.1; *cat. 6.5*): configuration, features, and the life of its two queues."""

from struct import Struct

from vmd.devices.vionet import announce
from vmd.devices.vionet import tap as taps
from vmd.devices.vionet.addresses import Addresses
from vmd.devices.vionet.interface import Interface, given
from vmd.devices.vionet.local import LocalNetwork
from vmd.devices.vionet.mover import Mover
from vmd.devices.vionet.receive import Receiver
from vmd.devices.vionet.transmit import Transmitter
from vmd.errors import HostError
from vmd.ipc import devmsg
from vmd.log import RateLimit
from vmd.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.devices.vionet import worker
    from vmd.virtio.queue import Queue

    class Services(worker.Services, Protocol):
        """What of `process.ThreadedProcess` is used here."""

        slot: memoryview

        def watch(self, fd: int, handler: Callable[[], None], events: int = ...) -> None:
            """Call back on an event."""

        def unwatch(self, fd: int) -> None:
            """Call back no more."""

        def tell(self, packet: bytes) -> None:
            """Inform the VM."""

        def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
            """Set the timer."""


CONFIG = Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
ALWAYS = (
    1 << spec.VIRTIO_NET_F_MAC
    | 1 << spec.VIRTIO_NET_F_STATUS
    | 1 << spec.VIRTIO_NET_F_MRG_RXBUF
    # What the guest sends unfinished, the kernel finishes, whatever the tap.
    | 1 << spec.VIRTIO_NET_F_CSUM
    | 1 << spec.VIRTIO_NET_F_HOST_TSO4
    | 1 << spec.VIRTIO_NET_F_HOST_TSO6
    | 1 << spec.VIRTIO_NET_F_HOST_ECN
)
OFFLOADS = {  # what the guest can take unfinished, and how the tap is told
    spec.VIRTIO_NET_F_GUEST_CSUM: taps.TUN_F_CSUM,
    spec.VIRTIO_NET_F_GUEST_TSO4: taps.TUN_F_TSO4,
    spec.VIRTIO_NET_F_GUEST_TSO6: taps.TUN_F_TSO6,
    spec.VIRTIO_NET_F_GUEST_ECN: taps.TUN_F_TSO_ECN,
}


class Vionet:
    """A network interface."""

    def __init__(
        self, interface: "Interface", tap: taps.Tap, kicks: "list[int]", services: "Services"
    ) -> None:
        """Take the tap, whose owner we are from here on, and start the thread that moves frames."""
        self.interface = interface
        self.tap = tap
        self.services = services
        self.complaints = RateLimit()
        self.wanted_up = True  # by the VM
        self.gone = False
        self.tap_up = tap.is_up()
        self.receiver = Receiver(services, kicks[0], tap, self._on_tap_failed)
        self.transmitter = Transmitter(services, kicks[1], tap, self._on_tap_failed)
        self.workers = (self.receiver, self.transmitter)
        self.mover = Mover(services, tap.fd, self.workers)
        if interface.locked:
            self.receiver.accepted = self.transmitter.allowed = interface.lladdr
        self.local: LocalNetwork | None = None
        self.addresses = Addresses(interface.lladdr)
        if not interface.local:
            self.transmitter.addresses = self.addresses
        if interface.local:
            self.local = LocalNetwork(interface, self._inject, services, services.tell)
            self.transmitter.answers = self.local
        self._set_links()
        if not self.tap_up:
            self._watch_tap()
        self.mover.start()

    # --- what a driver sees --------------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """Unfinished frames are offered to the guest as far as the tap leaves them so."""
        features = ALWAYS
        for bit, flag in OFFLOADS.items():
            if self.tap.offloads & flag:
                features |= 1 << bit
        if self.interface.mtu:
            features |= 1 << spec.VIRTIO_NET_F_MTU
        return features

    @property
    def link_up(self) -> bool:
        """Whether frames come and go."""
        return self.wanted_up and self.tap_up and not self.gone

    @property
    def config(self) -> bytes:
        """The configuration space as it is now (5.1.4)."""
        status = spec.VIRTIO_NET_S_LINK_UP if self.link_up else 0
        return CONFIG.pack(self.interface.lladdr, status, 1, self.interface.mtu)

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing can be written: a driver has the address that its operator gave it."""

    # --- life ----------------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "list[Queue | None]") -> None:
        """Take the rings, and set the tap for what was negotiated."""
        mergeable = bool(features >> spec.VIRTIO_NET_F_MRG_RXBUF & 1)
        modern = bool(features >> spec.VIRTIO_F_VERSION_1 & 1)
        header = spec.NET_HDR_BYTES if modern or mergeable else spec.NET_HDR_BYTES_LEGACY
        offloads = sum(flag for bit, flag in OFFLOADS.items() if features >> bit & 1) & self.tap.offloads
        if not offloads & taps.TUN_F_CSUM:
            offloads = 0  # to segment means to sum
        elif not offloads & (taps.TUN_F_TSO4 | taps.TUN_F_TSO6):
            offloads &= ~taps.TUN_F_TSO_ECN
        try:
            self.tap.configure(header, offloads)
        except HostError as error:
            self._lose_tap(str(error))
        self.tap.forget_frames()
        self.receiver.configure(header, mergeable=mergeable, sums=bool(offloads))
        self.receiver.forget()
        self.transmitter.header = header
        for worker, queue in zip(self.workers, [*queues, None, None], strict=False):
            worker.queue = queue
        if self.local is not None:
            self.local.begin()

    def quiesce(self, *, forget: bool) -> None:
        """Have both queues stand; a frame that is on its way gets there first.  Raises HostError."""
        self.mover.stop()
        if forget:
            if self.local is not None:
                self.local.end()
            for worker in self.workers:
                worker.queue = None
            self.receiver.forget()

    def resume(self) -> None:
        """Have both queues go on."""
        self.mover.go()

    def close(self) -> None:
        """There is nothing that could be lost."""

    def set_host_lladdr(self, lladdr: bytes) -> None:
        """Take the tap's link-layer address; routers and servers of the guest have it."""
        self.interface = self.interface.replace(host_lladdr=given(lladdr))
        if self.local is not None:
            self.local.interface = self.interface

    def _inject(self, frame: bytes) -> None:
        """Have the guest receive a frame of ours; on any thread."""
        self.receiver.inject(frame)

    # --- at another place ----------------------------------------------------------------------------------------

    def announce(self, addresses: tuple[bytes, ...]) -> None:
        """The guest goes on here and was somewhere else before: tell those that look for it there.

        `addresses` are those that it has told them itself, each a devmsg.ANNOUNCED.
        """
        if self.local is not None:
            interface = self.interface
            if interface.host_lladdr:  # which an earlier version may have given it otherwise
                self._inject(announce.router_address(interface.host_lladdr, interface.host4))
            return
        self.addresses.known = addresses
        self._announce(0)

    def _announce(self, number: int) -> None:
        if self.link_up:
            lladdr = self.interface.lladdr
            self.tap.send(announce.reverse_request(lladdr))
            for entry in self.addresses.known:
                self.tap.send(announce.address(lladdr, entry))
        if number + 1 < len(announce.ROUNDS_S):
            delay_s = announce.ROUNDS_S[number + 1] - announce.ROUNDS_S[number]
            self.services.call_after(delay_s, lambda: self._announce(number + 1))

    def set_resolvers(self, dns4: tuple[bytes, ...], dns6: tuple[bytes, ...]) -> None:
        """Take the name servers that the guest is to be told, and answer what has waited for them."""
        if self.interface.asks:
            self.interface = self.interface.replace(dns4=dns4, dns6=dns6)
        if self.local is not None:
            self.local.go_on(self.interface)

    # --- the link ------------------------------------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Take the link state that the operator wants."""
        if up != self.wanted_up:
            self.wanted_up = up
            self._change_links()

    def _on_tap_failed(self, error: OSError) -> None:
        """Take an error that either queue may find; on the thread that moves frames."""
        self.services.post(lambda: self._tap_failed(error))

    def _tap_failed(self, error: OSError) -> None:
        if error.errno in taps.GONE:
            self._lose_tap(f"{self.tap.name}: {error.strerror}")
        elif self.tap_up and not self.gone:
            self.tap_up = False
            self._watch_tap()  # before: where rings change hands then, the tap may turn out to be gone
            self._change_links()

    def _lose_tap(self, text: str) -> None:
        """Go on without the tap, for good."""
        if not self.gone:
            if not self.tap_up:
                self.services.unwatch(self.tap.fd)
            self.gone = True
            self.complaints.warn(f"{text}; the interface is gone, and with it the link")
            self._change_links()

    def _watch_tap(self) -> None:
        """Wait for a tap that is down to come up: only then can it be written to."""
        self.services.watch(self.tap.fd, self._on_tap_up, taps.WRITABLE)

    def _on_tap_up(self) -> None:
        if self.gone or self.tap_up:
            return
        try:
            self.tap_up = self.tap.is_up()
        except HostError as error:
            self._lose_tap(str(error))
            return
        if self.tap_up:
            self.services.unwatch(self.tap.fd)
            self._change_links()

    def _change_links(self) -> None:
        """Tell both queues and the guest."""
        self._set_links()
        self.mover.look()
        self.services.tell(devmsg.READY_HEAD.pack(devmsg.CONFIG_CHANGED, self.features, len(self.config)) + self.config)

    def _set_links(self) -> None:
        for worker in self.workers:
            worker.link_up = self.link_up

    def limit(self, rate: int) -> None:
        """Let no more bytes a second pass than these, in each direction; 0: as many as come."""
        for worker in self.workers:
            worker.limit(rate)
        self.mover.look()
