"""Random attacks on a daemon and its VMs for some time, and the check that they do not affect other guests.

A life is a VM from its start to its end, in one process.  A life is excused if it was attacked itself or if its owner
ended it.  Every other life must last to the end of the round and answer at its console all the time.
"""

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.bystander import PROMPT, vm_block
from tests.support.clients import connect_as
from tests.support.daemon import DEADLINE_S, Terminal
from tests.support.fusefile import HELD, OPEN, READ, FuseFile
from tests.support.hostile import KINDS, hostile
from tests.support.hostnet import ALIAS, NetDaemon, links
from vmd.ipc.imsg import MAX_MESSAGE, decode, encode
from vmd.ipc.messages.clients import (
    ANSWERS,
    End,
    Failed,
    ListRequest,
    PauseRequest,
    ReloadRequest,
    SendRequest,
    StartRequest,
    StopRequest,
    VmInfo,
    VmPaused,
    VmStarted,
    VmTerminated,
)
from vmd.ipc.routes import BY_CLASS
from vmd.record import Record

OWNERS = {40001: ("a1", "a2", "a3"), 40002: ("b1", "b2", "b3"), 40003: ("c1", "c2")}
ROOT, STRANGER = 0, 65534  # users without a VM
MAY_CONNECT = 40000  # a group whose members may connect to the control socket
NAMES = tuple(itertools.chain.from_iterable(OWNERS.values()))
PARTIAL = tuple(cls for cls in ANSWERS if BY_CLASS[cls].partial)
ANSWER_S = 300.0  # a watchdog: vmd gives up a VM that is not built within 120 s, and its successor likewise
TRY_AGAIN_S = 0.2
KEPT = ("a1", "b1", "c1")  # VMs that no test step ends: they must run from the first attack to the last
ON_STORAGE = "c2"  # the VM whose disk may hang
BRIDGE = "br7"
LONG_S = 60.0  # a round at least this long also stops some processes until its end


class Life:
    """A VM in one process, from its start to its end; `excused` says why it may have ended."""

    def __init__(self, name: str, pid: int, tty: str) -> None:
        self.name = name
        self.pid = pid
        self.excused = ""
        self.beats = 0
        self.lock = threading.Lock()  # held while a thread reads the console
        self.pidfd = os.pidfd_open(pid)
        self.terminal = Terminal(tty)  # opened now, because a later VM may get a pty of the same name

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def beat(self) -> None:
        """Type to the guest and wait for its answer.  Raises AssertionError or OSError."""
        if self.beats == 0:  # input before the guest has set up its UART is lost
            self.expect(PROMPT)
        self.beats += 1
        self.terminal.type(f"echo beat {self.beats}\r")
        self.expect(f"beat {self.beats}\r\nbeat {self.beats}\r\n{PROMPT}")

    def expect(self, wanted: str) -> None:
        """Wait for a text from the guest, or until the life is excused.  Raises AssertionError."""
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                self.terminal.expect(wanted, 1.0)
            except AssertionError:
                if self.excused or self.terminal.ended or time.monotonic() > deadline_s:
                    raise
            else:
                return

    def close(self) -> None:
        """Close its console."""
        os.close(self.pidfd)
        os.close(self.terminal.fd)


class StallingLog:
    """A reader that copies a daemon's log from a FIFO to its file, and that can be made to stop reading."""

    def __init__(self, vmd: NetDaemon) -> None:
        self.path = vmd.directory / "log.fifo"
        os.mkfifo(self.path)
        vmd.prefix = ["sh", "-c", 'exec "$@" 2>"$0"', str(self.path)]
        self.log_path = vmd.log_path
        self.reads = threading.Event()
        self.reads.set()
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self.thread = threading.Thread(target=self._run)
        self.over = False
        self.lock = threading.Lock()
        self.began_s = time.monotonic()

    def __enter__(self) -> "StallingLog":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.reads.set()
        self.thread.join()
        os.close(self.fd)

    def note(self, what: str) -> None:
        """Append lines to the log file, each with the time since the start."""
        with self.lock, self.log_path.open("a") as log:
            for line in what.splitlines():
                log.write(f"{time.monotonic() - self.began_s:7.2f} {line}\n")

    def _run(self) -> None:
        rest = ""
        while True:
            self.reads.wait()
            select.select([self.fd], [], [], 0.1)
            with contextlib.suppress(BlockingIOError):
                data = os.read(self.fd, 1 << 16)
                if not data and self.over:  # the daemon is gone
                    return
                if not data:
                    select.select([], [], [], 0.1)
                lines, _, rest = (rest + data.decode(errors="replace")).rpartition("\n")
                self.note(lines)


class Chaos:
    """The daemon, the lives of its VMs, and the attacks on them."""

    def __init__(self, vmd: NetDaemon, log: StallingLog, storage: FuseFile, seed: int, duration_s: float) -> None:
        """`storage` holds the disk of VM ON_STORAGE."""
        self.vmd = vmd
        self.network = vmd.network
        self.log = log
        self.storage = storage
        self.seed = seed
        self.random = random.Random(seed)
        self.duration_s = duration_s
        self.is_long = duration_s >= LONG_S
        self.done: Counter[str] = Counter()
        self.lives: list[Life] = []
        self.over = threading.Event()
        self.faults: list[str] = []
        self._struck: Counter[str] = Counter()  # by name: how often a VM was attacked
        self._shared = 0  # attacks on interfaces, and on processes other than control, log and vmm
        self._lock = threading.Lock()
        self._later: list[tuple[float, Callable[[], None]]] = []  # time and function of each attack's end
        self._for_good: list[Callable[[], None]] = []  # ends of attacks that last the whole round

    def life_of(self, name: str) -> Life | None:
        """Return the last life of a VM."""
        return next((life for life in reversed(self.lives) if life.name == name), None)

    def fault(self, what: str) -> None:
        """Record a failure and end the round."""
        self.faults.append(f"{what} (after {self.done.total()} attacks)")
        self.over.set()

    # --- what users do, in a thread each

    def ask(self, uid: int, request: Record, stream: int | None = None) -> list[Record]:
        """Send a request as a user; return the answers, without the last one if the connection ended early."""
        answers: list[Record] = []
        with connect_as(self.vmd.socket, uid, uid, [MAY_CONNECT]) as client:
            client.settimeout(ANSWER_S)
            packet, fds = encode(request, fds={"stream": [stream]} if stream is not None else {})
            try:
                socket.send_fds(client, [packet], fds)
                while not answers or isinstance(answers[-1], PARTIAL):
                    packet = client.recv(MAX_MESSAGE)
                    if not packet:
                        break
                    answers.append(decode(packet, [], "vmd").message)
            except (BrokenPipeError, ConnectionResetError):
                pass
            except TimeoutError:
                self.fault(f"no answer within {ANSWER_S:.0f} s to {request} of uid {uid}")
        return answers

    def answer(self, uid: int, request: Record, stream: int | None = None) -> Record | None:
        """Return the last answer to a request; None if the connection ended without one."""
        answers = self.ask(uid, request, stream)
        return answers[-1] if answers and not isinstance(answers[-1], PARTIAL) else None

    def rows(self, uid: int = 0) -> dict[str, VmInfo]:
        """Return the status of all VMs as a user sees it.  Ask again if control ended before its last answer."""
        while True:
            answers = self.ask(uid, ListRequest())
            if self.faults or (answers and isinstance(answers[-1], End)):
                break
            select.select([], [], [], TRY_AGAIN_S)
        return {row.name: row for row in answers if isinstance(row, VmInfo)}

    def renew(self, uid: int, name: str) -> None:
        """Stop and start a VM, from any state.  Try again until it has started."""
        deadline_s = time.monotonic() + ANSWER_S
        if (old := self.life_of(name)) is not None:
            old.excused = old.excused or "was ended by its owner"
        while True:
            stopped = self.answer(uid, StopRequest(name=name, force=True, wait=True))
            struck = self._struck[name]
            if isinstance(stopped, VmTerminated) or (isinstance(stopped, Failed) and "not running" in stopped.text):
                started = self.answer(uid, StartRequest(name=name))
                if isinstance(started, VmStarted):
                    break
                stopped = started
            if time.monotonic() > deadline_s:
                self.fault(f"vm {name} does not start: {stopped}")
            if self.faults:
                return
            select.select([], [], [], TRY_AGAIN_S)
        self.bear(name, started.pid, started.tty, struck)

    def bear(self, name: str, pid: int, tty: str, struck: int) -> None:
        """Record a new life.  `struck` is how often the VM had been attacked when its start was requested."""
        try:
            life = Life(name, pid, tty)
        except OSError:
            if self._struck[name] == struck:
                self.fault(f"vm {name} was started, and is gone")
            return
        with self._lock:
            if self._struck[name] != struck:
                life.excused = "was attacked"
            self.lives.append(life)

    def own(self, uid: int, seed: int) -> None:
        """Act as the owner of some VMs: start VMs that ended, and stop, reset or pause some at random."""
        chance = random.Random(seed)
        while not self.over.wait(chance.uniform(0.1, 1.0)):
            name = chance.choice(OWNERS[uid])
            life = self.life_of(name)
            may_end = name not in KEPT
            if life is None or life.ended or life.excused or (may_end and chance.random() < 0.04):
                self.renew(uid, name)
            elif may_end and chance.random() < 0.1:
                self.reset(uid, life)
            elif chance.random() < 0.5:
                self.pause(uid, life)
            else:
                self.rows(uid)

    def reset(self, uid: int, old: Life) -> None:
        """Have a guest reset itself.  Its VM must continue in a new process unless an attack hit a process it needs."""
        with old.lock:  # the next life reads what the guest writes from now on
            old.excused = "was reset"
        struck, shared = self._struck[old.name], self._shared
        old.terminal.type("\rreset\r")
        deadline_s = time.monotonic() + ANSWER_S
        while not self.faults:
            row = self.rows(uid).get(old.name)
            if row is None:  # the round has ended for another reason
                return
            if row.state == "running" and row.pid != old.pid:
                self.bear(row.name, row.pid, row.tty, struck)
                return
            if self._struck[old.name] != struck or (row.state == "stopped" and self._shared != shared):
                return
            if row.state == "stopped" and row.text == "restarted too quickly":
                return
            if row.state == "stopped" or time.monotonic() > deadline_s:
                self.fault(f"vm {old.name} does not come back from a reset: {row}")
            select.select([], [], [], TRY_AGAIN_S)

    def pause(self, uid: int, life: Life) -> None:
        """Pause and unpause a VM."""
        self.ask(uid, PauseRequest(name=life.name, paused=True))
        while not self.faults and not life.excused:
            if isinstance(self.answer(uid, PauseRequest(name=life.name, paused=False)), VmPaused):
                return
            select.select([], [], [], TRY_AGAIN_S)

    def be_root(self, seed: int) -> None:
        """Act as root: list all VMs, reload the configuration, and send copies of VMs that continue to run."""
        chance = random.Random(seed)
        with (self.vmd.directory / "stream").open("wb") as stream:
            while not self.over.wait(chance.uniform(0.1, 1.0)):
                if chance.random() < 0.1:
                    self.ask(ROOT, ReloadRequest())
                elif chance.random() < 0.2:
                    stream.seek(0)
                    self.ask(ROOT, SendRequest(name=chance.choice(NAMES), keep=True), stream.fileno())
                else:
                    self.rows()

    def watch(self) -> None:
        """Check repeatedly that the guests answer."""
        while not self.over.wait(0.05):
            for life in [each for each in self.lives if not each.excused]:
                self.look_at(life)

    def look_at(self, life: Life) -> None:
        """Have a guest answer; record a failure if it does not."""
        try:
            with life.lock:
                if not life.excused:
                    life.beat()
        except (AssertionError, OSError) as error:
            if not life.excused:
                self.fault(f"vm {life.name} (process {life.pid}{', ended' if life.ended else ''}): {error}")

    # --- actions on them

    def strike(self, title: str) -> None:
        """Record an attack on a process.  If the process belongs to a VM, the VM's life is excused."""
        part, _, rest = title.removeprefix("vmd: ").partition("/")
        with self._lock:
            self._shared += part not in ("control", "log", "vmm")
        if part != "vm" or not rest:
            return
        name = rest.partition("/")[0]
        with self._lock:
            self._struck[name] += 1
            if (life := self.life_of(name)) is not None:
                life.excused = life.excused or "was attacked"

    def victims(self) -> list[tuple[str, int]]:
        """Return titles and pids of all processes of the daemon except the parent."""
        found, family = [], [self.vmd.pid]
        while family:
            for pid in children_of(family.pop()):
                family.append(pid)
                found.append((title_of(pid), pid))
        return sorted((title, pid) for title, pid in found if title.startswith("vmd: "))

    def pick(self, wanted: Callable[[str], bool]) -> tuple[str, int] | None:
        """Stop a process with SIGSTOP; return its title, which cannot change while it is stopped, and its pidfd."""
        victims = [(title, pid) for title, pid in self.victims() if wanted(title) and not is_kept(title)]
        if not victims:
            return None
        kinds = sorted({kind_of(title) for title, _ in victims})  # each kind is equally likely, however many it has
        kind = self.random.choice(kinds)
        title, pid = self.random.choice([victim for victim in victims if kind_of(victim[0]) == kind])
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            if title_of(pid) != title or not is_below(pid, self.vmd.pid):
                raise ProcessLookupError
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            title = title_of(pid)
        except ProcessLookupError:
            os.close(pidfd)
            return None
        self.strike(title)
        return title, pidfd

    def kill(self, wanted: Callable[[str], bool]) -> str:
        """Kill a process."""
        picked = self.pick(wanted)
        if picked is None:
            return ""
        title, pidfd = picked
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        return f"kill {kind_of(title)}"

    def stop(self, wanted: Callable[[str], bool], most_s: float = 3.0, *, for_good: bool = True) -> str:
        """Stop a process for some time, or until the end of the round."""
        picked = self.pick(wanted)
        if picked is None:
            return ""
        title, pidfd = picked

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)

        if for_good and self.is_long and self.random.random() < 0.3:
            self._for_good.append(go_on)
            return f"stop {kind_of(title)} for good"
        self.later(most_s, go_on)
        return f"stop {kind_of(title)}"

    def later(self, most_s: float, end: Callable[[], None]) -> None:
        """Schedule the end of an attack at a random time, in at most `most_s` seconds."""
        self._later.append((time.monotonic() + self.random.uniform(0.1, most_s), end))

    def be_hostile(self) -> str:
        """Run a hostile client for a while."""
        uid, kind = self.random.choice((STRANGER, 40003)), self.random.choice(list(KINDS))
        stack = contextlib.ExitStack()
        seed = self.random.randrange(1 << 30)
        process = stack.enter_context(hostile(self.vmd.socket, uid, MAY_CONNECT, kind, seed, self.network))

        def end() -> None:
            if process.poll() is not None:
                self.fault(f"the hostile client ({kind}) has ended by itself")
            stack.close()

        self.later(25.0 if self.is_long else 5.0, end)
        return kind

    def stall_log(self) -> str:
        """Stop reading the log for a while."""
        self.log.reads.clear()
        self.later(4.0, self.log.reads.set)
        return "stall log"

    def hang_storage(self) -> str:
        """Make a disk not answer for a while.  This may affect only the VM that has the disk."""
        self.strike(f"vmd: vm/{ON_STORAGE}")
        for operation in self.random.choice(((READ,), (OPEN,), (OPEN, READ))):
            self.storage.rule(operation, HELD)
        self.later(25.0 if self.is_long else 5.0, self.storage.release)
        return "hang storage"

    def flush_rules(self) -> str:
        """Remove all rules of the host."""
        self.network.run("nft", "flush", "ruleset")
        return "flush nftables"

    def delete_link(self) -> str:
        """Delete an interface of a VM.  Its guest must continue without the interface."""
        ours = [
            name for name, link in links(self.network).items() if ALIAS.match(link.get("ifalias", "")) or name == BRIDGE
        ]
        if not ours:
            return ""
        name = self.random.choice(sorted(ours))
        self._shared += 1  # a guest that boots again at this moment may lose the tap that it was just given
        with contextlib.suppress(subprocess.CalledProcessError):
            self.network.run("ip", "link", "delete", name)
        return "delete bridge" if name == BRIDGE else "delete tap"

    ATTACKS: Sequence[tuple[int, Callable[["Chaos"], str]]] = (
        (20, lambda chaos: chaos.kill(is_core)),
        (14, lambda chaos: chaos.stop(is_core)),
        (2, lambda chaos: chaos.kill(is_of_a_vm)),
        (2, lambda chaos: chaos.stop(is_of_a_vm)),
        (3, lambda chaos: chaos.stop(lambda title: title == "vmd: vmm", for_good=False)),
        (6, be_hostile),
        (3, stall_log),
        (2, hang_storage),
        (5, flush_rules),
        (5, delete_link),
    )

    def attack(self) -> None:
        """Start one random attack, and end the attacks that are due."""
        (thing,) = self.random.choices([thing for _, thing in self.ATTACKS], [weight for weight, _ in self.ATTACKS])
        done = thing(self)
        if done:
            self.done[done] += 1
            self.log.note(f"--- {done}")
        self.end_attacks(time.monotonic())

    def end_attacks(self, until_s: float = float("inf")) -> None:
        """End the attacks that are due at a time."""
        due = [each for each in self._later if each[0] <= until_s]
        self._later = [each for each in self._later if each[0] > until_s]
        for _, end in due:
            end()

    # --- a round

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Start all VMs and the threads of the owners, of root and of the check."""
        with ThreadPoolExecutor(len(OWNERS)) as pool:
            list(pool.map(self.begin, OWNERS))
        threads = [
            threading.Thread(target=self.watch, daemon=True),
            threading.Thread(target=self.be_root, args=(self.seed,), daemon=True),
            *(threading.Thread(target=self.own, args=(uid, self.seed + uid), daemon=True) for uid in OWNERS),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.over.set()
            self.end_attacks()
            for thread in threads:
                thread.join(2 * ANSWER_S)
                assert not thread.is_alive()

    def begin(self, uid: int) -> None:
        """Start the VMs of a user."""
        for name in OWNERS[uid]:
            self.renew(uid, name)

    def run(self) -> str:
        """Run a whole round; return a summary of its attacks.  Raises AssertionError if a guest was lost."""
        with self.at_work():
            end_s, longest_s = time.monotonic() + self.duration_s, 1.0 if self.is_long else 0.5
            while time.monotonic() < end_s and not self.over.wait(self.random.uniform(0.05, longest_s)):
                self.attack()
        spared = [life for life in self.lives if not life.excused]
        self.log.note("--- the end")
        rows = self.rows()
        for life in spared:
            self.look_at(life)
        lost = [life.name for life in spared if life.ended or not is_running(rows.get(life.name), life)]
        for uid, names in OWNERS.items():
            for name in names:
                if not self.faults and all(life.name != name for life in spared):
                    self.renew(uid, name)
                    self.look_at(self.lives[-1])
        for life in self.lives:
            life.close()
        for go_on in self._for_good:
            go_on()
        said = (
            f"seed {self.seed}: {self.done.total()} attacks in {self.duration_s:.0f} s"
            f" ({', '.join(f'{what} {count}' for what, count in sorted(self.done.items()))});"
            f" {len(self.lives)} lives, which answered {sum(life.beats for life in self.lives)} times,"
            f" {len(spared)} to the end;"
            f" lost guests: {len(lost)}"
        )
        assert not self.faults, f"{self.faults}; {said}\n{self.vmd.log}"
        assert not lost, f"{lost}; {said}\n{self.vmd.log}"
        return said


def is_running(row: VmInfo | None, life: Life) -> bool:
    """Return whether a VM still runs in the same process."""
    return row is not None and (row.state, row.pid) == ("running", life.pid)


def is_core(title: str) -> bool:
    """Return whether a process belongs to no VM and is not vmm.  The end of vmm would end all guests."""
    return title != "vmd: vmm" and not is_of_a_vm(title)


def is_of_a_vm(title: str) -> bool:
    """Return whether a process belongs to a named VM."""
    return title.startswith("vmd: vm/")


def is_kept(title: str) -> bool:
    """Return whether a process belongs to a VM of KEPT."""
    return is_of_a_vm(title) and title.split("/")[1] in KEPT


def kind_of(title: str) -> str:
    """Return the kind of a process."""
    words = title.removeprefix("vmd: ").split("/")
    if words[0] == "vm" and len(words) > 1:
        return f"vm/*/{words[2].rstrip('0123456789')}" if len(words) > 2 else "vm/*"
    if len(words) > 1 and words[1] != "reserve":
        return f"{words[0]}/*"
    return "/".join(words)


def children_of(pid: int) -> list[int]:
    """Return the children of a process, or of its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def title_of(pid: int) -> str:
    """Return the title of a process; empty if it has none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
    except OSError:
        return ""


def is_below(pid: int, ancestor: int) -> bool:
    """Return whether a process descends from another one."""
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            return False
        if pid == ancestor:
            return True
    return False


def configuration(directory: Path, storage: Path) -> str:
    """Return a configuration of 8 VMs of 3 users, each with a disk; their kinds of interfaces differ.

    The disk of ON_STORAGE is the file `storage`, whose format vmd detects.
    """
    conf = [f"socket owner :{MAY_CONNECT}\n", f'switch "lan" {{\n    interface {BRIDGE}\n}}\n']
    nics = (("local interface",), ('interface switch "lan"',), ('interface switch "lan"', "local interface"), ())
    for number, (uid, name) in enumerate((uid, name) for uid, names in OWNERS.items() for name in names):
        image = directory / f"{name}.img"
        image.write_bytes(bytes(1 << 20))
        disk = f'disk "{storage}"' if name == ON_STORAGE else f'disk "{image}" format raw'
        conf.append(vm_block(name, f"owner {uid}", disk, *nics[number % len(nics)]))
    return "".join(conf)
