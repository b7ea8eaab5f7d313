"""vmctl start: start a VM of vm.conf, or one that the options describe (*cat. 3.4*).

Options -B, -b, -I and -k change a single boot of a known VM.  -b may also describe a new VM, so with it the daemon is
first asked for its VMs.  -I, -k and -p are ours.
"""

import errno
import os
import stat

from vmctl.errors import ArgumentError, CommandError, NoSuchVm
from vmctl.numbers import count
from vmctl.options import Given, meant
from vmctl.output import clean, notice, put_json, warn
from vmctl.session import Session
from vmctl.vmref import VmRef, parse_vmref
from vmd.client import Refused
from vmd.config import rules
from vmd.config.model import (
    DEFAULT_MEMORY_BYTES,
    NAME_MAX,
    PATH_MAX,
    BootDevice,
    DiskConfig,
    NicConfig,
    VmConfig,
    VmFlag,
)
from vmd.errors import (
    VMD_BIOS_MISSING,
    VMD_CDROM_INVALID,
    VMD_CDROM_MISSING,
    VMD_DISK_MISSING,
    VMD_PARENT_INVALID,
    VmdError,
    sentence,
)
from vmd.ipc.foreign import typed_format
from vmd.ipc.messages.clients import ConsoleReady, StartRequest, VmStarted
from vmd.scaled import fmt_scaled, scan_scaled
from vmd.units import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from vmctl.seed import Seed

    T = TypeVar("T")
    U = TypeVar("U")

BOOT_DEVICES = {"cdrom": BootDevice.CDROM, "disk": BootDevice.DISK, "net": BootDevice.NET}

REFUSALS = {
    VMD_BIOS_MISSING: "vmm bios firmware file not found.",
    VMD_DISK_MISSING: "could not open disk image(s)",
    VMD_CDROM_MISSING: "could not find specified iso image",
    VMD_CDROM_INVALID: "specified iso image is not a regular file",
    VMD_PARENT_INVALID: "invalid template",
}


class Wanted:
    """The values of the options."""

    def __init__(self) -> None:
        self.given = VmFlag(0)
        self.console = False
        self.boot_device = BootDevice.AUTO
        self.kernel = ""
        self.initrd = ""
        self.cmdline: str | None = None
        self.disks: list[DiskConfig] = []
        self.nics: list[NicConfig] = []
        self.nic_count: int | None = None
        self.memory_bytes = DEFAULT_MEMORY_BYTES
        self.vcpus = 1
        self.cdrom = ""
        self.template = ""
        self.seed: Seed | None = None

    def take(self, option: str, value: str) -> None:
        """Take one option.  Raises ArgumentError, CommandError."""
        match option:
            case "-B":
                self.set_boot_device(value)
            case "-b":
                once(self.kernel, "boot image")
                self.kernel = boot_path(value, "boot image path")
                self.given |= VmFlag.KERNEL
            case "-C":
                self.add_to_seed(value)
            case "-c":
                self.console = True
            case "-d":
                self.add_disk(value)
            case "-I":
                once(self.initrd, "initrd")
                ruled(rules.disk_initrd, value)
                self.initrd = boot_path(value, "initrd path")
            case "-i":
                if self.nic_count is not None:
                    raise ArgumentError("interfaces specified multiple times")
                self.nic_count = ruled(rules.nic_count, count(value, "count"))
                self.given |= VmFlag.NETWORK
            case "-k":
                self.set_cmdline(value)
            case "-L":
                self.add_nic(NicConfig(local=True))
            case "-m":
                if self.given & VmFlag.MEMORY:
                    raise ArgumentError("memory specified multiple times")
                self.memory_bytes = memory_size(value)
                self.given |= VmFlag.MEMORY
            case "-n":
                self.add_nic(NicConfig(switch=ruled(rules.switch_name, value)))
            case "-p":
                if self.given & VmFlag.CPU:
                    raise ArgumentError("vcpus specified multiple times")
                self.vcpus = ruled(rules.vcpus, count(value, "vcpus"))
                self.given |= VmFlag.CPU
            case "-r":
                once(self.cdrom, "iso image")
                self.cdrom = real_path(value, "iso image path")
                self.given |= VmFlag.CDROM
            case "-t":
                if not 0 < len(value) <= NAME_MAX:
                    raise ArgumentError(f"instance vm name too {'long' if value else 'short'}: {value}")
                self.template = value
                self.given |= VmFlag.INSTANCE

    def set_boot_device(self, name: str) -> None:
        """-B."""
        if self.boot_device is not BootDevice.AUTO:
            raise ArgumentError("boot device specified multiple times")
        device = BOOT_DEVICES.get(name)
        if device is None:
            raise ArgumentError(f"unknown boot device {name}{meant(name, BOOT_DEVICES)}")
        self.boot_device = device

    def set_cmdline(self, text: str) -> None:
        """-k."""
        if self.cmdline is not None:
            raise ArgumentError("kernel command line specified multiple times")
        self.cmdline = ruled(rules.cmdline, text)

    def add_to_seed(self, value: str) -> None:
        """-C."""
        if self.seed is None:
            from vmctl.seed import Seed  # no other start needs it

            self.seed = Seed()
        self.seed.take(value)
        self.given |= VmFlag.SEED

    def add_disk(self, value: str) -> None:
        """-d; without a format the daemon finds it out from the file."""
        ruled(rules.disk_count, len(self.disks) + 1)
        prefix, colon, path = value.partition(":")
        disk_format = prefix if colon and prefix in rules.DISK_FORMATS else ""
        typed = path if disk_format else value
        path = real_path(typed, "disk path")
        disk_format = disk_format or typed_format(typed, path)
        self.disks.append(DiskConfig(path=path, format=disk_format))
        self.given |= VmFlag.DISK

    def add_nic(self, nic: NicConfig) -> None:
        """-L or -n."""
        ruled(rules.nic_count, len(self.nics) + 1)
        self.nics.append(nic)
        self.given |= VmFlag.NETWORK

    @property
    def only_boot(self) -> bool:
        """Whether only options are given that may change a single boot."""
        return not self.given & ~VmFlag.KERNEL

    def config(self, name: str) -> VmConfig:
        """Return the description of a new VM, or the values that an instance does not inherit."""
        nics = self.nics + [NicConfig()] * ((self.nic_count or 0) - len(self.nics))
        return VmConfig(
            name=name,
            given=self.given,
            memory_bytes=self.memory_bytes,
            vcpus=self.vcpus,
            kernel=self.kernel,
            initrd=self.initrd,
            cmdline=self.cmdline or "",
            boot_device=self.boot_device,
            disks=tuple(self.disks),
            nics=tuple(nics),
            cdrom=self.cdrom,
            seed=self.seed.config() if self.seed is not None else None,
        )

    def require_bootable(self) -> None:
        """Check a new VM without a template (*cat. 3.4*).  Raises ArgumentError.

        Unlike vmd: there is no warning about a VM without disks or interfaces, because the user has asked for it.
        """
        if not self.given & (VmFlag.KERNEL | VmFlag.DISK | VmFlag.CDROM):
            raise ArgumentError("no kernel or disk/cdrom specified")
        for text, option in ((self.initrd, "-I"), (self.cmdline, "-k")):
            if text and not self.kernel:
                raise ArgumentError(f"option {option} needs a kernel to boot (-b)")


def ruled(rule: "Callable[[T], U]", value: "T") -> "U":
    """Apply a rule to a value.  Return its result.  Raises ArgumentError with the rule's sentence."""
    try:
        return rule(value)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def once(value: str, what: str) -> None:
    """Raise ArgumentError if an option has been given before."""
    if value:
        raise ArgumentError(f"{what} specified multiple times")


def real_path(path: str, what: str) -> str:
    """Return an existing path without symbolic links, so that the daemon finds the same file as we do."""
    if not path:  # realpath(3) refuses "", but Python's realpath returns the working directory
        raise CommandError(f"invalid {what}: {path}")
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        raise CommandError(f"invalid {what}: {path}: {sentence(error)}", error.errno) from None
    except ValueError:
        raise CommandError(f"invalid {what}: {path}") from None
    if len(os.fsencode(real)) > PATH_MAX:
        raise CommandError(f"invalid {what}: {real}: {os.strerror(errno.ENAMETOOLONG)}", errno.ENAMETOOLONG)
    return real


def boot_path(path: str, what: str) -> str:
    """Return an existing path without symbolic links; a file on a disk of the VM is returned unchanged."""
    return path if on_disk(path) else real_path(path, what)


def on_disk(path: str) -> bool:
    """Return whether a kernel or initrd is on a disk of the VM itself.  Raises ArgumentError."""
    return ruled(rules.disk_file, path) is not None


def memory_size(text: str) -> int:
    """Return the bytes of -m, whole megabytes (*cat. 3.4*)."""
    try:
        size = scan_scaled(text)
    except ValueError:
        raise ArgumentError(f"invalid memory size: {text}") from None
    ruled(rules.memory_bytes, size)
    rounded = size - size % MIB
    if rounded != size:
        warn(f"memory size rounded to {fmt_scaled(rounded)}")
    return rounded


def open_boot_file(path: str, what: str) -> int:
    """Open a kernel or initrd with our own rights, so that users may boot files that only they can read.

    O_NONBLOCK: the open must not wait for the writer of a FIFO.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = sentence(error)
        raise CommandError(f"cannot open {what} '{path}': {reason}", error.errno) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CommandError(f"{what} must be a regular file: {path}")
    return fd


def request_for(session: Session, wanted: Wanted, ref: VmRef) -> StartRequest:
    """Decide whether a known or a new VM is to be started, and build the request.  Raises CommandError."""
    known = wanted.only_boot
    if not wanted.template and wanted.given & (VmFlag.KERNEL | VmFlag.SEED):
        exists = ref.find(session.client.list_vms()) is not None
        if exists and not wanted.only_boot:
            raise CommandError(
                f"start vm command failed: vm {ref} already exists: only -B, -b, -I and -k may change one boot of it",
                errno.EEXIST,
            )
        known = exists
    if known:
        kernel, initrd = (path if on_disk(path) else "" for path in (wanted.kernel, wanted.initrd))
        return StartRequest(
            vmid=ref.vmid,
            name=ref.name,
            boot_device=wanted.boot_device,
            cmdline=wanted.cmdline,
            kernel=kernel,
            initrd=initrd,
        )
    if ref.vmid:
        raise NoSuchVm(f"start vm command failed: vm {ref} not found: a new one needs a name")
    ruled(rules.vm_name, ref.name)
    if not wanted.template:
        wanted.require_bootable()
    return StartRequest(
        name=ref.name, config=wanted.config(ref.name), template=wanted.template, boot_device=wanted.boot_device
    )


def is_known(session: Session, ref: VmRef) -> bool:
    """Return whether the daemon knows a VM; True if it cannot be asked."""
    try:
        return ref.find(session.client.list_vms()) is not None
    except VmdError:
        return True


def refusal(session: Session, error: Refused, ref: VmRef, request: StartRequest) -> CommandError:
    """Return the error for a refusal: upstream's words and then the daemon's sentence."""
    close = session.meant(request.template) if error.number == VMD_PARENT_INVALID else ""
    words = REFUSALS.get(error.number)
    if words is None:
        sentence = f"start vm command failed: {error.text}"
        # A missing file has the same errno as an unknown VM.
        if request.config is None and error.number == errno.ENOENT and not is_known(session, ref):
            return NoSuchVm(sentence)
        return CommandError(sentence, error.number)
    return CommandError(f"{words}{'' if words.endswith('.') else ':'} {error.text}{close}", error.number)


def load_console() -> None:
    """Import the console while the VM starts: the import takes almost as long as the start."""
    import vmctl.commands.console  # noqa: F401


def start(session: Session, wanted: Wanted, ref: VmRef) -> "tuple[StartRequest, VmStarted | ConsoleReady]":
    """Open the boot files, send the request and return it and the first answer.  Raises CommandError."""
    fds: dict[str, list[int]] = {}
    try:
        for name, path in (("kernel", wanted.kernel), ("initrd", wanted.initrd)):
            if path and not on_disk(path):
                fds[name] = [open_boot_file(path, name)]
        request = request_for(session, wanted, ref)
        if wanted.seed is not None:
            fds["seed"] = [wanted.seed.file(request.name)]
        if wanted.console and session.client.daemon is not None:  # a daemon without Hello does not know this field
            request = request.replace(console=True)
        meanwhile = load_console if wanted.console else None
        try:
            answer = session.client.ask(request, VmStarted, ConsoleReady, fds=fds, meanwhile=meanwhile)
        except Refused as error:
            raise refusal(session, error, ref, request) from None
        assert isinstance(answer, VmStarted | ConsoleReady)
        return request, answer
    finally:
        for opened in fds.values():
            os.close(opened[0])


def say_started(started: VmStarted, say: "Callable[[str], None]" = notice) -> None:
    """Say that a VM runs, with the daemon's notes about its start."""
    for note in started.notes:
        say(f"vmctl: warning: {clean(note)}\n")
    say(f"vmctl: started vm {started.vmid} successfully, tty {clean(started.tty)}\n")


def run(session: Session, given: Given) -> int:
    """Start the VM and, with -c, stay on its console."""
    ref = parse_vmref(given.operand)
    wanted = Wanted()
    for option, value in given.options:
        wanted.take(option, value)
    if session.json and wanted.console:
        raise ArgumentError("--json and -c cannot be used together")
    request, answer = start(session, wanted, ref)
    if isinstance(answer, ConsoleReady):
        from vmctl.commands.console import attach_to_start

        try:
            return attach_to_start(session.client, answer, say_started)
        except Refused as error:
            raise refusal(session, error, ref, request) from None
    started = answer
    say_started(started)
    if session.json:
        put_json({
            "id": started.vmid,
            "name": clean(started.name),
            "pid": started.pid,
            "tty": clean(started.tty),
            "notes": [clean(note) for note in started.notes],
        })  # fmt: skip
    if wanted.console:
        from vmctl.commands.console import attach

        return attach(session.client, VmRef(vmid=started.vmid, name=started.name))
    return 0
