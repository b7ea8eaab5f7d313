"""Random sequences of disk requests on every kind of image and storage, checked with a model: arch. 5.

A seed determines a sequence: its cell (the kind of image, its storage, how it ends), and its steps.  A step depends
only on the seed and its own number, so any step can be left out:

    python -m tests.support.diskrounds 1234             runs the sequence again
    python -m tests.support.diskrounds 1234 --only 3,17  only some of its steps
    python -m tests.support.diskrounds 1234 --shrink     finds the steps that the failure needs
"""

import argparse
import contextlib
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.blkdriver import (
    DISCARD,
    FEATURES,
    FLUSH,
    OK,
    READ,
    SLOTS,
    WRITE_DATA,
    WRITE_THROUGH,
    WRITE_ZEROES,
    BlockDriver,
    Request,
)
from tests.support.diskmodel import ANY, SECTOR, START, ZERO, Change, DiskModel, written
from tests.support.diskstorage import STORAGES
from tests.support.images import KIB, MIB, flat_file, opened, problems, qemu, read
from vmd.ipc import devmsg

FORMATS = ("raw", "v2", "v3", "v2-overlay", "v3-overlay")
CLUSTERS = (512, 4 * KIB, 64 * KIB, 2 * MIB)
ENDS = ("orderly", "killed")
SHOWN_STEPS = 25
UNMAP = 1
SHARED_MEMORY = "/dev/shm"


# --- cells ----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The factors of one sequence."""

    format: str
    cluster: int
    storage: str
    end: str

    def __str__(self) -> str:
        size = f"-{self.cluster}" if self.cluster else ""
        return f"{self.format}{size}/{self.storage}/{self.end}"


def pairs(cell: Cell) -> set[tuple[tuple[int, object], tuple[int, object]]]:
    """Return all pairs of a cell's factors."""
    return set(itertools.combinations(enumerate(cell), 2))


def ordered(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Return cells in an order in which as few cells as possible cover all pairs of factors."""
    rest = list(cells)
    random.Random(0).shuffle(rest)
    missing = set().union(*map(pairs, rest))
    result = []
    while missing:
        best = max(rest, key=lambda cell: len(pairs(cell) & missing))
        missing -= pairs(best)
        rest.remove(best)
        result.append(best)
    return (*result, *rest)


CELLS = ordered(
    Cell(image, cluster, storage, end)
    for image in FORMATS
    for cluster in (CLUSTERS if image != "raw" else (0,))
    for storage in STORAGES
    for end in ENDS
)
# This many seeds from the first cover all pairs of factors.
PAIRWISE = next(
    count for count in range(len(CELLS))
    if set().union(*map(pairs, CELLS[:count])) == set().union(*map(pairs, CELLS))
)  # fmt: skip


# --- steps ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One request, or another event of a disk."""

    number: int
    kind: str
    ranges: tuple[tuple[int, int], ...] = ()  # sector, number of sectors

    def __str__(self) -> str:
        where = ", ".join(f"{count} at {first}" for first, count in self.ranges)
        return f"{self.number}: {self.kind} {where}".rstrip()


REQUESTS = ("write", "read", "flush", "discard", "zero", "unmap")


class Plan:
    """The sequence that a seed determines."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cell = CELLS[seed % len(CELLS)]
        choice = self.choice = random.Random(seed)
        cluster = self.cell.cluster or 4 * KIB
        most = 4 * MIB if cluster < 64 * KIB else 6 * MIB if cluster < MIB else 14 * MIB
        self.sectors = choice.randrange(most // 4, most) // SECTOR
        if choice.random() < 0.3:
            self.sectors = self.sectors * SECTOR // cluster * cluster // SECTOR
        self.cluster_sectors = cluster // SECTOR
        # A raw file may end inside a sector.  That last sector counts as a whole one.
        odd = self.cell.format == "raw" and "device" not in self.cell.storage and choice.random() < 0.3
        self.bytes = self.sectors * SECTOR - (choice.choice((1, 5, SECTOR - 1)) if odd else 0)
        # Every seed weighs the kinds of steps differently: a kind that is rare in one sequence dominates another.
        self.weights = [choice.choice((1, 3, 9)), *(choice.choice((0, 1, 1, 3)) for _ in REQUESTS[1:])]
        self.depth = choice.choice((1, 4, SLOTS))
        self.slots = choice.choice((SLOTS, SLOTS, 6))
        self.window = choice.choice((1, 0.3, 0.05))  # the part of the disk that most requests go to
        self.long = choice.choice((8, 64, 600, 4000))  # the longest of most requests, in sectors
        self.write_through = choice.random() < 0.15
        self.steps = list(self._steps(choice))

    def _steps(self, choice: random.Random) -> Iterable[Step]:
        count = choice.choice((10, 25, 50, 80))
        lives = choice.choice((1, 1, 2, 3))
        grown = choice.randrange(count) if choice.random() < 0.7 else -1
        number = itertools.count()
        for life in range(lives):
            for place in range(count // lives):
                if life * (count // lives) + place == grown:
                    yield Step(next(number), "grow")
                if choice.random() < 0.02:
                    yield Step(next(number), choice.choice(("pause", "reset")))
                yield self._request(next(number))
            if (self.cell.end if life == lives - 1 else choice.choice(ENDS)) == "killed":
                yield Step(next(number), "flush")
                if choice.random() < 0.8:
                    yield Step(next(number), "wait")
                for _ in range(choice.randrange(6)):
                    yield self._request(next(number))
                yield Step(next(number), "kill")
            else:
                yield Step(next(number), "end")

    def _request(self, number: int) -> Step:
        choice = random.Random(f"{self.seed} {number}")
        (kind,) = choice.choices(REQUESTS, self.weights)
        if kind == "flush":
            return Step(number, kind)
        if kind in ("read", "write"):
            return Step(number, kind, (self._range(choice, self.long),))
        count = choice.choice((1, 1, 2, 4 if kind != "discard" else 16))
        longest = choice.choice((self.long, 8 * self.cluster_sectors))
        return Step(number, kind, tuple(self._range(choice, longest) for _ in range(count)))

    def _range(self, choice: random.Random, longest: int) -> tuple[int, int]:
        """Return first sector and number of sectors; often in the window, often with an end at a cluster boundary."""
        sectors, unit = self.sectors, self.cluster_sectors
        window = max(1, int(sectors * self.window)) if choice.random() < 0.8 else sectors
        count = choice.choice((1, 8, unit, choice.randrange(1, longest + 1)))
        first = choice.randrange(window)
        if choice.random() < 0.5:
            first = max(0, first // unit * unit + choice.choice((0, 0, 0, -1, 1)))
        if choice.random() < 0.05:
            first = sectors - count
        first = min(max(0, first), sectors - 1)
        return first, min(count, sectors - first)


# --- images -----------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A new image."""

    path: Path
    start: bytes  # the content of the disk
    backing: tuple[Path, ...] = ()
    formats: tuple[str, ...] = ("raw",)
    dirty: bool = False  # its refcounts may be wrong
    snapshot: str = ""


def make_image(plan: Plan, folder: Path) -> Made:
    """Make the image of a plan, as a regular file."""
    if plan.cell.format == "raw":
        return make_raw(plan, folder)
    choice, size = plan.choice, plan.sectors * SECTOR
    path, flat = folder / "made", folder / "flat"
    options = f"compat={'0.10' if 'v2' in plan.cell.format else '1.1'},cluster_size={plan.cell.cluster}"
    bits = choice.choice((1, 2, 8, 16, 32, 64)) if "v3" in plan.cell.format and choice.random() < 0.4 else 16
    if bits != 16:
        options += f",refcount_bits={bits}"
    if "overlay" in plan.cell.format:
        base, length = folder / "base", choice.choice((size, size, size // 3 // SECTOR * SECTOR, size + 64 * KIB))
        start = bytes(flat_file(flat, length, plan.seed, density=0.3))
        kind = choice.choice(("raw", "qcow2"))
        qemu("qemu-img", "convert", "-f", "raw", "-O", kind, flat, base)
        qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, "-F", kind, "-b", base, path, size)
        return Made(path, start[:size].ljust(size, b"\0"), (base,), ("qcow2", kind))
    if choice.random() < 0.4:
        start = bytes(flat_file(flat, size, plan.seed, density=0.2))
        compress = ("-c",) if choice.random() < 0.5 else ()
        qemu("qemu-img", "convert", *compress, "-f", "raw", "-O", "qcow2", "-o", options, flat, path)
        dirty = "v3" in plan.cell.format and choice.random() < 0.3
        if dirty:
            forget_refcounts(path, choice)
        snapshot = "before" if bits > 4 and not dirty and choice.random() < 0.3 else ""
        if snapshot:
            qemu("qemu-img", "snapshot", "-c", snapshot, path)
        return Made(path, start, (), ("qcow2",), dirty, snapshot)
    if choice.random() < 0.3:
        options += ",preallocation=metadata"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, path, size)
    return Made(path, bytes(size), (), ("qcow2",))


def make_raw(plan: Plan, folder: Path) -> Made:
    """Make a raw image."""
    path = folder / "made"
    start = bytes(flat_file(path, plan.bytes, plan.seed, density=0.3 * plan.choice.randrange(2)))
    return Made(path, start.ljust(plan.sectors * SECTOR, b"\0"))


def forget_refcounts(path: Path, choice: random.Random) -> None:
    """Change an image as a killed writer with lazy refcounts leaves it: some used clusters are marked free."""
    raw = bytearray(path.read_bytes())
    cluster, order = 1 << int.from_bytes(raw[20:24], "big"), int.from_bytes(raw[96:100], "big")
    per_block = cluster * 8 >> order
    table = int.from_bytes(raw[48:56], "big")
    clusters = len(raw) // cluster
    first = choice.randrange(clusters // 2, clusters + 1)
    for number in range(clusters):
        at = table + number // per_block * 8
        block = int.from_bytes(raw[at : at + 8], "big")
        bit = number % per_block << order
        if number >= first and block:
            width = 1 << order
            if width >= 8:
                place = block + bit // 8
                raw[place : place + width // 8] = bytes(width // 8)
            else:
                raw[block + bit // 8] &= ~((1 << width) - 1 << bit % 8)
    raw[79] |= 1
    path.write_bytes(raw)


# --- one sequence ---------------------------------------------------------------------------------------------------


class Flying(NamedTuple):
    """The record of a request in flight."""

    step: Step
    change: Change | None
    asked_at: int
    must_succeed: bool
    broken: bool  # the storage had failed before the request was submitted


class Difference(AssertionError):
    """The disk differs from the model."""


class Run:
    """Carries out a plan."""

    def __init__(self, plan: Plan, folder: Path, only: frozenset[int] | None = None) -> None:
        self.plan = plan
        self.folder = folder
        self.steps = [
            step for step in plan.steps
            if only is None or step.number in only or step is plan.steps[-1]
        ]  # fmt: skip
        self.history: list[str] = []
        self.was_killed = False
        self.was_limited = False

    def run(self) -> None:
        """Carry out the plan.  Raises Difference."""
        choice = random.Random(f"storage {self.plan.seed}")
        with STORAGES[self.plan.cell.storage](self.folder, choice) as self.storage:
            self.made = made = make_image(self.plan, self.folder)
            self.was_limited = self.storage.limited
            self.storage.raw = self.plan.cell.format == "raw"
            used = made.path.stat().st_size
            self.storage.place(made.path, used if self.storage.raw else used + 2 * self.plan.sectors * SECTOR)
            self.model = DiskModel(made.start)
            steps = iter(self.steps)
            for first in steps:
                self.storage.repair()
                self._live(itertools.chain([first], steps))
            if made.snapshot:
                self._compare_snapshot()

    def _fail(self, what: str) -> Difference:
        last = "\n    ".join(self.history[-SHOWN_STEPS:])
        return Difference(f"{what}\n  last steps:\n    {last}")

    # -- a life

    def _live(self, steps: Iterable[Step]) -> None:
        """Start a disk process, and do steps until one of them ends it."""
        features = WRITE_THROUGH if self.plan.write_through else FEATURES
        paths, formats = (self.storage.path, *self.made.backing), self.made.formats
        with BlockDriver(paths, formats, features=features, seed=self.plan.seed, slots=self.plan.slots) as self.driver:
            self.storage.confine(self.driver.device.child.pid)
            self._measure()
            for step in steps:
                self.history.append(str(step))
                if step.kind in ("end", "kill"):
                    self._end(killed=step.kind == "kill")
                    return
                self._do(step)

    def _measure(self) -> None:
        """Adapt the model: a raw disk on a block device is as long as the device, which may exceed the image."""
        sectors = len(self.model.start) // SECTOR
        if self.storage.raw and self.driver.sectors > sectors:
            with self.storage.path.open("rb") as file:
                self.model = self.model.settled(file.read(self.driver.sectors * SECTOR))
        elif self.driver.sectors != sectors:
            raise self._fail(f"the disk has {self.driver.sectors} sectors, not {sectors}")

    def _do(self, step: Step) -> None:
        driver = self.driver
        if step.kind == "grow":
            self.storage.grow()
        elif step.kind == "wait":
            self._drain()
        elif step.kind == "pause":
            driver.device.command(devmsg.PAUSE)
            driver.device.command(devmsg.RESUME)
        elif step.kind == "reset":
            driver.reset()
        else:
            self._make_room(step.ranges)
            self._submit(step)

    def _submit(self, step: Step) -> None:
        driver, model = self.driver, self.model
        most = driver.data_max // SECTOR
        ranges = [(first, min(count, most)) for first, count in step.ranges] if step.kind in ("read", "write") else [
            (first, count) for first, count in step.ranges
        ]  # fmt: skip
        changes = step.kind not in ("read", "flush")
        must = not self.storage.limited or not changes or (step.kind == "write" and model.holds_data(ranges))
        asked_at = model.tick()
        change = None
        if changes:
            forgets = step.kind == "discard" and self.storage.raw and self.storage.forgets
            value = step.number + 1 if step.kind == "write" else ANY if forgets else ZERO
            change = model.begin(value, ranges)
        note = Flying(step._replace(ranges=tuple(ranges)), change, asked_at, must, self.storage.broken)
        if step.kind == "read":
            driver.read(ranges[0][0], ranges[0][1] * SECTOR, note)
        elif step.kind == "write":
            first, count = ranges[0]
            driver.write(first, written(step.number + 1, first, count), note)
        elif step.kind == "flush":
            driver.flush(note)
        else:
            kind, flags = DISCARD if step.kind == "discard" else WRITE_ZEROES, UNMAP * (step.kind == "unmap")
            driver.change_ranges(kind, [(*one, flags) for one in ranges], note)

    def _make_room(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Wait until few enough requests are in flight and none of them overlaps the ranges."""
        driver = self.driver
        while len(driver.flying) >= min(self.plan.depth, driver.slots) or any(
            first < theirs + count and theirs < first + sectors
            for request in driver.flying.values()
            for theirs, count in self._note(request).step.ranges
            for first, sectors in ranges
        ):
            self._settle(driver.wait())

    def _drain(self) -> None:
        while self.driver.flying:
            self._settle(self.driver.wait())

    @staticmethod
    def _note(request: Request) -> Flying:
        assert isinstance(request.note, Flying)
        return request.note

    def _settle(self, requests: Sequence[Request]) -> None:
        """Record completed requests in the model."""
        for request in requests:
            note = self._note(request)
            if request.status != OK:
                self.history.append(f"{note.step.number}: failed with status {request.status}")
                if note.must_succeed and not self.storage.broken:
                    log = self.driver.device.read_log()
                    raise self._fail(f"step {note.step} failed with status {request.status}\n{log}")
            elif self.storage.broken:
                # After a failure of the storage only one thing is checked: a later flush must not succeed.
                if request.kind == FLUSH and note.broken:
                    raise self._fail(f"step {note.step} succeeded after data was lost")
            elif request.kind == READ:
                self._compare_read(note.step, self.driver.result(request))
            elif request.kind == FLUSH:
                self.model.flush_succeeded(note.asked_at)
            elif request.kind in (WRITE_DATA, WRITE_ZEROES):
                assert note.change is not None
                self.model.succeed(note.change, durable=self.plan.write_through)

    def _compare_read(self, step: Step, data: bytes) -> None:
        first = step.ranges[0][0]
        wrong = self.model.read(first, data)
        if wrong is not None:
            at = (wrong - first) * SECTOR
            raise self._wrong(f"step {step} read", wrong, data[at : at + SECTOR])

    def _wrong(self, who: str, sector: int, found: bytes, *, killed: bool = False) -> Difference:
        allowed = sorted(self.model.allowed(sector, killed=killed))
        names = {ANY: "anything", START: "what it held at first", ZERO: "zeroes"}
        texts = ", ".join(names.get(value, f"the write of step {value - 1}") for value in allowed)
        touched = [
            str(step) for step in self.steps
            if any(first <= sector < first + count for first, count in step.ranges)
        ]  # fmt: skip
        return self._fail(
            f"{who}: sector {sector} has {self._name(sector, found)}; the model allows {texts}\n"
            f"  steps that touch it: {'; '.join(touched)}"
        )

    def _name(self, sector: int, found: bytes) -> str:
        """Describe the bytes found in a sector."""
        if not any(found):
            return "zeroes"
        if found == self.model.content(START, sector):
            return "what it held at first"
        for step in self.steps:
            if found == written(step.number + 1, sector):
                return f"the write of step {step.number}"
        return f"{found[:16].hex()}…"

    # -- the end

    def _end(self, *, killed: bool) -> None:
        """End the process; check what QEMU and our own code read from the image."""
        device = self.driver.device
        if killed:
            device.child.kill()
            device.status()
            self._settle(self.driver.take())
            self.was_killed = True
        else:
            self._drain()
            log = self.driver.shut_down(quiet=False)
            if self.storage.broken:  # guarantees no more than after a kill
                killed = self.was_killed = True
            else:
                words = ("close:", "flush") if self.was_limited else ("close:", "flush", "request")
                if any(word in log for word in words):
                    raise self._fail(f"the log says:\n{log}")
        found = self._read_back()
        if len(found) != len(self.model.start):
            raise self._fail(f"{len(found)} bytes are read of a disk of {len(self.model.start)}")
        for sector in self.model.compare(found, killed=killed):
            data = found[sector * SECTOR : (sector + 1) * SECTOR]
            raise self._wrong("after the end", sector, data, killed=killed)
        self.model = self.model.settled(found, killed=killed)

    def _read_back(self) -> bytes:
        """Return the disk's content as QEMU reads it.  Our own code must read the same."""
        size, path, flat = len(self.model.start), self.storage.readable(), self.folder / "flat"
        with contextlib.closing(opened(path, *self.made.backing, formats=self.made.formats)) as image:
            ours = read(image, 0, image.size)
        if self.made.dirty:
            repaired = self.folder / "repaired"
            qemu("cp", "--sparse=always", path, repaired)
            qemu("qemu-img", "check", "-q", "-r", "all", repaired)
            path = repaired
        kind = self.made.formats[0]
        if kind == "qcow2":
            wrong = problems(path)
            if wrong.keys() - ({"leaks"} if self.was_killed else set()):
                raise self._fail(f"qemu-img check finds {wrong}")
        qemu("qemu-img", "convert", "-f", kind, "-O", "raw", path, flat)
        theirs = flat.read_bytes()
        flat.unlink()
        if theirs[:size] != ours[:size]:
            sector = next(at for at in range(size) if ours[at : at + 1] != theirs[at : at + 1]) // SECTOR
            raise self._fail(f"sector {sector} is read as other bytes by QEMU than by our own code")
        return theirs[:size]

    def _compare_snapshot(self) -> None:
        """Check that a snapshot is unchanged."""
        flat = self.folder / "flat"
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", self.made.snapshot, self.storage.readable(), flat)
        if flat.read_bytes() != self.made.start:
            raise self._fail("the snapshot has changed")


def run_seed(seed: int, only: frozenset[int] | None = None) -> Cell:
    """Run one sequence in its own directory; return its cell.  Raises Difference, with the command to repeat it."""
    plan = Plan(seed)
    # Most sequences run in memory, where a flush is cheap.
    in_memory = random.Random(f"folder {seed}").random() < 0.75 and os.access(SHARED_MEMORY, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="diskround", dir=SHARED_MEMORY if in_memory else None))
    try:
        Run(plan, folder, only).run()
    except Exception as error:
        raise Difference(
            f"seed {seed}, {plan.cell}: {error}\n  again: python -m tests.support.diskrounds {seed}"
        ) from error
    finally:
        shutil.rmtree(folder)
    return plan.cell


def run_seeds(seeds: range) -> str:
    """Run sequences; return how many ran of each kind.  Raises Difference."""
    cells = Counter(run_seed(seed) for seed in seeds)
    often = [cells[cell] for cell in CELLS]
    often_text = f"each of {len(CELLS)} cells {min(often)} to {max(often)} times"
    lines = [f"{len(seeds)} sequences from seed {seeds.start}, {often_text}"]
    for position, field in enumerate(Cell._fields):
        counts: Counter[str] = Counter()
        for cell, count in cells.items():
            counts[str(cell[position] or "none")] += count
        lines.append(f"  {field}: " + ", ".join(f"{count} {value}" for value, count in counts.items()))
    return "\n".join(lines)


# --- fewer steps ------------------------------------------------------------------------------------------------------


def fails(seed: int, only: frozenset[int]) -> str:
    """Return how some steps of a sequence fail; empty if they succeed."""
    try:
        run_seed(seed, only)
    except Difference as difference:
        return str(difference)
    return ""


def shrink(seed: int, fails: Callable[[int, frozenset[int]], str] = fails) -> frozenset[int]:
    """Return a minimal set of steps with which a sequence still fails."""
    steps = [step.number for step in Plan(seed).steps]
    size = len(steps) // 2
    while size:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            if fails(seed, frozenset(fewer)):
                steps = fewer
            else:
                at += size
        size //= 2
    return frozenset(steps)


def main(arguments: Sequence[str]) -> int:
    """Run one sequence again."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.diskrounds", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--only", metavar="STEPS", help="numbers of the steps to do, with commas between them")
    parser.add_argument("--shrink", action="store_true", help="find out which steps it takes")
    parser.add_argument("--count", type=int, default=1, help="do so many sequences, and go on after one that fails")
    parser.add_argument("--cell", default="", help="leave out what has not this word in its cell's name")
    chosen = parser.parse_args(arguments)
    if chosen.shrink:
        if not fails(chosen.seed, frozenset(step.number for step in Plan(chosen.seed).steps)):
            print(f"seed {chosen.seed} does not fail")
            return 0
        steps = sorted(shrink(chosen.seed))
        print(fails(chosen.seed, frozenset(steps)))
        print(f"fewest steps: {chosen.seed} --only {','.join(map(str, steps))}")
        return 1
    only = frozenset(map(int, chosen.only.split(","))) if chosen.only else None
    done = failed = 0
    for seed in range(chosen.seed, chosen.seed + chosen.count):
        if chosen.cell not in str(CELLS[seed % len(CELLS)]):
            continue
        try:
            run_seed(seed, only)
        except Difference as difference:
            print(difference, flush=True)
            failed += 1
        done += 1
        if not done % 100:
            print(f"{done} sequences up to seed {seed}, {failed} failed", flush=True)
    print(f"{done} sequences, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
