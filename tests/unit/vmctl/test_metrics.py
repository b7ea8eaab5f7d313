"""vmctl metrics: the text, the document, and the choice of one VM."""

import errno

import pytest

from tests.support import schema
from tests.unit.test_exposition import Numbers, a_vm, samples
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon
from vmd.exposition import expose
from vmd.ipc.messages.clients import End, Failed, FiguresRequest

EVERYTHING = a_vm(Numbers())
NOTHING = EVERYTHING.replace(
    name="db", pid=0, since_s=0, started_s=0, ended=None, vcpus=(), disks=(), nics=(), cdrom=None, entropy=None,
    group=None,
)  # fmt: skip


def test_the_text(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It has all VMs, in both formats, and the daemon's release."""
    daemon.answers(EVERYTHING, NOTHING, End())

    assert vmctl("metrics") == (0, expose([EVERYTHING, NOTHING], "9.9"), "")
    assert vmctl("metrics", "-o") == (0, expose([EVERYTHING, NOTHING], "9.9", openmetrics=True), "")
    assert daemon.requests == [FiguresRequest(), FiguresRequest()]
    assert {"version": "9.9"} in [labels for _, labels, _ in samples(expose([], "9.9"))]


def test_the_document(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Every figure has a key, with its usual name."""
    daemon.answers(EVERYTHING, NOTHING, End())

    everything, nothing = schema.document(vmctl("metrics", "--json"), "metrics")["vms"]

    assert everything["disks"][1]["read_bytes"] == EVERYTHING.disks[1].read_bytes
    assert everything["interfaces"][0]["lladdr"] == "02:00:00:00:00:01"
    assert EVERYTHING.group is not None
    assert everything["group"]["tasks"] == EVERYTHING.group.tasks
    assert {key for key in nothing if nothing[key] is None} == {
        "pid", "since", "started", "ended", "cdrom", "entropy", "group"
    }  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_one_vm(vmctl: Vmctl, daemon: FakeDaemon, options: list[str]) -> None:
    """The VM is given by name or id.  If there is none, the exit status is 4."""
    daemon.answers(Failed(code=errno.ENOENT, text="vm 7 not found"))

    status, output, errors = vmctl("metrics", "7", *options)

    assert (status, errors) == (4, "vmctl: metrics: vm 7 not found\n")
    assert not options or schema.check(output, "error")["code"] == errno.ENOENT
    assert daemon.requests[0] == FiguresRequest(vmid=7, name="7")
