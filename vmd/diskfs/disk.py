"""Files of a disk, by path, without mounting it: what boots a kernel from a guest's own file system.

    disk = Disk(read, size)
    kernel = disk.find("/bsd")  # or disk.find("/vmlinuz", "p1")
    for offset, piece in kernel.pieces(): ...

Everything that comes out is DiskFsError with a sentence, and the work for one disk has a bound (`source.py`).
"""

from vmd.diskfs import ext, ffs, foreign, walk
from vmd.diskfs.partitions import Partition, read_table
from vmd.diskfs.source import DiskFsError, NoSuchFile, Source, Store, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.diskfs.source import Read
    from vmd.diskfs.walk import File, FileSystem

NAMED_MAX = 8  # partitions in a sentence
READERS = ((ext.recognise, ext.Ext), (ffs.recognise, ffs.Ffs))


class Disk:
    """A disk of a guest, which may be that of another guest's making."""

    def __init__(self, read: "Read", size: int) -> None:
        """`read(offset, length)` returns exactly `length` bytes, and raises OSError.  Raises DiskFsError."""
        self.source = Source(Store(read, size), 0, size)
        self.table = read_table(self.source)
        self.filesystems: dict[str, FileSystem] = {}

    def find(self, path: str, partition: str = "") -> "File":
        """Return a file: of the partition of that name, or of the first one that has it.

        Raises:
            NoSuchFile: there is none, and nothing was wrong with what was read.
            DiskFsError: it cannot be read; without `partition` it names all that were tried.
        """
        if partition:
            return self._find(path, self._named(partition))
        refusals = []
        candidates = self._candidates()
        for candidate in candidates:
            try:
                return self._find(path, candidate)
            except DiskFsError as error:
                refusals.append(error)
        if self.table.problem:
            refusals.insert(0, DiskFsError(self.table.problem))
        if len(refusals) == 1:
            raise refusals[0]
        said = "; ".join(map(str, refusals[:NAMED_MAX]))
        more = f"; and {len(refusals) - NAMED_MAX} more" if len(refusals) > NAMED_MAX else ""
        missing = all(isinstance(refusal, NoSuchFile) for refusal in refusals)
        raise (NoSuchFile if missing else DiskFsError)(f"no partition has {printable(path)}: {said}{more}")

    def describe(self) -> str:
        """Return what is on the disk, for people: its partition table and its file systems.  Raises nothing."""
        parts = [self.table.problem] if self.table.problem else []
        candidates = self._candidates()
        for candidate in candidates[:NAMED_MAX]:
            try:
                what = candidate.problem or self._filesystem(candidate).name
            except DiskFsError as error:
                what = error.filesystem or error.what
            parts.append(f"{candidate.title}: {what}")
        if len(candidates) > NAMED_MAX:
            parts.append(f"and {len(candidates) - NAMED_MAX} more")
        return f"{self.table.kind or 'no partition table'}; {'; '.join(parts)}"

    def _named(self, name: str) -> Partition:
        """Return a partition.  Raises DiskFsError if there is none, or if only others are in it."""
        for partition in self.table.partitions:
            if partition.name == name:
                if partition.holds:
                    raise DiskFsError(f"holds {partition.holds}", partition=partition.title)
                return partition
        names = ", ".join(partition.name for partition in self.table.partitions[:NAMED_MAX])
        has = f"its {self.table.kind} has {names or 'none'}" if self.table.kind else "it has no partition table"
        raise DiskFsError(self.table.problem or f"there is no partition {printable(name)}: {has}")

    def _candidates(self) -> list[Partition]:
        """Return where files may be, none twice, though an MBR and a disklabel may both tell of it."""
        found: dict[int, Partition] = {}
        for partition in self.table.partitions:
            if not partition.holds:
                found.setdefault(partition.start if not partition.problem else -1 - len(found), partition)
        if not found and not self.table.problem:
            return [Partition(name="", start=0, size=self.source.size)]
        return list(found.values())

    def _find(self, path: str, partition: Partition) -> "File":
        try:
            if partition.problem:
                raise DiskFsError(partition.problem)
            found = walk.find(self._filesystem(partition), path)
        except DiskFsError as error:
            raise error.at(partition=partition.title) from error
        found.partition = partition.title
        return found

    def _filesystem(self, partition: Partition) -> "FileSystem":
        """Return the file system of a partition.  Raises DiskFsError, with its name where that is known."""
        if (known := self.filesystems.get(partition.name)) is not None:
            return known
        source = self.source.part(partition.start, partition.size)
        for recognise, reader in READERS:
            if name := recognise(source):
                try:
                    found = self.filesystems[partition.name] = reader(source, name)
                except DiskFsError as error:
                    raise error.at(filesystem=name) from error
                return found
        name = foreign.recognise(source)
        raise DiskFsError("is not read here" if name else "there is no file system that is known", filesystem=name)
