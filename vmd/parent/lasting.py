"""What outlives this parent: identities in a file of this host, and in the store all that another parent needs.

That one is started in our place after a crash, a restart or an upgrade.  The descriptors it finds are those of
`vmd.parent.store`; what it has to know beside them is in a memory file (`vmd.parent.truth`), written anew after each
change, before the next message is looked at.
"""

import time

from vmd.errors import HostError, VmdError
from vmd.log import log
from vmd.parent.statemem import StateMemory
from vmd.parent.truth import Writer, vm_of, vms_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from vmd.ipc.loop import Timer
    from vmd.parent.core import Core
    from vmd.parent.generations import Generations
    from vmd.parent.identity import StateFile
    from vmd.parent.network import Network
    from vmd.parent.store import Store
    from vmd.parent.truth import Truth, VmKnown

SAVE_REST = 10  # times as long as it has taken, between two times that the file of identities is written


class Lasting:
    """The room of what outlives us."""

    def __init__(self, core: "Core", store: "Store", file: "StateFile | None") -> None:
        """`file`, if there is one, is where identities are kept; ours from here on."""
        self.core = core
        self.store = store
        self.untold: Callable[[], Mapping[int, VmKnown]] = dict  # VMs that no vmm has told us of yet (`adoption`)
        self._file = file
        self._writer: Writer | None = None  # between `keep` and `forget`
        self._saving: Timer | None = None
        self._saved_s = self._save_took_s = 0.0
        self._writing: Timer | None = None
        if file is not None:
            file.load(core.vms.identities)
        core.vms.identities.on_change = self.save_soon

    def take(self, truth: "Truth") -> "list[VmKnown]":
        """Take over the VMs of the parent before us, and whose they are; return what was known of them."""
        core = self.core
        if truth.identities:
            try:
                core.vms.identities.decode(truth.identities)
                self.save_soon()  # the file may be behind
            except (VmdError, ValueError) as error:
                log.error(f"ids and addresses of the vmd before this one cannot be used: {error}")
        found = []
        for known in vms_of(truth):
            if core.vms.find(0, known.config.name) is None:
                core.vms.take(vm_of(known))
                found.append(known)
        return found

    def keep(self, generations: "Generations", network: "Network") -> None:
        """Have what we know outlive us, from now on.  Raises HostError."""
        try:
            if "state" in self.store.names:
                memory = StateMemory(self.store.duplicate("state"))
            else:
                memory = StateMemory.create()
                self.store.put("state", memory.fd, poll=False)
        except OSError as error:
            raise HostError("have a memory file for the state", error) from error
        self.generations = generations
        self.network = network
        self._writer = Writer(memory, self.core, self.untold)
        self.core.on_change = self.write_soon
        generations.on_change = self.core.changed
        self.core.write = self.write
        self.write_soon()

    def keep_listener(self, listener: "socket.socket") -> None:
        """Have the control socket outlive us."""
        if "listener" not in self.store.names:
            self.store.put("listener", listener.fileno(), poll=False)

    def plan(self, *, planned: bool) -> None:
        """Have another parent know whether it was meant to take our place; so it is written with all that changes."""
        if self._writer is not None:
            self._writer.planned = planned

    def write_soon(self) -> None:
        """Have what we know written before the next message is looked at; many changes are written once."""
        if self._writing is None and self._writer is not None:
            self._writing = self.core.loop.call_later(0, self.write)

    def write(self, *, plain: bool = False) -> None:
        """Write what another parent is to know; `plain` if that may be one of another version."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        if self._writer is not None:
            generations = [generation.known() for generation in self.generations]
            network = self.network
            self._writer.write(network.taps, network.left, generations, self.generations.number, plain=plain)

    def copy(self) -> int:
        """Return a memory file with what we know now, the caller's, for a program of any version.  Raises OSError.

        What changes while it is read is written to the other one.
        """
        self.write(plain=True)
        copy, ours = StateMemory.create(), StateMemory(self.store.duplicate("state"))
        try:
            copy.write(b"".join(ours.read()[:1]))
        except BaseException:
            copy.close()
            raise
        finally:
            ours.close()
        return copy.fd

    def save_soon(self) -> None:
        """Have identities written before the next message is looked at; many changes are written once.

        The file is written as a whole: not all the time, where that takes some.
        """
        self.write_soon()
        if self._saving is None:
            rest_s = self._saved_s + SAVE_REST * self._save_took_s - time.monotonic()
            self._saving = self.core.loop.call_later(max(0.0, rest_s), self._save)

    def save_now(self) -> None:
        """Write what waits for it."""
        if self._saving is not None:
            self._save()
        self.write()

    def _save(self) -> None:
        self._saving = None
        if self._file is not None:
            began_s = time.monotonic()
            self._file.save(self.core.vms.identities)
            self._saved_s = time.monotonic()
            self._save_took_s = self._saved_s - began_s

    def forget(self) -> None:
        """This daemon ends, and its guests with it: nobody is to take its place."""
        self._writer = None
        for name in self.store.names:
            self.store.remove(name)

    def close(self) -> None:
        """Write identities for the last time."""
        if self._file is not None:
            self.save_now()
            self._file.close()
