"""Asks seeder to make the seed of a VM."""

import errno
import os

from vmd.config.model import MAX_SEED_BYTES
from vmd.errors import OperatorError
from vmd.files.asking import ask_patiently
from vmd.ipc.imsg import pack
from vmd.ipc.seedmsg import unpack
from vmd.memfile import fill_file, is_constant
from vmd.seed.parts import PARTS_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.seed.parts import SeedParts

LONGEST_S = 60.0
FAILED = "seed: cannot be made"


def make_seed(
    sock: "socket.socket", parts: "SeedParts", packed: int, image: int, go_on: "Callable[[], None]"
) -> list[str]:
    """Make a seed; return sentences for the operator.  Raises OperatorError.

    `packed` and `image` are empty memory files, which stay the caller's.  On return both are sealed against changes,
    and `image` is the disk.  `go_on` is called now and then while this waits.
    """
    raw = pack(parts)
    if len(raw) > PARTS_MAX:
        raise OperatorError(errno.EFBIG, f"seed: its files have together more than {PARTS_MAX >> 20} MiB")
    try:
        fill_file(packed, raw)
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{FAILED}: {error.strerror}") from None

    def read(line: bytes) -> list[str] | str:
        answer = unpack(line)
        if not isinstance(answer, str) and not (is_constant(image) and 0 < os.fstat(image).st_size <= MAX_SEED_BYTES):
            raise ValueError("there is no disk image")
        return answer

    answer = ask_patiently(
        sock, (), (packed, image), read, go_on, longest_s=LONGEST_S, leaf="seeder",
        failed=FAILED, late=f"seed: seeder does not answer within {LONGEST_S:g} seconds",
    )  # fmt: skip
    if isinstance(answer, str):
        raise OperatorError(errno.EINVAL, f"seed: {answer}")
    return [f"seed: {note}" for note in answer]
