"""Has seeder make the seed of a VM."""

import errno
import os

from vmd.errors import OperatorError
from vmd.ipc.imsg import pack
from vmd.ipc.probing import send_question, wait_patiently
from vmd.ipc.seedmsg import unpack
from vmd.memfile import CONSTANT, is_constant, seal
from vmd.seed.parts import IMAGE_MAX, PARTS_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.seed.parts import SeedParts

SEEDER_ENTRY = "vmd.seed.seeder:main"
LONGEST_S = 60.0


def make_seed(
    sock: "socket.socket", parts: "SeedParts", packed: int, image: int, go_on: "Callable[[], None]"
) -> list[str]:
    """Have a seed made; return what is to be said of it.  Raises OperatorError.

    `packed` and `image` are empty memory files, and stay the caller's.  Nobody can change them any more then, and
    `image` is the disk.  `go_on` is called now and then.
    """
    line = b""
    try:
        put(packed, pack(parts))
        send_question(sock, (), (packed, image))
        line = wait_patiently(sock, LONGEST_S, go_on)
        answer = unpack(line)
        if not isinstance(answer, str) and not (is_constant(image) and 0 < os.fstat(image).st_size <= IMAGE_MAX):
            raise ValueError("there is no disk")
    except TimeoutError:
        raise OperatorError(errno.ETIMEDOUT, f"seed: seeder does not answer within {LONGEST_S:g} seconds") from None
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"seed: cannot be made: {error.strerror}") from None
    except ValueError as error:
        why = f"seeder answered nonsense: {error}" if line else "seeder has ended"
        raise OperatorError(errno.EIO, f"seed: cannot be made: {why}") from None
    if isinstance(answer, str):
        raise OperatorError(errno.EINVAL, f"seed: {answer}")
    return [f"seed: {note}" for note in answer]


def put(fd: int, data: bytes) -> None:
    """Leave the parts in a memory file that nobody can change any more.  Raises OSError, OperatorError."""
    if len(data) > PARTS_MAX:
        raise OperatorError(errno.EFBIG, f"seed: its files have together more than {PARTS_MAX >> 20} MiB")
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    seal(fd, CONSTANT)
