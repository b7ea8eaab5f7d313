"""vionet, of an interface with `vhost`: the kernel moves its frames whenever it can, and the process does otherwise.

Runs as  its VM's id, in its VM's cell, with two requests on its tap and those of `vhost` on /dev/vhost-net
Peers    its VM process
Holds    what `main` says, /dev/vhost-net, and a packet socket that hears some of what the guest sends (`ipc/devmsg.py`)
Threads  main (the channels, and all that concerns the kernel), and `mover`'s, which stands while the kernel serves

The kernel has the rings as long as all of this is so (`_kernel_may`):

    the guest is interrupted by MSI-X    of INTx the interrupt page would have to tell, which the kernel does not know
    buffers can be merged, and checksums may be missing    else each header needs a look
    there is a link                      with none frames are taken and dropped
    there is no `limit`                  the kernel has none
    nothing marks changed memory         the kernel marks nothing
    it understands the rings             else the process says what is wrong with them
    no driver resets, nothing is paused  then nobody has them

Each change of it takes the rings from one to the other, on the main thread, with the thread that moves frames standing.
No frame is lost by that, or there twice: what is in the tap stays there, and indices go along (`vhost`).

Frames of the kernel pass nobody here.  What a `local` interface answers, and what tells the guest's addresses, is heard
on the packet socket, and answers go out there.  When the tap goes down or away, the socket says so.
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
        """Take the tap and both other descriptors; nothing is asked of the kernel yet."""
        host = services.host
        self.vhost = Vhost(vhost_fd, services.memory, tap.fd, host.kicks, host.calls)
        self.in_kernel = False  # it has the rings
        self.going = False  # between `resume` and `quiesce`
        self.direct = False  # interrupts of all queues need nothing but their eventfds
        self.limited = False
        self.useless = False  # the kernel refuses, whatever the driver does
        self.puzzled = False  # ... or does not take what this driver does
        self.negotiated = 0
        self.queues: list[Queue | None] = []
        super().__init__(interface, tap, host.kicks, services)
        self.packets = Packets(
            packet_fd, services, self.local, self.addresses, self.transmitter.count_answered, self._look_at_tap
        )
        services.watch(self.vhost.failed, self._on_puzzled)

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
            and not self.useless
            and not self.puzzled
        )

    def reconsider(self) -> None:
        """Give the rings to whom they belong now.  Raises HostError."""
        may = self._kernel_may()
        if may and not self.in_kernel:
            super().quiesce(forget=False)
            self._hand_over()
            if not self.in_kernel:
                super().resume()
        elif self.in_kernel and not may:
            self._take_back()
            if not self.direct:  # of what the kernel has raised, the interrupt page is to tell
                for number in range(len(self.queues)):
                    self.services.interrupt(number)
            if self.going:
                super().resume()

    def _hand_over(self) -> None:
        """Give the rings, which nobody touches, to the kernel; it has them if nothing went wrong.  Raises HostError."""
        try:
            self.receiver.finish()
            self.packets.begin()  # which may find that the tap is down
            if self._kernel_may():
                self.vhost.start(self.negotiated, [queue for queue in self.queues if queue is not None])
                self._note(in_kernel=True)
        except GuestError as error:
            self.puzzled = True
            self.complaints.warn(f"{self.tap.name}: {error}; the process moves the frames")
        except OSError as error:
            self.useless = True
            self.complaints.warn(f"{self.tap.name}: /dev/vhost-net: {sentence(error)}; the process moves the frames")
        if self.in_kernel:
            for frame in self.receiver.take_injected():
                self._inject(frame)
        else:
            self.packets.end()

    def _take_back(self) -> None:
        """Have nobody touch the rings.  Raises HostError."""
        if self.in_kernel:
            self.vhost.stop()
            self._note(in_kernel=False)
            self.packets.end()

    def _note(self, *, in_kernel: bool) -> None:
        self.in_kernel = in_kernel
        self.services.figures[FIGURE] = in_kernel

    def _on_puzzled(self) -> None:
        """The kernel stands before something that it does not take: what is wrong with it, our own thread finds."""
        if self.vhost.take_failure() and self.in_kernel:
            self.puzzled = True
            text = "the kernel does not take what is in a ring; the process moves the frames"
            self.complaints.warn(f"{self.tap.name}: {text}")
            self.reconsider()

    # --- life ------------------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "list[Queue | None]") -> None:
        """Take the rings of another driver, whom the kernel may understand."""
        self.negotiated, self.queues, self.puzzled = features, queues, False
        super().activate(features, queues)

    def quiesce(self, *, forget: bool) -> None:
        """Have nobody touch the rings."""
        self.going = False
        self._take_back()
        super().quiesce(forget=forget)

    def resume(self) -> None:
        """Have the kernel go on, or our thread."""
        self.going = True
        if self.in_kernel:
            return
        self.reconsider()
        if not self.in_kernel:
            super().resume()

    def set_direct(self, direct: bool) -> None:
        """Take whether interrupts need nothing but their eventfds."""
        self.direct = direct
        self.reconsider()

    def limit(self, rate: int) -> None:
        """The kernel knows no limit."""
        super().limit(rate)
        self.limited = bool(rate)
        self.reconsider()

    def _change_links(self) -> None:
        super()._change_links()
        self.reconsider()

    # --- around the kernel -----------------------------------------------------------------------------------------

    def _inject(self, frame: bytes) -> None:
        """Have the guest receive a frame of ours.

        A thread that serves does not see the rings change hands.
        """
        if not self.in_kernel:
            super()._inject(frame)
        elif not self.packets.send(frame):
            self.receiver.lose_injected()

    def _look_at_tap(self) -> None:
        """The packet socket has an error: the tap may be down, or gone."""
        try:
            if not self.tap.is_up():
                self._tap_failed(OSError(errno.EIO, "down"))
        except HostError as error:
            self._lose_tap(str(error))


class KernelProcess(NetProcess):
    """The process, which serves interfaces without `vhost`, too: who starts it may not know yet."""

    def on_direct(self, packet: bytes) -> bytes:
        """Take whether interrupts need nothing but their eventfds."""
        direct = exact(devmsg.DIRECT_BODY, packet)[1]
        if isinstance(self.device, KernelVionet):
            self.device.set_direct(bool(direct))
        return devmsg.STATUS.pack(devmsg.DIRECT, 0)

    def on_mark(self, packet: bytes) -> bytes:
        """Mark what is changed in memory, or no longer; what the kernel has stored before the answer was in time."""
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
    """Take the tap, and what there is for the kernel, and start the thread.  Raises HostError or PeerError."""
    host = services.host
    interface = interface_of(host)
    if not interface.vhost:
        return make_plain(services)
    if len(host.resources) != RESOURCES:
        raise PeerError(process.VM, f"{len(host.resources)} resources instead of tap, /dev/vhost-net and packet socket")
    tap, vhost, packets = host.resources
    name_thread(EVENT)
    return KernelVionet(interface, Tap(tap, host.names[0]), services, vhost, packets)
