"""The exception family: whose fault a failure is decides which class is raised.

VmdError            anything that is answered with a sentence instead of a traceback
  ConfigError       the operator, in a configuration file; carries file and line
  OperatorError     the operator or a client, in a request; its number is an errno or one of *cat. 1.10*
    InUse           ... for somebody else has a file; carries which
  ImageError        a kernel, firmware or disk image that cannot be used
  GuestError        the guest; ends a request, a device or at most its own VM
  PeerError         a process on the other side of a channel broke the protocol
  HostError         the kernel refused something; its number is the errno; carries what was tried

`__str__` is a lower-case sentence without a full stop that names the thing and the value.
"""

import errno
import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.fileid import FileId

# What `number` may be beyond an errno (*cat. 1.10*)
VMD_BIOS_MISSING = 1001
VMD_DISK_MISSING = 1002
VMD_VM_STOP_INVALID = 1004
VMD_CDROM_MISSING = 1005
VMD_CDROM_INVALID = 1006
VMD_PARENT_INVALID = 1007
VMD_CONSOLE_TAKEN = 1008
VMD_IN_DOUBT = 1009  # a VM that was to go on here may have done so

NO_CALL = ": this kernel, or the container or unit that vmd runs in, does not let it make the system call"


class VmdError(Exception):
    """Base of everything that has a sentence for its user.

    `number` is for programs: an errno, or a VMD_* code; 0 is none.
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
    """A file cannot be had because somebody else has it; `file` says which file that is.

    `marks` are the bytes on which somebody else's locks contradict ours (`vmd.images.locks`); none: it may be any.
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
        """Return the same, with who has it."""
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
    """The guest did what no driver may do; the device, never the host, pays for it."""


class PeerError(VmdError):
    """A peer process broke the protocol; `raw` keeps the first bytes of what it sent."""

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
    """A system call failed: what was tried, and the kernel's reason, or ours if the failure was found by us."""

    def __init__(self, tried: str, error: OSError | int) -> None:
        self.tried = tried
        self.number = error if isinstance(error, int) else (error.errno or 0)
        self.reason = os.strerror(error) if isinstance(error, int) else sentence(error)
        super().__init__(tried, self.number)

    def __str__(self) -> str:
        return f"{self.tried}: {self.reason}{NO_CALL if self.number == errno.ENOSYS else ''}"


def sentence(error: Exception) -> str:
    """Return what a failure is, for people: an OSError without its number.

    Python raises some that have no number, for which strerror(3) would have "Success".
    """
    if not isinstance(error, OSError):
        return str(error)
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))


def number(error: Exception) -> int:
    """Return the number of a failure for those who are told of it, whatever it is; never 0."""
    found = error.number if isinstance(error, VmdError) else getattr(error, "errno", None)
    return found or (errno.EIO if isinstance(error, OSError | HostError) else errno.EINVAL)
