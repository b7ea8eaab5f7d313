"""What a vm.conf says, as frozen records; also the form in which a VM travels between processes.

Sizes are bytes, times are seconds, MAC addresses are 6 bytes.  Limits are those of *cat. 9.4* where the
host does not need others.  What a VM may be is in `rules.py`, and what spans objects in `check.py`.
"""

from vmd.enums import IntEnum, IntFlag
from vmd.record import Record
from vmd.units import GIB, MIB

DEFAULT_SOCKET = "/run/vmd.sock"
DEFAULT_MEMORY_BYTES = 512 * MIB
MIN_MEMORY_BYTES = 1 * MIB
MAX_MEMORY_BYTES = 1024 * GIB
MAX_VCPUS = 16
DEFAULT_LIMIT_VMS = 512  # at a time; what vmm(4) has room for
DEFAULT_LIMIT_VCPUS = 512  # of all VMs together
# The ids of VMs are so many, and that of priv comes after them.  By default they are above what SSSD and systemd give
# to people, services and containers; none may be one of those that every Linux system gives.
IDS = 0x10000
DEFAULT_FIRST_ID = 0x7F000000
FIRST_IDS = range(0x10000, 0xFFFFFFFE - IDS + 1)
MAX_DISKS = 4
MAX_NICS = 4
MAX_CHAIN = 4  # images in one backing chain
COUNT_MAX = (1 << 31) - 1  # beyond it a count, or the id of a VM, is no number any more
NAME_MAX = 63  # VM and switch names
LLADDR_BYTES = 6  # of an Ethernet address
IFNAME_MAX = 15
GROUP_MAX = 15
SOCKET_PATH_MAX = 107  # bytes; sun_path of unix(7) less its NUL
PATH_MAX = 1023  # *cat. 2.5*: "disk path too long"
CMDLINE_MAX = 2047  # Linux, x86 COMMAND_LINE_SIZE less its NUL

MIN_LOG_BYTES = 64 << 10  # of a console log: as much as is printed while the next one is opened
DEFAULT_LOG_BYTES = 10 * MIB
MAX_LOG_BYTES = 1 << 40
MAX_LOGS_KEPT = 99
MAX_SEED_BYTES = 8 * MIB  # of the disk that it is
MAX_RDOMAIN = 255
MAX_NAME_SERVERS = 3  # of each family
PAIR = 31  # length of a network of guest and host alone
FIXED_LENGTHS = range(16, PAIR + 1)  # of the network that an interface with a fixed address is alone in
MAX_FORWARDS = 16  # of an interface
MAX_FORWARDED = 1024  # ports of one forward
PORT_MAX = 65535
MAX_INET6_PREFIX = 60  # leaves subnet ids for the four interfaces of three VMs; a /64 has none

# Up to this length a route is a default route, perhaps in halves, as VPNs make it: every address is inside it.
DEFAULT_ROUTES = {4: 1, 16: 3}  # by size of an address in bytes

ROOT = 0


class BootDevice(IntEnum):
    """Where the firmware looks first (*cat. 2.6*)."""

    AUTO = 0
    DISK = 1
    CDROM = 2
    NET = 3


class VirtioMode(IntEnum):
    """Which virtio register interface the guest is offered; ours."""

    TRANSITIONAL = 0
    LEGACY = 1
    MODERN = 2
    MEMORY = 3  # modern, with registers in memory BARs only


class VmFlag(IntFlag):
    """Aspects of a VM: which were given explicitly, and which an instance may set (*cat. 2.6*)."""

    CPU = 0x01
    KERNEL = 0x02
    MEMORY = 0x04
    NETWORK = 0x08
    DISK = 0x10
    CDROM = 0x20
    INSTANCE = 0x40
    SEED = 0x80  # ours


class Owner(Record):
    """A user and, with `user:group` or `:group`, a group."""

    uid: int = ROOT
    gid: int | None = None


WHEEL = Owner(uid=ROOT, gid=ROOT)  # who may make instances where nobody is named
SERIAL_MAX = 20  # bytes; what virtio-blk has room for

# Of the limits of a VM.  A single request of a disk has up to 4 MiB and a frame up to 64 KiB: what is slower would
# stand still for minutes after one.
RATES = range(64 << 10, (1 << 40) + 1)  # bytes a second
IOPS = range(1, 10_000_001)  # requests a second
CPU_PERCENTS = range(1, 100_001)
WEIGHTS = range(1, 10_001)  # cpu.weight of cgroups(7)
DEFAULT_WEIGHT = 100
# What the processes of a VM need beside the memory of the guest; a limit below both together ends the VM.
BESIDES_BYTES = 128 * MIB


class DiskConfig(Record):
    """`disk PATH [format F] [serial S] [limit [iops N] [rate N]]`.

    An empty format is told from the first bytes of the file, and an empty serial number made from the VM's name.
    """

    path: str
    format: str = ""
    serial: str = ""
    iops_limit: int = 0  # requests a second; 0: no limit
    rate_limit: int = 0  # bytes a second, read and written together; 0: no limit


class Prefix(Record):
    """An address range: packed address and prefix length."""

    address: bytes
    length: int


class Forward(Record):
    """`forward [tcp|udp] port N[:M] to port K [from A/P]`: ports of the host that a guest serves."""

    port: int  # the first one, of the host
    to: int  # ... and of the guest
    count: int = 1
    udp: bool = False
    source: Prefix | None = None  # whom it is for; None: everybody

    @property
    def protocol(self) -> str:
        """Its name."""
        return "udp" if self.udp else "tcp"

    @property
    def ports(self) -> range:
        """The ports of the host."""
        return range(self.port, self.port + self.count)

    def overlaps(self, other: "Forward") -> bool:
        """Return whether both want the same port."""
        ours, theirs = self.ports, other.ports
        return self.udp == other.udp and ours.start < theirs.stop and theirs.start < ours.stop

    def __str__(self) -> str:
        """Return it as in vm.conf, but for whom it is."""
        last = f":{self.ports[-1]}" if self.count > 1 else ""
        return f"{self.protocol} port {self.port}{last} to port {self.to}"


class DiskFile(Record):
    """A file in a file system on a disk of the VM itself, as `boot "disk0p2:/vmlinuz"` names it.

    `partition`: `p2` is what Linux calls vda2, `a` one of an OpenBSD disklabel; "": the first that has the file.
    `path`: "" is what /etc/boot.conf of an OpenBSD system names.
    """

    disk: int
    partition: str = ""
    path: str = ""

    def __str__(self) -> str:
        return f"disk{self.disk}{self.partition}:{self.path}"


class NicConfig(Record):
    """`[local] interface ...`; a zero-length lladdr gets a random address when the VM is registered."""

    tap: str = ""  # "" or "tap" is the next free one
    switch: str = ""
    group: str = ""
    lladdr: bytes = b""
    locked: bool = False
    local: bool = False
    rdomain: int | None = None
    up: bool = True
    rate_limit: int = 0  # bytes a second in each direction; 0: no limit
    # Ours, and of `local` ones only:
    address: Prefix | None = None  # the guest's; None: one out of `local prefix`
    forwards: tuple[Forward, ...] = ()
    dns: tuple[bytes, ...] = ()  # name servers that its guest is told; none: those of all
    host_name: str = ""  # that its guest is told; "": the VM's name
    # Ours, and of all:
    vhost: bool = False  # the kernel moves its frames, where it can (vhost-net)


class VmLimits(Record):
    """`limit { memory N, cpu N%, weight N }`: what a VM has of the host, with all its processes; 0: no limit."""

    memory_bytes: int = 0
    cpu_percent: int = 0  # of one processor
    weight: int = 0  # its share of processors that are short; others have DEFAULT_WEIGHT


class ConsoleLog(Record):
    """`console log PATH [size N] [keep M]`: a file that has what the guest prints.

    With `size_bytes` in it, it becomes PATH.1, and so on up to PATH.`keep`.
    """

    path: str
    size_bytes: int = DEFAULT_LOG_BYTES
    keep: int = 3

    def path_of(self, name: str) -> str:
        """Return the path of the log of a VM: instances have that of their template, with their own name in it."""
        return self.path.replace("%n", name)


class SeedConfig(Record):
    """`seed { ... }`: what the cloud-init of a guest is told.  Paths are of files that are read when the VM starts.

    What a client has given with `vmctl start -C` travels in a file of its own: here it has no paths and no secrets.
    """

    hostname: str = ""  # "": the name of the VM
    user: str = ""  # "": whom the image calls its default user
    ssh_keys: tuple[str, ...] = ()  # paths of files with public keys
    password: str = ""  # a hash as of crypt(5), or the path of a file with one; "": no password
    user_data: str = ""  # a path; "": made from the above
    vendor_data: str = ""  # a path
    network_config: str = ""  # a path; "": made from the interfaces
    network: bool = True  # False: cloud-init is told nothing of the network
    instance_id: str = ""  # "": made from the name of the VM

    def public(self) -> "SeedConfig":
        """Return what others than the parent and the opener may know of it."""
        return SeedConfig(hostname=self.hostname, user=self.user)

    def __repr__(self) -> str:
        return f"SeedConfig(hostname={self.hostname!r}, user={self.user!r}, ...)"


class Rights(Record):
    """With whose rights the files of a VM are opened, each with those of whoever named it; None: root's.

    Only the parent fills this in: for instances that users make, and what is made of those.
    """

    boot: Owner | None = None
    disks: Owner | None = None
    cdrom: Owner | None = None
    seed: Owner | None = None


class AllowInstance(Record):
    """`allow instance { ... }`: who may derive VMs from this one, and what they may set."""

    flags: VmFlag = VmFlag(0)
    owner: Owner | None = None


class VmConfig(Record):
    """One virtual machine as the operator described it."""

    name: str
    parent: str = ""  # template, for `vm PARENT instance NAME`
    enabled: bool = True
    given: VmFlag = VmFlag(0)
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    vcpus: int = 1
    kernel: str = ""  # "" boots the firmware; a DiskFile in words is on a disk of its own, as is its initrd then
    initrd: str = ""
    cmdline: str = ""
    boot_device: BootDevice = BootDevice.AUTO
    disks: tuple[DiskConfig, ...] = ()
    nics: tuple[NicConfig, ...] = ()
    cdrom: str = ""
    owner: Owner = Owner()
    allow: AllowInstance | None = None
    virtio: VirtioMode = VirtioMode.TRANSITIONAL
    sev: bool = False
    sev_es: bool = False
    origin: str = ""  # "file:line", for messages
    # From which the addresses of `local` interfaces were computed: a guest that was sent elsewhere keeps them.
    plan_id: int = 0  # a vmid; 0: its own, and the ranges of this daemon
    plan_prefix4: Prefix | None = None
    plan_prefix6: Prefix | None = None
    rights: Rights = Rights()
    fault: str = ""  # why it cannot be started as it is written, such as an owner that this host does not know
    drive: bool = False  # it has a CD-ROM drive, even with no disc in it
    console_log: ConsoleLog | None = None  # ours; only vm.conf gives one
    limit: VmLimits = VmLimits()
    seed: SeedConfig | None = None


def without_secrets(config: VmConfig) -> VmConfig:
    """Return a VM as its own process, and a stream, may know it: without the secrets of its seed."""
    return config if config.seed is None else config.replace(seed=config.seed.public())


def with_limits(config: VmConfig, wanted: VmConfig) -> VmConfig:
    """Return a VM as it is, with the limits that another configuration has for it and for the same devices."""
    disks = list(config.disks)
    for index, (ours, theirs) in enumerate(zip(config.disks, wanted.disks, strict=False)):
        if ours.path == theirs.path:
            disks[index] = ours.replace(iops_limit=theirs.iops_limit, rate_limit=theirs.rate_limit)
    nics = list(config.nics)
    for index, (nic, other) in enumerate(zip(config.nics, wanted.nics, strict=False)):
        nics[index] = nic.replace(rate_limit=other.rate_limit)
    return config.replace(limit=wanted.limit, disks=tuple(disks), nics=tuple(nics))


def with_forwards(config: VmConfig, wanted: VmConfig) -> VmConfig:
    """Return a VM as it is, with the forwards that another configuration has for the same interfaces."""
    nics = list(config.nics)
    for index, (nic, other) in enumerate(zip(config.nics, wanted.nics, strict=False)):
        if nic.local and other.local:
            nics[index] = nic.replace(forwards=other.forwards)
    return config.replace(nics=tuple(nics))


class SwitchConfig(Record):
    """`switch NAME { ... }`."""

    name: str
    interface: str
    enabled: bool = True
    group: str = ""
    locked: bool = False
    rdomain: int | None = None
    up: bool = True
    origin: str = ""


class AgentxConfig(Record):
    """`agentx [context S] [path S]`."""

    context: str = ""
    path: str = "/var/agentx/master"


class Listen(Record):
    """Where HTTP is served: at an address of the host, or at a socket in the file system."""

    address: str = ""  # "": at `path`
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}" if host else self.path


class Globals(Record):
    """Statements outside any block (*cat. 2.3*)."""

    local_prefix: Prefix = Prefix(address=bytes([100, 64, 0, 0]), length=10)
    local_inet6: bool = False
    local_inet6_prefix: Prefix | None = None  # None: a random ULA, chosen once per daemon
    local_prefix_origin: str = ""  # "file:line", for messages; "" is the default range
    local_inet6_prefix_origin: str = ""
    local_nat: bool = True
    local_dns: tuple[bytes, ...] = ()  # ours: name servers for guests of `local` interfaces; none: the host's
    socket_owner: Owner = Owner(uid=0, gid=0)
    agentx: AgentxConfig | None = None
    metrics: tuple[Listen, ...] = ()  # ours: `metrics listen`
    start_parallel: int | None = None  # None: number of online CPUs
    start_delay_s: int = 30
    # ours: of all VMs that run at a time
    limit_memory_bytes: int | None = None  # None: twice what the host has
    limit_vms: int = DEFAULT_LIMIT_VMS
    limit_vcpus: int = DEFAULT_LIMIT_VCPUS
    first_id: int = DEFAULT_FIRST_ID  # ours
    first_id_origin: str = ""  # "file:line", for messages; "" is the default


class Config(Record):
    """A whole configuration file with what it includes."""

    settings: Globals = Globals()
    switches: tuple[SwitchConfig, ...] = ()
    vms: tuple[VmConfig, ...] = ()
