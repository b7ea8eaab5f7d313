"""Hints of `vmd -n` about a VM that are not about errors in vm.conf."""

import ctypes
import errno
import ipaddress
import os
import socket
from pathlib import Path
from struct import pack, unpack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import (
    Config,
    DiskConfig,
    DiskFile,
    Forward,
    Globals,
    NicConfig,
    Prefix,
    SeedConfig,
    SwitchConfig,
    VmConfig,
)
from vmd.errors import OperatorError
from vmd.files.images import Use
from vmd.parent import examine, hostports, hostroutes, vhost
from vmd.parent.examine import Examination
from vmd.parent.hostroutes import HostRoute


def test_a_host_without_vhost_is_named_for_each_interface_and_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is examined each time, because it may have changed since."""
    reasons = ["there is no /dev/vhost-net", "there is no /dev/vhost-net", ""]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(vhost, "lacking", lambda: reasons.pop(0))
    vm = VmConfig(name="a", nics=(NicConfig(vhost=True), NicConfig(), NicConfig(vhost=True)))

    said = [list(examine.of_vhost(vm)) for _ in range(3)]

    assert [len(each) for each in said] == [2, 2, 0]
    assert [line.split(":")[0] for line in said[0]] == ["interface 0", "interface 2"]
    assert all("there is no /dev/vhost-net" in line for line in said[1])


# --- all VMs of a configuration ---------------------------------------------------------------------------------


def run(*vms: VmConfig, deadline_s: float = float("inf"), probers: Any = None, **settings: Any) -> list[str]:  # noqa: ANN401
    """Return the warnings about VMs, without the file and line."""
    config = Config(vms=vms, settings=Globals(**settings))
    said: list[str] = []
    Examination([*vms], config, probers, deadline_s).run(said.append)
    return [line.removeprefix("vm.conf:1: ") for line in said]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No file is opened.  Return the paths of the images that are examined."""
    paths: list[str] = []

    def look(_self: Examination, disk: DiskConfig, _prober: object, _boots: bool) -> list[str]:
        paths.append(disk.path)
        return [f"disk {disk.path}: odd length"]

    monkeypatch.setattr(Examination, "of_disk", look)
    monkeypatch.setattr(Examination, "of_boot_files", lambda *_: [])
    return paths


def vm(name: str, *paths: str, **fields: Any) -> VmConfig:  # noqa: ANN401 - of a VmConfig
    """Return a VM of the file."""
    disks = tuple(DiskConfig(path=path) for path in paths)
    return VmConfig(name=name, origin="vm.conf:1", disks=disks).replace(**fields)


BOTH = (object(), object())


def test_an_image_of_many_vms_is_examined_once(examined: list[str]) -> None:
    """Each of them gets the warning.  Only one can run, so the others are not started with the daemon."""
    base, other = vm("a", "/base"), vm("b", "/base", enabled=False)
    assert run(base, other, probers=BOTH) == [
        'vm "a": disk /base: odd length', 'vm "b": disk /base: odd length',
    ]  # fmt: skip
    assert examined == ["/base"]
    assert run(base, vm("b", "/base"), probers=BOTH)[-1] == (
        'vm "b": disk /base is also used by vm a: only one of them can run'
    )


def test_images_that_take_too_long_are_counted(examined: list[str]) -> None:
    """Storage may hang.  The other checks of these VMs are made."""
    said = run(vm("a", "/a", "/b"), deadline_s=-1.0, probers=BOTH)
    assert (said, examined) == (
        [f"warning: 2 images are not examined: the others took more than {examine.TIME_S:g} seconds"], [],
    )  # fmt: skip


def test_without_a_prober_no_image_is_examined(examined: list[str]) -> None:
    """The caller has said why."""
    assert run(vm("a", "/a")) == []
    assert examined == []


def test_vms_that_do_not_fit_beside_those_before_them(examined: list[str]) -> None:
    """A VM that is not started with the daemon takes no room.  One that does not fit takes none from the next."""
    large = vm("c", "/c", vcpus=3)
    said = run(vm("a", "/a"), vm("off", "/o", enabled=False), large, vm("d", "/d"), limit_vcpus=3)
    (line,) = said
    assert line.startswith('vm "c": not started with those before it: ')
    assert "vm c" not in line
    assert "limit" in line
    assert len(run(vm("a", "/a"), vm("b", "/b"), vm("c", "/c"), limit_vms=2)) == 1


@pytest.mark.parametrize("vrfs", [False, True])
def test_a_host_without_routing_domains(examined: list[str], monkeypatch: pytest.MonkeyPatch, vrfs: bool) -> None:
    """The interface is named that is in one, by itself or by its switch."""
    monkeypatch.setattr(examine, "has_vrfs", lambda: vrfs)
    switches = (SwitchConfig(name="s", interface="br0", rdomain=3), SwitchConfig(name="t", interface="br1"))
    nics = (NicConfig(), NicConfig(rdomain=7), NicConfig(switch="s"), NicConfig(switch="t"))
    one = vm("a", nics=nics)
    said: list[str] = []
    Examination([one], Config(vms=(one,), switches=switches), None, 0).run(said.append)
    lacks = [f'vm.conf:1: vm "a": interface {index}: rdomain {number}: this kernel has no VRFs: load the module vrf'
             for index, number in ((1, 7), (2, 3))]  # fmt: skip
    assert [line for line in said if "rdomain" in line] == ([] if vrfs else lacks)


def test_the_question_whether_there_are_routing_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interface without a table is asked for.  Only "not supported" means that there are none."""
    answers = [errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM]
    asked: list[bytes] = []

    class Netlink:
        """The kernel."""

        def __init__(self, *kind: int) -> None:
            assert kind == (socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

        def __enter__(self) -> "Netlink":
            return self

        def __exit__(self, *_error: object) -> None:
            """Close it."""

        def send(self, request: bytes) -> None:
            """Take a request."""
            asked.append(request)

        def recv(self, _size: int) -> bytes:
            """Answer with an error."""
            return pack("=IHHII", 36, 2, 0, 1, 0) + pack("=i", -answers.pop(0)) + bytes(16)

    monkeypatch.setattr(socket, "socket", Netlink)
    assert [examine.has_vrfs() for _ in range(3)] == [False, True, True]
    # struct nlmsghdr with RTM_NEWLINK, and REQUEST, ACK, EXCL and CREATE; struct ifinfomsg; IFLA_LINKINFO with its kind
    attributes = pack("=HHHH", 12, 18, 8, 1) + b"vrf\0"
    assert asked[0] == pack("=IHHII", 44, 16, 0x605, 1, 0) + bytes(16) + attributes


@pytest.mark.parametrize(("driver", "problem"), [
    (b"bridge", ""), (b"bridges", "interface br0 is not a bridge: switches need one"),
])  # fmt: skip
def test_the_question_whether_an_interface_is_a_bridge(
    monkeypatch: pytest.MonkeyPatch, driver: bytes, problem: str
) -> None:
    """Its driver says so."""

    def ioctl(_sock: object, request: int, argument: bytes) -> None:
        name, address = unpack("=16sQ16x", argument)
        assert (request, name.rstrip(b"\0")) == (0x8946, b"br0")  # SIOCETHTOOL
        assert ctypes.string_at(address, 4) == pack("=I", 3)  # ETHTOOL_GDRVINFO
        ctypes.memmove(address + 4, driver, len(driver))

    monkeypatch.setattr("vmd.parent.examine.fcntl.ioctl", ioctl)
    assert examine.of_bridge("br0") == problem


def test_only_root_is_told_about_vhost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others cannot open the device anyway."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(vhost, "lacking", lambda: "no permission")
    assert list(examine.of_vhost(VmConfig(name="a", nics=(NicConfig(vhost=True),)))) == []


@pytest.mark.parametrize(("uid", "needed"), [(0, True), (0, False), (1000, True)])
def test_images_are_examined_in_a_cell(
    examined: list[str], monkeypatch: pytest.MonkeyPatch, uid: int, needed: bool
) -> None:
    """As by a daemon, if root asks.  It is made only if there is an image, and is closed."""
    done: list[object] = []

    def make_cell(*ids: int) -> SimpleNamespace:
        done.append(ids)
        return SimpleNamespace(close=lambda: done.append("close"))

    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr("vmd.parent.service.lookup_user", lambda: (4, 5))
    monkeypatch.setattr("vmd.privsep.cell.Cell.build", make_cell)
    monkeypatch.setattr(examine, "ImageProber", lambda _place, **_more: object())
    said: list[str] = []
    examine.check_vms(Config(vms=(vm("a", *(["/a"] if needed else [])),)), said.append)
    assert done == ([(4, 5), "close"] if needed and uid == 0 else [])
    assert examined == (["/a"] if needed else [])


def test_disks_that_a_bios_cannot_start_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM is named if none of its disks has code, and only if the firmware needs one."""
    looked: list[tuple[str, object, bool]] = []

    def look(self: Examination, disk: DiskConfig, prober: object, boots: bool) -> list[str]:
        looked.append((disk.path, prober, boots))
        if "data" in disk.path:
            self.codeless.add(disk.path)
        return []

    monkeypatch.setattr(Examination, "of_disk", look)
    monkeypatch.setattr(Examination, "of_boot_files", lambda *_: [])
    off = {"enabled": False}
    (line,) = run(vm("a", "/data1", "/data2", **off), vm("b", "/data1", "/boot", **off), probers=BOTH)
    assert line.startswith('vm "a": ')
    assert "/data1" in line
    assert "/data2" in line
    assert run(vm("c", "/data1", kernel="/k", **off), probers=BOTH) == []
    assert {prober for _, prober, _ in looked} == {BOTH[0]}
    assert looked[-1] == ("/data1", BOTH[0], False)


class Prober:
    """Examines kernels."""

    place = None

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble
        self.asked: list[tuple[list[int], str, list[str]]] = []

    def ask(self, fds: list[int], name: str, words: list[str]) -> None:
        """Answer."""
        self.asked.append((fds, name, words))
        if self.trouble:
            raise OperatorError(errno.EINVAL, self.trouble)


def test_a_kernel_is_examined_with_its_command_line() -> None:
    """Its initrd goes along, if there is one.  The sentence of a refusal is the message."""
    one = VmConfig(name="a", kernel="/k", cmdline="quiet", memory_bytes=1 << 20)
    for initrd, fds in ((9, [8, 9]), (None, [8])):
        prober = Prober()
        files = cast("Any", SimpleNamespace(boot=8, initrd=initrd, boot_name="/k"))
        assert examine.of_kernel(one, files, cast("Any", prober)) == []
        assert prober.asked == [(fds, "/k", ["1048576", b"quiet".hex()])]
    assert examine.of_kernel(one, files, cast("Any", Prober("/k: not a kernel"))) == ["/k: not a kernel"]


def test_boot_files_of_the_host(tmp_path: Path) -> None:
    """A file that is missing is named.  Without probers, and for the firmware, nothing else is looked at."""
    kernel = tmp_path / "k"
    kernel.write_bytes(b"x")
    prober = Prober("refused")
    given = (object(), prober)
    for probers, path, said in (
        (given, str(kernel), ["refused"]), (given, str(kernel), ["refused"]), (None, str(kernel), []),
        (given, str(tmp_path / "none"), [f"kernel {tmp_path}/none: No such file or directory"]),
    ):  # fmt: skip
        room = Examination([], Config(), cast("Any", probers), float("inf"))
        assert room.of_boot_files(VmConfig(name="a", kernel=path)) == said
    assert len(prober.asked) == 2


@pytest.mark.parametrize(("initrd", "names"), [("", ["kernel"]), ("disk0:/i", ["kernel", "initrd"])])
def test_a_kernel_on_a_disk(monkeypatch: pytest.MonkeyPatch, initrd: str, names: list[str]) -> None:
    """An imgboot reads it, and is ended.  An error of the disk itself is not reported again."""
    done: list[str] = []
    child = SimpleNamespace(kill=lambda: done.append("kill"), reap=lambda _timeout_s: done.append("reap"))
    sock = SimpleNamespace(close=lambda: done.append("close"))
    trouble: list[OperatorError] = []
    memories: list[int] = []
    images = object()

    class Found:
        """The files on disks."""

        def __init__(self) -> None:
            self.kernel: tuple[int, int] = (-1, 0)
            self.initrd: tuple[int, int] | None = None
            self.kernel_name = "disk0:/k"

        def read(self, _sock: object, name: str, file: DiskFile, _disk: object, memory: int, _at: object) -> None:
            """Read a file."""
            done.append(f"{name} {file.path}")
            if trouble:
                os.close(memory)
                raise trouble[0]
            memories.append(memory)
            setattr(self, name, (memory, 0))

        def close(self) -> None:
            """Close what was read."""
            done.append("close found")

    monkeypatch.setattr(examine, "start_probe", lambda *_given, **_more: (child, sock))
    def open_disk(disk: DiskConfig, prober: object, use: Use) -> SimpleNamespace:
        assert (disk.path, prober, use.locked) == ("/d", images, False)
        return SimpleNamespace(close=lambda: done.append("close disk"))

    monkeypatch.setattr(examine, "open_disk", open_disk)
    monkeypatch.setattr(examine, "FromDisks", Found)
    before = open_descriptors()
    prober = Prober("refused")
    one = vm("a", "/d", kernel="disk0:/k", initrd=initrd)
    assert Examination([], Config(), None, float("inf")).of_boot_files(one) == []
    assert done == []
    room = Examination([], Config(), cast("Any", (images, prober)), float("inf"))
    assert room.of_boot_files(one) == ["refused"]
    reads = [word for name in names for word in (f"{name} /{name[0]}", "close disk")]
    assert done == [*reads, "close", "kill", "reap"]
    assert [fds for fds, _, _ in prober.asked] == [memories]
    assert len(memories) == len(names)
    for text, said in (("disk0:/k: no such file", ["disk0:/k: no such file"]), ("disk /d: in use", [])):
        trouble[:] = [OperatorError(errno.ENOENT, text)]
        done.clear()
        assert Examination([], Config(), cast("Any", (images, prober)), float("inf")).of_boot_files(one) == said
        assert done == ["kernel /k", "close disk", "close found", "close", "kill", "reap"]
    assert open_descriptors() == before


def test_ports_and_addresses_that_the_host_has(examined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An address is named once, and not if only a tap has its network, or if it is in a routing domain of its own."""
    routes = [
        HostRoute(network=ipaddress.ip_network("10.0.0.0/8"), interface=name) for name in ("tap7", "vpn0", "eth0")
    ]
    monkeypatch.setattr(hostroutes, "host_routes", lambda: routes)
    monkeypatch.setattr(hostports, "in_the_way", lambda each: "a program has it" if each.port == 80 else "")
    address = Prefix(address=bytes((10, 9, 0, 2)), length=24)
    web, free = Forward(port=80, to=80), Forward(port=81, to=81)
    nics = (
        NicConfig(local=True, forwards=(free, web)), NicConfig(local=True, address=address),
        NicConfig(local=True, address=address, rdomain=3),
        NicConfig(local=True, address=Prefix(address=bytes((192, 0, 2, 2)), length=24)),
    )  # fmt: skip
    monkeypatch.setattr(examine, "has_vrfs", lambda: True)
    assert run(vm("a", "/a", nics=nics)) == [
        f'vm "a": interface 0: forward {web}: a program has it',
        'vm "a": interface 1: address 10.9.0.2/24: this host reaches 10.0.0.0/8 by vpn0',
    ]
    del routes[1:]
    assert len(run(vm("a", "/a", nics=nics))) == 1


def test_an_interface_of_the_host_that_is_no_bridge() -> None:
    """One that does not exist will be made."""
    assert examine.of_bridge("lo") == "interface lo is not a bridge: switches need one"
    assert examine.of_bridge("nosuch0") == ""


def test_the_files_of_a_seed(tmp_path: Path) -> None:
    """Each one that is missing is named, with its keyword.  A hash in the file itself is none."""
    (tmp_path / "there").touch()
    there, gone = str(tmp_path / "there"), str(tmp_path / "gone")
    assert examine.of_seed(SeedConfig(ssh_keys=(there,), user_data=there, password="$6$x$y")) == []
    said = examine.of_seed(
        SeedConfig(ssh_keys=(gone, there), user_data=gone, vendor_data=gone, network_config=gone, password=gone)
    )
    assert len(said) == 5
    words = ("ssh-key", "user-data", "vendor-data", "network-config", "password-hash")
    assert all(word in line and gone in line for word, line in zip(words, said, strict=True))


def test_a_configuration_whose_instances_cannot_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out, and the others are checked.  A switch that cannot be used is named, unless it is disabled."""
    said: list[str] = []
    switches = (
        SwitchConfig(name="s", interface="lo", origin="vm.conf:7"),
        SwitchConfig(name="off", interface="lo", origin="vm.conf:8", enabled=False),
    )
    monkeypatch.setattr(Examination, "of_boot_files", lambda *_: ["odd"])
    one = VmConfig(name="a", origin="vm.conf:1")
    lost = VmConfig(name="b", parent="none", origin="vm.conf:2")
    examine.check_vms(Config(vms=(lost, one), switches=switches), said.append)
    assert said[:2] == [
        "vm.conf:2: vm b: template none not found",
        'vm.conf:7: switch "s": interface lo is not a bridge: switches need one',
    ]
    assert 'vm.conf:1: vm "a": odd' in said[2:]
    assert not any('vm "b"' in line for line in said)
