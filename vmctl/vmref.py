"""How a command line refers to a VM: a number is an id, all else a name (*cat. 3.1*)."""

from vmctl.errors import CommandError
from vmd.config.model import NAME_MAX
from vmd.record import Record

ID_MAX = 0xFFFFFFFF


class VmRef(Record):
    """A VM by id or, with id 0, by name."""

    vmid: int = 0
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.vmid)


def parse_vmref(word: str) -> VmRef:
    """Return what `word` refers to.

    Raises:
        CommandError: it can be no VM.
    """
    digits = word.lstrip("0")
    if word.isascii() and word.isdigit() and len(digits) <= len(str(ID_MAX)) and int(digits or 0) <= ID_MAX:
        # Unlike vmd, where 0 is silently "no id": no VM has it.
        if not digits:
            raise CommandError(f"invalid id: {word}")
        return VmRef(vmid=int(digits))
    if not word or word.startswith("-"):
        raise CommandError(f"invalid id: {word}")
    if len(word.encode("utf-8", "surrogateescape")) > NAME_MAX:
        raise CommandError(f"name too long: {word}")
    return VmRef(name=word)
