"""When the daemon begins to serve clients, and what the next parent gets to know."""

import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from vmd.config.model import CMDLINE_MAX, Config, NicConfig, SwitchConfig, VmConfig
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.children import Ready
from vmd.ipc.messages.clients import REQUESTS, Caller, Failed, LogRequest, Request, StartRequest, Step
from vmd.ipc.messages.priv import AdoptNics, ConfigureNetwork, NetworkConfigured
from vmd.ipc.routes import BY_CLASS, Proc, Who
from vmd.log import log
from vmd.parent import main, statemem
from vmd.parent.addresses import Plan
from vmd.parent.identity import Identities, StateFile
from vmd.parent.main import Parent
from vmd.parent.options import Options
from vmd.parent.plans import Taps
from vmd.parent.statemem import StateMemory
from vmd.parent.truth import Truth, read, vms_of
from vmd.parent.vm import Sending, State
from vmd.record import Record


class Peer:
    """A channel that records messages, and closes their descriptors."""

    def __init__(self, proc: Proc) -> None:
        self.peer = proc
        self.label = proc.name.lower()
        self.told: list[Record] = []

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]] | None = None) -> None:
        """Record a message."""
        assert peerid == 0 or self.peer is Proc.CONTROL
        self.told.append(message)
        for each in (fds or {}).values():
            for fd in each:
                os.close(fd)


class Connections(Peer):
    """Stands in for the controls.  Client 7 belongs to root, client 8 to another user."""

    def __init__(self) -> None:
        super().__init__(Proc.CONTROL)
        self.listens = 0

    def on_ready(self, channel: Peer) -> bool:
        """Return that it is the control of root."""
        assert channel is self
        return True

    def listen(self, _listener: socket.socket) -> None:
        """Count the calls."""
        self.listens += 1

    def asker(self, number: int, channel: Peer) -> Caller:
        """Return the user of a connection."""
        assert channel is self
        return {7: Caller(uid=0, gid=0, pid=1), 8: Caller(uid=12345, gid=12345, pid=1)}[number]


@pytest.fixture
def controls() -> Connections:
    """Return the controls."""
    return Connections()


@pytest.fixture
def parent(tmp_path: Path, controls: Connections) -> Iterator[Parent]:
    """Yield a parent that waits for its three processes, with a listener."""
    config = Config(switches=(SwitchConfig(name="lan", interface="br7"),))
    options = Options(socket_path=str(tmp_path / "vmd.sock"))
    parent = Parent(options, config, lambda _path, _known, _warn: config)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        parent.listener = listener
        parent.connections = cast("Any", controls)
        peers = {Proc.PRIV: Peer(Proc.PRIV), Proc.CONTROL: controls, Proc.VMM: Peer(Proc.VMM)}
        parent.core.peers.channels = cast("Any", peers)
        yield parent
    parent.loop.close()


def hear(parent: Parent, proc: Proc, message: Record) -> None:
    """Have the parent handle a message of a process."""
    Parent.HANDLERS[proc, type(message)](
        parent, message, Envelope(message, 0, 0, {}), cast("Any", parent.core.peers.channels[proc])
    )


def told(parent: Parent, proc: Proc) -> list[type[Record]]:
    """Return the types of the messages to a process."""
    return [type(message) for message in cast("Peer", parent.core.peers.channels[proc]).told]


def test_clients_wait_until_priv_has_its_configuration(parent: Parent, controls: Connections) -> None:
    """This holds in every order of the processes.

    Otherwise the VM of an early client would have no switch and no NAT.
    """
    said: list[str] = []
    parent.on_ready = lambda: said.append("ready")
    for proc in (Proc.CONTROL, Proc.VMM, Proc.PRIV):
        hear(parent, proc, Ready())
    assert (told(parent, Proc.PRIV), controls.listens, said) == ([ConfigureNetwork], 0, [])

    hear(parent, Proc.PRIV, NetworkConfigured())
    assert (controls.listens, said) == (1, ["ready"])

    hear(parent, Proc.PRIV, NetworkConfigured(problems=("of a reload",)))
    assert (controls.listens, said) == (1, ["ready"])


def test_a_hangup_before_that(parent: Parent, controls: Connections) -> None:
    """The answer of priv to an early reload does not suffice, because other processes may not be ready."""
    hear(parent, Proc.PRIV, Ready())
    parent.configuration.on_hangup()
    hear(parent, Proc.PRIV, NetworkConfigured())
    assert controls.listens == 0

    for proc in (Proc.CONTROL, Proc.VMM):
        hear(parent, proc, Ready())
    hear(parent, Proc.PRIV, NetworkConfigured())
    assert controls.listens == 1


def test_the_descriptors_of_a_start_that_is_refused(parent: Parent, controls: Connections, tmp_path: Path) -> None:
    """The channel closes them after each kind of refusal.  No VM is left."""
    parent.core.vms.add(VmConfig(name="a"), from_config=True)
    kernel = tmp_path / "kernel"
    kernel.touch()
    root, user = 7, 8
    requests = (
        (root, StartRequest(name="a", cmdline="x" * (CMDLINE_MAX + 1))),
        (user, StartRequest(caller=controls.asker(root, controls), name="a")),  # a client cannot set its caller
        (user, StartRequest(name="b", config=VmConfig(name="b"))),
        (root, StartRequest(name="b", template="c")),
    )
    for client, request in requests:
        fd = os.open(kernel, os.O_RDONLY)
        envelope = Envelope(request, client, 0, {"kernel": [fd]})
        Parent.HANDLERS[Proc.CONTROL, StartRequest](parent, request, envelope, cast("Any", controls))
        assert envelope.untaken() == [fd]
        os.close(fd)

    assert told(parent, Proc.CONTROL) == [Failed] * len(requests)
    assert [vm.name for vm in parent.core.vms] == ["a"]


def test_a_rehearsal_has_a_copy_of_the_state(parent: Parent) -> None:
    """The copy has the form that every version reads, and does not change afterwards."""
    parent.core.vms.add(VmConfig(name="there"), from_config=True)
    parent.lasting.keep(parent.generations, parent.network)
    copy = StateMemory(parent.lasting.copy())
    for number in range(20):
        parent.core.vms.add(VmConfig(name=f"later{number}"), from_config=True)
        parent.lasting.write()
    assert os.pread(copy.fd, len(statemem.MAGIC), 0) == statemem.MAGIC
    assert [known.name for known in vms_of(read(copy))] == ["there"]
    copy.close()


def test_a_parent_that_is_killed_before_vmm_reports_a_vm(parent: Parent) -> None:
    """It loses nothing that the earlier parent knew: interfaces, copies of boot files, and the transfer."""
    vm = parent.core.vms.add(VmConfig(name="a", nics=(NicConfig(),)), from_config=True)
    parent.network.taps[vm.vmid] = Taps(
        vm.config.nics, Plan(number=7, prefix4=Config().settings.local_prefix), {}, (), [],
        AdoptNics(vmid=vm.vmid, nics=(), made=()),
    )  # fmt: skip
    vm.kept = {"kernel": -1}
    vm.sending = Sending(keep=False, state=State.RUNNING, carried=True)
    parent.lasting.keep(parent.generations, parent.network)
    before = StateMemory(parent.lasting.copy())
    for _ in range(2):
        truth = read(before)
        before.close()
        (known,) = vms_of(truth)
        assert known.taps is not None
        assert known.transfer is not None
        assert (known.taps.plan.number, known.kept, known.transfer.carried) == (7, ("kernel",), True)
        after = Parent(Options(), Config(), cast("Any", None), truth=truth)
        after.lasting.keep(after.generations, after.network)
        after.lasting.write()
        before = StateMemory(after.lasting.copy())
        after.loop.close()
    before.close()


def test_identities_that_a_killed_parent_did_not_save_are_saved(tmp_path: Path) -> None:
    """The new parent saves them at once, because there may be no later change that would save them."""
    there = Identities()
    there.of(("a", 0)).number = 77
    truth = Truth(program="1", config=b"", identities=there.encode())
    parent = Parent(Options(), Config(), cast("Any", None), StateFile(str(tmp_path)), truth=truth)
    parent.lasting.close()
    parent.loop.close()
    found = Identities()
    StateFile(str(tmp_path)).load(found)
    assert found.of(("a", 0)).number == 77


def test_the_next_parent_knows_the_log_level(parent: Parent, controls: Connections) -> None:
    """It is the only setting that is neither in a VM nor in vm.conf."""
    heard: list[int] = []
    parent.core.on_change = lambda: heard.append(parent.core.verbosity)
    before = log.verbosity
    try:
        request = LogRequest(verbosity=2)
        Parent.HANDLERS[Proc.CONTROL, LogRequest](
            parent, request, Envelope(request, 7, 0, {}), cast("Any", controls)
        )
    finally:
        log.verbosity = before
    assert heard == [2]


def test_the_steps_of_a_start_in_the_docstring_of_main() -> None:
    """Each room that it names exists and has the functions.  There are at most eight steps."""
    doc, here = main.__doc__ or "", Path(main.__file__).parent
    rows = re.findall(r"^    ([\w/]+\.py) +(.+)$", doc, re.MULTILINE)
    assert 0 < len(rows) <= 8
    text = ""
    for name, what in rows:
        text += (here / name if "/" not in name else here.parent.parent / name).read_text()
        assert [word for word in re.findall(r"`(\w+)`", what) if f"def {word}(" not in text] == []


NEEDED: dict[str, Any] = {
    "path": "/conf", "vms": True, "switches": True, "verbosity": 0, "paused": True, "name": "a",
    "step": Step.DONE, "disk": "0", "size_bytes": 512,
}  # fmt: skip


@pytest.mark.parametrize("cls", REQUESTS)
def test_another_user_is_served_only_requests_for_everybody(
    parent: Parent, controls: Connections, cls: type[Request]
) -> None:
    """The parent checks this even if control has let the request pass.  Others are for root or the VM's owner."""
    parent.core.vms.add(VmConfig(name="a"), from_config=True)
    fields = {name: value for name, value in NEEDED.items() if name in cls.fields}
    request = cls(**fields)

    Parent.HANDLERS[Proc.CONTROL, cls](parent, request, Envelope(request, 8, 0, {}), cast("Any", controls))

    answers = controls.told
    # ESRCH is allowed: `status` tells every user that a VM does not run.
    refused = isinstance(answers[0], Failed) and answers[0].code in (errno.EPERM, errno.ESRCH)
    assert refused is (BY_CLASS[cls].who is not Who.EVERYBODY), answers
