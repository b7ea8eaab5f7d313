"""Upgrade in place: the program that is installed now takes the place of this one, in the same process.

First it rehearses: it is started as a process of its own, with a copy of what this daemon knows, and says whether it
could go on from there (`vmd --check-adopt`).
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
REHEARSAL_S = 120.0  # for the program to start, and to have looked at everything
SAID_MAX = 16_384  # bytes of what it says
PIPE_BYTES = 1 << 16  # that a pipe holds: one read has all that a program has said before its end


class Rehearsal:
    """The new program, started to see whether it could go on."""

    def __init__(self, loop: "Loop", program: "Program", state_fd: int, done: "Callable[[str], None]") -> None:
        """`done` is called once, with the reason if it could not.  `state_fd` stays the caller's.  Raises HostError."""
        self._loop = loop
        self._done = done
        self._said = b""
        self._late = False
        command = program.command(CHECK)
        environment = store.environment({"state": state_fd})
        environment.pop("NOTIFY_SOCKET", None)  # it has nothing to say there
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
        """Take what it has said; return whether it may say more."""
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
        self._process.kill()  # it is reaped when it has ended: storage may keep it
        self._done(f"it has not come to an end in {REHEARSAL_S:.0f} s")


def in_words(said: str, status: int) -> str:
    """Return why a rehearsal has failed, from what was said in it."""
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
        """Have the new program rehearse and, unless that was all, take our place."""
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
        """Say which versions serve VMs."""
        for each in self.generations:
            row = GenerationInfo(number=each.number, version=each.version, vms=len(self.generations.vms(each)))
            self.core.clients.answer(envelope.peerid, row)
        self.core.clients.answer(envelope.peerid, End())

    def _on_rehearsed(self, trouble: str) -> None:
        """Answer whoever has asked for the rehearsal alone."""
        self._rehearsal = None
        if trouble:
            self._fail(trouble)
        else:
            self.core.clients.answer_all(For.UPGRADE, 0, Ok())

    def _take_place(self, trouble: str) -> None:
        """Have the new program take our place if it could go on; the connections of all clients end with that."""
        self._rehearsal = None
        if not trouble:
            log.info("upgrade: the version that is installed now takes over")
            try:
                self._execute()
            except OSError as error:
                trouble = f"it cannot be started: {error.strerror}"
        self._fail(trouble)

    def _execute(self) -> None:
        """Have the program that is installed now take our place.  Raises OSError; then we go on."""
        assert self.program is not None
        lasting, scores = self._lasting, self._life.scores
        lasting.plan(planned=True)
        lasting.save_now()
        try:
            os.chdir(self.program.directory)
            if scores is not None:
                scores.give_back()
            lasting.store.execute(self.program.command())
        finally:  # it has failed
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
