"""The devices of a VM, their slots, and the order in which firmware tries them."""

import pytest

from vmd.config.model import BootDevice, DiskConfig, NicConfig, Owner, SeedConfig, VmConfig
from vmd.config.rules import valid_serial
from vmd.ipc import devmsg
from vmd.ipc.messages.shared import DiskImages, ImageLink
from vmd.ipc.messages.vm import NicLink
from vmd.vm.kinds import DISK, SEED, Given, kinds
from vmd.vm.slots import Slot, boot_paths, plan, vmmci_slot, with_serials

DISK1, DISK2, DISC = "/pci@i0cf8/*@3", "/pci@i0cf8/*@4", "/pci@i0cf8/*@5/*@0/*@0,0"


CONFIG = VmConfig(
    name="a", nics=(NicConfig(),), disks=(DiskConfig(path="/a"), DiskConfig(path="/c")), cdrom="/disc.iso"
)


def slots() -> list[Slot]:
    """Return the devices of a VM with an interface, two disks and a disc.  The first disk has a backing file."""
    images = (
        DiskImages(images=(ImageLink(path="/a", format="qcow2"), ImageLink(path="/b", format="raw", guessed=True))),
        DiskImages(images=(ImageLink(path="/c", format="raw", discard_granularity=65536),), read_only=True),
    )
    nic = NicLink(name="tap0", lladdr=b"\xfe" + bytes(5), host_mac=bytes(6), locked=False, local=False, mtu=1500)
    return plan(
        Given(config=CONFIG, disks=images, disk_fds=(10, 11, 12), cdrom_fd=13, nics=(nic,), tap_fds=(14,))
    )


def test_each_device_has_upstreams_slot_and_its_own_files() -> None:
    """Entropy has slot 1, then come interfaces, disks and disc.  A disk gets its image chain, the top image first."""
    by_name = {slot.name: slot for slot in slots()}
    assert {name: slot.number for name, slot in by_name.items()} == {
        "viornd0": 1, "vionet0": 2, "vioblk0": 3, "vioblk1": 4, "vioscsi0": 5,
    }  # fmt: skip
    assert (by_name["vionet0"].fds, by_name["vionet0"].names) == ((14,), ("tap0", ""))
    assert [by_name[name].notes for name in ("viornd0", "vionet0", "vioscsi0")] == [(), (0,), (0,)]
    assert [by_name[name].flags for name in ("viornd0", "vioblk0", "vioscsi0")] == [0, 0, 0]
    assert by_name["vioblk0"].fds == (10, 11)
    assert by_name["vioblk0"].notes == (devmsg.RESOURCE_QCOW2, devmsg.RESOURCE_GUESSED)
    assert (by_name["vioblk1"].fds, by_name["vioblk1"].flags) == ((12,), devmsg.START_READ_ONLY)
    assert (by_name["vioblk0"].module, by_name["vioblk1"].module) == ("main", "raw")
    assert by_name["vioblk1"].notes == (128 << devmsg.RESOURCE_DISCARD_SHIFT,)  # in sectors
    assert (by_name["vioscsi0"].fds, by_name["vioscsi0"].names) == ((13,), ("/disc.iso",))


def test_an_interface_whose_frames_the_kernel_may_move_has_three_files() -> None:
    """After its tap it has /dev/vhost-net and a packet socket.  Other interfaces have neither."""
    lladdr = b"\xfe" + bytes(5)
    links = tuple(
        NicLink(name=name, lladdr=lladdr, host_mac=bytes(6), locked=False, local=False, mtu=1500, vhost=vhost)
        for name, vhost in (("tap0", True), ("tap1", False), ("tap2", True))
    )
    config = VmConfig(name="a", nics=(NicConfig(),) * 3)
    parts = Given(config=config, nics=links, tap_fds=(20, 21, 22), vhost_fds=(30, 31, 32, 33))

    found = [slot for slot in plan(parts) if slot.net]

    assert [slot.fds for slot in found] == [(20, 30, 31), (21,), (22, 32, 33)]
    assert [slot.names for slot in found] == [("tap0", "tap0", "tap0", ""), ("tap1", ""), ("tap2", "tap2", "tap2", "")]
    assert [slot.module for slot in found] == ["kernel", "main", "kernel"]
    flags = [devmsg.NET.unpack(slot.net)[2] for slot in found]
    assert [bool(each & devmsg.NET_VHOST) for each in flags] == [True, False, True]


@pytest.mark.parametrize(("given", "flags"), [
    ({}, 0), ({"locked": True}, devmsg.NET_LOCKED), ({"pxe": True}, devmsg.NET_PXE),
    ({"local": True, "asks": False}, devmsg.NET_LOCAL), ({"asks": True}, 0),
    ({"local": True, "asks": True}, devmsg.NET_LOCAL | devmsg.NET_ASKS),
])  # fmt: skip
def test_what_an_interface_may_do(given: dict[str, bool], flags: int) -> None:
    """Only a local interface asks for name servers."""
    link = NicLink(name="tap0", lladdr=b"\xfe" + bytes(5), host_mac=bytes(6), locked=False, local=False, mtu=0)
    parts = Given(config=VmConfig(name="a", nics=(NicConfig(),)), nics=(link.replace(**given),), tap_fds=(14,))
    (slot,) = [slot for slot in plan(parts) if slot.net]
    assert devmsg.NET.unpack(slot.net)[2] == flags


@pytest.mark.parametrize(
    ("given", "seed", "local", "pxe", "told"),
    [
        ("", None, True, False, "a"),
        ("www", SeedConfig(hostname="db1"), True, False, "www"),
        ("", SeedConfig(hostname="db1"), True, False, "db1"),
        ("", SeedConfig(), True, False, "a"),
        ("", None, False, True, "a"),
        ("", SeedConfig(hostname="db1"), False, False, ""),
    ],
)
def test_the_host_name_that_a_guest_gets(
    given: str, seed: SeedConfig | None, local: bool, pxe: bool, told: str
) -> None:
    """It is the interface's, else the seed's, else the VM's.  A guest that gets no address from us gets no name."""
    nic = NicConfig(local=local, host_name=given)
    link = NicLink(
        name="tap0", lladdr=b"\xfe" + bytes(5), host_mac=bytes(6), locked=False, local=local, mtu=0, pxe=pxe
    )
    parts = Given(config=VmConfig(name="a", nics=(nic,), seed=seed), nics=(link,), tap_fds=(14,))

    (slot,) = [slot for slot in plan(parts) if slot.net]
    assert slot.names == ("tap0", told)


def serials(name: str = "a", uid: int = 0, given: str = "") -> list[bytes]:
    """Return the serial numbers of two disks of a VM.  `given`: the configured one of the first disk."""
    disks = (DiskConfig(path="/a", serial=given), DiskConfig(path="/c"))
    config = VmConfig(name=name, owner=Owner(uid=uid), disks=disks)
    images = (DiskImages(images=(ImageLink(path=disk.path, format="raw"),)) for disk in config.disks)
    parts = Given(config=config, disks=tuple(images), disk_fds=(10, 11))
    return [slot.serial for slot in plan(parts) if slot.kind is DISK]


def test_serial_numbers_are_stable_and_differ_between_vms() -> None:
    """They depend on name and owner.  Long names give different numbers, although only their start is in the number."""
    found = [
        serial
        for name in ("a", "b", "a" * 62 + "b", "a" * 62 + "c", "webserver1", "webserver2")
        for uid in (0, 1000)
        for serial in serials(name, uid)
    ]
    assert len(set(found)) == len(found) == 24
    assert all(len(serial) <= 20 and valid_serial(serial.decode("ascii")) for serial in found)
    assert serials("webserver1")[0].startswith(b"webserv-")
    assert serials("db1") == serials("db1") == [b"db1-b718b3a078-0", b"db1-b718b3a078-1"]


def test_a_configured_serial_number_is_used() -> None:
    """It is used for its disk only.  The number of the other disk does not change."""
    assert serials(given="mine") == [b"mine", serials()[1]]


def test_the_configuration_that_is_sent_has_the_serial_numbers() -> None:
    """The receiver gets the numbers that the guest has seen, so a new name does not change them."""
    devices = slots()
    taken = with_serials(CONFIG.replace(name="other"), devices)

    assert [disk.serial.encode() for disk in taken.disks] == [slot.serial for slot in devices if slot.kind is DISK]
    assert with_serials(CONFIG, [slot.replace(serial=b"") for slot in devices]) == CONFIG


def test_the_configuration_alone_gives_the_kinds_of_devices() -> None:
    """A receiver needs the kinds before the disks can be opened."""
    assert kinds(CONFIG) == [slot.kind for slot in slots()]


@pytest.mark.parametrize(
    ("device", "to_boot", "others"),
    [
        (BootDevice.AUTO, (DISK1, DISK2, DISC), ()),
        (BootDevice.DISK, (DISK1, DISK2), (DISC,)),
        (BootDevice.CDROM, (DISC,), (DISK1, DISK2)),
        (BootDevice.NET, (DISK1, DISK2, DISC), ()),
    ],
)
def test_only_the_boot_device_is_tried_but_all_drives_are_listed(
    device: BootDevice, to_boot: tuple[str, ...], others: tuple[str, ...]
) -> None:
    """Every drive is in one of the two lists, because firmware hides drives without a line."""
    assert boot_paths(slots(), device) == (to_boot, others)


def test_a_seed_moves_no_device() -> None:
    """A seed is a read-only disk with its own slot and number.  Nothing is booted from it."""
    parts = Given(config=CONFIG, seed_fd=7)
    (entropy, seed) = plan(parts)

    assert (seed.kind, seed.number, seed.name, seed.label) == (SEED, 31, "vioblk4", "seed")
    assert (seed.fds, seed.flags, seed.module) == ((7,), devmsg.START_READ_ONLY, "raw")
    assert vmmci_slot((entropy, seed)) == vmmci_slot((entropy,)) == 2
    assert vmmci_slot([*slots(), seed]) == vmmci_slot(slots())
    assert kinds(CONFIG.replace(seed=SeedConfig())) == [*kinds(CONFIG), SEED]
    to_boot, others = boot_paths([*slots(), seed], BootDevice.AUTO)
    assert "/pci@i0cf8/*@1f" in others
    assert to_boot == boot_paths(slots(), BootDevice.AUTO)[0]
