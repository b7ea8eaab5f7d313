"""The console, with real terminals: the operator's terminal, and the pty that is the guest's serial line."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.console import Console
from tests.support.descriptors import open_descriptors
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import DEADLINE_S, ROOT, FakeDaemon, spawn
from vmctl.line import Ending
from vmd.errors import VMD_CONSOLE_TAKEN
from vmd.ipc.messages.clients import (
    ConsoleAttached,
    ConsoleBreak,
    ConsoleOutput,
    ConsoleReady,
    ConsoleRequest,
    ConsoleWatch,
    ConsoleWatched,
    Failed,
    StartRequest,
    VmStarted,
)
from vmd.record import Record

BACKLOG = b"boot> \x1b[1mready\x1b[0m\r\n"


class Line:
    """The guest's pty, both ends open as in the daemon."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)
        self.path = os.ttyname(self.slave)
        self.input = Console(self.master)
        attached = ConsoleAttached(vmid=3, name="web", tty=self.path)
        self.answers = (ConsoleOutput(data=BACKLOG[:9]), ConsoleOutput(data=BACKLOG[9:]), attached)
        daemon.script = self._answer

    def _answer(self, request: Record) -> tuple[Record, ...]:
        return self.answers if isinstance(request, ConsoleRequest) else ()

    def prints(self, data: bytes) -> None:
        """Let the guest print."""
        os.write(self.master, data)

    def gets(self, wanted: str) -> str:
        """Return the guest's input up to a text."""
        return self.input.expect(wanted, DEADLINE_S)

    def end(self) -> None:
        """End the VM by closing both ends."""
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)


class Operator:
    """A user who has typed `vmctl console web` at a terminal."""

    def __init__(self, daemon: FakeDaemon, *arguments: str) -> None:
        self.master, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.screen = Console(self.master)
        # In its own process group, as shells do: the terminal cannot stop an orphaned group.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-s", str(daemon.path), *(arguments or ("console", "web"))],
            cwd=ROOT, stdin=self.slave, stdout=self.slave, stderr=self.slave, process_group=0,
        )  # fmt: skip

    def types(self, data: bytes) -> None:
        """Type at the terminal."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.master, view) :]

    def sees(self, wanted: str) -> str:
        """Return the output at the terminal up to a text."""
        return self.screen.expect(wanted, DEADLINE_S)

    def ended(self) -> int:
        """Wait for the end of vmctl, and return its exit status."""
        return self.process.wait(DEADLINE_S)

    def mode(self) -> list[object]:
        """Return the settings of the terminal."""
        return list(termios.tcgetattr(self.slave))

    def waiting(self) -> int:
        """Return the number of typed bytes that were not read."""
        return int.from_bytes(fcntl.ioctl(self.slave, termios.FIONREAD, bytes(4)), sys.byteorder)

    def close(self) -> None:
        """End vmctl and close the terminal."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def line(daemon: FakeDaemon) -> Iterator[Line]:
    """A guest's line that the daemon hands out."""
    line = Line(daemon)
    yield line
    line.end()


@pytest.fixture
def operator(daemon: FakeDaemon, line: Line) -> Iterator[Operator]:
    """An operator who is attached and has seen the backlog."""
    operator = Operator(daemon)
    try:
        operator.sees("ready\x1b[0m\r\n")
        yield operator
    finally:
        operator.close()


def is_raw(mode: list[object]) -> bool:
    """Return whether a terminal passes every byte unchanged."""
    assert isinstance(mode[3], int)
    return not mode[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


# --- at a terminal ---------------------------------------------------------------------------------------


def test_greeting(daemon: FakeDaemon, line: Line) -> None:
    """The console's name, how to leave, and then the backlog unchanged."""
    operator = Operator(daemon)
    try:
        shown = operator.sees("ready\x1b[0m\r\n")
        assert shown == (
            f"Connected to {line.path} (speed 115200)\r\n"
            "Type ~. at the start of a line to leave, ~? for help.\r\n" + BACKLOG.decode()
        )
        assert daemon.requests == [ConsoleRequest(name="web")]
    finally:
        operator.close()


def test_both_ways(line: Line, operator: Operator) -> None:
    """Control characters pass, too: ^C goes to the guest."""
    operator.types(b"root\r\x03\x13\x11")
    assert line.gets("\x11") == "root\r\x03\x13\x11"

    line.prints(b"\x1b[2J login:")
    assert operator.sees("login:") == "\x1b[2J login:"


def test_leaving_gives_everything_back(daemon: FakeDaemon, line: Line, operator: Operator) -> None:
    """The terminal gets its mode back, and the daemon its console."""
    assert is_raw(operator.mode())

    operator.types(b"exit\r~.more\r~#")

    operator.sees("[EOT]\r\n")
    assert operator.ended() == 0
    assert operator.mode() == operator.before
    os.write(line.slave, b"!")
    assert line.gets("!") == "exit\r!"  # nothing that was typed after the escape
    daemon.wait_left()
    assert daemon.requests == [ConsoleRequest(name="web")]


@pytest.mark.parametrize("escape", [b"~#", b"~b"])
def test_break(daemon: FakeDaemon, line: Line, operator: Operator, escape: bytes) -> None:
    """BREAK is a message, because a pty on Linux cannot carry it."""
    operator.types(b"\r" + escape + b"after")

    assert line.gets("after") == "\rafter"
    assert daemon.requested() == ConsoleRequest(name="web")
    assert daemon.requested() == ConsoleBreak(vmid=3, name="web")


def test_refused_break_is_shown(daemon: FakeDaemon, line: Line, operator: Operator) -> None:
    """The console goes on after that."""
    daemon.script = lambda _request: [Failed(code=errno.EPERM, text="the console is not attached\x1b here")]
    operator.types(b"~#")

    operator.sees("\r\n[the console is not attached\\x1b here]\r\n")
    operator.types(b"x")
    line.gets("x")


def test_help(line: Line, operator: Operator) -> None:
    """It lists every escape, and the guest gets none of it."""
    operator.types(b"~?")

    shown = operator.sees("at the start of a line.\r\n")
    assert all(escape in shown for escape in ("~.", "~^D", "~#", "~b", "~^Z", "~?", "~~"))
    operator.types(b"x")
    assert line.gets("x") == "x"


def test_tilde_for_the_guest(line: Line, operator: Operator) -> None:
    """`~~` sends one tilde.  In the middle of a line a tilde is an ordinary character."""
    operator.types(b"~~.\recho ~.\r")

    assert line.gets("~.\r") + line.gets("~.\r") == "~.\recho ~.\r"


def test_suspend(line: Line, operator: Operator) -> None:
    """While vmctl is stopped, the terminal has the shell's mode.  Then it is raw again."""
    operator.types(b"~\x1a")

    os.waitid(os.P_PID, operator.process.pid, os.WSTOPPED)
    assert operator.mode() == operator.before
    line.prints(b"meanwhile")
    os.kill(operator.process.pid, signal.SIGCONT)

    operator.sees("meanwhile")
    assert is_raw(operator.mode())
    operator.types(b"back\r~.")
    line.gets("back\r")
    assert operator.ended() == 0
    assert operator.mode() == operator.before


def test_stop_signal_from_outside(line: Line, operator: Operator) -> None:
    """`kill -TSTP` suspends vmctl in the same way, each time."""
    for _ in range(2):
        os.kill(operator.process.pid, signal.SIGTSTP)

        os.waitid(os.P_PID, operator.process.pid, os.WSTOPPED)
        assert operator.mode() == operator.before
        line.prints(b"meanwhile")
        os.kill(operator.process.pid, signal.SIGCONT)
        operator.sees("meanwhile")
        assert is_raw(operator.mode())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_signal_restores_the_terminal(operator: Operator, signum: signal.Signals) -> None:
    """Every signal that ends vmctl does so."""
    operator.process.send_signal(signum)

    operator.sees(f"vmctl: console: ended by {signum.name}\r\n")
    assert operator.ended() == 1
    assert operator.mode() == operator.before


def test_end_of_the_vm(line: Line, operator: Operator) -> None:
    """vmctl prints a message and ends successfully."""
    line.end()

    operator.sees("[EOT]\r\n")
    operator.sees("vmctl: vm web has ended\r\n")
    assert operator.ended() == 0
    assert operator.mode() == operator.before


def test_end_of_a_vm_that_does_not_read(line: Line, operator: Operator) -> None:
    """Typed bytes that it did not take are dropped."""
    operator.types(b"x" * 300_000)
    line.end()

    operator.sees("vmctl: vm web has ended\r\n")
    assert operator.ended() == 0


def test_end_of_the_daemon(daemon: FakeDaemon, operator: Operator) -> None:
    """vmctl fails: no process holds the line any more."""
    daemon.hang_up()

    operator.sees("vmctl: pipe closed: vmd has ended or is started again; the guest may still run\r\n")
    assert operator.ended() == 3
    assert operator.mode() == operator.before


def test_daemon_that_breaks_the_protocol(daemon: FakeDaemon, operator: Operator) -> None:
    """The terminal is restored here, too."""
    daemon.send_raw(b"noise")

    operator.sees("vmctl: vmd: packet of 5 bytes has no header")
    assert operator.ended() == 1
    assert operator.mode() == operator.before


def test_terminal_that_hangs_up(daemon: FakeDaemon, line: Line) -> None:
    """Closing the window detaches from the console."""
    operator = Operator(daemon)
    operator.sees("ready")
    os.close(operator.slave)
    os.close(operator.master)

    operator.process.wait(DEADLINE_S)
    daemon.wait_left()


def test_guest_that_does_not_read(line: Line, operator: Operator) -> None:
    """The operator can leave although typed bytes cannot be delivered."""
    operator.types(b"x" * 300_000 + b"\r~.")

    operator.sees("[EOT]\r\n")
    assert operator.ended() == 0


def test_line_that_echoes_is_made_raw(daemon: FakeDaemon, line: Line) -> None:
    """A previous user may have left it so.  With echo the guest would read its own output."""
    cooked = termios.tcgetattr(line.slave)
    cooked[3] |= termios.ECHO | termios.ICANON
    termios.tcsetattr(line.slave, termios.TCSANOW, cooked)
    operator = Operator(daemon)
    try:
        operator.sees("ready")
        line.prints(b"prompt\n")
        operator.sees("prompt\n")
        operator.types(b"x")
        assert line.gets("x") == "x"
    finally:
        operator.close()


# --- how guests change terminals -------------------------------------------------------------------------


def test_backlog_does_not_act_on_the_terminal(daemon: FakeDaemon, line: Line) -> None:
    """Sequences of SeaBIOS and others are removed from the backlog.

    A sequence that its end cuts finishes in the live output, and is removed, too.
    """
    attached = line.answers[-1]
    replayed = b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n\x1b[6n\x1b[c\x05\x1b]0;guest\x07ready\r\n\x1b]2;ti"
    line.answers = (ConsoleOutput(data=replayed[:30]), ConsoleOutput(data=replayed[30:]), attached)
    operator = Operator(daemon)
    try:
        operator.sees("for help.\r\n")
        assert operator.sees("ready\r\n") == "\x1b[0mSeaBIOS\r\nready\r\n"
        line.prints(b"tle\x07live")
        assert operator.sees("live") == "live"
    finally:
        operator.close()


def test_backlog_alone_at_a_terminal(daemon: FakeDaemon, line: Line) -> None:
    """Only standard output is a terminal, and that is enough for the filter."""
    daemon.answers(ConsoleOutput(data=b"\x1bc\x1b[?7l\x1b[6n\x1b[31mred"), line.answers[-1])
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "console", "web"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(slave)
        screen = Console(master)
        screen.drain(DEADLINE_S)
        assert process.wait(DEADLINE_S) == 0
    os.close(master)
    assert screen.said == b"\x1b[31mred\x1b[m"


@pytest.mark.parametrize("way", ["leave", "end", "signal", "daemon"])
def test_terminal_is_given_back_as_it_was(daemon: FakeDaemon, line: Line, operator: Operator, way: str) -> None:
    """Modes of the guest are undone, also after an unfinished sequence, however vmctl ends."""
    line.prints(b"\x1b[?1049h\x1b[?7l\x1b[?25l\x1b[?1002h\x1b[?2004h\x1b(0\x1b[31mlogin\x1b]0;unended")
    operator.sees("unended")

    match way:
        case "leave":
            operator.types(b"~.")
        case "end":
            line.end()
        case "signal":
            operator.process.send_signal(signal.SIGTERM)
        case "daemon":
            daemon.hang_up()

    undone = operator.sees("\x1b[m")
    assert undone == "\x18\x1b\\\x1b[?1049l\x1b[?7h\x1b[?25h\x1b[?1002l\x1b[?2004l\x1b(B\x1b[m"
    operator.sees("\x1b[5n")  # reports of the mouse may still arrive
    operator.types(b"\x1b[<35;1;1M\x1b[0n")
    operator.ended()
    assert operator.waiting() == 0  # for a shell to read


def test_plain_output_leaves_nothing_to_undo(line: Line, operator: Operator) -> None:
    """A guest that has undone its modes leaves nothing, either."""
    line.prints(b"\x1b[?1049h\x1b[31mx\x1b[m\x1b[?1049ltext")
    operator.sees("text")
    operator.types(b"~.")

    assert operator.sees("[EOT]") == "\r\n[EOT]"


def test_late_answers_are_not_typed_into_the_shell(line: Line, operator: Operator) -> None:
    """The guest asks for the cursor's position, and the operator leaves before the answer."""
    line.prints(b"\x1b[6n")
    operator.sees("\x1b[6n")
    operator.types(b"~.")

    operator.sees("\x1b[5n")
    operator.types(b"\x1b[3;4R\x1b[0n")
    operator.ended()
    assert operator.waiting() == 0


def test_suspending_gives_the_terminal_back_for_a_while(line: Line, operator: Operator) -> None:
    """The guest's modes are set again when vmctl continues."""
    line.prints(b"\x1b[?25l\x1b[31mred")
    operator.sees("red")
    operator.types(b"~\x1a")

    operator.sees("\x1b[?25h\x1b[m")
    os.waitid(os.P_PID, operator.process.pid, os.WSTOPPED)
    os.kill(operator.process.pid, signal.SIGCONT)
    operator.sees("\x1b[?25l\x1b[31m")


def test_only_the_output_is_a_terminal(daemon: FakeDaemon, line: Line) -> None:
    """It is given back, too."""
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "vmctl", "-s", str(daemon.path), "console", "web"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=slave, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(slave)
        screen = Console(master)
        screen.expect("ready", DEADLINE_S)
        line.prints(b"\x1b[?25llogin")
        screen.expect("login", DEADLINE_S)
        process.send_signal(signal.SIGTERM)
        screen.expect("\x1b[?25h", DEADLINE_S)
        assert process.wait(DEADLINE_S) == 1
    os.close(master)


# --- without a terminal ----------------------------------------------------------------------------------


def test_pipes_carry_every_byte(daemon: FakeDaemon, line: Line) -> None:
    """Input from a pipe has no escapes, and standard output has the guest's bytes only."""
    process = spawn(daemon, "console", "web", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    screen = Console(process.stdout.fileno())
    screen.expect("ready\x1b[0m\r\n", DEADLINE_S)
    line.prints(b"\x00\xffhello\r\n")
    screen.expect("hello\r\n", DEADLINE_S)
    process.stdin.write("\r~.\r~~ done")
    _, errors = process.communicate(timeout=DEADLINE_S)

    assert line.gets("done") == "\r~.\r~~ done"
    assert screen.said == BACKLOG + b"\x00\xffhello\r\n"
    assert (process.returncode, errors) == (0, f"Connected to {line.path} (speed 115200)\n\n[EOT]\n")


def test_end_of_input_waits_for_the_line(daemon: FakeDaemon, line: Line) -> None:
    """vmctl delivers its whole input before it ends, even if the guest reads slowly."""
    process = spawn(daemon, "console", "web", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("y" * 200_000 + "z")
    process.stdin.close()

    assert len(line.gets("z")) == 200_001
    assert process.wait(DEADLINE_S) == 0
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def test_backlog_alone(daemon: FakeDaemon, line: Line) -> None:
    """Without any input, vmctl prints the backlog and ends."""
    process = spawn(daemon, "console", "web")
    output, _ = process.communicate(timeout=DEADLINE_S)

    assert (process.returncode, output.encode()) == (0, BACKLOG.replace(b"\r\n", b"\n"))


def test_input_that_cannot_be_read(daemon: FakeDaemon, line: Line) -> None:
    """The error names standard input."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"never read")
        ours.close()  # unread data makes this a reset for the other end
        process = spawn(daemon, "console", "web", stdin=theirs.fileno())

    _, errors = process.communicate(timeout=DEADLINE_S)

    assert (process.returncode, errors.splitlines()[-1]) == (1, "vmctl: standard input: Connection reset by peer")


def test_reader_that_has_gone(daemon: FakeDaemon, line: Line) -> None:
    """`vmctl console web | head -1`: the broken pipe is reported."""
    process = spawn(daemon, "console", "web", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    Console(process.stdout.fileno()).expect("ready", DEADLINE_S)
    process.stdout.close()
    line.prints(b"more")

    assert process.wait(DEADLINE_S) == 1
    assert process.stderr.read().endswith("vmctl: standard output: Broken pipe\n")
    assert process.stdin is not None
    process.stdin.close()
    process.stderr.close()


def test_endings_differ() -> None:
    """Two members with one value would be one member."""
    assert len(Ending) == 4


# --- taking over, watching, looking back -----------------------------------------------------------------


def test_taking_over(daemon: FakeDaemon, line: Line) -> None:
    """The option -f requests it."""
    process = spawn(daemon, "console", "-f", "web")
    process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 0
    assert daemon.requested() == ConsoleRequest(name="web", force=True)


def test_being_taken_over(daemon: FakeDaemon, operator: Operator) -> None:
    """vmctl prints a message, restores the terminal, and fails."""
    daemon.send(Failed(code=VMD_CONSOLE_TAKEN, text="the console of vm web was taken over by root (pid 9)"))

    operator.sees("[EOT]\r\nvmctl: the console of vm web was taken over by root (pid 9)\r\n")
    assert operator.ended() == 1
    assert operator.mode() == operator.before


class Printed:
    """A daemon that reports the output of a guest to watchers."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self.pieces = [BACKLOG]
        daemon.script = self._answer
        self.daemon = daemon

    def _answer(self, request: Record) -> tuple[Record, ...]:
        assert isinstance(request, ConsoleWatch)
        if request.since is None:
            return ConsoleOutput(data=BACKLOG[:9]), ConsoleOutput(data=BACKLOG[9:]), self.seen(len(BACKLOG))
        return ()

    def seen(self, end: int, *, lost: int = 0, running: bool = True) -> ConsoleWatched:
        """Return the last message of an answer."""
        return ConsoleWatched(vmid=3, name="web", end=end, lost=lost, running=running)


def test_watching(daemon: FakeDaemon) -> None:
    """The backlog comes as text, then live output until the end.

    Nothing is sent to the guest, and no pty is opened.
    """
    printed = Printed(daemon)
    operator = Operator(daemon, "console", "-r", "web")
    try:
        operator.sees("Watching the console of vm web\r\nType ^C, or ~. at the start of a line, to leave.\r\n")
        operator.sees("ready\x1b[0m\r\n")
        operator.types(b"typed in vain\r")
        assert daemon.requested() == ConsoleWatch(name="web")
        assert daemon.requested() == ConsoleWatch(vmid=3, name="web", since=len(BACKLOG))
        daemon.send(ConsoleOutput(data=b"\x1b[31mmore"))
        daemon.send(printed.seen(70_000, lost=5))
        operator.sees("\x1b[31mmore\r\n[5 bytes were printed too fast to be seen]\r\n")
        assert daemon.requested() == ConsoleWatch(vmid=3, name="web", since=70_000)
        daemon.send(ConsoleOutput(data=b"bye"))
        daemon.send(printed.seen(70_003, running=False))
        operator.sees("bye\x1b[m\r\n[EOT]\r\nvmctl: vm web has ended\r\n")
        assert operator.ended() == 0
        assert operator.mode() == operator.before
    finally:
        operator.close()


def test_keys_while_watching(daemon: FakeDaemon) -> None:
    """Help and suspension are those of a console.  A BREAK cannot be meant."""
    Printed(daemon)
    operator = Operator(daemon, "console", "-r", "web")
    try:
        operator.sees("ready")
        operator.types(b"~#~?")
        assert operator.sees("at the start of a line.\r\n").split("~?\r\n")[0] == "\x1b[0m\r\n"
        operator.types(b"~\x1a")
        operator.sees("~^Z\r\n")
        os.waitid(os.P_PID, operator.process.pid, os.WSTOPPED)
        os.kill(operator.process.pid, signal.SIGCONT)
        operator.types(b"~.")
        operator.sees("[EOT]\r\n")
        assert operator.ended() == 0
    finally:
        operator.close()


@pytest.mark.parametrize("keys", [b"\x03", b"~."])
def test_leaving_while_watching(daemon: FakeDaemon, keys: bytes) -> None:
    """^C leaves, too, because it cannot be meant for the guest."""
    Printed(daemon)
    operator = Operator(daemon, "console", "-r", "web")
    try:
        operator.sees("ready")
        operator.types(keys)
        operator.sees("[EOT]\r\n")
        assert operator.ended() == 0
        assert operator.mode() == operator.before
    finally:
        operator.close()


def test_watching_into_a_file(daemon: FakeDaemon) -> None:
    """Without a keyboard, watching goes on until the VM ends."""
    printed = Printed(daemon)
    process = spawn(daemon, "console", "-r", "web")
    assert daemon.requested() == ConsoleWatch(name="web")
    assert daemon.requested() == ConsoleWatch(vmid=3, name="web", since=len(BACKLOG))
    daemon.send(ConsoleOutput(data=b"\x1b[2Jmore"))
    daemon.send(printed.seen(40, running=False))
    output, _ = process.communicate(timeout=DEADLINE_S)

    assert (process.returncode, output.encode()) == (0, (BACKLOG + b"\x1b[2Jmore").replace(b"\r\n", b"\n"))


def test_a_vm_that_does_not_run(daemon: FakeDaemon) -> None:
    """vmctl prints the last output of its console, and a message."""
    refusal = Failed(code=errno.ESRCH, text="vm web is not running")
    daemon.answers(ConsoleOutput(data=b"panic: "), ConsoleOutput(data=b"out of luck\r\n"), refusal)
    process = spawn(daemon, "console", "web")
    output, errors = process.communicate(timeout=DEADLINE_S)

    assert (process.returncode, output) == (0, "panic: out of luck\n")
    assert errors == "vmctl: vm web is not running; this is what its console showed last\n"


# --- no console ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "sentence"),
    [
        (errno.ENOENT, "vm web not found", "console not found: vm web not found"),
        (errno.ESRCH, "vm web is not running", "console not found: vm web is not running"),
        (
            errno.EBUSY,
            "the console of vm web is in use by anna (pid 5)",
            "command failed: the console of vm web is in use by anna (pid 5)",
        ),
        (errno.EPERM, "uid 5 may not attach to vm web", "command failed: uid 5 may not attach to vm web"),
    ],
)
def test_refused(vmctl: Vmctl, daemon: FakeDaemon, code: int, text: str, sentence: str) -> None:
    """The texts are upstream's where it has some, and the message names the holder of a console."""
    daemon.answers(Failed(code=code, text=text))

    assert vmctl("console", "web") == (4 if code == errno.ENOENT else 1, "", f"vmctl: {sentence}\n")


def test_line_that_cannot_be_opened(vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path) -> None:
    """vmctl opens it with its own rights, and it must be a terminal."""
    before = open_descriptors()
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (Path("/dev/null"), "not a terminal"),
    ):
        daemon.answers(ConsoleAttached(vmid=3, name="web", tty=str(path)))
        assert vmctl("console", "web") == (1, "", f"vmctl: cannot open console {path}: {reason}\n")
        daemon.wait_left()
    assert open_descriptors() == before


def test_start_and_a_line_that_cannot_be_opened(vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path) -> None:
    """The result of the start is shown first."""
    ready = ConsoleReady(vmid=3, name="web", tty=f"{tmp_path}/none")
    daemon.answers(ready, VmStarted(vmid=3, name="web", pid=77, tty="/dev/pts/7"))
    trouble = f"vmctl: cannot open console {tmp_path}/none: No such file or directory\n"
    assert vmctl("start", "-c", "web") == (1, "", f"vmctl: started vm 3 successfully, tty /dev/pts/7\n{trouble}")
    daemon.answers(ready, Failed(code=errno.EPERM, text="no"))
    assert vmctl("start", "-c", "web") == (1, "", "vmctl: start vm command failed: no\n")


def test_start_and_console(daemon: FakeDaemon, line: Line) -> None:
    """`start -c` attaches to the new VM, also with an older daemon, which does not send ConsoleReady."""
    started = VmStarted(vmid=3, name="web", pid=77, tty=line.path)
    daemon.script = lambda request: (started,) if isinstance(request, StartRequest) else line.answers
    operator = Operator(daemon, "start", "-c", "web")
    try:
        operator.sees(f"vmctl: started vm 3 successfully, tty {line.path}\r\n")
        operator.sees("ready")
        operator.types(b"~.")
        assert operator.ended() == 0
        assert daemon.requests == [StartRequest(name="web", console=True), ConsoleRequest(vmid=3, name="web")]
    finally:
        operator.close()


def test_start_and_console_from_the_first_byte(daemon: FakeDaemon, line: Line) -> None:
    """Output of the guest before VmStarted is shown at once, and no second request is sent."""
    daemon.answers(ConsoleReady(vmid=3, name="web", tty=line.path))
    operator = Operator(daemon, "start", "-c", "web")
    try:
        assert daemon.requested() == StartRequest(name="web", console=True)
        line.prints(b"early")
        operator.sees("early")
        daemon.send(VmStarted(vmid=3, name="web", pid=77, tty=line.path, notes=("slow",)))
        operator.sees(f"vmctl: warning: slow\r\nvmctl: started vm 3 successfully, tty {line.path}\r\n")
        operator.types(b"hello")
        line.gets("hello")
        operator.types(b"\r~.")
        assert operator.ended() == 0
        assert operator.mode() == operator.before
        assert daemon.requests == [StartRequest(name="web", console=True)]
    finally:
        operator.close()


def test_start_and_console_of_a_guest_that_is_silent(daemon: FakeDaemon, line: Line) -> None:
    """The operator gets the message about the start, and then the console."""
    started = VmStarted(vmid=3, name="web", pid=77, tty=line.path)
    daemon.answers(ConsoleReady(vmid=3, name="web", tty=line.path), started)
    operator = Operator(daemon, "start", "-c", "web")
    try:
        operator.sees(f"vmctl: started vm 3 successfully, tty {line.path}\r\nConnected to {line.path}")
        operator.types(b"\r~.")
        assert operator.ended() == 0
    finally:
        operator.close()


@pytest.mark.parametrize("ends", [False, True], ids=["line stays", "line ends first"])
def test_start_and_console_of_a_start_that_fails(daemon: FakeDaemon, line: Line, ends: bool) -> None:
    """Message and status are those of a start, and the terminal stays as it is."""
    daemon.answers(ConsoleReady(vmid=3, name="web", tty=line.path))
    operator = Operator(daemon, "start", "-c", "web")
    try:
        daemon.requested()
        if ends:
            line.end()
        daemon.send(Failed(code=errno.ENOENT, text="vm web: disk /d: No such file or directory"))
        operator.sees("vmctl: start vm command failed: vm web: disk /d: No such file or directory\r\n")
        assert operator.ended() == 1
        assert operator.mode() == operator.before
        assert "Connected" not in operator.screen.said.decode()
    finally:
        operator.close()
