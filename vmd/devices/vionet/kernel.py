"""vionet for an interface with `vhost`: the kernel moves the frames while it can, this process moves them otherwise.

Runs as  its VM's id, in its VM's cell; may make two ioctl requests on its tap, and those of `vhost` on /dev/vhost-net
Peers    its VM process
Holds    what `main` lists, /dev/vhost-net, and a packet socket that receives some frames of the guest (`ipc/devmsg.py`)
Threads  main (the channels, and everything about the kernel), and the one of `mover`, stopped while the kernel serves

The kernel has the rings while all of this is true (`_kernel_may`):

    interrupts are MSI-X                 INTx needs stores to the interrupt page, which the kernel does not make
    the driver merges buffers, and accepts frames without checksums    otherwise this process corrects each header
    the link is up                       otherwise this process takes the guest's frames and drops them
    there is no `limit`                  the kernel has no limits
    changed memory is not marked         the kernel marks nothing
    the kernel accepts the rings         otherwise this process finds out what is wrong with them
    the device is active and not paused  otherwise neither side touches the rings

When one of these changes, the main thread hands the rings over, while the thread that moves frames is stopped.  No
frame is lost or sent twice: waiting frames stay in the tap, and the ring indices are handed over too (`vhost`).

Frames that the kernel moves do not pass this process.  The packet socket receives the frames that a `local` interface
answers, and those that tell the guest's addresses; answers are sent on it.  An error of the socket tells that the tap
went down or was deleted.
"""

import errno

from vmd.devices import process
from vmd.devices.process import exact
from vmd.devices.vionet.device import Vionet
from vmd.devices.vionet.interface import Interface
from vmd.devices.vionet.main import NetProcess, interface_of
from vmd.devices.vionet.main import make as make_plain
from vmd.devices.vionet.packets import Packets
from vmd.devices.vionet.tap import Tap
from vmd.devices.vionet.vhost import Vhost
from vmd.errors import GuestError, HostError, PeerError, sentence
from vmd.ipc import devmsg
from vmd.privsep.confine import VIONET_KERNEL
from vmd.privsep.title import EVENT, name_thread
from vmd.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.virtio.queue import Queue

NEEDED = 1 << spec.VIRTIO_NET_F_MRG_RXBUF | 1 << spec.VIRTIO_NET_F_GUEST_CSUM
FIGURE = devmsg.COUNTER_NAMES.index("vhost")
RESOURCES = 3


class KernelVionet(Vionet):
    """A network interface whose rings the kernel may have."""

    services: "KernelProcess"

    def __init__(
        self, interface: Interface, tap: Tap, services: "KernelProcess", vhost_fd: int, packet_fd: int
    ) -> None:
        """Take ownership of the three descriptors.  No request is made to /dev/vhost-net yet."""
        host = services.host
        self.vhost = Vhost(vhost_fd, services.memory, tap.fd, host.kicks, host.calls)
        self.in_kernel = False  # the kernel has the rings
        self.going = False  # between `resume` and `quiesce`
        self.direct = False  # interrupts of all queues need only their call eventfds
        self.limited = False
        self.unusable = False  # the kernel refused the rings; not tried again
        self.driver_refused = False  # the kernel does not accept the rings of this driver; tried again for the next one
        self.negotiated = 0
        self.queues: list[Queue | None] = []
        super().__init__(interface, tap, host.kicks, services)
        self.packets = Packets(
            packet_fd, services, self.local, self.addresses, self.transmitter.count_answered, self._look_at_tap
        )
        services.watch(self.vhost.failed, self._on_ring_error)

    # --- who has the rings -----------------------------------------------------------------------------------------

    def _kernel_may(self) -> bool:
        return (
            self.going
            and self.direct
            and self.link_up
            and self.negotiated & NEEDED == NEEDED
            and None not in self.queues
            and not self.limited
            and not self.services.memory.marking
            and not self.unusable
            and not self.driver_refused
        )

    def reconsider(self) -> None:
        """Hand the rings to the side that should have them now.  Raises HostError."""
        may = self._kernel_may()
        if may and not self.in_kernel:
            super().quiesce(forget=False)
            self._hand_over()
            if not self.in_kernel:
                super().resume()
        elif self.in_kernel and not may:
            self._take_back()
            if not self.direct:  # the kernel may have interrupted without a store to the interrupt page: do it now
                for number in range(len(self.queues)):
                    self.services.interrupt(number)
            if self.going:
                super().resume()

    def _hand_over(self) -> None:
        """Hand the rings, which neither side touches, to the kernel.  `in_kernel` says whether that worked.

        Raises:
            HostError: the kernel refuses the rings, and does not give them back.
        """
        try:
            self.receiver.finish()
            self.packets.begin()  # it may find that the tap is down
            if self._kernel_may():
                self.vhost.start(self.negotiated, [queue for queue in self.queues if queue is not None])
                self._note(in_kernel=True)
        except GuestError as error:
            self.driver_refused = True
            self.complaints.warn(f"{self.tap.name}: {error}; the process moves the frames")
        except OSError as error:
            self.unusable = True
            self.complaints.warn(f"{self.tap.name}: /dev/vhost-net: {sentence(error)}; the process moves the frames")
        if self.in_kernel:
            for frame in self.receiver.take_injected():
                self._inject(frame)
        else:
            self.packets.end()

    def _take_back(self) -> None:
        """Take the rings from the kernel, if it has them.  Raises HostError."""
        if self.in_kernel:
            self.vhost.stop()
            self._note(in_kernel=False)
            self.packets.end()

    def _note(self, *, in_kernel: bool) -> None:
        self.in_kernel = in_kernel
        self.services.figures[FIGURE] = in_kernel

    def _on_ring_error(self) -> None:
        """The kernel has stopped at an error in a ring.  Our own thread serves the ring, and finds the error."""
        if self.vhost.take_failure() and self.in_kernel:
            self.driver_refused = True
            text = "the kernel found an error in a ring; the process moves the frames"
            self.complaints.warn(f"{self.tap.name}: {text}")
            self.reconsider()

    # --- life ------------------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "list[Queue | None]") -> None:
        """Take the rings of another driver.  The kernel may accept them, even if it refused the last ones."""
        self.negotiated, self.queues, self.driver_refused = features, queues, False
        super().activate(features, queues)

    def quiesce(self, *, forget: bool) -> None:
        """Stop the kernel or our own thread: neither touches the rings when this returns."""
        self.going = False
        self._take_back()
        super().quiesce(forget=forget)

    def resume(self) -> None:
        """Let the kernel or our own thread serve the rings."""
        self.going = True
        self.reconsider()
        if not self.in_kernel:
            super().resume()

    def set_direct(self, direct: bool) -> None:
        """Take whether interrupts need only their call eventfds (DIRECT)."""
        self.direct = direct
        self.reconsider()

    def limit(self, rate: int) -> None:
        """Set the limit.  The kernel has no limits, so it gives the rings back while there is one."""
        super().limit(rate)
        self.limited = bool(rate)
        self.reconsider()

    def _change_links(self) -> None:
        super()._change_links()
        self.reconsider()

    # --- around the kernel -----------------------------------------------------------------------------------------

    def _inject(self, frame: bytes) -> None:
        """Give the guest a frame of this process; on any thread.

        `in_kernel` does not change while the thread that moves frames serves.
        """
        if not self.in_kernel:
            super()._inject(frame)
        elif not self.packets.send(frame):
            self.receiver.lose_injected()

    def _look_at_tap(self) -> None:
        """Find out whether the tap is down or gone, after an error of the packet socket."""
        try:
            if not self.tap.is_up():
                self._tap_failed(OSError(errno.EIO, "down"))
        except HostError as error:
            self._lose_tap(str(error))


class KernelProcess(NetProcess):
    """The process.  It serves interfaces without `vhost` too, because it may be started before that is known."""

    def on_direct(self, packet: bytes) -> bytes:
        """Take whether interrupts need only their call eventfds."""
        direct = exact(devmsg.DIRECT_BODY, packet)[1]
        if isinstance(self.device, KernelVionet):
            self.device.set_direct(bool(direct))
        return devmsg.STATUS.pack(devmsg.DIRECT, 0)

    def on_mark(self, packet: bytes) -> bytes:
        """Begin or stop to mark changed pages.  The answer to MARK comes after the kernel has given the rings back."""
        answer = super().on_mark(packet)
        if isinstance(self.device, KernelVionet):
            self.device.reconsider()
        return answer

    QUESTIONS = NetProcess.QUESTIONS | {
        devmsg.DIRECT: on_direct,
        devmsg.MARK: on_mark,
        devmsg.UNMARK: on_mark,
    }


def main() -> int:
    """Run the process."""
    return process.main("vionet", VIONET_KERNEL, make, KernelProcess)


def make(services: KernelProcess) -> Vionet:
    """Take the tap, /dev/vhost-net and the packet socket, and start the thread.  Raises HostError or PeerError."""
    host = services.host
    interface = interface_of(host)
    if not interface.vhost:
        return make_plain(services)
    if len(host.resources) != RESOURCES:
        what = f"{len(host.resources)} resources instead of tap, /dev/vhost-net and packet socket"
        raise PeerError(process.PEER, what)
    tap, vhost, packets = host.resources
    name_thread(EVENT)
    return KernelVionet(interface, Tap(tap, host.names[0]), services, vhost, packets)
