"""The commands of vmctl with their options.

Parser, usage, help and completions are made from this table, so a new command, option or word is written down here and
in vmctl(8), and nowhere else.
"""

from vmd.record import Record

# What a word of the command line names; completion looks there for candidates.
TEXT, VM, SWITCH, FILE, COMMAND = "text", "vm", "switch", "file", "command"


class Option(Record):
    """One option: `-f`, or `--json`."""

    name: str
    help: str
    value: str = ""  # what its value is called; options without a name for it take none
    kind: str = TEXT  # of the value
    words: tuple[str, ...] = ()  # all values that there are, if they can be listed
    instead_of: str = ""  # the option or operand that it excludes


class Operand(Record):
    """A word that a command is about."""

    name: str
    kind: str = TEXT
    words: tuple[str, ...] = ()
    abbreviated: bool = False  # whether the beginning of one of `words` will do, in any case
    optional: bool = False


class Command(Record):
    """One command: `module` of vmctl.commands has `run(session, given) -> exit status`."""

    name: str
    module: str
    help: str
    options: tuple[Option, ...] = ()
    operand: Operand | None = None
    more: tuple[Operand, ...] = ()  # operands behind it
    upstream: bool = True  # vmd's vmctl has it: what abbreviates it there does so here
    writes_data: bool = False  # to standard output, where its document then has no place
    behind: str = ""  # what the words behind `--` are, which are for somebody else; "": further operands

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands, in their order."""
        return (self.operand, *self.more) if self.operand else ()


HELP = (
    Option(name="-h", help="show this help"),
    Option(name="--help", help="show this help"),
)
# What every command takes.
COMMON = (Option(name="--json", help="print one JSON document, for programs"), *HELP)
# What stands before the command.
GLOBAL = (
    Option(name="-s", value="socket", kind=FILE, help="talk to the daemon at another socket than /run/vmd.sock"),
    Option(name="-v", help="say more: which messages are exchanged, and how or why a VM has ended"),
    Option(name="-V", help="show the version of vmctl"),
    Option(name="--version", help="show the version of vmctl"),
    *HELP,
)

SEED_WORDS = (
    "hostname=", "instance-id=", "network-config=", "password-hash=", "ssh-key", "ssh-key=", "user-data=", "user=",
    "vendor-data=",
)  # fmt: skip
SEED_FILES = ("network-config=", "password-hash=", "ssh-key=", "user-data=", "vendor-data=")  # a file comes behind
ID = Operand(name="id", kind=VM)
STATUS = Command(
    name="status",
    module="status",
    help="show all VMs, or one",
    options=(
        Option(name="-r", help="only those that run"),
        Option(name="-v", help="add interfaces, what is wrong with devices, and why a VM does not run"),
    ),
    operand=Operand(name="id", kind=VM, optional=True),
)

COMMANDS = (
    Command(
        name="cdrom",
        module="cdrom",
        upstream=False,
        help="put an ISO image into the CD drive of a VM, which may run, or take it out",
        options=(
            Option(name="-f", help="do so even though the guest has locked the drive"),
            Option(name="-e", instead_of="path", help="take the disc out"),
        ),
        operand=ID,
        more=(Operand(name="path", kind=FILE),),
    ),
    Command(
        name="clone",
        module="clone",
        upstream=False,
        help="copy the disks of a stopped VM, or of a snapshot, for a new VM, and print its block for vm.conf",
        operand=Operand(name="id[@tag]", kind=VM),
        more=(Operand(name="name"),),
    ),
    Command(
        name="console",
        module="console",
        help="use the serial line of a VM; ~. leaves, ~? helps",
        options=(
            Option(name="-f", help="take it over from whoever uses it"),
            Option(name="-r", instead_of="-f", help="watch what the guest prints, without typing"),
            Option(name="-l", instead_of="-f", help="show its console log, also of a VM that does not run"),
            Option(name="-F", help="with -l: go on with what is printed, until ^C"),
        ),
        operand=ID,
    ),
    Command(
        name="create",
        module="create",
        help="make a disk image: raw, or qcow2 if its name ends in .qcow2",
        options=(
            Option(name="-b", value="base", kind=FILE, help="store only what differs from this qcow2 image"),
            Option(name="-i", value="disk", kind=FILE, instead_of="-b", help="copy this image"),
            Option(name="-c", value="sum", help="with -i: only if its file has this sha256:sum or sha512:sum"),
            Option(name="-s", value="size", help="the size, such as 20G; with -b or -i it need not be given"),
        ),
        operand=Operand(name="disk", kind=FILE),
    ),
    Command(
        name="events",
        module="events",
        upstream=False,
        help="show what happens, to all VMs or to one, until it is interrupted",
        options=(
            Option(name="-a", help="show first what has happened, as far as the daemon remembers it"),
            Option(name="-l", instead_of="-a", help="show only that, and end"),
        ),
        operand=Operand(name="id", kind=VM, optional=True),
    ),
    Command(
        name="help",
        module="help",
        upstream=False,
        help="show what vmctl can do, or more of one command",
        operand=Operand(name="command", kind=COMMAND, optional=True),
    ),
    Command(
        name="load",
        module="load",
        help="read a further configuration file",
        operand=Operand(name="filename", kind=FILE),
    ),
    Command(
        name="log",
        module="log",
        help="set how much the daemon logs",
        operand=Operand(name="brief | verbose", words=("brief", "verbose"), abbreviated=True),
    ),
    Command(
        name="metrics",
        module="metrics",
        upstream=False,
        help="print what VMs have done and what they use, for Prometheus",
        options=(Option(name="-o", help="in the format of OpenMetrics"),),
        operand=Operand(name="id", kind=VM, optional=True),
    ),
    Command(
        name="migrate",
        module="migrate",
        upstream=False,
        help="have a running VM go on at another host, by ssh",
        options=(
            Option(name="-d", value="ms", help="let it stand still for this many milliseconds (300)"),
            Option(name="-e", value="command", help="run this instead of ssh; it may have options of its own"),
            Option(name="-f", help="the storage does not carry locks: take it on trust that it is the same at both"),
            Option(name="-r", value="rounds", help="let it stand still after this many rounds (30)"),
            Option(name="-v", help="say how far it is"),
        ),
        operand=ID,
        more=(Operand(name="[user@]host[:name]"),),
    ),
    Command(
        name="pause", module="pause", help="have a VM stand still until unpause", operand=ID
    ),
    Command(
        name="receive",
        module="receive",
        help="read a VM that send has written from standard input, and let it go on under this name",
        options=(
            Option(name="-p", help="leave it paused"),
            Option(name="-w", instead_of="-p", help="let it go on when the sender says so: what migrate runs"),
            Option(name="-f", help="with -w: take it on trust that the disks here are the sender's"),
        ),
        operand=Operand(name="name", kind=VM),
    ),
    Command(
        name="reload",
        module="reload",
        help="read the main configuration file again; running VMs go on, others start",
    ),
    Command(
        name="reset",
        module="reset",
        help="forget VMs after terminating them, or switches, or all",
        operand=Operand(name="all | switches | vms", words=("all", "switches", "vms"), optional=True),
    ),
    Command(
        name="send",
        module="send",
        help="write a running VM to standard output, for receive; it is gone then",
        writes_data=True,
        options=(
            Option(name="-k", help="keep it: it goes on when it has been written"),
            Option(name="-l", help="write it while it runs; it stands still for the rest only"),
            Option(name="-d", value="ms", help="with -l: let it stand still for this many milliseconds (300)"),
            Option(name="-r", value="rounds", help="with -l: let it stand still after this many rounds (30)"),
        ),
        operand=ID,
    ),
    Command(
        name="resize",
        module="resize",
        upstream=False,
        help="make a disk of a VM larger, which may run",
        operand=ID,
        more=(Operand(name="disk"), Operand(name="size")),
    ),
    STATUS.replace(name="show"),
    Command(
        name="snapshot",
        module="snapshot",
        upstream=False,
        help="make a snapshot of the disks of a VM, called by the time if it has no tag",
        options=(
            Option(name="-d", help="delete this one"),
            Option(name="-l", instead_of="-d", help="list them"),
            Option(name="-r", instead_of="-d", help="go back to this one: what was written since then is lost"),
        ),
        operand=ID,
        more=(Operand(name="tag", optional=True),),
    ),
    Command(
        name="ssh",
        module="ssh",
        upstream=False,
        help="log in to the guest of a VM that has a local interface, or run a command there",
        options=(
            Option(name="-n", help="its host key may be a new one: forget the old one"),
            Option(name="-i", value="identity", kind=FILE, help="use this private key"),
            Option(name="-l", value="user", help="log in as this user, not as the one that its seed names"),
            Option(name="-o", value="option", help="an option of ssh_config(5), such as ForwardAgent=yes"),
            Option(name="-p", value="port", help="its server is at this port (22)"),
            Option(name="-w", value="seconds", help="wait for it so long (180)"),
        ),
        operand=ID,
        behind="command ...",
    ),
    Command(
        name="start",
        module="start",
        help="start a VM of vm.conf, or one that the options describe",
        options=(
            Option(name="-c", help="go on to its console"),
            Option(name="-L", help="add a local interface: an address by DHCP, and NAT"),
            Option(name="-B", value="device", words=("cdrom", "disk", "net"), help="boot from cdrom, disk or net"),
            Option(name="-b", value="path", kind=FILE, help="boot this kernel, or BIOS image, or disk0:/path"),
            Option(
                name="-C", value="key=value", words=SEED_WORDS,
                help="have a seed for cloud-init that says this; see vmctl(8)",
            ),
            Option(name="-d", value="disk", kind=FILE, help="add a disk; raw: or qcow2: before it says its format"),
            Option(name="-I", value="initrd", kind=FILE, help="hand the kernel this initial RAM disk"),
            Option(name="-i", value="count", help="have this many network interfaces"),
            Option(name="-k", value="cmdline", help="hand the kernel this command line"),
            Option(name="-m", value="size", help="have this much memory, such as 512M (the default) or 1.5G"),
            Option(name="-n", value="switch", kind=SWITCH, help="add an interface that is attached to this switch"),
            Option(name="-p", value="vcpus", help="have this many virtual CPUs"),
            Option(name="-r", value="path", kind=FILE, help="put this ISO image into the CD drive"),
            Option(name="-t", value="name", kind=VM, help="make an instance of this VM"),
        ),
        operand=Operand(name="id | name", kind=VM),
    ),
    STATUS,
    Command(
        name="stop",
        module="stop",
        help="ask a guest to shut down; its VM is killed if it has not done so after two minutes",
        options=(
            Option(name="-f", help="kill the VM; the guest is not asked"),
            Option(name="-w", help="wait until the VM is gone"),
            Option(name="-a", instead_of="id", help="stop all VMs that run or wait for their start"),
        ),
        operand=ID,
    ),
    Command(
        name="top",
        module="top",
        upstream=False,
        help="show what VMs are doing now, every two seconds or as often as said; q leaves",
        options=(Option(name="-n", value="count", help="end after so many tables"),),
        operand=Operand(name="interval", optional=True),
    ),
    Command(
        name="unpause",
        module="unpause",
        help="let a paused VM go on",
        options=(Option(name="-f", help="one that is in doubt, or whose disks others have written to, too"),),
        operand=ID,
    ),
    Command(
        name="upgrade",
        module="upgrade",
        upstream=False,
        help="let the version that is installed now take over from the daemon; VMs run on",
        options=(Option(name="-n", help="only find out whether it can"),),
    ),
    Command(
        name="version", module="version", upstream=False, help="show the versions of vmctl and of the daemon"
    ),
    Command(name="wait", module="wait", help="wait until a VM is gone", operand=ID),
)
