"""vionet: a network interface, queues of 256 for receiving and for transmitting.

Runs as  its VM's id, in its VM's cell; may make two ioctl requests on its tap, and use networks in no other way
Peers    its VM process
Holds    guest memory, two queues' eventfds, and the tap
Threads  main (the channels), one that moves frames
"""

from vmd.devices import process
from vmd.devices.process import ThreadedProcess, exact
from vmd.devices.vionet.device import Vionet
from vmd.devices.vionet.interface import Interface, servers
from vmd.devices.vionet.tap import Tap
from vmd.errors import PeerError
from vmd.ipc import devmsg
from vmd.privsep.confine import VIONET
from vmd.privsep.title import EVENT, name_thread


class NetProcess(ThreadedProcess):
    """The process, with the messages that only network interfaces get."""

    device: Vionet

    def on_limit(self, packet: bytes) -> None:
        """Limit the bytes that pass each second."""
        _, _, rate = exact(devmsg.LIMIT_BODY, packet)
        self.device.limit(rate)

    def on_announce(self, packet: bytes) -> None:
        """Announce the guest's addresses: it goes on here after a move."""
        raw = packet[devmsg.TYPE.size :]
        size = devmsg.ANNOUNCED.size
        entries = tuple(raw[at : at + size] for at in range(0, len(raw), size))
        kinds = (devmsg.ANNOUNCED_4, devmsg.ANNOUNCED_6, devmsg.ANNOUNCED_ROUTER)
        if len(raw) % size or len(entries) > devmsg.ANNOUNCED_MAX or any(entry[0] not in kinds for entry in entries):
            raise PeerError(process.PEER, "addresses that cannot be announced", packet)
        self.device.announce(entries)

    def on_addresses(self, packet: bytes) -> bytes:
        """Answer with the addresses that the guest has told its neighbours."""
        exact(devmsg.TYPE, packet)
        return devmsg.TYPE.pack(devmsg.ADDRESSES) + b"".join(self.device.addresses.known)

    def on_resolvers(self, packet: bytes) -> None:
        """Take the name servers, and answer the guest's requests that wait for them."""
        _, dns4, dns6 = exact(devmsg.RESOLVERS_BODY, packet)
        self.device.set_resolvers(servers(dns4, 4), servers(dns6, 16))

    def on_same_resolvers(self, packet: bytes) -> None:
        """The name servers have not changed: answer the guest's requests that wait for them."""
        exact(devmsg.TYPE, packet)
        self.device.set_resolvers(self.device.interface.dns4, self.device.interface.dns6)

    INFORMS = ThreadedProcess.INFORMS | {
        devmsg.LIMIT: on_limit,
        devmsg.ANNOUNCE: on_announce,
        devmsg.RESOLVERS: on_resolvers,
        devmsg.SAME_RESOLVERS: on_same_resolvers,
    }
    QUESTIONS = ThreadedProcess.QUESTIONS | {devmsg.ADDRESSES: on_addresses}


def main() -> int:
    """Run the process."""
    return process.main("vionet", VIONET, make, NetProcess)


def make(services: NetProcess) -> Vionet:
    """Take the tap and start the thread that moves frames.  Raises HostError or PeerError."""
    host = services.host
    interface = interface_of(host)
    if len(host.resources) != 1:
        raise PeerError(process.PEER, f"{len(host.resources)} resources instead of one tap")
    tap = Tap(host.resources[0], host.names[0])
    name_thread(EVENT)
    return Vionet(interface, tap, host.kicks, services)


def interface_of(host: process.Host) -> Interface:
    """Return the interface that START describes.  Raises PeerError."""
    if host.net is None or len(host.kicks) != 2:
        raise PeerError(process.PEER, "a network interface without its addresses and two queues")
    try:
        return Interface.from_start(host.net, host.host_name)
    except ValueError as error:
        raise PeerError(process.PEER, str(error)) from None
