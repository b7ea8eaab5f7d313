"""The commands of vmctl with their options.

Parser, usage, help and completions are made from this table.  A new command, option or word is only added here and in
vmctl(8).
"""

from vmd.config.model import DEFAULT_SOCKET
from vmd.record import Record

# Kinds of words on the command line.  The kind decides where completion finds candidates.
TEXT, VM, SWITCH, FILE, COMMAND = "text", "vm", "switch", "file", "command"


class Option(Record):
    """One option: `-f`, or `--json`."""

    name: str
    help: str
    value: str = ""  # the name of its value; "" if it takes no value
    kind: str = TEXT  # of the value
    words: tuple[str, ...] = ()  # all possible values, if they can be listed
    instead_of: str = ""  # the option or operand that it excludes


class Operand(Record):
    """A word that is not an option."""

    name: str
    kind: str = TEXT
    words: tuple[str, ...] = ()
    abbreviated: bool = False  # whether the beginning of one of `words` is enough, in upper or lower case
    optional: bool = False


class Command(Record):
    """One command: `module` of vmctl.commands has `run(session, given) -> exit status`."""

    name: str
    module: str
    help: str
    options: tuple[Option, ...] = ()
    operand: Operand | None = None
    more: tuple[Operand, ...] = ()  # operands after it
    upstream: bool = True  # upstream's vmctl has it, and its abbreviations keep their meaning
    writes_data: bool = False  # to standard output, so its document goes to standard error
    behind: str = ""  # the name of the words after `--`, if they are for another program; "": they are operands

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands, in order."""
        return (self.operand, *self.more) if self.operand else ()


HELP = (
    Option(name="-h", help="show this help"),
    Option(name="--help", help="show this help"),
)
# Options of every command.
COMMON = (Option(name="--json", help="print one JSON document, for programs"), *HELP)
# Options before the command.
GLOBAL = (
    Option(name="-s", value="socket", kind=FILE, help=f"talk to the daemon at another socket than {DEFAULT_SOCKET}"),
    Option(name="-v", help="say more: which messages are exchanged, and how and why a VM has ended"),
    Option(name="-V", help="show the version of vmctl"),
    Option(name="--version", help="show the version of vmctl"),
    *HELP,
)

SEED_WORDS = (
    "hostname=", "instance-id=", "network-config=", "password-hash=", "ssh-key", "ssh-key=", "user-data=", "user=",
    "vendor-data=",
)  # fmt: skip
SEED_FILES = ("network-config=", "password-hash=", "ssh-key=", "user-data=", "vendor-data=")  # a file follows
ID = Operand(name="id", kind=VM)
STATUS = Command(
    name="status",
    module="status",
    help="show all VMs, or one",
    options=(
        Option(name="-r", help="only those that run"),
        Option(name="-v", help="add figures, interfaces, problems of devices, and why a VM does not run"),
    ),
    operand=Operand(name="id", kind=VM, optional=True),
)

COMMANDS = (
    Command(
        name="cdrom",
        module="cdrom",
        upstream=False,
        help="put an ISO image into the CD drive of a VM, or take it out; the VM may run",
        options=(
            Option(name="-f", help="even if the guest has locked the drive"),
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
            Option(name="-f", help="take it over from its present user"),
            Option(name="-r", instead_of="-f", help="only watch the output of the guest"),
            Option(name="-l", instead_of="-f", help="show its console log; the VM need not run"),
            Option(name="-F", help="with -l: follow new output, until ^C"),
        ),
        operand=ID,
    ),
    Command(
        name="create",
        module="create",
        help="make a disk image: raw, or qcow2 if its name ends in .qcow2",
        options=(
            Option(name="-b", value="base", kind=FILE, help="store only the differences from this qcow2 image"),
            Option(name="-i", value="disk", kind=FILE, instead_of="-b", help="copy this image"),
            Option(name="-c", value="sum", help="with -i: only if the file has this sha256:... or sha512:... checksum"),
            Option(name="-s", value="size", help="the size, such as 20G; may be left out with -b or -i"),
        ),
        operand=Operand(name="disk", kind=FILE),
    ),
    Command(
        name="events",
        module="events",
        upstream=False,
        help="show the events of all VMs, or of one, until interrupted",
        options=(
            Option(name="-a", help="show the remembered events first"),
            Option(name="-l", instead_of="-a", help="show only the remembered events"),
        ),
        operand=Operand(name="id", kind=VM, optional=True),
    ),
    Command(
        name="help",
        module="help",
        upstream=False,
        help="show all commands, or one command with its options",
        operand=Operand(name="command", kind=COMMAND, optional=True),
    ),
    Command(
        name="load",
        module="load",
        help="read an additional configuration file",
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
        help="print the figures of all VMs, or of one, for Prometheus",
        options=(Option(name="-o", help="in the format of OpenMetrics"),),
        operand=Operand(name="id", kind=VM, optional=True),
    ),
    Command(
        name="migrate",
        module="migrate",
        upstream=False,
        help="move a running VM to another host, by ssh",
        options=(
            Option(name="-d", value="ms", help="the longest pause at the end, in milliseconds (300)"),
            Option(name="-e", value="command", help="run this command instead of ssh; it may have options"),
            Option(name="-f", help="do not check by locks that both hosts have the same disks"),
            Option(name="-r", value="rounds", help="the largest number of rounds (30)"),
            Option(name="-v", help="show each step"),
        ),
        operand=ID,
        more=(Operand(name="[user@]host[:name]"),),
    ),
    Command(
        name="pause", module="pause", help="pause a VM until unpause", operand=ID
    ),
    Command(
        name="receive",
        module="receive",
        help="read a VM that send has written from standard input, and let it continue under this name",
        options=(
            Option(name="-p", help="let it stay paused"),
            Option(name="-w", instead_of="-p", help="let it continue only when the sender says so; used by migrate"),
            Option(name="-f", help="with -w: do not check by locks that the disks are those of the sender"),
        ),
        operand=Operand(name="name", kind=VM),
    ),
    Command(
        name="reload",
        module="reload",
        help="read the main configuration file again; running VMs continue, others start",
    ),
    Command(
        name="reset",
        module="reset",
        help="kill and forget all VMs, forget all switches, or both",
        operand=Operand(name="all | switches | vms", words=("all", "switches", "vms"), optional=True),
    ),
    Command(
        name="send",
        module="send",
        help="write a running VM to standard output, for receive; it ends here",
        writes_data=True,
        options=(
            Option(name="-k", help="keep it: it continues after it was written"),
            Option(name="-l", help="write it while it runs; it is paused only for the rest"),
            Option(name="-d", value="ms", help="with -l: the longest pause at the end, in milliseconds (300)"),
            Option(name="-r", value="rounds", help="with -l: the largest number of rounds (30)"),
        ),
        operand=ID,
    ),
    Command(
        name="resize",
        module="resize",
        upstream=False,
        help="make a disk of a VM larger; the VM may run",
        operand=ID,
        more=(Operand(name="disk"), Operand(name="size")),
    ),
    STATUS.replace(name="show"),
    Command(
        name="snapshot",
        module="snapshot",
        upstream=False,
        help="make a snapshot of the disks of a VM; without a tag it is called by the time",
        options=(
            Option(name="-d", help="delete the snapshot"),
            Option(name="-l", instead_of="-d", help="list the snapshots"),
            Option(name="-r", instead_of="-d", help="go back to the snapshot: data written since then is lost"),
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
            Option(name="-n", help="forget the known host key of this VM"),
            Option(name="-i", value="identity", kind=FILE, help="use this private key"),
            Option(name="-l", value="user", help="log in as this user, not as the user of its seed"),
            Option(name="-o", value="option", help="pass an option of ssh_config(5), such as ForwardAgent=yes"),
            Option(name="-p", value="port", help="connect to this port (22)"),
            Option(name="-w", value="seconds", help="wait at most this long for an answer (180)"),
        ),
        operand=ID,
        behind="command ...",
    ),
    Command(
        name="start",
        module="start",
        help="start a VM of vm.conf, or one that the options describe",
        options=(
            Option(name="-c", help="then connect to its console"),
            Option(name="-L", help="add a local interface: an address by DHCP, and NAT"),
            Option(name="-B", value="device", words=("cdrom", "disk", "net"), help="boot from cdrom, disk or net"),
            Option(name="-b", value="path", kind=FILE, help="boot this kernel, or BIOS image, or disk0:/path"),
            Option(
                name="-C", value="key=value", words=SEED_WORDS,
                help="give it a seed for cloud-init with this setting; see vmctl(8)",
            ),
            Option(name="-d", value="disk", kind=FILE, help="add a disk; raw: or qcow2: in front gives its format"),
            Option(name="-I", value="initrd", kind=FILE, help="pass the kernel this initial RAM disk"),
            Option(name="-i", value="count", help="give it this many network interfaces"),
            Option(name="-k", value="cmdline", help="pass the kernel this command line"),
            Option(name="-m", value="size", help="give it this much memory, such as 512M (the default) or 1.5G"),
            Option(name="-n", value="switch", kind=SWITCH, help="add an interface that is attached to this switch"),
            Option(name="-p", value="vcpus", help="give it this many virtual CPUs"),
            Option(name="-r", value="path", kind=FILE, help="put this ISO image into the CD drive"),
            Option(name="-t", value="name", kind=VM, help="make an instance of this VM"),
        ),
        operand=Operand(name="id | name", kind=VM),
    ),
    STATUS,
    Command(
        name="stop",
        module="stop",
        help="ask a guest to shut down; its VM is killed if it still runs after two minutes",
        options=(
            Option(name="-f", help="kill the VM without asking the guest"),
            Option(name="-w", help="wait until the VM has ended"),
            Option(name="-a", instead_of="id", help="stop all VMs that run or wait for their start"),
        ),
        operand=ID,
    ),
    Command(
        name="top",
        module="top",
        upstream=False,
        help="show the activity of VMs, every two seconds or after each interval; q leaves",
        options=(Option(name="-n", value="count", help="end after this many tables"),),
        operand=Operand(name="interval", optional=True),
    ),
    Command(
        name="unpause",
        module="unpause",
        help="let a paused VM continue",
        options=(Option(name="-f", help="even if it is in doubt, or others have written to its disks"),),
        operand=ID,
    ),
    Command(
        name="upgrade",
        module="upgrade",
        upstream=False,
        help="let the installed version take over from the daemon; VMs continue to run",
        options=(Option(name="-n", help="only check whether it can take over"),),
    ),
    Command(
        name="version", module="version", upstream=False, help="show the versions of vmctl and of the daemon"
    ),
    Command(name="wait", module="wait", help="wait until a VM has ended", operand=ID),
)
