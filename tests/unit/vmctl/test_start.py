"""start: options and their errors, existing and new VMs, boot files, answers (*cat. 3.4*)."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import ROOT, Answers, FakeDaemon, vm_info
from vmd.config import rules
from vmd.config.model import BootDevice, DiskConfig, NicConfig, VmConfig, VmFlag
from vmd.errors import VMD_BIOS_MISSING, VMD_CDROM_INVALID, VMD_CDROM_MISSING, VMD_DISK_MISSING, VMD_PARENT_INVALID
from vmd.ipc.messages.clients import End, Failed, ListRequest, StartRequest, VmInfo, VmStarted
from vmd.record import Record

STARTED = VmStarted(vmid=3, name="web", pid=40211, tty="/dev/pts/7")
SUCCESS = "vmctl: started vm 3 successfully, tty /dev/pts/7\n"
MIB = 1 << 20


class Files:
    """Files for starts of VMs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = self.make("vmlinuz", b"kernel!")
        self.initrd = self.make("initrd.gz", b"initrd!")
        self.disk = self.make("disk.qcow2", b"")
        self.iso = self.make("install.iso", b"")

    def make(self, name: str, data: bytes) -> str:
        """Write a file and return its path."""
        path = self.folder / name
        path.write_bytes(data)
        return str(path)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The files in a folder."""
    return Files(tmp_path)


@pytest.fixture
def known(daemon: FakeDaemon) -> FakeDaemon:
    """A daemon that knows VM 3, `web`, and accepts every start."""

    def script(request: Record) -> Answers:
        if isinstance(request, ListRequest):
            return [vm_info("web", vmid=3, running=False), End()]
        return [STARTED]

    daemon.script = script
    return daemon


def start_request(daemon: FakeDaemon) -> StartRequest:
    """Return the last request, which is a start."""
    request = daemon.requests[-1]
    assert isinstance(request, StartRequest)
    return request


def new_config(daemon: FakeDaemon) -> VmConfig:
    """Return the new VM of the last request."""
    config = start_request(daemon).config
    assert config is not None
    return config


# --- a VM that the daemon knows --------------------------------------------------------------------------


def test_a_new_vm_with_an_invalid_name(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """It is a usage error, and no start is requested."""
    status, _, errors = vmctl("start", "-b", files.kernel, "../a")

    assert (status, errors) == (2, f"vmctl: invalid VM name: ../a: {rules.NAME_FORM}\n")
    assert not any(isinstance(request, StartRequest) for request in known.requests)


@pytest.mark.parametrize(
    ("word", "request_"), [("web", StartRequest(name="web")), ("3", StartRequest(vmid=3, name="3"))]
)
def test_known_vm(vmctl: Vmctl, known: FakeDaemon, word: str, request_: StartRequest) -> None:
    """Without options, vmctl needs no other request first."""
    assert vmctl("start", word) == (0, "", SUCCESS)
    assert known.requests == [request_]


@pytest.mark.parametrize(
    ("name", "device"), [("cdrom", BootDevice.CDROM), ("disk", BootDevice.DISK), ("net", BootDevice.NET)]
)
def test_boot_device_for_once(vmctl: Vmctl, known: FakeDaemon, name: str, device: BootDevice) -> None:
    """-B alone does not make a new VM."""
    assert vmctl("start", "-B", name, "web") == (0, "", SUCCESS)
    assert known.requests == [StartRequest(name="web", boot_device=device)]


@pytest.mark.parametrize("word", ["web", "3"])
def test_kernel_for_once(vmctl: Vmctl, known: FakeDaemon, files: Files, word: str) -> None:
    """-b with an existing name boots that VM, with files that vmctl opens."""
    status = vmctl("start", "-b", files.kernel, "-I", files.initrd, "-k", "single", word)

    assert status == (0, "", SUCCESS)
    request = start_request(known)
    assert (request.vmid, request.name) == ((3, "3") if word == "3" else (0, "web"))
    assert (request.config, request.cmdline) == (None, "single")
    assert known.files[-1] == {"kernel": b"kernel!", "initrd": b"initrd!"}


def test_initrd_and_command_line_for_once(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """vm.conf names the VM's kernel.  An empty command line is a command line."""
    assert vmctl("start", "-I", files.initrd, "-k", "", "web")[0] == 0

    assert known.requests == [StartRequest(name="web", cmdline="")]
    assert known.files == [{"initrd": b"initrd!"}]


def test_files_on_a_disk_for_once(vmctl: Vmctl, known: FakeDaemon) -> None:
    """They are named and not opened: only the daemon reads the disk."""
    status = vmctl("start", "-b", "disk0:/vmlinuz", "-I", "disk0p2:/initrd.img", "-k", "single", "web")

    assert status == (0, "", SUCCESS)
    request = StartRequest(name="web", kernel="disk0:/vmlinuz", initrd="disk0p2:/initrd.img", cmdline="single")
    assert known.requests == [ListRequest(), request]
    assert known.files[-1] == {}


def test_new_vm_from_a_kernel_on_its_disk(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """It counts as a given boot image."""
    assert vmctl("start", "-b", "disk0:", "-d", files.disk, "scratch") == (0, "", SUCCESS)

    config = new_config(known)
    assert (config.kernel, config.given, known.files[-1]) == ("disk0:", VmFlag.KERNEL | VmFlag.DISK, {})


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("-b", "disk0:bsd", "disk0:bsd: the path of a file on a disk begins with /"),
        ("-I", "disk0:", "disk0:: an initrd needs the path of a file"),
    ],
)
def test_malformed_names_of_files_on_disks(vmctl: Vmctl, known: FakeDaemon, option: str, value: str, what: str) -> None:
    """They are usage errors."""
    status, _, errors = vmctl("start", option, value, "web")

    assert (status, errors.splitlines()[0]) == (2, f"vmctl: {what}")
    assert known.requests == []


def test_options_of_a_new_vm_with_a_known_name(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """Ignoring them silently would suggest that the memory was changed."""
    assert vmctl("start", "-b", files.kernel, "-m", "1G", "web") == (
        1,
        "",
        "vmctl: start vm command failed: vm web already exists: only -B, -b, -I and -k may change one boot of it\n",
    )
    assert known.requests == [ListRequest()]


# --- a new VM --------------------------------------------------------------------------------------------


def test_new_vm_from_a_kernel(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """-b with an unknown name makes a VM of the default size, without disks and network."""
    status = vmctl("start", "-b", files.kernel, "-I", files.initrd, "-k", "console=ttyS0", "scratch")

    assert status == (0, "", SUCCESS)
    assert start_request(known) == StartRequest(
        name="scratch",
        config=VmConfig(
            name="scratch",
            given=VmFlag.KERNEL,
            kernel=files.kernel,
            initrd=files.initrd,
            cmdline="console=ttyS0",
        ),
    )
    assert known.files[-1] == {"kernel": b"kernel!", "initrd": b"initrd!"}


def test_new_vm_with_everything(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """Every option is in the request, in order, and -i adds the missing interfaces."""
    # fmt: off
    status = vmctl(
        "start", "-B", "cdrom", "-d", files.disk, "-d", f"raw:{files.disk}", "-d", f"qcow2:{files.disk}", "-i", "4",
        "-L", "-n", "uplink", "-m", "1.5G", "-p", "4", "-r", files.iso, "big",
    )
    # fmt: on

    assert status == (0, "", SUCCESS)
    assert start_request(known) == StartRequest(
        name="big",
        boot_device=BootDevice.CDROM,
        config=VmConfig(
            name="big",
            given=VmFlag.DISK | VmFlag.NETWORK | VmFlag.MEMORY | VmFlag.CPU | VmFlag.CDROM,
            memory_bytes=1536 * MIB,
            vcpus=4,
            boot_device=BootDevice.CDROM,
            disks=(
                DiskConfig(path=files.disk),
                DiskConfig(path=files.disk, format="raw"),
                DiskConfig(path=files.disk, format="qcow2"),
            ),
            nics=(NicConfig(local=True), NicConfig(switch="uplink"), NicConfig(), NicConfig()),
            cdrom=files.iso,
        ),
    )


def test_new_vm_with_the_most_devices(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """Four disks and four interfaces."""
    assert vmctl("start", *("-d", files.disk) * 4, "-LL", "-n", "a", "-n", "b", "new") == (0, "", SUCCESS)

    assert new_config(known).disks == (DiskConfig(path=files.disk),) * 4
    assert [nic.switch for nic in new_config(known).nics] == ["", "", "a", "b"]


def test_count_of_interfaces_never_takes_one_away(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """-i 1 is given with two interfaces."""
    vmctl("start", "-d", files.disk, "-i", "1", "-LL", "new")

    assert new_config(known).nics == (NicConfig(local=True), NicConfig(local=True))


def test_links_are_followed(vmctl: Vmctl, known: FakeDaemon, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon gets the absolute path of the file itself."""
    monkeypatch.chdir(files.folder)
    os.symlink("disk.qcow2", "link")

    vmctl("start", "-d", "link", "-r", "./install.iso", "new")

    assert new_config(known).disks == (DiskConfig(path=os.path.realpath(files.disk)),)
    assert new_config(known).cdrom == os.path.realpath(files.iso)


def test_long_path(vmctl: Vmctl, known: FakeDaemon, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short link may lead to it.  The daemon could not name it."""
    monkeypatch.chdir(files.folder)
    for _ in range(6):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    Path("disk").touch()
    deep = os.getcwd()
    os.chdir(files.folder)
    monkeypatch.chdir(files.folder)
    os.symlink(os.path.relpath(deep, files.folder), "link")

    assert vmctl("start", "-d", "link/disk", "new") == (
        1, "", f"vmctl: invalid disk path: {os.path.realpath('link/disk')}: File name too long\n"
    )  # fmt: skip


def test_file_name_with_a_colon(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """Only `raw:` and `qcow2:` are prefixes."""
    path = files.make("vmdk:disk", b"")

    vmctl("start", "-d", path, "new")

    assert new_config(known).disks == (DiskConfig(path=path),)


@pytest.mark.parametrize(
    ("size", "mib", "note"),
    [
        ("1M", 1, ""),
        ("512m", 512, ""),
        ("2G", 2048, ""),
        ("1.5g", 1536, ""),
        ("1048577", 1, "vmctl: memory size rounded to 1.0M\n"),
        ("1.0005G", 1024, "vmctl: memory size rounded to 1.0G\n"),
    ],
)
def test_memory(vmctl: Vmctl, known: FakeDaemon, files: Files, size: str, mib: int, note: str) -> None:
    """It is rounded down to megabytes, with a message."""
    assert vmctl("start", "-m", size, "-d", files.disk, "new") == (0, "", note + SUCCESS)
    assert new_config(known).memory_bytes == mib * MIB


def test_instance(vmctl: Vmctl, known: FakeDaemon) -> None:
    """-t needs no device, because the instance inherits them."""
    assert vmctl("start", "-t", "tmpl", "-m", "1G", "new") == (0, "", SUCCESS)
    assert known.requests == [
        StartRequest(
            name="new",
            template="tmpl",
            config=VmConfig(name="new", given=VmFlag.MEMORY | VmFlag.INSTANCE, memory_bytes=1024 * MIB),
        )
    ]


def test_instance_with_its_own_kernel(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """-t makes a new VM, so vmctl does not request the list."""
    vmctl("start", "-t", "tmpl", "-b", files.kernel, "web")

    assert start_request(known).template == "tmpl"
    assert new_config(known).kernel == files.kernel
    assert len(known.requests) == 1


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-B", "floppy"], "unknown boot device floppy"),
        (["-B", "disk", "-B", "disk"], "boot device specified multiple times"),
        (["-b", "{none}"], "invalid boot image path: {none}: No such file or directory"),
        (["-b", "{kernel}", "-b", "{kernel}"], "boot image specified multiple times"),
        (["-b", "{folder}"], "kernel must be a regular file: {folder}"),
        (["-b", "/dev/null"], "kernel must be a regular file: /dev/null"),
        (["-b", ""], "invalid boot image path: "),
        (["-b", "a\0b"], "invalid boot image path: a\\x00b"),
        (["-d", "{none}"], "invalid disk path: {none}: No such file or directory"),
        (["-d", "raw:{none}"], "invalid disk path: {none}: No such file or directory"),
        (["-d", "qcow2:"], "invalid disk path: "),
        (["-d", "{disk}"] * 5, "too many disks: 5 (limit is 4)"),
        (["-I", "{none}"], "invalid initrd path: {none}: No such file or directory"),
        (["-I", "{initrd}", "-I", "{initrd}"], "initrd specified multiple times"),
        (["-b", "{kernel}", "-I", "{folder}"], "initrd must be a regular file: {folder}"),
        (["-i", "1", "-i", "1"], "interfaces specified multiple times"),
        (["-i", "0"], "count is too small: 0"),
        (["-i", "-1"], "count is too small: -1"),
        (["-i", "many"], "count is invalid: many"),
        (["-i", "99999999999999999999"], "count is too large: 99999999999999999999"),
        (["-i", "9" * 6000], "count is too large: " + "9" * 6000),
        (["-i", "5"], "too many interfaces: 5 (limit is 4)"),
        (["-L"] * 5, "too many interfaces: 5 (limit is 4)"),
        (["-L", "-n", "a", "-n", "b", "-n", "c", "-n", "d"], "too many interfaces: 5 (limit is 4)"),
        (["-n", ""], "invalid switch name: "),
        (["-n", "s" * 64], "switch name too long"),
        (["-k", "a", "-k", "b"], "kernel command line specified multiple times"),
        (["-k", "x" * 2048], "cmdline too long: 2048 bytes (limit is 2047)"),
        (["-m", "1G", "-m", "1G"], "memory specified multiple times"),
        (["-m", "lots"], "invalid memory size: lots"),
        (["-m", ""], "invalid memory size: "),
        (["-m", "1023K"], "memory size must be at least 1MB"),
        (["-m", "-1G"], "memory size must be at least 1MB"),
        (["-m", "1025G"], "memory size too large (limit is 1.0T)"),
        (["-p", "2", "-p", "2"], "vcpus specified multiple times"),
        (["-p", "17"], "invalid number of vcpus: 17 (limit is 16)"),
        (["-p", "0"], "vcpus is too small: 0"),
        (["-p", "two"], "vcpus is invalid: two"),
        (["-r", "{none}"], "invalid iso image path: {none}: No such file or directory"),
        (["-r", "{iso}", "-r", "{iso}"], "iso image specified multiple times"),
        (["-t", "t" * 64], "instance vm name too long: " + "t" * 64),
        (["-t", ""], "instance vm name too short: "),
        (["-m", "1G"], "no kernel or disk/cdrom specified"),
        (["-L"], "no kernel or disk/cdrom specified"),
        (["-p", "2"], "no kernel or disk/cdrom specified"),
        (["-d", "{disk}", "-k", "quiet"], "option -k needs a kernel to boot (-b)"),
        (["-d", "{disk}", "-I", "{initrd}"], "option -I needs a kernel to boot (-b)"),
        (["-c", "--json"], "--json and -c cannot be used together"),
    ],
)
def test_mistake_is_one_sentence(
    vmctl: Vmctl, known: FakeDaemon, files: Files, arguments: list[str], sentence: str
) -> None:
    """It names the thing and the value, and no VM is started."""
    places = {
        "none": str(files.folder / "none"), "folder": str(files.folder), "kernel": files.kernel,
        "initrd": files.initrd, "disk": files.disk, "iso": files.iso,
    }  # fmt: skip
    filled = [argument.format(**places) for argument in arguments]

    status, _, errors = vmctl("start", *filled, "new")

    assert errors == f"vmctl: {sentence.format(**places)}\n"
    # An invalid value is a usage error (2).  A file that cannot be used is a failure (1).
    assert status == (1 if " path: " in sentence or "must be a regular file" in sentence else 2)
    assert not any(isinstance(request, StartRequest) for request in known.requests)


@pytest.mark.root
def test_unreadable_kernel(open_folder: Path) -> None:
    """vmctl opens it with its own rights, before any request."""
    kernel = Files(open_folder).kernel
    os.chmod(kernel, 0o600)
    program = "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"

    done = subprocess.run(
        [sys.executable, "-c",
         f"import os, sys, vmctl.commands.start; from vmctl.__main__ import main; {program}",
         "start", "-b", kernel, "new"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vmctl: cannot open kernel '{kernel}': Permission denied\n"


def test_fifo_does_not_block(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """An ordinary open for reading would wait for a writer."""
    path = str(files.folder / "fifo")
    os.mkfifo(path)

    assert vmctl("start", "-b", path, "new") == (1, "", f"vmctl: kernel must be a regular file: {path}\n")


def opened_here() -> set[str]:
    """Return the paths of this process's open files.  Other threads open and close files meanwhile."""
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
    return links


def test_boot_files_are_closed(vmctl: Vmctl, known: FakeDaemon, files: Files) -> None:
    """They are closed after every outcome of the request."""
    vmctl("start", "-b", files.kernel, "-I", files.initrd, "new")
    vmctl("start", "-b", files.kernel, "-I", str(files.folder), "new")
    known.answers(End())
    vmctl("start", "-b", files.kernel, "-k", "new")

    assert not opened_here() & {files.kernel, files.initrd}


@pytest.mark.parametrize("options", [("-d", "{disk}"), ("-b", "{kernel}"), ("-t", "tmpl")])
def test_new_vm_needs_a_name(vmctl: Vmctl, known: FakeDaemon, files: Files, options: tuple[str, ...]) -> None:
    """A number is an id, so a VM with such a name could not be addressed."""
    filled = [option.format(disk=files.disk, kernel=files.kernel) for option in options]

    assert vmctl("start", *filled, "17") == (
        4,
        "",
        "vmctl: start vm command failed: vm 17 not found: a new one needs a name\n",
    )


@pytest.mark.parametrize(("word", "sentence"), [("-x", "invalid id: -x"), ("v" * 64, "name too long: " + "v" * 64)])
def test_invalid_names_of_vms(vmctl: Vmctl, known: FakeDaemon, word: str, sentence: str) -> None:
    """They are refused before any request."""
    assert vmctl("start", "--", word) == (2, "", f"vmctl: {sentence}\n")
    assert known.requests == []


# --- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "sentence"),
    [
        (
            VMD_BIOS_MISSING,
            "no BIOS image at /usr/share/seabios/bios.bin",
            "vmm bios firmware file not found. no BIOS image at /usr/share/seabios/bios.bin",
        ),
        (VMD_DISK_MISSING, "/vm/a: no such file", "could not open disk image(s): /vm/a: no such file"),
        (VMD_CDROM_MISSING, "/vm/i: no such file", "could not find specified iso image: /vm/i: no such file"),
        (VMD_CDROM_INVALID, "/dev: a folder", "specified iso image is not a regular file: /dev: a folder"),
        (VMD_PARENT_INVALID, "vm tmpl not found", "invalid template: vm tmpl not found"),
        (errno.EALREADY, "vm web is already running", "start vm command failed: vm web is already running"),
        (errno.EPERM, "", "start vm command failed: Operation not permitted"),
    ],
)
def test_refusal(vmctl: Vmctl, daemon: FakeDaemon, code: int, text: str, sentence: str) -> None:
    """Upstream's text, then the daemon's."""
    daemon.answers(Failed(code=code, text=text))

    assert vmctl("start", "web") == (1, "", f"vmctl: {sentence}\n")


@pytest.mark.parametrize(("listed", "status"), [((), 4), ((vm_info("web"),), 1)])
def test_missing_vm_and_missing_file(vmctl: Vmctl, daemon: FakeDaemon, listed: tuple[VmInfo, ...], status: int) -> None:
    """Both are ENOENT, so the list shows which of them is missing."""
    refusal = Failed(code=errno.ENOENT, text="something not found")
    daemon.script = lambda request: (*listed, End()) if isinstance(request, ListRequest) else (refusal,)

    assert vmctl("start", "web") == (status, "", "vmctl: start vm command failed: something not found\n")


def test_json(vmctl: Vmctl, known: FakeDaemon) -> None:
    """Its keys must stay the same.  The message goes to standard error as usual."""
    status, output, errors = vmctl("start", "--json", "web")

    assert (status, errors) == (0, SUCCESS)
    assert json.loads(output) == {
        "schema": 1, "id": 3, "name": "web", "pid": 40211, "tty": "/dev/pts/7", "notes": [],
    }  # fmt: skip


def test_json_of_a_refusal(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It has the code for programs."""
    daemon.answers(Failed(code=VMD_DISK_MISSING, text="/vm/a: no such file"))

    status, output, _ = vmctl("start", "--json", "web")

    assert status == 1
    text = "could not open disk image(s): /vm/a: no such file"
    assert json.loads(output) == {"schema": 1, "error": text, "code": 1002}
