"""What agentx is told: when, how often, and about which states; and how the agent is found."""

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.parent.test_figures import MOST, filled
from vmd.config.model import (
    MAX_DISKS,
    MAX_NICS,
    MAX_VCPUS,
    NAME_MAX,
    AgentxConfig,
    Config,
    DiskConfig,
    Globals,
    NicConfig,
    SwitchConfig,
    VmConfig,
)
from vmd.errors import HostError
from vmd.ipc.figures import CdromFigures, DiskFigures, NicFigures, VcpuFigures
from vmd.ipc.imsg import MAX_MESSAGE, Envelope, encode
from vmd.ipc.messages.agentx import (
    AgentxChanged,
    AgentxLink,
    AgentxLost,
    AgentxMaster,
    AgentxUp,
    AgentxVm,
    AgentxVms,
    AskAgentxVms,
)
from vmd.ipc.messages.children import Quit
from vmd.parent.agentx import ANSWER_EVERY_S, FIRST_S, LONGEST_S, Agentx
from vmd.parent.core import Core
from vmd.parent.endings import FAILED, KILLED
from vmd.parent.figures import Figures
from vmd.parent.vm import Receiving, Vm
from vmd.record import Record


class Timer:
    """A call that is due later."""

    def __init__(self, delay_s: float, call: Callable[[], None]) -> None:
        self.delay_s, self.call = delay_s, call

    def cancel(self) -> None:
        """Cancel the call."""
        self.call = lambda: None


class Loop:
    """Timers that run when the test calls `run`."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Keep a timer."""
        self.timers.append(Timer(delay_s, call))
        return self.timers[-1]

    def run(self) -> list[float]:
        """Make all calls that are due, and return their delays."""
        timers, self.timers = self.timers, []
        for timer in timers:
            timer.call()
        return [timer.delay_s for timer in timers]


class Process:
    """The channel to agentx, and what starts and kills it."""

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.killed = self.started = 0
        self.done: list[str] = []  # what was done with the channel
        self.trouble: HostError | None = None

    def start(self, _proc: object, _open_log: object) -> tuple[None, None]:
        """Start agentx."""
        if self.trouble is not None:
            raise self.trouble
        self.started += 1
        return None, None

    def kill(self, _proc: object) -> None:
        """Count the kills."""
        self.killed += 1

    def send(self, message: Record, *, fds: Mapping[str, Sequence[int]] | None = None) -> None:
        """Record a message."""
        self.sent.append(message)
        for each in (fds or {}).get("master", ()):
            socket.socket(fileno=each).close()

    def flush_blocking(self, _timeout_s: float) -> None:
        """Note it."""
        self.done.append("flushed")

    def finish(self) -> None:
        """Note it."""
        self.done.append("finished")

    def take(self) -> list[Record]:
        """Return the messages since the last call."""
        sent, self.sent = self.sent, []
        return sent


class Network:
    """A network without interfaces."""

    taps: dict[int, object] = {}

    def counted(self, _vmid: int, _index: int, figures: dict[str, Any]) -> dict[str, Any]:
        """Return the figures that the device process has counted."""
        return figures


class Rig:
    """The room with two VMs: `a` is in vm.conf, `b` is not.  `path` is for the agent's socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = Loop()
        self.core = Core(cast("Any", self.loop), self.config(AgentxConfig(path=str(path))))
        self.process = Process()
        self.a, self.b = (self.add(name) for name in ("a", "b"))
        self.room = Agentx(
            self.core, Figures(self.core, cast("Any", Network())), lambda *_, **__: cast("Any", self.process)
        )
        self.room.start(cast("Any", self.process), cast("Any", None))
        self.loop.run()

    def config(self, agentx: AgentxConfig | None) -> Config:
        """Return a configuration."""
        return Config(settings=Globals(agentx=agentx), switches=(SwitchConfig(name="lan", interface="lo"),))

    def add(self, name: str) -> Vm:
        """Add a VM."""
        disk = DiskConfig(path=f"/{name}", format="raw")
        config = VmConfig(name=name, disks=(disk,), nics=(NicConfig(switch="lan"),), cdrom="/c", enabled=name == "a")
        return self.core.vms.add(config, from_config=name == "a")

    def told(self) -> list[tuple[str, str, bool]]:
        """Return the states that the process was told since the last call."""
        self.loop.run()
        changes = [each for each in self.process.take() if isinstance(each, AgentxChanged)]
        return [(each.name, each.state, each.deleted) for each in changes]

    def ask(self) -> None:
        """Have the process ask for all VMs."""
        message = AskAgentxVms()
        self.room.on_ask(message, Envelope(message, 0, 0, {}))


@pytest.fixture
def rig(tmp_path: Path, log_lines: list[str]) -> Rig:
    """Return a room."""
    assert log_lines == []
    return Rig(tmp_path / "master")


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the warnings and errors that are logged."""
    lines: list[str] = []
    monkeypatch.setattr("vmd.parent.agentx.log.warn", lines.append)
    monkeypatch.setattr("vmd.parent.agentx.log.error", lines.append)
    return lines


def test_states_are_told_as_they_change(rig: Rig) -> None:
    """Each state is told once.  A state that is over before the next look, as in a guest's reset, is not told."""
    assert rig.told() == []
    timers = len(rig.loop.timers)
    rig.a.begin_start(0)
    assert [timer.delay_s for timer in rig.loop.timers[timers:]] == [0]
    assert rig.told() == [("a", "starting", False)]
    rig.a.begin_run(4711)
    rig.a.notes = ("odd",)
    assert rig.told() == [("a", "running", False)]
    rig.a.begin_reboot()
    rig.a.begin_start(0, again=True)
    rig.a.begin_run(4712)
    assert rig.told() == []
    rig.a.begin_send(keep=False, carried=True)
    assert rig.told() == [("a", "migrating", False)]
    rig.a.stay()
    rig.a.pause_changed(paused=True)
    assert rig.told() == [("a", "paused", False)]


@pytest.mark.parametrize(("how", "state"), [(FAILED, "crashed"), (KILLED, "stopped")])
def test_the_state_of_a_vm_that_ended_says_how(rig: Rig, how: str, state: str) -> None:
    """The state of a VM that crashed differs from that of a stopped one, until the next start."""
    rig.a.begin_start(0)
    rig.told()
    rig.a.ended("", how)
    assert rig.told() == [("a", state, False)]
    rig.a.begin_receive(Receiving(paused=False))
    assert rig.told() == [("a", "receiving", False)]


def test_a_vm_that_is_forgotten(rig: Rig) -> None:
    """The last state of a removed VM is told first, and then its removal."""
    rig.b.begin_start(0)
    rig.b.begin_run(1)
    rig.told()
    rig.b.ended("", KILLED)
    rig.core.vms.remove(rig.b)
    assert rig.told() == [("b", "stopped", False), ("b", "stopped", True)]


def test_a_vm_that_is_removed_and_added_again(rig: Rig) -> None:
    """This is what a reload does.  No change is told, but how the VM ended is no longer known."""
    rig.a.begin_start(0)
    rig.a.ended("", FAILED)
    assert rig.told() == [("a", "crashed", False)]
    rig.core.vms.remove(rig.a)
    again = rig.add("a")
    assert rig.told() == []
    again.begin_start(0)
    assert rig.told() == [("a", "starting", False)]


def test_too_many_questions_are_answered_together(rig: Rig) -> None:
    """Questions without end get one answer in each interval."""
    rig.process.take()
    rig.ask()
    rig.loop.run()
    assert [type(each) for each in rig.process.take()] == [AgentxVm, AgentxVm, AgentxVms]
    timers = len(rig.loop.timers)
    for _ in range(1000):
        rig.ask()
    assert len(rig.loop.timers) == timers + 1
    *_, timer = rig.loop.timers
    assert 0 < timer.delay_s <= ANSWER_EVERY_S
    rig.loop.run()
    assert [type(each) for each in rig.process.take()] == [AgentxVm, AgentxVm, AgentxVms]


def test_an_answer_leaves_time_for_others(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """VMs are told in small batches, without those removed meanwhile.  If the process ends, so does the answer."""
    monkeypatch.setattr("vmd.parent.agentx.BATCH", 1)
    rig.process.take()
    rig.ask()
    rig.loop.run()
    assert rig.loop.timers[-1].delay_s == 0
    rig.ask()  # the first question is still being answered
    assert [type(each) for each in rig.process.take()] == [AgentxVm]
    rig.core.vms.remove(rig.b)
    rig.loop.run()
    assert [type(each) for each in rig.process.take()] == [AgentxVms, AgentxChanged]

    rig.add("b")
    rig.loop.run()
    rig.ask()
    rig.loop.run()
    rig.process.take()
    rig.room._on_lost(cast("Any", rig.process), None)
    rig.loop.run()
    assert rig.process.take() == []
    rig.ask()  # another process asks
    rig.loop.run()
    assert [type(each) for each in rig.process.take()] == [AgentxVm]


def test_the_answer_describes_a_vm(rig: Rig) -> None:
    """It has what vm.conf says, and the numbers of interfaces."""
    rig.process.take()
    rig.ask()
    rig.loop.run()
    a, b, _ = cast("list[AgentxVm]", rig.process.take())
    assert (a.name, a.state, a.enabled, a.persistent, a.formats, a.disc) == ("a", "stopped", True, True, ("raw",), "/c")
    assert (b.enabled, b.persistent) == (False, False)
    assert [disk.path for disk in a.disks] == ["/a"]
    assert a.links == (AgentxLink(tap=0, parent=socket.if_nametoindex("lo")),)


def test_an_agent_that_does_not_exist(rig: Rig, log_lines: list[str]) -> None:
    """It is tried at growing intervals, and this is logged once.

    When a connected agent is lost, it is logged again.
    """
    waits = [rig.loop.run()[-1] for _ in range(8)]
    assert waits == [min(FIRST_S * 2**tries, LONGEST_S) for tries in range(1, 9)]
    assert len(log_lines) == 1
    assert log_lines[0].startswith(f"agentx: no SNMP agent at {rig.path}: No such file or directory")
    rig.process.take()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.path))
        listener.listen()
        rig.loop.run()
        (master,) = rig.process.take()
        assert isinstance(master, AgentxMaster)
        up = AgentxUp(number=master.number)
        rig.room.on_up(up, Envelope(up, 0, 0, {}))
        for number in (master.number - 1, master.number):  # the first is late, from an earlier connection
            lost = AgentxLost(number=number)
            rig.room.on_gone(lost, Envelope(lost, 0, 0, {}))
    assert rig.loop.run() == [FIRST_S]
    assert len(log_lines) == 2


def test_a_path_that_is_not_a_socket(rig: Rig, log_lines: list[str]) -> None:
    """The error of connect(2) is logged."""
    rig.path.write_text("no socket")
    rig.core.config = rig.config(AgentxConfig(path=str(rig.path), context="vms"))
    rig.process.take()
    rig.room.configure()
    assert rig.process.take() == [Quit()]  # or it would keep its earlier agent
    assert log_lines[-1].startswith(f"agentx: no SNMP agent at {rig.path}: Connection refused")


def test_a_configuration_without_an_agent_ends_the_process(rig: Rig, log_lines: list[str]) -> None:
    """Nothing is told or tried any more.  A process that is lost then is not started again."""
    rig.core.config = rig.config(None)
    rig.room.configure()
    assert rig.process.take()[-1] == Quit()
    rig.a.begin_start(0)
    rig.loop.run()
    assert rig.process.take() == []
    assert len(log_lines) == 1


def test_a_process_that_is_lost(rig: Rig, log_lines: list[str]) -> None:
    """Another process is started, and gets the connection to the agent."""
    rig.loop.timers.clear()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.path))
        listener.listen()
        rig.room._on_lost(cast("Any", rig.process), None)
        rig.loop.run()
    assert log_lines[-1] == "lost child: agentx: it is started again"
    assert rig.process.killed == 1
    assert [type(each) for each in rig.process.take()] == [AgentxMaster]


def test_a_process_that_cannot_be_started(rig: Rig, log_lines: list[str]) -> None:
    """It is tried again, with growing delays, until it starts or is not wanted any more."""
    rig.loop.timers.clear()
    rig.process.trouble = HostError("fork", 11)
    rig.room._on_lost(cast("Any", rig.process), None)
    for _ in range(3):
        assert len(rig.loop.timers) == 1
        rig.loop.run()
        assert log_lines[-1] == "agentx cannot be started: fork: Resource temporarily unavailable"
    rig.process.trouble = None
    rig.loop.run()
    assert rig.process.started == 2
    rig.room._start_later()  # late
    rig.loop.run()
    assert rig.process.started == 2


def test_a_configuration_that_stays(rig: Rig) -> None:
    """The process keeps its session with the agent."""
    rig.process.take()
    rig.core.config = rig.config(AgentxConfig(path=str(rig.path)))
    rig.room.configure()
    assert (rig.process.take(), rig.process.started) == ([], 1)


def test_the_end_of_the_daemon(rig: Rig) -> None:
    """The process closes its session.  The loop runs no more, so the message is sent at once."""
    rig.process.take()
    rig.room.close()
    assert (rig.process.take(), rig.process.done) == ([Quit()], ["flushed", "finished"])
    rig.room._on_lost(cast("Any", rig.process), None)
    rig.loop.run()
    assert rig.process.started == 1


def test_the_longest_answer_fits_a_message() -> None:
    """It describes a VM with the largest number of everything."""
    path, name = "/" + "\N{SNOWMAN}" * 341, "n" * NAME_MAX
    row = filled(
        AgentxVm,
        name=name,
        state="migrating",
        enabled=True,
        persistent=True,
        vcpus=(filled(VcpuFigures),) * MAX_VCPUS,
        disks=(filled(DiskFigures, counted=True, path=path),) * MAX_DISKS,
        cdrom=filled(CdromFigures),
        nics=(filled(NicFigures, counted=True, tap="t" * 15, switch=name, lladdr=bytes(6)),) * MAX_NICS,
        formats=("qcow2",) * MAX_DISKS,
        disc=path,
        links=(filled(AgentxLink),) * MAX_NICS,
    )
    assert row.cpu_ns == MOST
    assert len(encode(row)[0]) <= MAX_MESSAGE - 2000
