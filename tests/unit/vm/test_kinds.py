"""The table of device kinds agrees with everything else that depends on a kind."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.support.ringdevices import ADAPTERS
from vmd.config.model import DiskConfig, VmConfig
from vmd.config.rules import DISK_FORMATS
from vmd.devices import process
from vmd.ipc.messages.shared import DiskImages, ImageLink
from vmd.ipc.messages.vm import NicLink, StartVm
from vmd.privsep.confine import VMM, Confinement
from vmd.vm.kinds import DISK, KINDS, SEED, Given, Kind, spares
from vmd.vm.slots import plan
from vmd.vmm.children import SPARES_MAX, device_words

ROOT = Path(__file__).resolve().parents[3]


def test_every_device_process_is_a_kind() -> None:
    """Each package in vmd/devices has a row.  Each row has a package, unless the VM process serves that kind."""
    packages = {main.parent.name for main in ROOT.glob("vmd/devices/*/main.py")}
    rows = {kind.process for kind in KINDS if not kind.inside}
    assert packages - rows == set(), "KINDS has no row for these packages"
    assert rows - packages == set(), "vmd/devices has no package for these rows"


@pytest.mark.parametrize("process", sorted({kind.process for kind in KINDS if not kind.inside}))
def test_a_device_process_is_described_and_attacked(process: str) -> None:
    """Each document that lists device processes names it, and process tests attack it as its VM and as a driver."""
    for document, start, end in (
        ("README.md", "## How it is built", "Every process is"),
        ("docs/architecture.md", "## 5. ", "## 6. "),
        ("docs/security.md", "## The process of a device", "Who has taken over"),
    ):
        part = (ROOT / document).read_text().partition(start)[2].partition(end)[0]
        assert process in part, f"{document}, from {start!r} on, does not name {process}"
    assert list(ROOT.glob(f"tests/process/test_{process}*.py")), f"tests/process has no test of {process}"


def test_each_queue_is_in_the_tests_of_rings() -> None:
    """The tests for all rings have a driver for each queue."""
    queues = {(kind.process, number) for kind in KINDS for number in range(len(kind.queues))}
    driven = {(adapter.kind.process, adapter.queue) for adapter in ADAPTERS}
    assert queues - driven == set(), "tests/support/ringdevices.py has no adapter for these queues"
    assert driven - queues == set(), "KINDS has no such queues"


def test_each_format_of_images_is_in_the_tests_of_rings() -> None:
    """A disk reads an image of each format in another way, and its rings are tested with each."""
    assert sorted(adapter.image for adapter in ADAPTERS if adapter.kind is DISK) == sorted(DISK_FORMATS)


def test_kinds_have_unique_names() -> None:
    """A kind has unique names in streams, for users, in `ps` and for guests.  For the last two a seed is a disk."""
    for fields, kinds in (
        (("name", "word"), KINDS),
        (("process", "device_type", "legacy_id"), [kind for kind in KINDS if kind is not SEED]),
    ):
        for field in fields:
            assert len({getattr(kind, field) for kind in kinds}) == len(kinds), field


@pytest.mark.parametrize("module", ["main", "widest"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.inside], ids=lambda kind: kind.name)
def test_a_device_process_may_do_nothing_that_vmm_may_not(
    kind: Kind, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It inherits vmm's filter, and can only narrow it.  A call that vmm may not make would kill the process."""
    confinements: list[Confinement] = []
    monkeypatch.setattr(process, "main", lambda _kind, confinement, *_: confinements.append(confinement))

    name = kind.widest if module == "widest" else module
    importlib.import_module(f"vmd.devices.{kind.process}.{name}").main()

    (mine,) = confinements
    assert set(mine.syscalls) <= set(VMM.syscalls)
    assert set(mine.ioctls) <= set(VMM.ioctls)


def test_vmm_knows_which_processes_a_vm_needs() -> None:
    """A reserved process of the wrong kind is useless, and only a slower start would show it."""
    raw, qcow2 = (ImageLink(path=f"/{kind}", format=kind) for kind in ("raw", "qcow2"))
    disks = [DiskImages(images=images, read_only=False) for images in ((raw,), (qcow2,), (qcow2, raw))]
    nic = NicLink(name="tap0", lladdr=bytes(6), host_mac=bytes(6), locked=False, local=False, mtu=1500)
    for some, nics in ((disks[:2], (nic, nic.replace(vhost=True))), (disks, ()), ([], (nic,))):
        config = VmConfig(name="a", disks=(DiskConfig(path="/d"),) * 3)
        start = StartVm(vmid=1, config=config, boot_name="", disks=tuple(some), nics=nics, verbosity=0)
        given = Given(
            config=start.config,
            disks=start.disks,
            disk_fds=(0,) * 4,
            nics=nics,
            tap_fds=(0,) * len(nics),
            vhost_fds=(0,) * 2,
        )
        slots = [(slot.kind, slot.module) for slot in plan(given) if not slot.kind.inside]

        assert spares(device_words(start)) == slots
        assert len(device_words(start.replace(nics=(nic,) * 8))) == SPARES_MAX


@pytest.mark.parametrize("path", sorted(ROOT.glob("vmd/vm/*.py")), ids=lambda path: path.stem)
def test_only_the_table_names_a_kind(path: Path) -> None:
    """Code that depends on a kind uses a field of its row, or the row itself, and not its name."""
    names = {name for kind in KINDS for name in (kind.name, kind.process)}
    words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}

    assert path.name == "kinds.py" or not words & names
