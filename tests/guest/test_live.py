"""vmctl send -l with the whole daemon: guests write memory, and check it, while they are sent."""

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.test_transfer import PROMPT, ROUNDS, answers, running, works
from tests.support import churn
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.transfers import ended, from_file, move, to_file, vmctl
from vmd.vm.stream import PREAMBLE, STILL, VERSION

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

SAID = re.compile(r"vmctl: sent vm \d+ successfully \((.+), (\d+) rounds?, stood still for (\d+) ms\)\n")
SOME = 1 << 16  # bytes of a stream


def rounds(said: str) -> int:
    """Return the number of rounds of a successful transfer."""
    found = SAID.fullmatch(said)
    assert found is not None, said
    return int(found[2])


@contextmanager
def storing(tmp_path: Path, mib: int, rest_ms: int) -> Iterator[Daemon]:
    """Yield a daemon whose VM `a` repeatedly writes each of its pages, after checking the page's earlier content."""
    cmdline = f"mib={mib} again rest={rest_ms}"
    with running(tmp_path, "fill", cmdline, ready="pass 16\r\n") as vmd:
        yield vmd


def has_lost_nothing(vmd: Daemon, name: str) -> None:
    """Raise AssertionError unless the guest has found all earlier content in more than one whole pass."""
    with vmd.console(name) as console:
        for _ in range(3):
            console.expect("pass ", DEADLINE_S)
        assert "lost" not in console.text()


@pytest.mark.deep
@churn.WAYS
def test_moving_while_it_runs_under_load(tmp_path: Path, cmdline: str, lines: tuple[str, ...]) -> None:
    """The VM moves there and back: no request, interrupt or byte of the disk is lost."""
    with running(tmp_path, "blk", f"churn {cmdline}", *lines, ready="churn: begin") as vmd:
        before = works(vmd, "a")
        for here, there in (("a", "c"), ("c", "a")):
            assert rounds(move(vmd, here, there, send=("-l",))[0]) >= 2
            now = works(vmd, there)
            assert now.rounds > before.rounds
            before = now
        with vmd.console("a") as console:
            churn.finish(console)
            console.drain(DEADLINE_S)


@pytest.mark.deep
def test_a_guest_that_stores_faster_than_it_is_sent(tmp_path: Path) -> None:
    """The guest is paused after the largest number of rounds, and finds all its memory."""
    with storing(tmp_path, 16, 0) as vmd:
        said, _ = move(vmd, "a", "c", send=("-l", "-d", "1", "-r", "3"))
        assert rounds(said) == 3
        has_lost_nothing(vmd, "c")
        vmd.must("stop", "-fw", "c")


@pytest.mark.deep
def test_a_guest_that_stores_now_and_then(tmp_path: Path) -> None:
    """The guest moves repeatedly between two daemons.  The goal is reached long before the limit of rounds."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with storing(tmp_path / "here", 32, 50) as here, Daemon(tmp_path / "there") as there:
        for _ in range(2):
            assert rounds(move(here, "a", "a", send=("-l", "-d", "1000"), into=there)[0]) < 30
            has_lost_nothing(there, "a")
            move(there, "a", "a", send=("-l", "-d", "1000"), into=here)
            has_lost_nothing(here, "a")
        here.must("stop", "-fw", "a")


@pytest.mark.deep
def test_keep(tmp_path: Path) -> None:
    """The guest and its copy go on, and each finds its memory.  The guest can be sent again, also paused."""
    with storing(tmp_path, 8, 20) as vmd:
        assert rounds(to_file(vmd, "a", tmp_path / "live", "-lk")) >= 2
        has_lost_nothing(vmd, "a")
        assert "round" not in to_file(vmd, "a", tmp_path / "still", "-k")
        assert versions(tmp_path / "live", tmp_path / "still") == [VERSION, STILL]
        vmd.must("stop", "-fw", "a")
        for name in ("live", "still"):
            assert from_file(vmd, "a", tmp_path / name)[0] == 0
            has_lost_nothing(vmd, "a")
            vmd.must("stop", "-fw", "a")


def versions(*files: Path) -> list[int]:
    """Return the versions of streams."""
    return [PREAMBLE.unpack_from(file.read_bytes())[1] for file in files]


@pytest.mark.deep
def test_a_paused_vm_is_sent_without_rounds(tmp_path: Path) -> None:
    """No rounds are needed, and a reader of an older version can read the stream."""
    with running(tmp_path, "demo", "", ready=PROMPT) as vmd:
        vmd.must("pause", "a")
        assert "round" not in to_file(vmd, "a", tmp_path / "stream", "-lk")
        assert vmd.status("a")["state"] == "paused"
        assert versions(tmp_path / "stream") == [STILL]
        vmd.must("unpause", "a")
        answers(vmd, "a")


@pytest.mark.deep
def test_impossible_goals(tmp_path: Path) -> None:
    """An impossible goal is refused with the limit, also with --json, and the VM goes on."""
    with running(tmp_path, "demo", "", ready=PROMPT) as vmd:
        for words, what in (
            (("-d", "3600001"), "stand-still of 3600001 ms (limit is 3600000)"),
            (("-r", "1001"), "1001 rounds (limit is 1000)"),
        ):
            with (tmp_path / "stream").open("wb") as stream:
                done = ended(vmctl(vmd, "send", "-l", *words, "a", stdout=stream.fileno()))
            assert done == (1, f"vmctl: send vm command failed: {what}\n")
        answers(vmd, "a")
        document = json.loads(to_file(vmd, "a", tmp_path / "stream", "--json", "-l"))
        assert {"rounds", "still_ms"} < set(document)


# --- cut off ----------------------------------------------------------------------------------------------------------


def cut_off(vmd: Daemon, after_bytes: int, signum: int) -> bool:
    """Send `a`, read part of the stream, and end the client; return whether everything was sent by then."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    client = vmctl(vmd, "send", "-l", "a", stdout=writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        while after_bytes > 0 and (data := stream.read(min(SOME, after_bytes))):
            after_bytes -= len(data)
        client.send_signal(signum)
        status, _ = ended(client)
    return status == 0


@pytest.mark.deep
def test_interrupted_in_any_round(tmp_path: Path) -> None:
    """The guest goes on without loss, and can be sent."""
    choice = random.Random(3)
    with storing(tmp_path, 8, 10) as vmd:
        for signum in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
            assert not cut_off(vmd, choice.randrange(8 << 20), signum)
            vmd.wait_state("a", "running")
            has_lost_nothing(vmd, "a")
        move(vmd, "a", "c", send=("-l",))
        has_lost_nothing(vmd, "c")
        vmd.must("stop", "-fw", "c")


@pytest.mark.deep
def test_a_reader_that_goes(tmp_path: Path) -> None:
    """The reader closes the stream in the middle, and the sender's VM goes on."""
    with storing(tmp_path, 8, 10) as vmd:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        client = vmctl(vmd, "send", "-l", "a", stdout=writing)
        os.close(writing)
        assert os.read(reading, SOME)
        os.close(reading)
        assert ended(client) == (
            1,
            "vmctl: send vm command failed: vm a was not sent, and is as before: the stream was closed by its reader\n",
        )
        has_lost_nothing(vmd, "a")
        vmd.must("stop", "-fw", "a")


ENDINGS = {
    "force": "stopped by force",
    "off": "powered off by the guest",
    "reset": "was reset by its guest meanwhile",
}


@pytest.mark.deep
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_guest_that_ends_while_it_is_sent(tmp_path: Path, ending: str) -> None:
    """The sender is told how the guest ended, the receiver that the stream is cut off.  A reset counts as an end."""
    with running(tmp_path, "demo", "", ready=PROMPT) as vmd:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        client = vmctl(vmd, "send", "-l", "a", stdout=writing)
        os.close(writing)
        vmd.wait_state("a", "sending")
        if ending == "force":
            vmd.must("stop", "-fw", "a")
        else:
            with vmd.console("a") as console:
                console.type(f"{ending}\r")
                vmd.wait_state("a", "stopped" if ending == "off" else "running")
        status, said = ended(client)
        assert status == 1
        assert said == f"vmctl: send vm command failed: vm a: {ENDINGS[ending]}\n"
        with os.fdopen(reading, "rb") as stream:
            (tmp_path / "stream").write_bytes(stream.read())
        status, said = from_file(vmd, "c", tmp_path / "stream")
        assert status == 1
        assert "before its end" in said
        if ending == "reset":
            answers(vmd, "a")


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_cut_at_random(tmp_path: Path) -> None:
    """Transfers are cut off thirty times, at random places and in random ways; two moves succeed in between."""
    choice = random.Random(13)
    with running(tmp_path, "blk", "churn smp", "vcpus 2", ready="churn: begin") as vmd:
        before = works(vmd, "a")
        for number in range(30):
            signum = choice.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
            assert not cut_off(vmd, choice.randrange(1 << 20), signum)
            vmd.wait_state("a", "running")
            now = works(vmd, "a", 1)
            assert now.rounds > before.rounds
            before = now
            if number % 15 == 7:
                move(vmd, "a", "c", send=("-l",))
                move(vmd, "c", "a", send=("-l",))
        works(vmd, "a", ROUNDS)
