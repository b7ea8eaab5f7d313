"""priv: the only process that may change the host's network.

Runs as  an ordinary user of its own, with CAP_NET_ADMIN and CAP_NET_RAW; sees nft and /proc/sys/net, not /run
Peers    parent
Holds    netlink sockets; a tap, which the parent opened, only until it is handed over
Parses   output of nft, and messages of the kernel

A request that fails is answered with an error; it never ends this process.  When priv is told to end, it removes
everything that it has made.  When the parent is gone, it removes nothing: guests may still run, and the next daemon
adopts their interfaces or removes them.
"""

import errno
import time

from vmd.closing import close_all
from vmd.errors import HostError, OperatorError, PeerError
from vmd.ipc.channel import Channel
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.children import Quit, Ready, SetVerbosity
from vmd.ipc.messages.priv import (
    AdoptNics,
    AskDrops,
    ConfigureNetwork,
    DropsReported,
    ForwardsSet,
    MakeNics,
    NetworkConfigured,
    NetworkTrouble,
    NicMade,
    NicsFailed,
    NicsMade,
    NicsRemoved,
    RemoveNics,
    SetForwards,
    SwitchRequest,
)
from vmd.ipc.messages.shared import Trouble, brief
from vmd.ipc.process import Process, handles
from vmd.ipc.routes import Proc
from vmd.log import log
from vmd.priv import legacy
from vmd.priv.changes import Changes
from vmd.priv.damage import Damage
from vmd.priv.host import HostNetwork
from vmd.privsep.confine import PRIV, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.loop import Timer
    from vmd.ipc.process import Handlers

SWITCHES_MAX = 10_000  # more than a host can have bridges for
PROBLEMS_MAX = 3  # in one message; further ones are only logged
DROPS_MAX, DROP_MAX = 8, 1500  # sentences in one message, and characters of one
REPAIR_S = 0.5  # from a change of the network to the repair of damage
LOOK_S = 30.0  # between two looks at what other firewalls drop
SWEEP_S = 0.25  # one look serves all questions about VMs within this time
REST = 10  # the next look begins after this many times the time that the last one has taken
REST_MAX_S = 4.0  # ... at most: the parent waits a little longer for an answer before it takes priv for dead


class Priv(Process):
    """Serves the parent."""

    def __init__(self) -> None:
        super().__init__(Proc.PRIV)
        self.parent = self.attach_parent(Proc.PARENT)
        self.network = HostNetwork()
        self.began = False
        self.cleans_up = False  # it was told to end, and removes everything then
        self.switches: list[SwitchRequest] = []  # of a configuration that has not arrived completely
        self.wrong: dict[str, tuple[int, str]] = {}  # troubles that the parent was told of: VM and device of each
        self.told: set[int] = set()  # vmids that were answered since the last look
        self.looked_s = -SWEEP_S
        self.look_took_s = self.repair_took_s = 0.0
        self.loop.call_later(LOOK_S, self.look)
        self.changes: Changes | None = None
        self.repairing: Timer | None = None

    def listen(self) -> None:
        """Subscribe to changes of the host's network, of which some may be damage."""
        try:
            self.changes = Changes()
        except HostError as error:
            log.warn(f"damage to networks will not be repaired: {error}")
            return
        for each in self.changes.sockets:
            self.loop.add(each.fileno(), self.on_change)

    def on_change(self, _events: int) -> None:
        """The network has changed: look for damage soon, once for many changes."""
        assert self.changes is not None
        self.changes.forget()
        if self.repairing is None:
            self.repairing = self.loop.call_later(max(REPAIR_S, REST * self.repair_took_s), self.repair)

    def repair(self) -> None:
        """Repair what other programs have damaged."""
        self.repairing = None
        began_s = time.monotonic()
        self.network.damage.repair()
        self.repair_took_s = time.monotonic() - began_s
        self.tell()

    def look(self) -> None:
        """Look what other firewalls drop, and plan the next look."""
        self.loop.call_later(LOOK_S, self.look)
        try:
            self.network.look()
        except (OperatorError, HostError) as error:
            log.warn(str(error))
        self.tell_dropped()
        self.tell()

    def tell(self) -> None:
        """Tell the parent of new troubles of interfaces, and of interfaces that have no trouble any more."""
        wrong = self.network.wrong()
        before, self.wrong = self.wrong, {key: self.wrong.get(key) or found.where() for key, found in wrong.items()}
        for key in wrong.keys() - before.keys():
            thing, (vmid, device) = wrong[key].thing, self.wrong[key]
            text = thing.text if isinstance(thing, Damage) else self.network.sentence(thing)
            self.parent.send(NetworkTrouble(vmid=vmid, device=device, text=text[:DROP_MAX]))
        for vmid, device in set(before.values()) - set(self.wrong.values()):
            if not vmid or vmid in self.network.nics:
                self.parent.send(NetworkTrouble(vmid=vmid, device=device))

    def tell_dropped(self) -> None:
        """Tell the parent what filters have dropped since the last report."""
        for message in self.network.frames_dropped():
            self.parent.send(message)

    def on_configure_network(self, message: ConfigureNetwork, _envelope: Envelope, channel: Channel) -> None:
        """Take switches of a configuration.  With the last message, make their bridges."""
        self.switches += message.switches
        if len(self.switches) > SWITCHES_MAX:
            count, self.switches = len(self.switches), []
            raise PeerError(channel.label, f"wants {count} switches")
        if message.more:
            return
        switches, self.switches = tuple(self.switches), []
        if not self.began:
            self.began = True
            self.begin(again=message.again)
        try:
            problems = self.network.configure(message.replace(switches=switches))
        except (OperatorError, HostError) as error:
            problems = [str(error)]
        for problem in problems[PROBLEMS_MAX:]:
            log.error(problem)
        channel.send(NetworkConfigured(problems=tuple(map(brief, problems[:PROBLEMS_MAX]))))

    def take_tables(self, envelope: Envelope) -> None:
        """Take the files that list the tables of the old iptables from a message."""
        for family, name in zip(legacy.FAMILIES, ("tables4", "tables6"), strict=True):
            self.network.loaded.take(family, envelope.take_fd(name))

    def begin(self, *, again: bool) -> None:
        """Become the owner of the network.  `again`: adopt what an earlier priv has made, instead of removing it."""
        self.network.adopting = again
        try:
            self.network.own()
        except HostError as error:
            log.warn(f"networks will not work: {error}")

    def on_adopt_nics(self, message: AdoptNics, _envelope: Envelope, _channel: Channel) -> None:
        """Adopt the interfaces of a running VM."""
        try:
            self.network.adopt(message)
        except (OperatorError, HostError) as error:
            log.error(str(error))

    def on_make_nics(self, message: MakeNics, envelope: Envelope, channel: Channel) -> None:
        """Make the interfaces of a VM."""
        began_s = time.monotonic()
        self.take_tables(envelope)
        tuns = envelope.take_fds("tuns")
        try:
            nics = self.network.make_nics(message, tuns)
        except (OperatorError, HostError) as error:
            code = error.number
            failed = NicsFailed(vmid=message.vmid, ticket=message.ticket, code=code, text=brief(str(error)))
            channel.send(failed)
            return
        finally:
            close_all(tuns)
        made = tuple(
            NicMade(
                name=nic.link.name,
                lladdr=nic.link.lladdr,
                link_local=nic.link_local,
                mtu=nic.link.mtu,
                index=nic.link.index,
                before=nic.as_it_was(),
                vhost=nic.vhost,
                without=brief(nic.without),
            )
            for nic in nics
        )
        answer = NicsMade(vmid=message.vmid, ticket=message.ticket, nics=made)
        channel.send(answer, fds={"taps": [nic.take_fd() for nic in nics]})
        names = ", ".join(nic.name for nic in made)
        log.debug(f"vm {message.vmid}: made {names} in {(time.monotonic() - began_s) * 1000:.0f} ms")

    def on_remove_nics(self, message: RemoveNics, _envelope: Envelope, channel: Channel) -> None:
        """Remove the interfaces of a VM."""
        try:
            self.network.remove_nics(message.vmid)
        except (OperatorError, HostError) as error:
            log.error(str(error))
        channel.send(NicsRemoved(vmid=message.vmid))

    def on_set_forwards(self, message: SetForwards, _envelope: Envelope, channel: Channel) -> None:
        """Change the ports that are forwarded to a VM."""
        said = ""
        try:
            self.network.forward_ports(message)
        except (OperatorError, HostError) as error:
            log.error(said := str(error))
        channel.send(ForwardsSet(vmid=message.vmid, text=brief(said)))

    def on_ask_drops(self, message: AskDrops, envelope: Envelope, _channel: Channel) -> None:
        """Answer which packets of a VM are dropped now.

        A second question about the same VM needs a new look.  If looks take long, the question waits, so that priv can
        also do other work.
        """
        self.take_tables(envelope)
        vmid, now_s = message.vmid, time.monotonic()
        rest_s = min(REST_MAX_S, REST * self.look_took_s)
        if vmid not in self.told and now_s - self.looked_s <= max(SWEEP_S, rest_s):
            self.answer_drops(vmid)
        elif now_s - self.looked_s < rest_s:
            self.loop.call_later(self.looked_s + rest_s - now_s, lambda: self.look_for(vmid, now_s))
        else:
            self.look_for(vmid, now_s)

    def look_for(self, vmid: int, asked_s: float) -> None:
        """Answer with a look that has begun after the question."""
        looks = self.looked_s <= asked_s
        if looks:
            began_s = time.monotonic()
            self.told.clear()
            try:
                self.network.look()
            except (OperatorError, HostError) as error:
                log.warn(str(error))
            self.looked_s = time.monotonic()
            self.look_took_s = self.looked_s - began_s
            self.tell_dropped()  # before the answer, because clients are shown both together
        self.answer_drops(vmid)
        if looks:
            self.tell()

    def answer_drops(self, vmid: int) -> None:
        """Answer with what the last look has found of a VM."""
        self.told.add(vmid)
        troubles: tuple[Trouble, ...] = ()
        try:
            troubles = tuple(
                Trouble(device=f"interface{index}", text=self.network.sentence(loss)[:DROP_MAX], since_s=loss.since_s)
                for index, loss in self.network.losses(vmid)[:DROPS_MAX]
            )
            troubles += tuple(
                Trouble(device=f"interface{index}", text=damage.text[:DROP_MAX], since_s=damage.since_s)
                for index, damage in self.network.damages(vmid)[:DROPS_MAX]
            )
        except (OperatorError, HostError) as error:
            log.warn(str(error))
        self.parent.send(DropsReported(vmid=vmid, troubles=troubles))

    def give_up(self, envelope: Envelope, channel: Channel) -> None:
        """Answer a request whose handler has failed."""
        message = envelope.message
        if isinstance(message, ConfigureNetwork) and not message.more:
            channel.send(NetworkConfigured(problems=(OUR_FAULT,)))
        elif isinstance(message, MakeNics):
            channel.send(NicsFailed(vmid=message.vmid, ticket=message.ticket, code=errno.EIO, text=OUR_FAULT))
        elif isinstance(message, SetForwards):
            channel.send(ForwardsSet(vmid=message.vmid, text=OUR_FAULT))
        elif isinstance(message, AskDrops):
            channel.send(DropsReported(vmid=message.vmid))

    def on_set_verbosity(self, message: SetVerbosity, _envelope: Envelope, _channel: Channel) -> None:
        """Set the verbosity of the log."""
        log.verbosity = message.verbosity

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End, and remove everything that was made."""
        self.cleans_up = True
        self.loop.stop()

    HANDLERS: "Handlers" = {
        **handles(Proc.PARENT, ConfigureNetwork, on_configure_network),
        **handles(Proc.PARENT, AdoptNics, on_adopt_nics),
        **handles(Proc.PARENT, MakeNics, on_make_nics),
        **handles(Proc.PARENT, RemoveNics, on_remove_nics),
        **handles(Proc.PARENT, SetForwards, on_set_forwards),
        **handles(Proc.PARENT, AskDrops, on_ask_drops),
        **handles(Proc.PARENT, SetVerbosity, on_set_verbosity),
        **handles(Proc.PARENT, Quit, on_quit),
    }


def main() -> int:
    """Run process priv."""
    process = Priv()
    process.ignore_terminal_signals()
    warnings = confine(PRIV)
    process.listen()
    process.parent.send(Ready(warnings=tuple(warnings)))
    process.loop.run()
    if process.cleans_up:
        process.network.close()
    return process.exit_status
