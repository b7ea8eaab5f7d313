"""How a command line refers to a VM: a number is an id, all else a name (*cat. 3.1*)."""

from vmctl.errors import ArgumentError
from vmd.config.model import NAME_MAX
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.messages import VmInfo

ID_MAX = 0xFFFFFFFF


class VmRef(Record):
    """A VM by id or, with id 0, by name."""

    vmid: int = 0
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.vmid)

    def means(self, vm: "VmInfo") -> bool:
        """Return whether this is the VM."""
        return vm.vmid == self.vmid if self.vmid else vm.name == self.name


def parse_vmref(word: str) -> VmRef:
    """Return what `word` refers to.

    Raises:
        ArgumentError: it can be no VM.
    """
    digits = word.lstrip("0")
    if word.isascii() and word.isdigit() and len(digits) <= len(str(ID_MAX)) and int(digits or 0) <= ID_MAX:
        # Unlike vmd, where 0 is silently "no id": no VM has it.
        if not digits:
            raise ArgumentError(f"invalid id: {word}")
        return VmRef(vmid=int(digits))
    if not word or word.startswith("-"):
        raise ArgumentError(f"invalid id: {word}")
    if len(word.encode("utf-8", "surrogateescape")) > NAME_MAX:
        raise ArgumentError(f"name too long: {word}")
    return VmRef(name=word)
