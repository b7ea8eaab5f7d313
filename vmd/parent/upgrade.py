"""Upgrade in place: this process executes the newly installed program.

First comes a rehearsal: the new program is started as another process with a copy of this daemon's state, and says
whether it could take over (`vmd --check-adopt`).
"""

import errno
import os
import subprocess

from vmd.closing import close
from vmd.errors import HostError, OperatorError
from vmd.ipc.messages.clients import Caller, End, GenerationInfo, GenerationsRequest, Ok, UpgradeRequest
from vmd.log import log
from vmd.parent import store
from vmd.parent.clients import For

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.imsg import Envelope
    from vmd.ipc.loop import Loop
    from vmd.parent.core import Core
    from vmd.parent.generations import Generations
    from vmd.parent.lasting import Lasting
    from vmd.parent.life import Life
    from vmd.parent.program import Program

CHECK = "--check-adopt"
REHEARSAL_S = 120.0  # a rehearsal must end within this time
SAID_MAX = 16_384  # bytes of output that are kept
PIPE_BYTES = 1 << 16  # size of a pipe: one read returns all output that is left when the program has ended


class Rehearsal:
    """The new program, which is started to check whether it could take over."""

    def __init__(self, loop: "Loop", program: "Program", state_fd: int, done: "Callable[[str], None]") -> None:
        """`done` is called once with the reason why it cannot take over; empty if it can.

        The caller keeps `state_fd`.  Raises HostError.
        """
        self._loop = loop
        self._done = done
        self._said = b""
        self._late = False
        command = program.command(CHECK)
        environment = store.environment({"state": state_fd})
        environment.pop("NOTIFY_SOCKET", None)  # it must not notify the service manager
        try:
            self._process = subprocess.Popen(
                command, cwd=program.directory, env=environment, pass_fds=[state_fd], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            raise HostError(f"start {command[0]}", error) from error
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._pidfd = os.pidfd_open(self._process.pid)
        os.set_blocking(self._output.fileno(), False)
        loop.add(self._output.fileno(), self._on_output)
        loop.add(self._pidfd, self._on_end)
        self._timer = loop.call_later(REHEARSAL_S, self._on_late)

    def _on_output(self, _events: int) -> None:
        if not self._read():
            self._loop.remove(self._output.fileno())

    def _read(self) -> bool:
        """Read its output; return whether there may be more."""
        try:
            piece = os.read(self._output.fileno(), PIPE_BYTES)
        except BlockingIOError:
            return True
        self._said = (self._said + piece)[-SAID_MAX:]
        return piece != b""

    def _on_end(self, _events: int) -> None:
        self._read()
        status = self._process.wait()
        self._timer.cancel()
        for fd in (self._output.fileno(), self._pidfd):
            self._loop.remove(fd)
        self._output.close()
        close(self._pidfd)
        if not self._late:
            self._done("" if status == 0 else in_words(self._said.decode(errors="replace"), status))

    def _on_late(self) -> None:
        self._late = True
        self._process.kill()  # `_on_end` reaps it: storage may delay its end
        self._done(f"it did not end within {REHEARSAL_S:.0f} s")


def in_words(said: str, status: int) -> str:
    """Return why a rehearsal has failed, from its output and its exit status."""
    lines = [line.removeprefix("vmd: ") for line in said.strip().splitlines()]
    if lines and lines[0].startswith("Traceback "):
        log.error(said)
        lines = lines[-1:]
    return "\n".join(lines) or f"it ended with status {status}"


class Upgrade:
    """The room of upgrades."""

    def __init__(self, core: "Core", generations: "Generations", lasting: "Lasting", life: "Life") -> None:
        self.core = core
        self.generations = generations
        self.program: Program | None = None  # set when the daemon starts; without it there is no upgrade
        self._lasting = lasting
        self._life = life
        self._rehearsal: Rehearsal | None = None

    def serve(self, message: UpgradeRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Start a rehearsal of the new program.  If it succeeds, execute the program, unless only that was asked."""
        if self._rehearsal is not None:
            raise OperatorError(errno.EBUSY, "an upgrade is under way")
        assert self.program is not None
        done = self._on_rehearsed if message.rehearse_only else self._take_place
        try:
            state_fd = self._lasting.copy()
        except OSError as error:
            raise HostError("copy the state for the new program", error) from error
        try:
            self._rehearsal = Rehearsal(self.core.loop, self.program, state_fd, done)
        finally:
            close(state_fd)
        self.core.clients.wait(envelope.peerid, For.UPGRADE)

    def serve_generations(self, _message: GenerationsRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Answer with the version and number of VMs of each vmm."""
        for each in self.generations:
            row = GenerationInfo(number=each.number, version=each.version, vms=len(self.generations.vms(each)))
            self.core.clients.answer(envelope.peerid, row)
        self.core.clients.answer(envelope.peerid, End())

    def _on_rehearsed(self, trouble: str) -> None:
        """Answer the client that has asked for a rehearsal only."""
        self._rehearsal = None
        if trouble:
            self._fail(trouble)
        else:
            self.core.clients.answer_all(For.UPGRADE, 0, Ok())

    def _take_place(self, trouble: str) -> None:
        """Execute the new program if it can take over.  The connections of all clients end with that."""
        self._rehearsal = None
        if not trouble:
            log.info("upgrade: the version that is installed now takes over")
            try:
                self._execute()
            except OSError as error:
                trouble = f"it cannot be started: {error.strerror}"
        self._fail(trouble)

    def _execute(self) -> None:
        """Execute the installed program in this process.  Raises OSError; then this daemon goes on."""
        assert self.program is not None
        lasting, scores = self._lasting, self._life.scores
        lasting.plan(planned=True)
        lasting.save_now()
        try:
            os.chdir(self.program.directory)
            if scores is not None:
                scores.give_back()
            lasting.store.execute(self.program.command())
        finally:  # reached only if `execute` has failed
            lasting.plan(planned=False)
            lasting.write()
            os.chdir("/")
            if scores is not None:
                scores.lower()

    def _fail(self, trouble: str) -> None:
        text = f"the version that is installed now cannot take over:\n{trouble}"
        for line in text.splitlines():
            log.error(line)
        self.core.clients.fail_all(For.UPGRADE, 0, errno.EINVAL, text)
