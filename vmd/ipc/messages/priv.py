"""Between the parent and priv."""

from vmd.config.model import Forward
from vmd.ipc.messages.shared import Trouble
from vmd.ipc.routes import Proc, message
from vmd.record import Record


class SwitchRequest(Record):
    """A bridge that must be there; one that is there already is left alone."""

    interface: str
    alias: str  # switch<id>-<name>, which marks it as ours
    rdomain: int | None = None
    up: bool = True


class NicRequest(Record):
    """A tap that must be made."""

    name: str  # "": the next free one
    existing: bool = False  # a tap of that name that is there is used; else that is an error
    alias: str  # vm<id>-if<n>-<name>, which marks it as ours
    bridge: str = ""  # of a switch that was configured before
    groups: tuple[str, ...] = ()  # the first is the one that Linux knows; the rest are sets of nftables
    rdomain: int | None = None
    up: bool = True
    host4: bytes = b""  # the host's address
    prefix6: bytes = b""  # a /64; the host is its ::1
    lladdr: bytes = b""  # the guest's
    length4: int = 31  # of the network of `host4`
    guest4: bytes = b""  # the guest's address; "": that beside `host4`
    forwards: tuple[Forward, ...] = ()  # to `guest4`
    locked: bool = False  # the guest sends from `lladdr` only, and is sent what is for that
    vhost: bool = False  # the kernel may move its frames: filters on the tap keep what its process keeps otherwise


class AddressGiven(Record):
    """An address that an interface was given."""

    address: bytes
    length: int  # of its network's prefix


class TapBefore(Record):
    """What was changed of a tap that somebody else has made, for giving it back."""

    master: int  # index of the bridge or VRF that it was in; 0: none
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
    before: TapBefore | None = None  # it was there
    vhost: bool = False  # the kernel may move its frames: the tap has the filters that this takes
    without: str = ""  # why not, though it was asked for


@message(0x80, (Proc.PARENT, Proc.PRIV), answered_by=("NetworkConfigured",))
class ConfigureNetwork(Record):
    """What the configuration says; bridges of ours that it no longer names go with their last tap."""

    nat: bool
    switches: tuple[SwitchRequest, ...] = ()
    more: bool = False  # further switches follow in another message, and the answer after that
    again: bool = False  # to a priv that was started again: what is there stays, for guests run on it


@message(0x81, (Proc.PRIV, Proc.PARENT))
class NetworkConfigured(Record):
    """Done, but for what these sentences say."""

    problems: tuple[str, ...] = ()


@message(0x82, (Proc.PARENT, Proc.PRIV), fds=("tuns*", "tables4?", "tables6?"), answered_by=("NicsMade", "NicsFailed"))
class MakeNics(Record):
    """Make all interfaces of a VM, or none; the answer has the same ticket.

    fds: `tuns` are what taps are made from (/dev/net/tun, opened anew for each); `tables4` and `tables6` say which
    tables of the old iptables are loaded, where this kernel has them.
    """

    vmid: int
    ticket: int
    nics: tuple[NicRequest, ...]
    reserved: tuple[str, ...] = ()  # names that are for others


@message(0x83, (Proc.PRIV, Proc.PARENT), fds=("taps*",))
class NicsMade(Record):
    """The interfaces are there, in the order in which they were asked for; as are `taps`."""

    vmid: int
    ticket: int
    nics: tuple[NicMade, ...]


@message(0x8A, (Proc.PARENT, Proc.PRIV))
class AdoptNics(Record):
    """Interfaces of a VM that runs, which a priv before this one has made; sent before all else."""

    vmid: int
    nics: tuple[NicRequest, ...]
    made: tuple[NicMade, ...]


@message(0x84, (Proc.PRIV, Proc.PARENT))
class NicsFailed(Record):
    """Nothing was made: an errno, and the sentence that says why."""

    vmid: int
    ticket: int
    code: int
    text: str


@message(0x85, (Proc.PARENT, Proc.PRIV), answered_by=("NicsRemoved",))
class RemoveNics(Record):
    """The VM is gone, or will not be: remove its interfaces, whatever there is of them."""

    vmid: int


@message(0x8B, (Proc.PRIV, Proc.PARENT))
class NicsRemoved(Record):
    """They are gone; the log says what could not be removed."""

    vmid: int


@message(0x8C, (Proc.PARENT, Proc.PRIV), answered_by=("ForwardsSet",))
class SetForwards(Record):
    """Forward these ports, and no others, to the interfaces of a VM that runs; nothing if it has none."""

    vmid: int
    forwards: tuple[tuple[Forward, ...], ...]  # of each of its interfaces


@message(0x8D, (Proc.PRIV, Proc.PARENT))
class ForwardsSet(Record):
    """They are forwarded, or the sentence says why not."""

    vmid: int
    text: str = ""


@message(0x88, (Proc.PARENT, Proc.PRIV), fds=("tables4?", "tables6?"), answered_by=("DropsReported",))
class AskDrops(Record):
    """Say what other firewalls drop of this VM's packets.

    fds: as for `MakeNics`.
    """

    vmid: int


@message(0x89, (Proc.PRIV, Proc.PARENT))
class DropsReported(Record):
    """What is dropped now, as something that is wrong with an interface."""

    vmid: int
    troubles: tuple[Trouble, ...] = ()


@message(0x8F, (Proc.PRIV, Proc.PARENT))
class FramesDropped(Record):
    """What the filters of an interface have dropped until now, in frames."""

    vmid: int
    index: int
    spoofed: int  # from another address than the guest's
    unwanted: int  # to another one


@message(0x8E, (Proc.PRIV, Proc.PARENT))
class NetworkTrouble(Record):
    """Something is newly wrong with an interface of a VM or, without a `vmid`, with what several VMs use.

    Without a `text`, nothing is any more.
    """

    vmid: int = 0
    device: str = ""  # as VMs have it, such as interface0, or as the host has it
    text: str = ""
