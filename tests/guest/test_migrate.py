"""vmctl migrate between two daemons: there and back, refused early, interrupted anywhere (*vmd.parent.migrations*)."""

import contextlib
import random
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import DONE
from tests.guest.test_transfer import answers, block, works
from tests.support import migration
from tests.support.blkdisk import Disk
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.images import problems, qemu
from tests.support.keeper import KeptDaemon
from tests.support.migration import GUEST, HERE, PLACES, THERE, VICTIMS, Plan
from vmd.client import Client

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(300)]

DEEP_ROUNDS = 12  # with each kind of disk
SEED = 13
STREAM_BYTES = 1 << 20  # the approximate stream size of the guest that keeps its disk busy


class Two(NamedTuple):
    """Two daemons."""

    here: Daemon
    there: Daemon
    folder: Path

    def migrate(self, *arguments: str, back: bool = False, **cut: object) -> tuple[int, str]:
        """Migrate VM `a`; return exit status and output."""
        source, target = (self.there, self.here) if back else (self.here, self.there)
        plan = Plan(self.folder / "plan", target, out_of=source, **cut)
        done = source.vmctl("migrate", *arguments, "-e", plan.command, "a", "there")
        for vmd in (self.here, self.there):
            if vmd.process is not None and cut.get("victim") in (HERE, THERE) and is_killed(vmd):
                vmd.start()
        return done.returncode, done.stderr


def is_killed(vmd: Daemon) -> bool:
    """Return whether a daemon has ended; reap it if so."""
    assert vmd.process is not None
    return vmd.process.poll() is not None


@pytest.fixture
def kind() -> str:
    """Return the format of the disk; a test may give another one."""
    return "raw"


@pytest.fixture
def two(tmp_path: Path, kind: str) -> Iterator[Two]:
    """VM `a` keeps its disk busy at one of two daemons."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    disk = Disk(tmp_path / "disk.raw").path
    if kind == "qcow2":
        disk = tmp_path / "disk.qcow2"
        qemu("qemu-img", "convert", "-f", "raw", "-O", kind, tmp_path / "disk.raw", disk)
    conf = block("a", "blk", "churn smp", f'disk "{disk}" format {kind}', "vcpus 2")
    with KeptDaemon(tmp_path / "here", conf) as here, KeptDaemon(tmp_path / "there") as there:
        here.must("start", "a")
        with here.console("a") as console:
            console.expect("churn: begin", DEADLINE_S)
        yield Two(here, there, tmp_path)
        for vmd in (here, there):
            if state(vmd):
                vmd.vmctl("stop", "-fw", "a")
    if kind == "qcow2":
        assert problems(disk).keys() <= {"leaks"}  # a killed process may leave no other problem


def state(vmd: Daemon, name: str = "a") -> str:
    """Return the state of a VM; "" if the daemon does not have it."""
    with contextlib.closing(Client(str(vmd.socket))) as client:
        return next((row.state for row in client.list_vms() if row.name == name), "")


def wait(what: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def test_to_and_fro(two: Two) -> None:
    """The VM goes on at the target without loss, is gone at the source, and returns.  The message has the figures."""
    before = works(two.here, "a")

    status, said = two.migrate("-v")

    assert (status, state(two.here), state(two.there)) == (0, "stopped", "running"), said
    steps = ("there accepts the VM", "there has received the VM", "the disks are unlocked here")
    assert said.startswith("".join(f"vmctl: {step}\n" for step in steps))
    assert "vmctl: migrated vm 1 to there successfully, id 1 there (" in said
    assert " downtime " in said
    assert two.here.status("a")["text"] == "sent"
    now = works(two.there, "a")
    assert now.rounds > before.rounds
    two.there.must("pause", "a")
    assert two.migrate(back=True)[0] == 0
    assert (state(two.here), two.there.rows()) == ("paused", [])
    two.here.must("unpause", "a")
    assert works(two.here, "a").rounds > now.rounds


@pytest.mark.deep
def test_in_doubt(two: Two) -> None:
    """After an interruption behind the commit the VM runs at the target, and stays paused at the source."""
    status, said = two.migrate(place="before running", victim=migration.SHELL)

    assert status == 1
    assert "vm a is in doubt, and paused: it may run elsewhere: there: the remote command has ended" in said
    wait(lambda: state(two.there) == "running")
    row = two.here.status("a")
    assert row["state"] == "in doubt"
    assert row["text"].startswith("it may run elsewhere: there: the remote command has ended with status 255")
    works(two.there, "a")
    for command in (("unpause", "a"), ("unpause", "-f", "a")):
        refused = two.here.vmctl(*command)
        assert refused.returncode == 1
        assert "vm a stays in doubt: vioblk0 " in refused.stderr or "vm a stays in doubt: disk" in refused.stderr
    for command in (("pause", "a"), ("stop", "a"), ("send", "a")):
        assert two.here.vmctl(*command).returncode == 1
    two.here.must("stop", "-fw", "a")
    works(two.there, "a")


@pytest.mark.deep
def test_in_doubt_for_ever_if_it_has_run_there(two: Two) -> None:
    """The source stays in doubt when the disks are unlocked but have changed."""
    two.migrate(place="before running", victim=migration.SHELL)
    wait(lambda: state(two.there) == "running")
    works(two.there, "a")
    two.there.must("stop", "-fw", "a")
    refused = two.here.vmctl("unpause", "-f", "a")
    assert refused.returncode == 1
    assert "has been written to since it was let go: its guest has run elsewhere" in refused.stderr
    row = two.here.status("a")
    assert (row["state"], "its guest has run elsewhere" in row["text"]) == ("in doubt", True)


@pytest.mark.deep
def test_in_doubt_for_ever_if_it_has_run_there_and_written_nothing(tmp_path: Path) -> None:
    """The guest at its prompt does not write to its disk, but the source still sees that it has run."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    disk = Disk(tmp_path / "disk")
    conf = block("a", "demo", "", f'disk "{disk.path}" format raw')
    with Daemon(tmp_path / "here", conf) as here, Daemon(tmp_path / "there") as there:
        here.must("start", "a")
        Two(here, there, tmp_path).migrate(place="before running", victim=migration.SHELL)
        wait(lambda: state(there) == "running")
        answers(there, "a")
        there.must("stop", "-fw", "a")
        refused = here.vmctl("unpause", "-f", "a")
        assert (refused.returncode, "its guest has run elsewhere" in refused.stderr) == (1, True)
        here.must("stop", "-fw", "a")
    disk.check_untouched()


@pytest.mark.deep
def test_the_source_goes_on_if_the_vm_never_ran_at_the_target(two: Two) -> None:
    """The message to run was lost.  The VM goes on at the source by itself, as soon as it has its disks again."""
    before = works(two.here, "a")
    assert two.migrate(place="before commit", victim=migration.SHELL)[0] == 1
    wait(lambda: state(two.here) == "running")
    assert works(two.here, "a").rounds > before.rounds
    assert two.there.rows() == []


@pytest.mark.deep
def test_an_interrupt_comes_too_late(two: Two) -> None:
    """An interrupt before the disks are unlocked keeps the VM here; after that the first one is ignored."""
    status, said = two.migrate(place="after asked", victim=migration.OPERATOR)
    assert (status, said.splitlines()[-1]) == (1, "vmctl: migrate: interrupted")
    wait(lambda: state(two.here) == "running" and not two.there.rows())

    status, said = two.migrate(place="after commit", victim=migration.OPERATOR)

    assert status == 0, said
    assert "vmctl: the VM is being handed over: another interrupt leaves it in doubt\n" in said
    works(two.there, "a")


@pytest.mark.deep
def test_without_disks_only_its_operator_knows(tmp_path: Path) -> None:
    """Without disks no lock shows whether the VM runs at the target.  Only `unpause -f` lets it go on."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with Daemon(tmp_path / "here", block("a", "demo")) as here, Daemon(tmp_path / "there") as there:
        two = Two(here, there, tmp_path)
        here.must("start", "a")
        assert two.migrate(place="before commit", victim=migration.SHELL)[0] == 1
        assert state(here) == "in doubt"
        refused = here.vmctl("unpause", "a")
        assert refused.returncode == 1
        assert "if it does not run there: `vmctl unpause -f`" in refused.stderr
        here.must("unpause", "-f", "a")
        answers(here, "a")
        assert two.migrate()[0] == 0
        answers(there, "a")


# --- refused, while the guest runs on ------------------------------------------------------------------------------


@pytest.mark.deep
def test_refused_early(two: Two, tmp_path: Path) -> None:
    """The guest runs on, nothing is left at the target, and the message has the target's reason."""
    before = works(two.here, "a")
    two.there.conf.write_text(block("a", "demo"))
    two.there.must("reload")
    two.there.must("start", "a")
    status, said = two.migrate()
    assert (status, "there: vm a exists, and is running" in said) == (1, True), said
    two.there.must("stop", "-fw", "a")
    two.there.conf.write_text("")
    two.there.must("reload")
    disk = tmp_path / "disk.raw"
    disk.rename(tmp_path / "elsewhere")
    disk.write_bytes(bytes(1 << 20))
    status, said = two.migrate()
    assert status == 1
    assert f"there: vm a: disk {disk}: it is not in use, so it is not the sender's" in said
    disk.unlink()
    status, said = two.migrate()
    assert (status, f"there: vm a: disk {disk}" in said) == (1, True), said
    (tmp_path / "elsewhere").rename(disk)
    assert (state(two.here), state(two.there)) == ("running", "")
    assert works(two.here, "a").rounds > before.rounds
    assert two.migrate()[0] == 0


# --- cut at any place ----------------------------------------------------------------------------------------------


class Counters:
    """Counts of the rounds' results."""

    def __init__(self) -> None:
        self.rounds = self.moved = self.stayed = self.lost = self.two = self.wrong = 0
        self.in_doubt = self.doubted_early = 0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds: moved={self.moved} stayed={self.stayed} lost={self.lost} in_doubt={self.in_doubt}"
            f" two={self.two} wrong bytes={self.wrong} in doubt before the commit={self.doubted_early}"
        )


def rounds(two: Two, count: int, seed: int) -> Counters:
    """Migrate there and back, each time with an interruption at a random place."""
    choice = random.Random(seed)
    found = Counters()
    ends = [two.here, two.there]
    for number in range(count):
        place, victim = choice.choice(PLACES), choice.choice(VICTIMS)
        cut = {"bytes": choice.randrange(STREAM_BYTES), "later_ms": choice.randrange(400)}
        source, target = ends
        found.rounds += 1
        said = two.migrate(back=source is two.there, place=place, victim=victim, **cut)[1]
        plan = (place, victim, said.strip())
        doubted = state(source) == "in doubt"
        found.in_doubt += doubted
        early = place in migration.BEFORE_COMMIT and (place, victim) != migration.ONLY_SEEN_LATER
        found.doubted_early += doubted and early
        winner = settle(two, source, target, found, plan)
        became = "moved" if winner is target else "stayed" if winner is source else "lost"
        print(f"{number}: {place}, {victim}: {'doubt, ' if doubted else ''}{became}: {said.strip()}")
        if winner is None:
            assert victim == GUEST, plan
            found.lost += 1
            two.here.must("start", "a")
            with two.here.console("a") as console:
                console.expect("churn: begin", DEADLINE_S)
            winner = two.here
        elif winner is target:
            found.moved += 1
        else:
            found.stayed += 1
        try:
            works(winner, "a", 2)
        except AssertionError as error:
            found.wrong += 1
            raise AssertionError(f"{plan}: {error}") from error
        ends = [winner, two.there if winner is two.here else two.here]
    return found


def settle(two: Two, source: Daemon, target: Daemon, found: Counters, plan: object) -> Daemon | None:
    """Wait until it is clear where the VM runs; return that daemon, or None if the VM was killed at the target."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        here, there = state(source), state(target)
        if here == there == "running":
            found.two += 1
            raise AssertionError(f"{plan}: two")
        if there == "running" and here in ("stopped", ""):
            return target
        if here == "running" and there in ("stopped", ""):
            return source
        if here in ("stopped", "") and there in ("stopped", ""):
            return None
        if here == "in doubt" and there == "running":
            works(target, "a", 1)
            assert source.vmctl("unpause", "-f", "a").returncode == 1, plan
            source.must("stop", "-fw", "a")
        elif here == "in doubt" and "has run elsewhere" in source.status("a")["text"]:
            source.must("stop", "-fw", "a")
        assert time.monotonic() < deadline, f"{plan}: {here} and {there}\n{two.here.log}\n{two.there.log}"
        select.select([], [], [], 0.02)


KINDS = pytest.mark.parametrize("kind", ["raw", "qcow2"])


@pytest.mark.deep
@pytest.mark.timeout(1200)
@KINDS
def test_cut_at_random(two: Two, record_property: Callable[[str, object], None]) -> None:
    """The VM never runs twice, no byte is wrong, and it is in doubt only after the commit."""
    found = rounds(two, DEEP_ROUNDS, SEED)
    print(found)
    record_property(DONE, str(found))
    assert (found.two, found.wrong, found.doubted_early) == (0, 0, 0)


@pytest.mark.soak
@pytest.mark.timeout(0)
@KINDS
def test_cut_at_random_for_long(
    two: Two, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    """Run as many rounds as requested."""
    found = rounds(two, pytestconfig.getoption("--sequences"), pytestconfig.getoption("--seed"))
    record_property(DONE, str(found))
    assert (found.two, found.wrong, found.doubted_early) == (0, 0, 0)
