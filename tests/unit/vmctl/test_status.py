"""The status table, byte for byte, and its JSON (*cat. 3.3*)."""

import errno
import json

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon, vm_info
from vmd.config.model import Forward, Prefix
from vmd.devices.vionet.dhcp import REASONS, RELEASED
from vmd.ipc.devmsg import COUNTER_NAMES
from vmd.ipc.messages.clients import (
    DiskInfo,
    End,
    Failed,
    FiguresRequest,
    ListRequest,
    NicInfo,
    NicsRequest,
    TroubleInfo,
    VmFiles,
    VmInfo,
)
from vmd.ipc.messages.figures import LifeEnd

HEADER = "   ID   PID VCPUS  MAXMEM  CURMEM     TTY        OWNER    STATE NAME\n"
DB1 = vm_info("db1", vmid=1, memory_bytes=2 << 30, resident_bytes=1181116006, tty="/dev/ttyp3", owner="anna:ops")
DB1 = DB1.replace(
    since_s=1790000000,
    started_s=1780000000,
    files=VmFiles(disks=(DiskInfo(path="/vm/a\n", format=""),), cdrom="/vm/cd.iso", console_log="/vm/log"),
)
TMPL = vm_info(
    "tmpl",
    vmid=2,
    running=False,
    text="powered off by the guest",
    ended=LifeEnd(at_s=1790000001, how="powered off", text="powered off by the guest"),
)


@pytest.fixture
def two(daemon: FakeDaemon) -> FakeDaemon:
    """A daemon with the two VMs of the catalogue's sample."""
    daemon.answers(DB1, TMPL, End())
    return daemon


ROW_DB1 = "    1 40211     1    2.0G    1.1G   ttyp3     anna:ops  running db1\n"
ROW_TMPL = "    2     -     1    512M       -       -         root  stopped tmpl\n"


def test_a_word_that_is_a_name_and_an_id(daemon: FakeDaemon, vmctl: Vmctl) -> None:
    """The VM with that name is shown, from any place in the list."""
    for vms in ([vm_info("2", vmid=1), vm_info("b", vmid=2)], [vm_info("b", vmid=2), vm_info("2", vmid=7)]):
        daemon.answers(*vms, End())
        status, out, _ = vmctl("status", "2")
        assert (status, [line.split()[-1] for line in out.splitlines()[1:]]) == (0, ["2"])


@pytest.mark.parametrize("command", ["status", "show", "stat", "sh"])
def test_table(vmctl: Vmctl, two: FakeDaemon, command: str) -> None:
    """Header and rows, with both names of the command and their abbreviations."""
    assert vmctl(command) == (0, HEADER + ROW_DB1 + ROW_TMPL, "")
    assert two.requests == [ListRequest()]


def test_no_vms(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The output is the header."""
    daemon.answers(End())

    assert vmctl("status") == (0, HEADER, "")


@pytest.mark.parametrize("arguments", [("-r",), ("-r", "db1")])
def test_running_only(vmctl: Vmctl, two: FakeDaemon, arguments: tuple[str, ...]) -> None:
    """The option is -r."""
    assert vmctl("status", *arguments) == (0, HEADER + ROW_DB1, "")


@pytest.mark.parametrize(("word", "row"), [("db1", ROW_DB1), ("1", ROW_DB1), ("tmpl", ROW_TMPL), ("2", ROW_TMPL)])
def test_one_vm(vmctl: Vmctl, two: FakeDaemon, word: str, row: str) -> None:
    """The VM is given by name or id."""
    assert vmctl("status", word) == (0, HEADER + row, "")


def test_running_only_of_one_that_is_stopped(vmctl: Vmctl, two: FakeDaemon) -> None:
    """The VM exists, so there is no row and no failure."""
    assert vmctl("status", "-r", "tmpl") == (0, HEADER, "")


def test_unknown_vm(vmctl: Vmctl, two: FakeDaemon) -> None:
    """The header is printed, and the command fails."""
    assert vmctl("status", "web") == (4, HEADER, "vmctl: vm web not found\n")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("0", "invalid id: 0"),
        ("x" * 64, "name too long: " + "x" * 64),
    ],
)
def test_invalid_names_of_vms(vmctl: Vmctl, two: FakeDaemon, word: str, sentence: str) -> None:
    """They are refused before any request."""
    assert vmctl("status", word) == (2, "", f"vmctl: {sentence}\n")
    assert two.requests == []


def test_number_beyond_32_bits_is_a_name(vmctl: Vmctl, two: FakeDaemon) -> None:
    """Numbers that strtonum(3) refuses are names, too."""
    assert vmctl("status", "4294967296") == (4, HEADER, "vmctl: vm 4294967296 not found\n")


@pytest.mark.parametrize(
    ("vm", "row"),
    [
        (
            vm_info(owner="christopher:development"),
            "    1 40211     1    512M    300M   pts/3 christopher:dev  running web\n",
        ),
        (vm_info(vmid=123456, vcpus=16), "123456 40211    16    512M    300M   pts/3         root  running web\n"),
        (vm_info(state="stopping", tty=""), "    1 40211     1    512M    300M       -         root stopping web\n"),
        (
            vm_info(running=False, state="waiting", memory_bytes=(1 << 40)),
            "    1     -     1    1.0T       -       -         root  waiting web\n",
        ),
        (vm_info("a\x1b[31mb"), "    1 40211     1    512M    300M   pts/3         root  running a\\x1b[31mb\n"),
    ],
)
def test_row(vmctl: Vmctl, daemon: FakeDaemon, vm: VmInfo, row: str) -> None:
    """Owners are cut at 15 characters, which are more than the column has.  Control characters are escaped."""
    daemon.answers(vm, End())

    assert vmctl("status") == (0, HEADER + row, "")


def test_many_vms(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """A list has one message for each VM."""
    daemon.answers(*(vm_info(f"vm{n}", vmid=n) for n in range(1, 301)), End())

    status, output, _ = vmctl("status")

    assert status == 0
    assert [line.split()[-1] for line in output.splitlines()[1:]] == [f"vm{n}" for n in range(1, 301)]


def test_verbose_says_why_a_vm_does_not_run(vmctl: Vmctl, two: FakeDaemon) -> None:
    """The table has no column for the reason."""
    status, _, errors = vmctl("-v", "status")

    assert status == 0
    assert errors.endswith("vmctl: vm tmpl: powered off by the guest\n")


def test_json(vmctl: Vmctl, two: FakeDaemon) -> None:
    """Its keys must stay the same."""
    status, output, errors = vmctl("status", "--json")

    assert (status, errors) == (0, "")
    assert json.loads(output) == {
        "schema": 1,
        "vms": [
            {
                "id": 1,
                "name": "db1",
                "state": "running",
                "pid": 40211,
                "vcpus": 1,
                "memory_bytes": 2147483648,
                "resident_bytes": 1181116006,
                "tty": "/dev/ttyp3",
                "owner": "anna:ops",
                "uid": 0,
                "gid": None,
                "text": "",
                "since": 1790000000,
                "started": 1780000000,
                "restarts": 0,
                "autostart": False,
                "boot_image": None,
                "initrd": None,
                "disks": [{"path": "/vm/a\\x0a", "format": None}],
                "cdrom": "/vm/cd.iso",
                "console_log": "/vm/log",
                "interfaces": [],
                "ended": None,
            },
            {
                "id": 2,
                "name": "tmpl",
                "state": "stopped",
                "pid": None,
                "vcpus": 1,
                "memory_bytes": 536870912,
                "resident_bytes": None,
                "tty": None,
                "owner": "root",
                "uid": 0,
                "gid": None,
                "text": "powered off by the guest",
                "since": None,
                "started": None,
                "restarts": 0,
                "autostart": False,
                "boot_image": None,
                "initrd": None,
                "disks": None,
                "cdrom": None,
                "console_log": None,
                "interfaces": [],
                "ended": {"at": 1790000001, "how": "powered off", "text": "powered off by the guest"},
            },
        ]
    }


def test_json_of_one_vm_and_of_running_ones(vmctl: Vmctl, two: FakeDaemon) -> None:
    """VMs are chosen as for the table.  Options may come last."""
    assert [vm["name"] for vm in json.loads(vmctl("status", "2", "--json")[1])["vms"]] == ["tmpl"]
    assert [vm["name"] for vm in json.loads(vmctl("status", "--json", "-r")[1])["vms"]] == ["db1"]


def test_json_of_an_unknown_vm(vmctl: Vmctl, two: FakeDaemon) -> None:
    """The only document is that of the failure."""
    status, output, errors = vmctl("status", "--json", "web")

    assert (status, errors) == (4, "vmctl: vm web not found\n")
    assert json.loads(output) == {"schema": 1, "error": "vm web not found", "code": errno.ENOENT}


def test_list_refused(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The message is that of the busy daemon."""
    daemon.answers(Failed(code=errno.EUSERS, text="too many connections of uid 5 (64)"))

    assert vmctl("status") == (1, "", "vmctl: command failed: too many connections of uid 5 (64)\n")


# --- interfaces ----------------------------------------------------------------------------------------------

LLADDR = bytes.fromhex("fee1bbd10001")


FROM_WORLD = Forward(
    port=5000, to=6000, count=10, udp=True, source=Prefix(address=bytes((192, 0, 2, 0)), length=24)
)


def with_nics(daemon: FakeDaemon, *nics: NicInfo | TroubleInfo) -> None:
    """Let the daemon know one VM with these interfaces."""
    daemon.script = lambda request: {
        ListRequest: (DB1, End()), NicsRequest: (*nics, End()), FiguresRequest: (End(),),
    }[type(request)]  # fmt: skip


def counters(**figures: int) -> tuple[int, ...]:
    """Return counters, zero except for these."""
    assert not figures.keys() - set(COUNTER_NAMES)
    return tuple(figures.get(name, 0) for name in COUNTER_NAMES)


def nic(**fields: object) -> NicInfo:
    """Return an interface of a running VM."""
    base: dict[str, object] = {
        "index": 0, "tap": "tap0", "switch": "", "lladdr": LLADDR, "up": True, "locked": False, "local": False,
    }  # fmt: skip
    return NicInfo(**{**base, "mtu": 1500, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("each", "lines"),
    [
        (
            nic(switch="lan", locked=True, counters=counters(rx_packets=3, rx_bytes=180, tx_packets=2, tx_bytes=90)),
            ["db1 interface 0: tap0, switch lan, lladdr fe:e1:bb:d1:00:01 locked, mtu 1500",
             "    received 3 packets, 180 bytes", "    sent 2 packets, 90 bytes"],
        ),
        (
            nic(counters=counters(rx_no_room=1, rx_filtered=2, tx_spoofed=3, tx_busy=4)),
            ["db1 interface 0: tap0, lladdr fe:e1:bb:d1:00:01, mtu 1500",
             "    received 0 packets, 0 bytes; dropped 1 larger than the guest's buffers, 2 not for this address",
             "    sent 0 packets, 0 bytes; dropped 3 from another address, 4 the host was busy"],
        ),
        (
            nic(local=True, host4=bytes((100, 64, 1, 2)), guest4=bytes((100, 64, 1, 3)),
                prefix6=b"\xfd" + bytes(15), counters=counters()),
            ["db1 interface 0: tap0, local, lladdr fe:e1:bb:d1:00:01, mtu 1500",
             "    host 100.64.1.2, guest 100.64.1.3, prefix fd00::/64", "    no lease given",
             "    received 0 packets, 0 bytes", "    sent 0 packets, 0 bytes"],
        ),
        (
            nic(tap="", mtu=0, local=True, host4=bytes((10, 9, 0, 1)), guest4=bytes((10, 9, 0, 2)), length4=24,
                forwards=(Forward(port=80, to=8080), FROM_WORLD)),
            ["db1 interface 0: no tap, local, lladdr fe:e1:bb:d1:00:01", "    host 10.9.0.1, guest 10.9.0.2/24",
             "    forward tcp port 80 to port 8080",
             "    forward udp port 5000:5009 to port 6000 from 192.0.2.0/24"],
        ),
        (nic(tap="", mtu=0, up=False), ["db1 interface 0: no tap, lladdr fe:e1:bb:d1:00:01, down"]),
        *(
            (
                nic(vhost=True, counters=counters(vhost=used)),
                [f"db1 interface 0: tap0, lladdr fe:e1:bb:d1:00:01, mtu 1500, {words}",
                 "    received 0 packets, 0 bytes", "    sent 0 packets, 0 bytes"],
            )
            for used, words in ((1, "vhost"), (0, "vhost not in use"))
        ),
        (
            nic(),
            ["db1 interface 0: tap0, lladdr fe:e1:bb:d1:00:01, mtu 1500",
             "    no counters: its process has not answered"],
        ),
    ],
)  # fmt: skip
def test_interfaces_as_text(vmctl: Vmctl, daemon: FakeDaemon, each: NicInfo, lines: list[str]) -> None:
    """-v prints the interface, its addresses, its traffic and its drops."""
    with_nics(daemon, each)

    status, said, _ = vmctl("status", "-v", "db1")

    assert (status, said) == (0, HEADER + ROW_DB1 + "".join(f"{line}\n" for line in lines))
    assert daemon.requests[1] == NicsRequest(vmid=1)


def test_a_lease(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Its time is printed, unless the number is not a valid time."""
    leased = nic(local=True, guest4=bytes((100, 64, 1, 3)), counters=counters(lease_s=86400))
    with_nics(daemon, leased)
    assert "    lease 100.64.1.3 given 1970-01-0" in vmctl("show", "-v")[1]
    with_nics(daemon, leased.replace(counters=counters(lease_s=(1 << 64) - 1), lease_name="web"))
    assert "    lease 100.64.1.3 given to web\n" in vmctl("show", "-v")[1]
    with_nics(daemon, leased.replace(lease_name="web"))
    (row,) = json.loads(vmctl("status", "-v", "--json")[1])["vms"]
    assert row["interfaces"][0]["lease"] == {"address": "100.64.1.3", "hostname": "web", "since": 86400}
    with_nics(daemon, nic(local=True, counters=counters(dhcp_releases=1)))
    assert "    lease released\n" in vmctl("show", "-v")[1]


def test_requests_of_dhcp_that_were_not_answered(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Each reason has its text.  Without such requests there is no line."""
    reasons = {name: number for number, name in enumerate(REASONS, 1) if name != RELEASED}
    with_nics(daemon, nic(local=True, counters=counters(**reasons)))
    shown = vmctl("show", "-v")[1]

    (line,) = [line for line in shown.splitlines() if "not answered" in line]
    assert line.startswith("    DHCP requests not answered: 1 for another server, ")
    assert line.count(", ") == len(reasons) - 1
    with_nics(daemon, nic(local=True, counters=counters()))
    assert "not answered" not in vmctl("show", "-v")[1]


def test_interfaces_in_json(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The keys must stay the same."""
    with_nics(daemon, nic(local=True, host4=bytes((100, 64, 1, 2)), counters=counters(rx_packets=3)))

    (row,) = json.loads(vmctl("status", "-v", "--json")[1])["vms"]

    (shown,) = row["interfaces"]
    assert (shown["tap"], shown["lladdr"], shown["host4"]) == ("tap0", "fe:e1:bb:d1:00:01", "100.64.1.2")
    assert (shown["prefix6"], shown["switch"], shown["counters"]["rx_packets"]) == (None, None, 3)
    assert (shown["forwards"], shown["lease"], shown["prefix4_length"]) == ([], None, 31)
    assert (shown["mtu"], shown["vhost"], shown["guest4"]) == (1500, False, None)
    with_nics(daemon, nic(mtu=0, switch="lan", vhost=True, guest4=bytes((100, 64, 1, 3))))
    (row,) = json.loads(vmctl("status", "-v", "--json")[1])["vms"]
    (shown,) = row["interfaces"]
    assert (shown["mtu"], shown["vhost"], shown["guest4"]) == (None, True, "100.64.1.3")
    assert (shown["switch"], shown["host4"], shown["prefix4_length"], shown["counters"]) == ("lan", None, None, None)


def test_forwards_in_json(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Each has the host's ports, the guest's port, and the allowed source."""
    with_nics(daemon, nic(local=True, forwards=(Forward(port=8022, to=22), FROM_WORLD)))

    (row,) = json.loads(vmctl("status", "-v", "--json")[1])["vms"]

    assert row["interfaces"][0]["forwards"] == [
        {"protocol": "tcp", "port": 8022, "count": 1, "to": 22, "from": None},
        {"protocol": "udp", "port": 5000, "count": 10, "to": 6000, "from": "192.0.2.0/24"},
    ]


def test_troubles_of_devices(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """-v prints them below the interfaces.  An invalid time is left out, and the device's text is escaped."""
    disk = TroubleInfo(device="disk0", text="flush fails: No space left\x1b on device", since_s=86400 * 365)
    with_nics(daemon, disk, disk.replace(since_s=(1 << 64) - 1))

    lines = vmctl("status", "-v", "db1")[1].splitlines()
    (row,) = json.loads(vmctl("status", "-v", "--json")[1])["vms"]

    assert lines[-2].startswith("db1 disk0: flush fails: No space left\\x1b on device (since 197")
    assert lines[-1] == "db1 disk0: flush fails: No space left\\x1b on device"
    assert row["troubles"][0] == {
        "device": "disk0", "text": "flush fails: No space left\\x1b on device", "since": 86400 * 365,
    }  # fmt: skip


def test_a_vm_that_ends_meanwhile(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Its row is shown without interfaces.  Other failures are reported."""
    gone, broken = Failed(code=errno.ENOENT, text="vm 1 not found"), Failed(code=errno.EIO, text="no")
    daemon.script = lambda request: (DB1, End()) if isinstance(request, ListRequest) else (gone,)
    assert vmctl("status", "-v") == (0, HEADER + ROW_DB1, "")
    daemon.script = lambda request: (DB1, End()) if isinstance(request, ListRequest) else (broken,)
    assert vmctl("status", "-v")[0] == 1
