"""A virtio network device (virtio 1.2, 5.1; *cat. 6.5*): configuration, features, and the life of its two queues."""

from struct import Struct

from vmd.devices.vionet import announce
from vmd.devices.vionet import tap as taps
from vmd.devices.vionet.addresses import Addresses
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
    from vmd.devices.vionet.interface import Interface
    from vmd.virtio.queue import Queue

    class Services(worker.Services, Protocol):
        """The part of `process.ThreadedProcess` that is used here."""

        slot: memoryview

        def watch(self, fd: int, handler: Callable[[], None], events: int = ...) -> None:
            """Call `handler` for each of `events` on `fd`."""

        def unwatch(self, fd: int) -> None:
            """Stop watching `fd`."""

        def tell(self, packet: bytes) -> None:
            """Send a packet to the VM on the async channel."""

        def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
            """Set the timer."""


CONFIG = Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
ALWAYS = (
    1 << spec.VIRTIO_NET_F_MAC
    | 1 << spec.VIRTIO_NET_F_STATUS
    | 1 << spec.VIRTIO_NET_F_MRG_RXBUF
    # Offloads for frames from the guest: the kernel completes checksums and segments for any tap.
    | 1 << spec.VIRTIO_NET_F_CSUM
    | 1 << spec.VIRTIO_NET_F_HOST_TSO4
    | 1 << spec.VIRTIO_NET_F_HOST_TSO6
    | 1 << spec.VIRTIO_NET_F_HOST_ECN
)
OFFLOADS = {  # offloads for frames to the guest: feature bit, and flag of TUNSETOFFLOAD
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
        """Take ownership of the tap, and start the thread that moves frames."""
        self.interface = interface
        self.tap = tap
        self.services = services
        self.complaints = RateLimit()
        self.gone = False  # the tap was deleted
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

    # --- configuration -------------------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """The features: offloads for frames to the guest are offered only if the tap supports them."""
        features = ALWAYS
        for bit, flag in OFFLOADS.items():
            if self.tap.offloads & flag:
                features |= 1 << bit
        if self.interface.mtu:
            features |= 1 << spec.VIRTIO_NET_F_MTU
        return features

    @property
    def link_up(self) -> bool:
        """Whether the link is up: the tap is there and up."""
        return self.tap_up and not self.gone

    @property
    def config(self) -> bytes:
        """The configuration space as it is now (5.1.4)."""
        status = spec.VIRTIO_NET_S_LINK_UP if self.link_up else 0
        return CONFIG.pack(self.interface.lladdr, status, 1, self.interface.mtu)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore the write: the operator sets the guest's link-layer address, and no other field can be written."""

    # --- life ----------------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "list[Queue | None]") -> None:
        """Take the rings, and set the tap to the negotiated features."""
        mergeable = bool(features >> spec.VIRTIO_NET_F_MRG_RXBUF & 1)
        modern = bool(features >> spec.VIRTIO_F_VERSION_1 & 1)
        header = spec.NET_HDR_BYTES if modern or mergeable else spec.NET_HDR_BYTES_LEGACY
        offloads = sum(flag for bit, flag in OFFLOADS.items() if features >> bit & 1) & self.tap.offloads
        if not offloads & taps.TUN_F_CSUM:
            offloads = 0  # segmentation needs checksums
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
        """Stop the thread that moves frames; it completes the frame that it moves.  Raises HostError."""
        self.mover.stop()
        if forget:
            if self.local is not None:
                self.local.end()
            for worker in self.workers:
                worker.queue = None
            self.receiver.forget()

    def resume(self) -> None:
        """Let the thread that moves frames go on."""
        self.mover.go()

    def close(self) -> None:
        """Do nothing: an interface has no data to save."""

    def _inject(self, frame: bytes) -> None:
        """Put a frame of this process into the receive queue; on any thread."""
        self.receiver.inject(frame)

    # --- after a move --------------------------------------------------------------------------------------------

    def announce(self, addresses: tuple[bytes, ...]) -> None:
        """Tell switches and neighbours that the guest, which was at another host before, is here now.

        `addresses` are those that the guest itself has told its neighbours, each a devmsg.ANNOUNCED.  The guest of a
        `local` interface is told the Ethernet address of its router here instead.
        """
        if self.local is not None:
            interface = self.interface
            if interface.host_lladdr:
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
        """Take the name servers for the guest, and answer its requests that wait for them."""
        if self.interface.asks:
            self.interface = self.interface.replace(dns4=dns4, dns6=dns6)
        if self.local is not None:
            self.local.go_on(self.interface)

    # --- the link ------------------------------------------------------------------------------------------------

    def _on_tap_failed(self, error: OSError) -> None:
        """Pass an error of the tap to the main thread.  Called on the thread that moves frames, for either queue."""
        self.services.post(lambda: self._tap_failed(error))

    def _tap_failed(self, error: OSError) -> None:
        if error.errno in taps.GONE:
            self._lose_tap(f"{self.tap.name}: {error.strerror}")
        elif self.tap_up and not self.gone:
            self.tap_up = False
            self._watch_tap()  # before `_change_links`, which may find that the tap is gone, and then unwatches it
            self._change_links()

    def _lose_tap(self, text: str) -> None:
        """The tap was deleted: go on without it until the process ends."""
        if not self.gone:
            if not self.tap_up:
                self.services.unwatch(self.tap.fd)
            self.gone = True
            self.complaints.warn(f"{text}; the interface was deleted, so the link is down")
            self._change_links()

    def _watch_tap(self) -> None:
        """Wait until the tap, which is down, comes up.  A tap becomes writable when it comes up."""
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
        """Tell the link's new state to both queues and to the guest."""
        self._set_links()
        self.mover.look()
        self.services.tell(devmsg.READY_HEAD.pack(devmsg.CONFIG_CHANGED, self.features, len(self.config)) + self.config)

    def _set_links(self) -> None:
        for worker in self.workers:
            worker.link_up = self.link_up

    def limit(self, rate: int) -> None:
        """Limit the bytes that pass each second, in each direction; 0: no limit."""
        for worker in self.workers:
            worker.limit(rate)
        self.mover.look()
