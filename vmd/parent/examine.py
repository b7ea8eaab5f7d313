"""The checks of `vmd -n`: the sentences with which a start of each VM of a configuration would fail or warn.

No file is locked or opened for writing, so the images of running VMs can be examined.
"""

import array
import contextlib
import errno
import fcntl
import os
import socket
import struct
import time

from vmd.closing import close
from vmd.config import rules
from vmd.errors import HostError, OperatorError, VmdError
from vmd.files.boot import BootFiles, open_boot_files, open_regular
from vmd.files.diskboot import FromDisks, NothingToStart
from vmd.files.images import Use, open_cdrom, open_disk
from vmd.files.prober import END_TIMEOUT_S, ImageProber, start_probe
from vmd.memfile import bounded_file
from vmd.netlink import IFLA_INFO_KIND, IFLA_LINKINFO, NLM_F_REQUEST, NLMSGHDR, RTATTR, RTM_NEWLINK
from vmd.parent import hostports, hostroutes, instances, service, vhost
from vmd.parent.limits import require_room
from vmd.parent.opening import BOOT_FILE_MAX, IMGBOOT_ENTRY, firmware_needs_disk
from vmd.privsep.cell import Cell
from vmd.seed.parts import HASHED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmd.config.model import Config, DiskConfig, SeedConfig, VmConfig
    from vmd.files.prober import Prober

SIOCETHTOOL, ETHTOOL_GDRVINFO = 0x8946, 3
ETHTOOL_DRVINFO = struct.Struct("=I32s160x")  # struct ethtool_drvinfo: cmd, driver, ...
IFINFOMSG_BYTES = 16
NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 4, 0x200, 0x400
IFREQ = struct.Struct("=16sQ16x")  # struct ifreq: ifr_name, ifr_data
BOOTPROBE_ENTRY = "vmd.vm.bootprobe:main"
TIME_S = 60.0  # for all images together: storage may hang, and a configuration may have hundreds of images


def check_vms(config: "Config", warn: "Callable[[str], None]") -> None:
    """Warn of every VM that could not be started, and of oddities of the others.

    A missing file is a warning, too, and no error: its file system may be mounted later.
    """
    vms, problems = instances.resolve(config.vms, lambda _name: None)
    for problem in problems:
        warn(problem)
    for switch in config.switches:
        if switch.enabled and (what := of_bridge(switch.interface)):
            warn(f'{switch.origin}: switch "{switch.name}": {what}')
    probers, cell = None, None
    if any(vm.disks or vm.cdrom or vm.kernel for vm in vms):
        try:
            cell = Cell.build(*service.lookup_user()) if os.geteuid() == 0 else None
            probers = ImageProber(cell), ImageProber(cell, entry=BOOTPROBE_ENTRY, title="bootprobe")
        except (OperatorError, HostError, VmdError) as error:
            warn(f"warning: images are not examined: {error}")
    try:
        Examination(vms, config, probers, time.monotonic() + TIME_S).run(warn)
    finally:
        if cell is not None:
            cell.close()


class Examination:
    """Examines all VMs of a configuration, in the order of the file.  A shared image is examined once.

    `probers` are one for images and one for boot images.  Without them, no image is examined.
    """

    def __init__(
        self, vms: "list[VmConfig]", config: "Config", probers: "tuple[Prober, ImageProber] | None", deadline_s: float
    ) -> None:
        self.vms = vms
        self.settings = config.settings
        self.switches = {switch.name: switch for switch in config.switches if switch.enabled}
        self.probers = probers
        self.deadline_s = deadline_s
        self.said: dict[object, list[str]] = {}  # by image: the sentences about it
        self.codeless: set[str] = set()  # paths of disks on which a BIOS finds nothing to start
        self.left = 0  # images that were not examined, because TIME_S was over
        self.starting: list[VmConfig] = []  # the VMs so far that start with the daemon
        self.users: dict[str, str] = {}  # by path of a disk: the first VM that has it

    def run(self, warn: "Callable[[str], None]") -> None:
        """Warn about all VMs."""
        for vm in self.vms:
            for what in self.of_vm(vm):
                warn(f'{vm.origin}: vm "{vm.name}": {what}')
        if self.left:
            warn(f"warning: {self.left} images are not examined: the others took more than {TIME_S:g} seconds")

    def of_vm(self, vm: "VmConfig") -> "Iterator[str]":
        """Yield the messages of a start of a VM, and the reasons why it could not run beside the VMs before it."""
        for _, what in rules.obstacles(vm):
            yield what
        yield from self.of_rdomains(vm)
        yield from self.of_local_options(vm)
        yield from of_vhost(vm)
        yield from self.of_boot_files(vm)
        if vm.seed is not None:
            yield from of_seed(vm.seed)
        if self.probers is not None:
            images = self.probers[0]
            needs_code = firmware_needs_disk(vm)
            for disk in vm.disks:
                yield from self.once(self.of_disk, disk, images, needs_code)
            if needs_code and all(disk.path in self.codeless for disk in vm.disks):
                yield str(NothingToStart([f"disk {disk.path}" for disk in vm.disks]))
            if vm.cdrom:
                yield from self.once(of_disc, vm.cdrom, images)
        if vm.enabled:
            yield from self.beside_others(vm)

    def of_rdomains(self, vm: "VmConfig") -> "Iterator[str]":
        """Yield the messages of a start about routing domains, on a host that has none."""
        for index, nic in enumerate(vm.nics):
            switch = self.switches.get(nic.switch)
            number = switch.rdomain if switch is not None else nic.rdomain
            if number and not has_vrfs():
                yield f"interface {index}: rdomain {number}: this kernel has no VRFs: load the module vrf"

    def of_local_options(self, vm: "VmConfig") -> "Iterator[str]":
        """Yield the messages of a start about forwarded ports, and about addresses that the operator has chosen."""
        for index, nic in enumerate(vm.nics):
            for forward in nic.forwards:
                if why := hostports.in_the_way(forward):
                    yield f"interface {index}: forward {forward}: {why}"
            if nic.address is not None and not nic.rdomain:
                network = hostroutes.network_of(nic.address.address, nic.address.length)
                for route in hostroutes.overlapping(network, hostroutes.host_routes()):
                    if not hostroutes.TAP.fullmatch(route.interface):  # else a VM's route, or this one's
                        what = f"address {rules.shown_prefix(nic.address)}"
                        yield f"interface {index}: {what}: this host reaches {route.network} by {route.interface}"
                        break

    def of_boot_files(self, vm: "VmConfig") -> list[str]:
        """Return the messages of a start about the boot image and its initrd, or else about the firmware."""
        wanted = vm.kernel, vm.initrd, vm.cmdline, vm.memory_bytes
        if any(rules.files_on_disks(vm)):
            if self.probers is None or any(rules.boots_from_disks(vm)):  # `rules.obstacles` has said why
                return []
            disks = tuple(disk.path for disk in vm.disks)
            return self.once(lambda *_: self.of_kernel_on_disk(vm), *wanted, disks)
        try:
            files = open_boot_files(vm.kernel, vm.initrd)
        except OperatorError as error:
            return [str(error)]
        with contextlib.closing(files):
            if not vm.kernel or self.probers is None:
                return []
            prober = self.probers[1]
            return self.once(lambda *_: of_kernel(vm, files, prober), *wanted)

    def of_disk(self, config: "DiskConfig", prober: "Prober", boots: bool) -> list[str]:
        """Return the messages of a start about a disk.  With `boots`, note a disk that a BIOS cannot start from."""
        try:
            disk = open_disk(config, prober, Use(locked=False, boots=boots))
        except OperatorError as error:
            return [str(error)]
        disk.close()
        if disk.boots is False:
            self.codeless.add(config.path)
        return disk.notes

    def of_kernel_on_disk(self, vm: "VmConfig") -> list[str]:
        """Return the messages of a start about a kernel on a disk of the VM itself, and about its initrd."""
        assert self.probers is not None
        try:
            files = self.from_disks(vm)
        except OperatorError as error:
            # An error of the disk itself is reported for the disk.
            return [str(error)] if str(error).startswith((vm.kernel, vm.initrd or vm.kernel)) else []
        with contextlib.closing(files):
            return of_kernel(vm, files, self.probers[1])

    def from_disks(self, vm: "VmConfig") -> BootFiles:
        """Return the kernel and initrd that a VM boots from its own disks.  Raises OperatorError."""
        assert self.probers is not None
        images, files, found = self.probers[0], BootFiles(), FromDisks()
        try:
            child, sock = start_probe(self.probers[1].place, entry=IMGBOOT_ENTRY, title="imgboot")
        except VmdError as error:
            raise OperatorError(errno.EIO, f"{vm.kernel}: cannot be examined: {error}") from None
        try:
            for name, file in zip(("kernel", "initrd"), rules.files_on_disks(vm), strict=True):
                if file is None:
                    continue
                with contextlib.closing(open_disk(vm.disks[file.disk], images, Use(locked=False))) as disk:
                    memory = bounded_file(name, min(vm.memory_bytes, BOOT_FILE_MAX))
                    found.read(sock, name, file, disk, memory, lambda: None)
        except BaseException:
            found.close()
            raise
        finally:
            sock.close()
            child.kill()
            child.reap(END_TIMEOUT_S)
        files.boot, files.boot_name = found.kernel[0], found.kernel_name
        files.initrd = found.initrd[0] if found.initrd else None
        return files

    def once(self, look: "Callable[..., list[str]]", *what: object) -> list[str]:
        """Return the messages of `look` about an image.  It is called once for each image, as long as there is time."""
        if what not in self.said:
            if time.monotonic() > self.deadline_s:
                self.left += 1
                return []
            self.said[what] = look(*what)
        return self.said[what]

    def beside_others(self, vm: "VmConfig") -> "Iterator[str]":
        """Yield the reasons why a VM could not start with the daemon after the VMs before it."""
        for disk in vm.disks:
            if (user := self.users.setdefault(disk.path, vm.name)) != vm.name:
                yield f"disk {disk.path} is also used by vm {user}: only one of them can run"
        try:
            require_room(vm, (), self.settings)
            require_room(vm, self.starting, self.settings)
        except OperatorError as error:
            yield f"not started with those before it: {str(error).removeprefix(f'vm {vm.name}: ')}"
        else:
            self.starting.append(vm)


def of_vhost(vm: "VmConfig") -> "Iterator[str]":
    """Yield, for each interface with `vhost`, why this host's kernel cannot move its frames.  Only root can know."""
    why = vhost.lacking() if any(nic.vhost for nic in vm.nics) and os.geteuid() == 0 else ""
    for index, nic in enumerate(vm.nics if why else ()):
        if nic.vhost:
            yield f"interface {index}: {vhost.BY_PROCESS}: {why}"


def has_vrfs() -> bool:
    """Return whether this host can have a VRF.  Return True also for another user than root, who cannot ask.

    The kernel is asked for a VRF without a routing table.  It refuses that with EINVAL if it has VRFs, and with
    EOPNOTSUPP if it has none.
    """
    kind = b"vrf\0"
    info = RTATTR.pack(RTATTR.size + len(kind), IFLA_INFO_KIND) + kind
    attributes = RTATTR.pack(RTATTR.size + len(info), IFLA_LINKINFO) + info
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE
    request = NLMSGHDR.pack(NLMSGHDR.size + IFINFOMSG_BYTES + len(attributes), RTM_NEWLINK, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(request + bytes(IFINFOMSG_BYTES) + attributes)
        answer = netlink.recv(4096)
    return int.from_bytes(answer[NLMSGHDR.size :][:4], "little", signed=True) != -errno.EOPNOTSUPP


def of_bridge(name: str) -> str:
    """Return why an interface of the host cannot be a switch; empty if it can, or does not exist yet."""
    driver = array.array("B", ETHTOOL_DRVINFO.pack(ETHTOOL_GDRVINFO, b""))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, SIOCETHTOOL, IFREQ.pack(name.encode(), driver.buffer_info()[0]))
        except OSError as error:
            if error.errno == errno.ENODEV:  # priv will make it
                return ""
    if ETHTOOL_DRVINFO.unpack(driver)[1].rstrip(b"\0") == b"bridge":
        return ""
    return f"interface {name} is not a bridge: switches need one"


def of_kernel(vm: "VmConfig", files: "BootFiles", prober: "ImageProber") -> list[str]:
    """Return the messages of a start about an open boot image and its initrd."""
    given = [fd for fd in (files.boot, files.initrd) if fd is not None]
    try:
        prober.ask(given, files.boot_name, [str(vm.memory_bytes), os.fsencode(vm.cmdline).hex()])
    except OperatorError as error:
        return [str(error)]
    return []


def of_seed(seed: "SeedConfig") -> list[str]:
    """Return the messages of a start about the files of a seed."""
    files = [("ssh-key", path) for path in seed.ssh_keys]
    files += [("user-data", seed.user_data), ("vendor-data", seed.vendor_data)]
    files += [("network-config", seed.network_config)]
    if not seed.password.startswith(HASHED):
        files.append(("password-hash", seed.password))
    problems = []
    for what, path in files:
        try:
            if path:
                close(open_regular(path, what))
        except OperatorError as error:
            problems.append(str(error))
    return problems


def of_disc(path: str, prober: "Prober") -> list[str]:
    """Return the messages of a start about a disc."""
    try:
        fd, notes = open_cdrom(path, prober, locked=False)
    except OperatorError as error:
        return [str(error)]
    close(fd)
    return notes
