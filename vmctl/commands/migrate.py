"""vmctl migrate: move a VM to another host, where `vmctl receive -w` reads it (*vmd.parent.migrations*)."""

import contextlib
import errno
import shlex
import subprocess
import time

from vmctl.bar import Bar
from vmctl.carry import ASKED, COMMIT, COMPLETE, FAILED, RUNNING, SOURCE, TARGET, Ear, say
from vmctl.commands.send import live_goal
from vmctl.errors import ArgumentError, CommandError, NoSuchVm, refused
from vmctl.options import Given
from vmctl.output import clean, put_json, warn
from vmctl.session import Session
from vmctl.vmref import VmRef, parse_vmref
from vmd import signals as signal
from vmd.client import NoDaemon, Refused
from vmd.errors import PeerError, sentence
from vmd.ipc.messages.clients import MigrationAt, MigrationStep, Step, VmReceived, VmSent
from vmd.scaled import fmt_scaled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeVar

    from vmctl.carry import Words
    from vmd.ipc.messages.shared import Live

    A = TypeVar("A", MigrationAt, VmSent, VmReceived)

SHELL = "ssh"
MOVABLE = ("running", "paused")  # states in which a VM can be moved
END_S = 10.0  # for the remote shell to end, after the last message


def run(session: Session, given: Given) -> int:
    """Migrate."""
    ref = parse_vmref(given.operands[0])
    host, name = destination(given.operands[1])
    goal = live_goal(given)
    shell = shell_words(given.value("-e") or SHELL)
    vm = ref.find(session.client.list_vms())
    if vm is None:
        raise NoSuchVm(f"migrate vm command failed: vm {ref} not found")
    if vm.state not in MOVABLE:  # checked first, because ssh may ask for a password
        raise CommandError(f"migrate vm command failed: vm {vm.name} is {vm.state}", errno.EINVAL)
    name = name or vm.name
    begin_s = time.monotonic()
    command = [*shell, host, "vmctl", "receive", "-w", *(["-f"] if given.has("-f") else []), name]
    process = started(command)
    with contextlib.closing(Source(session, ref, host, process, goal, verbose=given.has("-v"))) as source:
        sent, running = source.run()
    total_s = time.monotonic() - begin_s
    if session.json:
        put_json({
            "id": sent.vmid,
            "name": clean(sent.name),
            "host": clean(host),
            "sent_bytes": sent.sent_bytes,
            "rounds": sent.rounds,
            "downtime_ms": sent.downtime_ms,
            "total_ms": round(total_s * 1000),
        })  # fmt: skip
    else:
        rounds = f"{sent.rounds} round{'s' if sent.rounds != 1 else ''}, " if sent.rounds else ""
        told = f"{fmt_scaled(sent.sent_bytes)}, {rounds}downtime {sent.downtime_ms} ms, {total_s:.1f} s in all"
        warn(f"migrated vm {sent.vmid} to {host} successfully, id {running.get('id')} there ({told})")
    return 0


def started(command: list[str]) -> "subprocess.Popen[bytes]":
    """Start the remote shell.  Raises CommandError."""
    # The remote shell ignores ^C: only we know whether it may end the migration.  The shell stays in our process group
    # with the terminal, because it may ask for a password.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    except OSError as error:
        raise CommandError(f"{command[0]}: {sentence(error)}", error.errno) from None
    finally:
        signal.signal(signal.SIGINT, before)


def destination(word: str) -> tuple[str, str]:
    """Return the host of `[user@]host[:name]` and the name, or "".  An IPv6 address may be in brackets.

    Raises ArgumentError.
    """
    host, colon, name = word.rpartition(":")
    if not colon or (word.startswith("[") and word.endswith("]")):
        host, name = word, ""
    elif not name:
        raise ArgumentError(f"invalid destination: {word}: no name after the colon")
    elif ":" in host and "[" not in host:
        raise ArgumentError(f"invalid destination: {word}: an IPv6 address belongs in brackets")
    user, at, address = host.rpartition("@")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    if not address or host.startswith("-") or address.startswith("-") or (at and not user):
        raise ArgumentError(f"invalid destination: {word}")
    if name and parse_vmref(name).vmid:
        raise ArgumentError(f"invalid vm name: {name}")
    return f"{user}{at}{address}", name


def shell_words(text: str) -> list[str]:
    """Return the words of -e, the command that runs another one at a host.  Raises ArgumentError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ArgumentError(f"invalid command: {text}: {error}") from None
    if not words:
        raise ArgumentError("empty command: -e")
    return words


class Source:
    """One migration, seen from the source."""

    def __init__(
        self,
        session: Session,
        ref: VmRef,
        host: str,
        process: "subprocess.Popen[bytes]",
        goal: "Live",
        *,
        verbose: bool,
    ) -> None:
        self.session = session
        self.goal = goal
        self.ref = ref
        self.host = host
        self.process = process
        self.verbose = verbose
        assert process.stdin is not None
        assert process.stdout is not None
        self.to_target, self.from_target = process.stdin.fileno(), process.stdout.fileno()
        self.ear = Ear(self.from_target, TARGET)
        self.bar = Bar(str(ref), rate=True, rounds=True, shown=not session.quiet)

    def close(self) -> None:
        """End the connection.  The target gives up unless it was told to let the guest run."""
        self.bar.end()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
        self.process.stdout.close()

    def run(self) -> "tuple[VmSent, Words]":
        """Take all steps; return the last answers of the source and the target.  Raises CommandError."""
        try:
            self.session.client.migrate(self.ref, self.to_target, live=self.goal)
        except Refused as error:
            raise self._refused(error) from None
        words = self._hear(ASKED)
        self._note(f"{self.host} accepts the VM")
        self._step(Step.GO_ON, MigrationAt, locks_travel=words.get("locks_travel") is True)
        self.bar.end()
        self._hear(COMPLETE)
        self._note(f"{self.host} has received the VM")
        with uninterrupted():  # an end in here would leave the VM in doubt
            let_go = self._step(Step.COMMIT, MigrationAt)
            self._note("the disks are unlocked here")
            try:
                say(self.to_target, SOURCE, COMMIT, paused=let_go.paused)
            except OSError:
                self._give_up(f"{self.host}: {self._how_it_ended()}")  # no byte of the message was sent
            running = self._hear(RUNNING, committed=True)
            return self._end(), running

    def _ask(
        self, step: Step, expected: "type[A]", *, locks_travel: bool = False, in_doubt: bool = False, text: str = ""
    ) -> "A":
        """Take a step at the source, and show the progress.  Raises ClientError, PeerError."""
        request = MigrationStep(
            vmid=self.ref.vmid,
            name=self.ref.name,
            step=step,
            locks_travel=locks_travel,
            in_doubt=in_doubt,
            text=text,
        )
        return self.session.client.carry_out(request, expected, self.bar.follow)

    def _step(self, step: Step, expected: "type[A]", *, locks_travel: bool = False) -> "A":
        """Take a step at the source.  Raises CommandError, if possible with the reason of the target."""
        try:
            return self._ask(step, expected, locks_travel=locks_travel)
        except Refused as error:
            raise self._refused(error) from None

    def _refused(self, error: Refused) -> CommandError:
        """Return the error for a refusal of the daemon.  If the stream has failed, ask the target for the reason."""
        if error.number != errno.EIO:
            return refused("migrate vm command failed", error)
        why = self._last_words() or self._how_it_ended()
        return CommandError(f"migrate vm command failed: {error.text}: {self.host}: {why}", error.number)

    def _last_words(self) -> str:
        """Return why the target has failed; "" if it does not say."""
        with contextlib.suppress(CommandError):
            while self.ear.poll(int(END_S * 1000)):
                words = self.ear.hear(ASKED, COMPLETE, FAILED)
                if words is None:
                    break
                if words["at"] == FAILED:
                    return clean(str(words.get("text")))
        return ""

    def _hear(self, wanted: str, *, committed: bool = False) -> "Words":
        """Return the wanted line of the target.  Raises CommandError if it has failed or is gone."""
        try:
            words = self.ear.hear(wanted, FAILED)
        except CommandError as error:
            self._give_up(str(error), in_doubt=committed)
        if words is None:
            self._give_up(f"{self.host}: {self._how_it_ended()}", in_doubt=committed)
        elif words["at"] == FAILED:
            in_doubt = committed and words.get("in_doubt") is not False
            self._give_up(f"{self.host}: {clean(str(words.get('text')))}", in_doubt=in_doubt)
        else:
            return words
        raise AssertionError("not reached")

    def _how_it_ended(self) -> str:
        try:
            status = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "has closed the connection"
        return f"the remote command was killed by signal {-status}" if status < 0 else (
            f"the remote command has ended with status {status}"
        )  # fmt: skip

    def _give_up(self, why: str, *, in_doubt: bool = False) -> None:
        """Let the VM continue here, or be in doubt.  Always raises: CommandError, PeerError."""
        try:
            self._ask(Step.BACK, MigrationAt, in_doubt=in_doubt, text=why)
        except Refused as error:
            raise CommandError(f"migrate vm command failed: {error.text}", error.number) from None
        raise PeerError("vmd", "does not say what has become of the VM")

    def _end(self) -> VmSent:
        """End the VM here, because it runs at the target.  Raises CommandError."""
        try:
            return self._ask(Step.DONE, VmSent)
        except (Refused, NoDaemon) as error:
            text = f"vm {self.ref} runs at {self.host}, but it could not be ended here: {error}"
            raise CommandError(text, errno.EIO) from None

    def _note(self, text: str) -> None:
        if self.verbose:
            warn(text)


@contextlib.contextmanager
def uninterrupted() -> "Iterator[None]":
    """Ignore the first ^C; the second one ends us."""
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        warn("the VM is being handed over: another interrupt leaves it in doubt")

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
