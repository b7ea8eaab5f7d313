"""Between the parent and priv."""

from vmd.config.model import Forward
from vmd.ipc.messages.shared import Trouble
from vmd.ipc.routes import Proc, message
from vmd.record import Record


class SwitchRequest(Record):
    """A bridge that must exist.  A bridge that exists already is not changed."""

    interface: str
    alias: str  # switch<id>-<name>; marks a bridge that priv has made
    rdomain: int | None = None
    up: bool = True


class NicWanted(Record):
    """A tap to make."""

    name: str  # "": the next free name
    existing: bool = False  # use a tap of this name that exists already; otherwise that is an error
    alias: str  # vm<id>-if<n>-<name>; marks a tap that priv has made
    bridge: str = ""  # of a switch that was configured before
    groups: tuple[str, ...] = ()  # the first becomes the group of the Linux interface; the others are sets of nftables
    rdomain: int | None = None
    up: bool = True
    host4: bytes = b""  # the host's address
    prefix6: bytes = b""  # a /64; the host's address is ::1 in it
    lladdr: bytes = b""  # the guest's
    length4: int = 31  # prefix length of the network of `host4`
    guest4: bytes = b""  # the guest's address; b"": the other address of the /31
    forwards: tuple[Forward, ...] = ()  # to `guest4`
    locked: bool = False  # the guest may send from `lladdr` only, and gets only frames for it
    vhost: bool = False  # the kernel may move the frames; then filters on the tap enforce the rules of vionet


class AddressGiven(Record):
    """An address that an interface was given."""

    address: bytes
    length: int  # prefix length


class TapBefore(Record):
    """The settings of a tap that another program has made, before priv changed them; for restoring them."""

    master: int  # index of the bridge or VRF that the tap was in; 0: none
    mtu: int
    group: int
    up: bool
    added: tuple[AddressGiven, ...] = ()


class NicMade(Record):
    """A tap that was made."""

    name: str
    lladdr: bytes
    link_local: bytes  # empty without `prefix6`
    mtu: int
    index: int = 0  # the kernel's number for it
    before: TapBefore | None = None  # None: priv has made the tap; otherwise it existed
    vhost: bool = False  # the kernel may move the frames: the tap has the filters for that
    without: str = ""  # why `vhost` is False, if it was asked for


@message(0x80, (Proc.PARENT, Proc.PRIV), answered_by=("NetworkConfigured",))
class ConfigureNetwork(Record):
    """The network part of the configuration.

    A bridge that priv has made, and that the configuration does not name any more, is removed with its last tap.
    """

    nat: bool
    switches: tuple[SwitchRequest, ...] = ()
    more: bool = False  # more switches follow in another message; only the last message is answered
    again: bool = False  # priv was started again: keep all interfaces, because guests use them


@message(0x81, (Proc.PRIV, Proc.PARENT))
class NetworkConfigured(Record):
    """Done, except for the `problems`, which are sentences."""

    problems: tuple[str, ...] = ()


@message(0x82, (Proc.PARENT, Proc.PRIV), fds=("tuns*", "tables4?", "tables6?"), answered_by=("NicsMade", "NicsFailed"))
class MakeNics(Record):
    """Make all interfaces of a VM, or none.  The answer has the same ticket.

    fds: each of `tuns` becomes a tap (/dev/net/tun, opened once for each).  `tables4` and `tables6` are files that list
    the loaded tables of the old iptables, if this kernel has them.
    """

    vmid: int
    ticket: int
    nics: tuple[NicWanted, ...]
    reserved: tuple[str, ...] = ()  # names that are reserved for other interfaces


@message(0x83, (Proc.PRIV, Proc.PARENT), fds=("taps*",))
class NicsMade(Record):
    """The interfaces are made.  `nics` and `taps` are in the order of the request."""

    vmid: int
    ticket: int
    nics: tuple[NicMade, ...]


@message(0x8A, (Proc.PARENT, Proc.PRIV))
class AdoptNics(Record):
    """The interfaces of a running VM, which an earlier priv has made.  Sent before all other messages."""

    vmid: int
    nics: tuple[NicWanted, ...]
    made: tuple[NicMade, ...]


@message(0x84, (Proc.PRIV, Proc.PARENT))
class NicsFailed(Record):
    """No interface was made: an errno, and a sentence with the reason."""

    vmid: int
    ticket: int
    code: int
    text: str


@message(0x85, (Proc.PARENT, Proc.PRIV), answered_by=("NicsRemoved",))
class RemoveNics(Record):
    """The VM has ended, or its start has failed: remove all interfaces that it has."""

    vmid: int


@message(0x8B, (Proc.PRIV, Proc.PARENT))
class NicsRemoved(Record):
    """The interfaces are removed.  priv has logged which could not be removed."""

    vmid: int


@message(0x8C, (Proc.PARENT, Proc.PRIV), answered_by=("ForwardsSet",))
class SetForwards(Record):
    """Forward these ports to the interfaces of a running VM, in place of the previous ones.

    No effect if the VM has no interfaces.
    """

    vmid: int
    forwards: tuple[tuple[Forward, ...], ...]  # one entry for each interface


@message(0x8D, (Proc.PRIV, Proc.PARENT))
class ForwardsSet(Record):
    """The ports are forwarded, or `text` says why not."""

    vmid: int
    text: str = ""


@message(0x88, (Proc.PARENT, Proc.PRIV), fds=("tables4?", "tables6?"), answered_by=("DropsReported",))
class AskDrops(Record):
    """Ask which packets of this VM other firewalls drop.

    fds: as for `MakeNics`.
    """

    vmid: int


@message(0x89, (Proc.PRIV, Proc.PARENT))
class DropsReported(Record):
    """The packets that are dropped now, each as a trouble of an interface."""

    vmid: int
    troubles: tuple[Trouble, ...] = ()


@message(0x8F, (Proc.PRIV, Proc.PARENT))
class FramesDropped(Record):
    """The number of frames that the filters of an interface have dropped until now."""

    vmid: int
    index: int
    spoofed: int  # not from the guest's address
    unwanted: int  # not to the guest's address


@message(0x8E, (Proc.PRIV, Proc.PARENT))
class NetworkTrouble(Record):
    """Something is newly wrong with an interface of a VM; without `vmid`, with an interface that several VMs use.

    Without `text` nothing is wrong with it any more.
    """

    vmid: int = 0
    device: str = ""  # the VM's name for it, for example interface0; without `vmid` the host's name
    text: str = ""
