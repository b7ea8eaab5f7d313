"""The state that outlives this parent: identities in a file of this host, and the rest in the store.

The next parent is started after a crash, a restart or an upgrade.  It finds descriptors in the store
(`vmd.parent.store`), and the state in a memory file there (`vmd.parent.truth`).  That is written after each change,
before the next message is served.
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

SAVE_REST = 10  # the file of identities is written again after this many times the time that writing has taken


class Lasting:
    """The room of the state that outlives this parent."""

    def __init__(self, core: "Core", store: "Store", file: "StateFile | None") -> None:
        """`file` keeps identities, if there is one.  It is closed here."""
        self.core = core
        self.store = store
        self.untold: Callable[[], Mapping[int, VmKnown]] = dict  # VMs that no vmm has described yet (`adoption`)
        self._file = file
        self._writer: Writer | None = None  # between `keep` and `forget`
        self._saving: Timer | None = None
        self._saved_s = self._save_took_s = 0.0
        self._writing: Timer | None = None
        if file is not None:
            file.load(core.vms.identities)
        core.vms.identities.on_change = self.save_soon

    def take(self, truth: "Truth") -> "list[VmKnown]":
        """Take over the VMs and identities of the parent before.  Return the records of these VMs."""
        core = self.core
        if truth.identities:
            try:
                core.vms.identities.decode(truth.identities)
                self.save_soon()  # the file may be older
            except (VmdError, ValueError) as error:
                log.error(f"ids and addresses of the vmd before this one cannot be used: {error}")
        found = []
        for known in vms_of(truth):
            if core.vms.find(0, known.config.name) is None:
                core.vms.take(vm_of(known))
                found.append(known)
        return found

    def keep(self, generations: "Generations", network: "Network") -> None:
        """Keep the state in the store from now on.  Raises HostError."""
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
        """Keep the control socket in the store."""
        if "listener" not in self.store.names:
            self.store.put("listener", listener.fileno(), poll=False)

    def plan(self, *, planned: bool) -> None:
        """Note in the state whether the next parent replaces this one by plan.  It is written with each change."""
        if self._writer is not None:
            self._writer.planned = planned

    def write_soon(self) -> None:
        """Write the state before the next message is served.  Several changes are written together."""
        if self._writing is None and self._writer is not None:
            self._writing = self.core.loop.call_later(0, self.write)

    def write(self, *, plain: bool = False) -> None:
        """Write the state for the next parent.  `plain`: one of any version must be able to read it."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        if self._writer is not None:
            generations = [generation.known() for generation in self.generations]
            network = self.network
            self._writer.write(network.taps, network.left, generations, self.generations.number, plain=plain)

    def copy(self) -> int:
        """Return a memory file with a copy of the state, for a program of any version.  Raises OSError.

        The caller owns it.  Later changes go to the original only.
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
        """Write the file of identities before the next message is served.  Several changes are written together.

        The file is written as a whole, so the next writing waits if the last one took long (SAVE_REST).
        """
        self.write_soon()
        if self._saving is None:
            rest_s = self._saved_s + SAVE_REST * self._save_took_s - time.monotonic()
            self._saving = self.core.loop.call_later(max(0.0, rest_s), self._save)

    def save_now(self) -> None:
        """Write now what waits to be written."""
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
        """This daemon ends with its guests, and no other takes its place: empty the store."""
        self._writer = None
        for name in self.store.names:
            self.store.remove(name)

    def close(self) -> None:
        """Write identities for the last time, and close the file."""
        if self._file is not None:
            self.save_now()
            self._file.close()
