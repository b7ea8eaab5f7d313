"""The configuration of a vm.conf as frozen records.  Processes send each other a VM in the same form.

Sizes are in bytes, times in seconds; MAC addresses have 6 bytes.  Limits are those of *cat. 9.4*, unless Linux needs
others.  The rules for values are in `rules.py`, those that span several objects in `check.py`.
"""

from vmd.enums import IntEnum, IntFlag
from vmd.record import Record
from vmd.units import GIB, MIB

DEFAULT_SOCKET = "/run/vmd.sock"
DEFAULT_MEMORY_BYTES = 512 * MIB
MIN_MEMORY_BYTES = 1 * MIB
MAX_MEMORY_BYTES = 1024 * GIB
MAX_VCPUS = 16
DEFAULT_LIMIT_VMS = 512  # running at the same time; the limit of vmm(4)
DEFAULT_LIMIT_VCPUS = 512  # of all VMs together
# Number of user ids of VMs; the next id is that of priv.  By default they are above the ids that SSSD and systemd give
# to people, services and containers.  FIRST_IDS leaves out the ids that every Linux system gives out itself.
IDS = 0x10000
DEFAULT_FIRST_ID = 0x7F000000
FIRST_IDS = range(0x10000, 0xFFFFFFFE - IDS + 1)
MAX_DISKS = 4
MAX_NICS = 4
MAX_CHAIN = 4  # images in one backing chain
COUNT_MAX = (1 << 31) - 1  # the largest count, and the largest id of a VM
NAME_MAX = 63  # VM and switch names
LLADDR_BYTES = 6  # of an Ethernet address
IFNAME_MAX = 15
GROUP_MAX = 15
SOCKET_PATH_MAX = 107  # bytes; sun_path of unix(7) without its NUL
PATH_MAX = 1023  # *cat. 2.5*: "disk path too long"
CMDLINE_MAX = 2047  # bytes; Linux' COMMAND_LINE_SIZE on x86 without its NUL

MIN_LOG_BYTES = 64 << 10  # of a console log: room for the output that arrives while the next file is opened
DEFAULT_LOG_BYTES = 10 * MIB
MAX_LOG_BYTES = 1 << 40
MAX_LOGS_KEPT = 99
MAX_SEED_BYTES = 8 * MIB  # of the disk image of a seed
MAX_RDOMAIN = 255
MAX_NAME_SERVERS = 3  # of each family
PAIR = 31  # prefix length of a network of two addresses: guest and host
FIXED_LENGTHS = range(16, PAIR + 1)  # prefix lengths of a fixed `address`; its network has only guest and host
MAX_FORWARDS = 16  # of an interface
MAX_FORWARDED = 1024  # ports of one forward
PORT_MAX = 65535
MAX_INET6_PREFIX = 60  # has 16 networks of /64: one for each of four interfaces of three VMs

# A route of at most this prefix length counts as a default route: VPNs split theirs into two halves or more.
DEFAULT_ROUTES = {4: 1, 16: 3}  # by size of an address in bytes

ROOT = 0


class BootDevice(IntEnum):
    """Where the firmware looks first (*cat. 2.6*)."""

    AUTO = 0
    DISK = 1
    CDROM = 2
    NET = 3


class VirtioMode(IntEnum):
    """Which virtio register interface the devices offer to the guest.  vm.conf(5) of OpenBSD has no such choice."""

    TRANSITIONAL = 0
    LEGACY = 1
    MODERN = 2
    MEMORY = 3  # modern, with registers in memory BARs only


class VmFlag(IntFlag):
    """Aspects of a VM: those that its block sets, or those that an instance may set (*cat. 2.6*)."""

    CPU = 0x01
    KERNEL = 0x02
    MEMORY = 0x04
    NETWORK = 0x08
    DISK = 0x10
    CDROM = 0x20
    INSTANCE = 0x40
    SEED = 0x80  # ours; not in OpenBSD


class Owner(Record):
    """A user and perhaps a group: `user`, `user:group` or `:group`."""

    uid: int = ROOT
    gid: int | None = None


WHEEL = Owner(uid=ROOT, gid=ROOT)  # who may make instances if `allow instance` has no owner
SERIAL_MAX = 20  # bytes; the size of the field in virtio-blk

# Bounds for the limits of a VM.  One request of a disk has up to 4 MiB, one frame up to 64 KiB: at a lower rate than
# the least one, a single request would block the disk for minutes.
RATES = range(64 << 10, (1 << 40) + 1)  # bytes a second
IOPS = range(1, 10_000_001)  # requests a second
CPU_PERCENTS = range(1, 100_001)
WEIGHTS = range(1, 10_001)  # cpu.weight of cgroups(7)
DEFAULT_WEIGHT = 100
# Memory that the processes of a VM need besides the guest's.  With a limit below the sum the kernel would kill the VM.
BESIDES_BYTES = 128 * MIB


class DiskConfig(Record):
    """`disk PATH [format F] [serial S] [limit [iops N] [rate N]]`.

    "" as format: it is guessed from the first bytes of the file.  "" as serial: it is made from the VM's name.
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
    """`forward [tcp|udp] port N[:M] to port K [from A/P]`: connections to ports of the host go to the guest."""

    port: int  # the first port of the host
    to: int  # the first port of the guest
    count: int = 1
    udp: bool = False
    source: Prefix | None = None  # clients that may use it; None: all

    @property
    def protocol(self) -> str:
        """`tcp` or `udp`."""
        return "udp" if self.udp else "tcp"

    @property
    def ports(self) -> range:
        """The ports of the host."""
        return range(self.port, self.port + self.count)

    def overlaps(self, other: "Forward") -> bool:
        """Return whether both have a port of the host in common."""
        ours, theirs = self.ports, other.ports
        return self.udp == other.udp and ours.start < theirs.stop and theirs.start < ours.stop

    def __str__(self) -> str:
        """Return the forward as in vm.conf, without `from`."""
        last = f":{self.ports[-1]}" if self.count > 1 else ""
        return f"{self.protocol} port {self.port}{last} to port {self.to}"


class DiskFile(Record):
    """A file in a file system on a disk of the VM itself, as `boot "disk0p2:/vmlinuz"` names it.

    `partition`: `p2` is vda2 of Linux, `a` is a partition of an OpenBSD disklabel, "" is the first partition that has
    the file.  `path`: "" is the kernel that /etc/boot.conf of an OpenBSD system names.
    """

    disk: int
    partition: str = ""
    path: str = ""

    def __str__(self) -> str:
        return f"disk{self.disk}{self.partition}:{self.path}"


class NicConfig(Record):
    """`[local] interface ...`.  An empty lladdr is replaced by a random address when the parent registers the VM."""

    tap: str = ""  # "" or "tap": the next free one
    switch: str = ""
    group: str = ""
    lladdr: bytes = b""
    locked: bool = False
    local: bool = False
    rdomain: int | None = None
    up: bool = True
    rate_limit: int = 0  # bytes a second in each direction; 0: no limit
    # Ours (not in OpenBSD), for `local` interfaces only:
    address: Prefix | None = None  # of the guest; None: one of `local prefix`
    forwards: tuple[Forward, ...] = ()
    dns: tuple[bytes, ...] = ()  # name servers for the guest; (): those of `local dns`
    host_name: str = ""  # for the guest; "": the VM's name
    # Ours, for all interfaces:
    vhost: bool = False  # the kernel moves the frames if it can (vhost-net)


class VmLimits(Record):
    """`limit { memory N, cpu N%, weight N }`: limits for all processes of a VM together; 0: no limit."""

    memory_bytes: int = 0
    cpu_percent: int = 0  # 100: one processor
    weight: int = 0  # share of processor time when it is short; 0: DEFAULT_WEIGHT


class ConsoleLog(Record):
    """`console log PATH [size N] [keep M]`: the file for the output of the guest.

    At `size_bytes` the file is renamed to PATH.1, PATH.1 to PATH.2 and so on; the last one is PATH.`keep`.
    """

    path: str
    size_bytes: int = DEFAULT_LOG_BYTES
    keep: int = 3

    def path_of(self, name: str) -> str:
        """Return the path of the log of a VM.  An instance has its template's path, with its own name for `%n`."""
        return self.path.replace("%n", name)


class SeedConfig(Record):
    """`seed { ... }`: the configuration for cloud-init in the guest.  Its files are read when the VM starts.

    A seed that a client gives with `vmctl start -C` is sent in a file of its own.  Its record has no paths or secrets.
    """

    hostname: str = ""  # "": the name of the VM
    user: str = ""  # "": the image's default user
    ssh_keys: tuple[str, ...] = ()  # paths of files with public keys
    password: str = ""  # a hash of crypt(5), or the path of a file with a hash; "": no password
    user_data: str = ""  # a path; "": made from the fields above
    vendor_data: str = ""  # a path
    network_config: str = ""  # a path; "": made from the interfaces of the VM
    network: bool = True  # False: no network configuration for cloud-init
    instance_id: str = ""  # "": made from the name of the VM

    def public(self) -> "SeedConfig":
        """Return the part of the seed that processes other than the parent and the opener may see."""
        return SeedConfig(hostname=self.hostname, user=self.user)

    def __repr__(self) -> str:
        return f"SeedConfig(hostname={self.hostname!r}, user={self.user!r}, ...)"


class Rights(Record):
    """Whose rights open the files of a VM: those of the user who named the file.  None: root.

    Only the parent sets this, for instances that users make and for instances of these.
    """

    boot: Owner | None = None
    disks: Owner | None = None
    cdrom: Owner | None = None
    seed: Owner | None = None


class AllowInstance(Record):
    """`allow instance { ... }`: who may make instances of this VM, and which aspects they may set."""

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
    kernel: str = ""  # "": the firmware boots.  Like `initrd`, a path of the host or the text of a DiskFile
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
    # The plan: the addresses of `local` interfaces are computed from it.  A guest keeps it on another host.
    plan_id: int = 0  # a vmid; 0: the VM's own id, with the prefixes of this daemon
    plan_prefix4: Prefix | None = None
    plan_prefix6: Prefix | None = None
    rights: Rights = Rights()
    fault: str = ""  # why vm.conf does not let it start, such as an owner that this host does not know
    drive: bool = False  # it has a CD-ROM drive, perhaps an empty one
    console_log: ConsoleLog | None = None  # ours; only vm.conf gives one
    limit: VmLimits = VmLimits()
    seed: SeedConfig | None = None


def without_secrets(config: VmConfig) -> VmConfig:
    """Return a VM without the secrets of its seed, as its own process and a stream may see it."""
    return config if config.seed is None else config.replace(seed=config.seed.public())


def with_limits(config: VmConfig, wanted: VmConfig) -> VmConfig:
    """Return `config` with the limits of `wanted`: those of the VM, of disks with the same path, and of interfaces."""
    disks = list(config.disks)
    for index, (ours, theirs) in enumerate(zip(config.disks, wanted.disks, strict=False)):
        if ours.path == theirs.path:
            disks[index] = ours.replace(iops_limit=theirs.iops_limit, rate_limit=theirs.rate_limit)
    nics = list(config.nics)
    for index, (nic, other) in enumerate(zip(config.nics, wanted.nics, strict=False)):
        nics[index] = nic.replace(rate_limit=other.rate_limit)
    return config.replace(limit=wanted.limit, disks=tuple(disks), nics=tuple(nics))


def with_forwards(config: VmConfig, wanted: VmConfig) -> VmConfig:
    """Return `config` with the forwards of `wanted` for interfaces that are `local` in both."""
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
    """Where HTTP is served: an address and port of the host, or a Unix socket in the file system."""

    address: str = ""  # "": listen at `path`
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
    local_prefix_origin: str = ""  # "file:line", for messages; "": the prefix is the default
    local_inet6_prefix_origin: str = ""
    local_nat: bool = True
    local_dns: tuple[bytes, ...] = ()  # ours: name servers for guests on `local` interfaces; (): the host's
    socket_owner: Owner = Owner(uid=0, gid=0)
    agentx: AgentxConfig | None = None
    metrics: tuple[Listen, ...] = ()  # ours: `metrics listen`
    start_parallel: int | None = None  # None: number of online CPUs
    start_delay_s: int = 30
    # ours: limits of all running VMs together
    limit_memory_bytes: int | None = None  # None: twice the memory of the host
    limit_vms: int = DEFAULT_LIMIT_VMS
    limit_vcpus: int = DEFAULT_LIMIT_VCPUS
    first_id: int = DEFAULT_FIRST_ID  # ours
    first_id_origin: str = ""  # "file:line", for messages; "": the id is the default


class Config(Record):
    """A whole configuration: a file and the files that it includes."""

    settings: Globals = Globals()
    switches: tuple[SwitchConfig, ...] = ()
    vms: tuple[VmConfig, ...] = ()
