"""vm.conf in force: what a load, a reload and a reset change, and what the operator is told."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmd.config.check import ConfigErrors
from vmd.config.model import Config, DiskConfig, Globals, Owner, SwitchConfig, VmConfig
from vmd.errors import HostError, OperatorError, VmdError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.children import SetVerbosity
from vmd.ipc.messages.clients import Caller, LoadRequest, LogRequest, Ok, ReloadRequest, ResetRequest
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.parent import service
from vmd.parent.clients import For
from vmd.parent.configuration import Configuration
from vmd.parent.core import Core
from vmd.parent.vm import State, Vm
from vmd.record import Record

CLIENT = 7
ROOT = Caller(uid=0, gid=0, pid=1)
SOCKET_OWNER = Owner(uid=5, gid=6)


def vm(name: str, **fields: Any) -> VmConfig:  # noqa: ANN401 - of a VmConfig
    """Return a VM of vm.conf, which is not started."""
    return VmConfig(name=name, enabled=False, disks=(DiskConfig(path=f"/{name}"),)).replace(**fields)


class Rig:
    """The room, and what it asks others for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        switches = (SwitchConfig(name="first", interface="br1"),)
        self.core = Core(cast("Any", None), Config(vms=(vm("a"), vm("b")), switches=switches))
        self.core.peers.channels = cast("Any", {Proc.CONTROL: self})
        self.sent: list[tuple[int, Record]] = []
        self.file = Config()
        self.warnings: list[str] = []
        self.errors: VmdError | None = None
        self.read: list[tuple[str | None, bool]] = []  # which file, and whether in addition to what is known
        self.batches = 0
        self.owned: list[tuple[str, Owner]] = []
        self.killed: list[Vm] = []
        self.configured: list[tuple[str, ...]] = []  # switches that the room of networks was given
        self.events: list[str] = []
        bounds = SimpleNamespace(change=lambda one, _wanted: [f"vm {one.name}: its new limits count from now on"])
        life = SimpleNamespace(
            start_batch_in_time=self.batch, kill=self.killed.append, bounds=bounds,
            consoles=SimpleNamespace(on_change=lambda _vm: None),
        )  # fmt: skip
        network = SimpleNamespace(
            configure=self.configure, drop_forwards=lambda _vm, _wanted: [], change_forwards=lambda _vm, _wanted: []
        )
        monkeypatch.setattr(service, "own_socket", lambda path, owner: self.owned.append((path, owner)))
        monkeypatch.setattr(self.core.events, "add", lambda what, *_more: self.events.append(what))
        self.room = Configuration(self.core, cast("Any", life), cast("Any", network), self.load, "/vmd.sock")

    def load(self, path: str | None, known: Config | None, warn: Any) -> Config:  # noqa: ANN401
        """Read the file."""
        self.read.append((path, known is not None))
        if self.errors is not None:
            raise self.errors
        for warning in self.warnings:
            warn(warning)
        return self.file

    def configure(self, config: Config) -> list[str]:
        """Take the switches."""
        self.configured.append(tuple(switch.name for switch in config.switches))
        return ["switch note"]

    def batch(self) -> None:
        """Count."""
        self.batches += 1

    def send(self, message: Record, *, peerid: int = 0, fds: object = None) -> None:
        """Replaces the channel to control."""
        assert not fds
        self.sent.append((peerid, message))

    def names(self) -> list[str]:
        """Return the names of the VMs."""
        return [one.name for one in self.core.vms]

    def ask(self, message: Any) -> None:  # noqa: ANN401 - a request
        """Let a client ask."""
        serve: dict[type[Any], Any] = {
            LoadRequest: self.room.serve_load, ReloadRequest: self.room.serve_reload,
            ResetRequest: self.room.serve_reset, LogRequest: self.room.serve_log,
        }  # fmt: skip
        serve[type(message)](message, ROOT, Envelope(message, CLIENT, 0, {}))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Give the room.  The verbosity of the log is as before afterwards."""
    verbosity = log.verbosity
    yield Rig(monkeypatch)
    log.verbosity = verbosity


def test_a_further_file(rig: Rig) -> None:
    """Its VMs and switches are added.  A VM that is known stays as it is."""
    rig.file = Config(
        vms=(vm("a", vcpus=4), vm("c")), switches=(SwitchConfig(name="second", interface="br2"),),
        settings=Globals(socket_owner=SOCKET_OWNER),
    )  # fmt: skip
    rig.warnings = ["warning: odd"]
    rig.ask(LoadRequest(path="/more.conf"))

    assert rig.read == [("/more.conf", True)]
    assert rig.names() == ["a", "b", "c"]
    assert rig.core.vms.get(0, "a").config.vcpus == 1
    assert [switch.name for switch in rig.core.config.switches] == ["first", "second"]
    assert rig.configured == [("first", "second")]
    assert rig.sent == [(CLIENT, Ok(notes=("warning: odd", "switch note")))]
    assert (rig.batches, rig.owned, rig.events) == (1, [("/vmd.sock", SOCKET_OWNER)], [])


def test_the_main_file_again(rig: Rig) -> None:
    """It replaces what was there.  A running VM stays, and the client is told when changes count."""
    running = rig.core.vms.get(0, "a")
    running.restore_state(State.RUNNING)
    effects: list[Config] = []
    rig.room.on_effect = lambda: effects.append(rig.core.config)
    rig.file = Config(vms=(vm("a", vcpus=4), vm("c")))
    rig.ask(ReloadRequest())

    assert rig.read == [(None, False)]
    assert (rig.names(), running.config.vcpus) == (["a", "c"], 1)
    assert running.next_config is not None
    ((_, answer),) = rig.sent
    assert isinstance(answer, Ok)
    assert answer.notes[:2] == ("switch note", "vm a: its new limits count from now on")
    assert "vcpus changed; that waits for its next start" in answer.notes[2]
    assert (effects, rig.events, rig.batches) == ([rig.file], ["reload"], 1)


@pytest.mark.parametrize("error", [ConfigErrors([OperatorError(22, "vm.conf:1: no")]), HostError("read", 5)])
def test_a_file_with_errors_changes_nothing(rig: Rig, capfd: pytest.CaptureFixture[str], error: VmdError) -> None:
    """The client gets them.  After SIGHUP the log has them, and the daemon goes on."""
    rig.errors = error
    before = rig.core.config
    for message in (ReloadRequest(), LoadRequest(path="/x")):
        with pytest.raises(type(error)):
            rig.ask(message)
    rig.room.on_hangup()
    assert str(error) in capfd.readouterr().err
    assert (rig.core.config, rig.names(), rig.configured, rig.batches) == (before, ["a", "b"], [], 0)


def test_a_hangup_reads_the_main_file(rig: Rig) -> None:
    """As `vmctl reload` does."""
    rig.file = Config(vms=(vm("c"),))
    rig.room.on_hangup()
    assert (rig.read, rig.names(), rig.events) == ([(None, False)], ["c"], ["reload"])


def test_ids_that_count_only_after_a_start(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The client and the log are told, with the line."""
    first = rig.core.config.settings.first_id + (1 << 20)
    rig.file = Config(settings=Globals(first_id=first, first_id_origin="vm.conf:3"))
    rig.ask(LoadRequest(path="/x"))
    text = f"warning: vm.conf:3: ids {first} count when vmd is started again"
    ((_, answer),) = rig.sent
    assert isinstance(answer, Ok)
    assert text in answer.notes
    assert text in capfd.readouterr().err


def test_an_instance_whose_template_is_missing(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """It is left out, and the operator is told."""
    rig.file = Config(vms=(vm("c", parent="none", origin="vm.conf:9"), vm("d")))
    rig.ask(ReloadRequest())
    assert rig.names() == ["d"]
    text = "vm.conf:9: vm c: template none not found"
    ((_, answer),) = rig.sent
    assert isinstance(answer, Ok)
    assert any(text in note for note in answer.notes)
    assert text in capfd.readouterr().err


@pytest.mark.parametrize("switches", [False, True])
@pytest.mark.parametrize("vms", [False, True])
def test_a_reset(rig: Rig, vms: bool, switches: bool) -> None:
    """It concerns what it names.  Without running VMs it is answered at once, and ids begin with 1 again."""
    rig.ask(ResetRequest(vms=vms, switches=switches))
    assert rig.names() == ([] if vms else ["a", "b"])
    assert (rig.core.config.switches == ()) == switches
    assert rig.configured == ([()] if switches else [])
    assert (rig.sent, rig.killed) == ([(CLIENT, Ok())], [])
    assert rig.core.vms.add(vm("new"), from_config=True).vmid == (1 if vms else 3)


def test_a_reset_with_running_vms(rig: Rig) -> None:
    """They are killed, and the client waits.  They are forgotten when they have ended, and no file brings them back."""
    running = cast("Any", rig.core.vms.get(0, "b"))
    running.restore_state(State.RUNNING)
    running.next_config = running.config
    rig.ask(ResetRequest(vms=True, switches=False))

    assert (rig.killed, rig.names(), rig.sent) == ([running], ["b"], [])
    assert (running.from_config, running.next_config, running.resetting) == (False, None, True)
    assert [wait.client for wait in rig.core.clients.waiting(For.RESET)] == [CLIENT]
    rig.file = Config(vms=(vm("b", vcpus=4),))
    rig.ask(LoadRequest(path="/x"))
    assert running.successor is not None
    assert (running.successor.vcpus, running.config.vcpus) == (4, 1)
    rig.ask(ResetRequest(vms=True, switches=False))
    assert running.successor is None


@pytest.mark.parametrize(("wanted", "given"), [(0, 0), (2, 2), (9, 2), (-1, 0)])
def test_how_much_is_logged(rig: Rig, wanted: int, given: int) -> None:
    """All processes are told, and those that start later get it from the state."""
    changed: list[int] = []
    rig.core.on_change = lambda: changed.append(rig.core.verbosity)
    rig.ask(LogRequest(verbosity=wanted))
    assert rig.sent == [(0, SetVerbosity(verbosity=given)), (CLIENT, Ok())]
    assert (log.verbosity, changed) == (given, [given])


def test_a_daemon_that_adopts_vms_registers_none(rig: Rig) -> None:
    """They come from the state of the earlier daemon."""
    core = Core(cast("Any", None), Config(vms=(vm("a"),)))
    core.adopts = True
    Configuration(core, rig.room.life, rig.room.network, rig.load, "/vmd.sock")
    assert len(core.vms) == 0


def test_a_reload_takes_forwards_away_before_it_gives_them(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """A port can move from one VM to another.  Consoles are told of changes, and the log has what is changed."""
    order: list[str] = []
    network, life = cast("Any", rig.room.network), cast("Any", rig.room.life)

    def note(text: str, note: str) -> list[str]:
        order.append(text)
        return [note]

    network.drop_forwards = lambda one, wanted: note(f"drop {one.name} {wanted.vcpus}", "dropped")
    network.change_forwards = lambda one, _wanted: note(f"give {one.name}", "given")
    life.consoles.on_change = lambda one: order.append(f"console {one.name}")
    for name in ("a", "b"):
        rig.core.vms.get(0, name).restore_state(State.RUNNING)
    rig.file = Config(vms=(vm("b", vcpus=2), vm("b", vcpus=3)))
    notes = rig.room.reload()

    assert order == ["drop b 2", "give b", "console a", "console b"]
    assert "vm b: its new limits count from now on" in notes
    log = capfd.readouterr().err
    for text in ("dropped", "given", "vm b: its new limits count from now on"):
        assert text in notes
        assert f"vmd: {text}\n" in log
