"""The exceptions.  The class of an exception tells who has caused the failure.

VmdError            base: the user gets a sentence, not a traceback
  ConfigError       the operator, in a configuration file; has file and line
  OperatorError     the operator or a client, in a request; its number is an errno or one of *cat. 1.10*
    InUse           the same, because another process has locked a file; names the file
  ImageError        a kernel, firmware or disk image that cannot be used
  GuestError        the guest; ends a request, a device or at most its own VM
  PeerError         a process at the other end of a channel has broken the protocol
  HostError         the kernel refused something; its number is the errno; names the action that was tried

`__str__` is a lower-case sentence without a full stop that names the thing and the value.
"""

import errno
import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.fileid import FileId

# Values of `number` that are not an errno (*cat. 1.10*)
VMD_BIOS_MISSING = 1001
VMD_DISK_MISSING = 1002
VMD_VM_STOP_INVALID = 1004
VMD_CDROM_MISSING = 1005
VMD_CDROM_INVALID = 1006
VMD_PARENT_INVALID = 1007
VMD_CONSOLE_TAKEN = 1008
VMD_IN_DOUBT = 1009  # a VM that was to go on here may have run here

NO_CALL = ": this kernel, or the container or unit that vmd runs in, does not let it make the system call"


class VmdError(Exception):
    """Base of all exceptions with a sentence for the user.

    `number` is for programs: an errno or a VMD_* code; 0: none.
    """

    number: int = errno.EINVAL


class ConfigError(VmdError):
    """A statement of a configuration file is wrong: `path:line: what`."""

    def __init__(self, path: str, line: int, what: str) -> None:
        super().__init__(path, line, what)
        self.path = path
        self.line = line
        self.what = what

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


class OperatorError(VmdError):
    """A request cannot be done."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, what)
        self.number = number
        self.what = what

    def __str__(self) -> str:
        return self.what


class InUse(OperatorError):
    """A file cannot be used because another process has locked it.  `file` is the identity of the file.

    `marks` are the bytes on which the other locks conflict with ours (`vmd.images.locks`); empty: it is not known
    which.
    """

    def __init__(
        self, name: str, file: "FileId", *, by: str = "another process", doing: str = "", marks: tuple[int, ...] = ()
    ) -> None:
        super().__init__(errno.EBUSY, f"{name}: is in use by {by}{doing}")
        self.name = name
        self.file = file
        self.by = by
        self.doing = doing
        self.marks = marks

    def held_by(self, who: str) -> "InUse":
        """Return the same error, naming the user or process that has the file."""
        return InUse(self.name, self.file, by=who, doing=self.doing, marks=self.marks)


class ImageError(VmdError):
    """An image file cannot be used: `path: what`."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path = path
        self.what = what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class GuestError(VmdError):
    """The guest's driver has broken the rules.  The consequence is for the device or its VM, never for the host."""


class PeerError(VmdError):
    """A peer process has broken the protocol.  `raw` has the first bytes of the packet."""

    number = errno.EPROTO

    def __init__(self, peer: str, what: str, raw: bytes = b"") -> None:
        super().__init__(peer, what, raw)
        self.peer = peer
        self.what = what
        self.raw = raw[:64]

    def __str__(self) -> str:
        shown = f" ({self.raw.hex()})" if self.raw else ""
        return f"{self.peer}: {self.what}{shown}"


class HostError(VmdError):
    """A system call, or a check of ours, has failed: what was tried, and the reason."""

    def __init__(self, tried: str, error: OSError | int) -> None:
        self.tried = tried
        self.number = error if isinstance(error, int) else (error.errno or 0)
        self.reason = os.strerror(error) if isinstance(error, int) else sentence(error)
        super().__init__(tried, self.number)

    def __str__(self) -> str:
        return f"{self.tried}: {self.reason}{NO_CALL if self.number == errno.ENOSYS else ''}"


def sentence(error: Exception) -> str:
    """Return the sentence of an error, for people to read.  For an OSError it has no number.

    Python raises some OSErrors without a number, for which strerror(3) would return "Success".
    """
    if not isinstance(error, OSError):
        return str(error)
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))


def number(error: Exception) -> int:
    """Return an errno or VMD_* code for an error of any class, to put into an answer.  Never 0."""
    found = error.number if isinstance(error, VmdError) else getattr(error, "errno", None)
    return found or (errno.EIO if isinstance(error, OSError | HostError) else errno.EINVAL)
