"""The protocol of seeder.  The answer is one line that is simple to split.

    files                 two memory files: the packed parts of a seed, and an empty one, which becomes the disk
                          (`vmd/seed`)
    answer                `made` [NUL note]... LF
                          `error` NUL sentence LF

Standard library only.
"""

from vmd.ipc.probemsg import ANSWER_MAX, END, as_field, fields_of, pack_error

MADE = b"made"
NOTES_MAX = 8
NOTE_MAX = 1500  # bytes

__all__ = ["pack_error", "pack_made", "unpack"]


def pack_made(notes: list[str]) -> bytes:
    """Return the line for a disk that was made.  `notes` are sentences for the user who starts the VM."""
    room, fields = ANSWER_MAX - len(MADE + END), [MADE]
    for note in notes[:NOTES_MAX]:
        raw = as_field(note)[:NOTE_MAX]
        if len(raw) < room:
            fields.append(raw)
            room -= len(raw) + 1
    return b"\0".join(fields) + END


def unpack(line: bytes) -> list[str] | str:
    """Return the contents of an answer: notes, or the sentence of an error.

    Raises ValueError for a malformed line.
    """
    answer = fields_of(line)
    if isinstance(answer, str):
        return answer
    kind, *fields = answer
    if kind != MADE or len(fields) > NOTES_MAX:
        raise ValueError(f"{len(fields)} fields of kind {kind[:16]!r}")
    return [field.decode("utf-8", "backslashreplace") for field in fields]
