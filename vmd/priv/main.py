"""priv: the only process that may change the host's network.

Runs as  an ordinary user of its own, with CAP_NET_ADMIN and CAP_NET_RAW; sees nft and /proc/sys/net, not /run
Peers    parent
Holds    netlink sockets; a tap, which the parent opened, only until it is handed over
Parses   what nft and the kernel say

Whatever cannot be done is an answer, never the end of this process: with it would go the whole daemon.
What it has made it removes when it is told to end.  When the parent is gone it removes nothing: guests may go on, and
the next daemon goes on with their interfaces, or removes them.
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
from vmd.priv.host import Network
from vmd.privsep.confine import PRIV, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.loop import Timer
    from vmd.ipc.process import Handlers

SWITCHES_MAX = 10_000  # more than a host can have bridges for
PROBLEMS_MAX = 3  # in one message; more are in the log only
DROPS_MAX, DROP_MAX = 8, 1500  # sentences in one message, and characters of one
REPAIR_S = 0.5  # from a change to a look at what may be damaged
LOOK_S = 30.0  # between two looks at what other firewalls drop
SWEEP_S = 0.25  # one look is enough for all VMs that are asked about within so long
REST = 10  # times as long as a look has taken, before the next one
REST_MAX_S = 4.0  # ... at most: whoever asks waits a little longer, and takes a priv that owes answers for dead


class Priv(Process):
    """Serves the parent."""

    def __init__(self) -> None:
        super().__init__(Proc.PRIV)
        self.parent = self.attach_parent(Proc.PARENT)
        self.network = Network()
        self.began = False
        self.cleans_up = False  # at its end
        self.switches: list[SwitchRequest] = []  # of a configuration that has not come to its end
        self.wrong: dict[str, tuple[int, str]] = {}  # what the parent was told of, and with what that is wrong
        self.told: set[int] = set()  # vmids that had their answer since the last look
        self.looked_s = -SWEEP_S
        self.look_took_s = self.repair_took_s = 0.0
        self.loop.call_later(LOOK_S, self.look)
        self.changes: Changes | None = None
        self.repairing: Timer | None = None

    def listen(self) -> None:
        """Hear of changes of the network, of which some may be damage."""
        try:
            self.changes = Changes()
        except HostError as error:
            log.warn(f"damage to networks will not be repaired: {error}")
            return
        for each in self.changes.sockets:
            self.loop.add(each.fileno(), self.on_change)

    def on_change(self, _events: int) -> None:
        """Look soon, and once for many changes."""
        assert self.changes is not None
        self.changes.forget()
        if self.repairing is None:
            self.repairing = self.loop.call_later(max(REPAIR_S, REST * self.repair_took_s), self.repair)

    def repair(self) -> None:
        """Put right what others have damaged."""
        self.repairing = None
        began_s = time.monotonic()
        self.network.damage.repair()
        self.repair_took_s = time.monotonic() - began_s
        self.tell()

    def look(self) -> None:
        """Look at what other firewalls drop, again and again."""
        self.loop.call_later(LOOK_S, self.look)
        try:
            self.network.look()
        except (OperatorError, HostError) as error:
            log.warn(str(error))
        self.tell_dropped()
        self.tell()

    def tell(self) -> None:
        """Tell the parent what is newly wrong with interfaces, and of which nothing is wrong any more."""
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
        """Tell the parent what filters have dropped since it was told."""
        for message in self.network.frames_dropped():
            self.parent.send(message)

    def on_configure_network(self, message: ConfigureNetwork, _envelope: Envelope, channel: Channel) -> None:
        """Make the bridges of switches, once all of them are known."""
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
        """Take the files that say which tables of the old iptables there are."""
        for family, name in zip(legacy.FAMILIES, ("tables4", "tables6"), strict=True):
            self.network.loaded.take(family, envelope.take_fd(name))

    def begin(self, *, again: bool) -> None:
        """Take what there is: remove it, or go on with it."""
        self.network.adopting = again
        try:
            self.network.own()
        except HostError as error:
            log.warn(f"networks will not work: {error}")

    def on_adopt_nics(self, message: AdoptNics, _envelope: Envelope, _channel: Channel) -> None:
        """Go on with the interfaces of a VM that runs."""
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
        """Forward other ports to a VM."""
        said = ""
        try:
            self.network.forward_ports(message)
        except (OperatorError, HostError) as error:
            log.error(said := str(error))
        channel.send(ForwardsSet(vmid=message.vmid, text=brief(said)))

    def on_ask_drops(self, message: AskDrops, envelope: Envelope, _channel: Channel) -> None:
        """Say what is dropped now of a VM's packets.

        Whoever asks again wants to know anew, and waits where a look takes long: it must not be all that is done here.
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
        """Answer by a look that was begun after the question."""
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
            self.tell_dropped()  # first, for it is shown with this
        self.answer_drops(vmid)
        if looks:
            self.tell()

    def answer_drops(self, vmid: int) -> None:
        """Say what the last look has found of a VM."""
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
        """Answer for a handler that has failed."""
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
        """Log more or less."""
        log.verbosity = message.verbosity

    def on_quit(self, _message: Quit, _envelope: Envelope, _channel: Channel) -> None:
        """End, with all that was made."""
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
