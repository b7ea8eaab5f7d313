"""Reads files of a disk by path, without mounting it.  A VM can boot a kernel from its own file system this way.

    disk = Disk(read, size)
    kernel = disk.find("/bsd")  # or disk.find("/vmlinuz", "p1")
    for offset, piece in kernel.pieces(): ...

Functions raise only DiskFsError, with a sentence.  The work for one disk is bounded (`source.py`).
"""

from vmd.diskfs import ext, ffs, foreign, walk
from vmd.diskfs.partitions import Partition, read_table
from vmd.diskfs.source import DiskFsError, NoSuchFile, Source, Store, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.diskfs.source import Read
    from vmd.diskfs.walk import File, FileSystem

NAMED_MAX = 8  # partitions that a sentence names
READERS = ((ext.recognise, ext.Ext), (ffs.recognise, ffs.Ffs))


class Disk:
    """A disk of a guest.  All its bytes are untrusted."""

    def __init__(self, read: "Read", size: int) -> None:
        """`read(offset, length)` returns exactly `length` bytes, and raises OSError.  Raises DiskFsError."""
        self.source = Source(Store(read, size), 0, size)
        self.table = read_table(self.source)
        self.filesystems: dict[str, FileSystem] = {}

    def find(self, path: str, partition: str = "") -> "File":
        """Return a file of the named partition, or of the first partition that has the file.

        Raises:
            NoSuchFile: there is no such file, and everything could be read.
            DiskFsError: it cannot be read; without `partition`, the sentence names all partitions that were tried.
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
        """Return the partition table and the file systems as text.  Raises nothing."""
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
        """Return a partition.  Raises DiskFsError if it does not exist or only contains other partitions."""
        for partition in self.table.partitions:
            if partition.name == name:
                if partition.holds:
                    raise DiskFsError(f"holds {partition.holds}", partition=partition.title)
                return partition
        names = ", ".join(partition.name for partition in self.table.partitions[:NAMED_MAX])
        has = f"its {self.table.kind} has {names or 'none'}" if self.table.kind else "it has no partition table"
        raise DiskFsError(self.table.problem or f"there is no partition {printable(name)}: {has}")

    def _candidates(self) -> list[Partition]:
        """Return the partitions that may have files.  One that is in both the MBR and a disklabel comes once."""
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
        """Return the file system of a partition.  Raises DiskFsError, with its name if that is known."""
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
        raise DiskFsError("is not supported" if name else "has no known file system", filesystem=name)
