"""The rule for names of snapshots.  Processes that read no image use it, too."""

MAX_NAME = 64
NAME_MARKS = "._-+:"


def check_name(name: str) -> str:
    """Return the name of a new snapshot.  Raises ValueError.

    A number is not allowed as a name, because QEMU takes it for an id.
    """
    if not name or len(name) > MAX_NAME:
        raise ValueError(f"name of a snapshot must have 1 to {MAX_NAME} characters, not {len(name)}")
    wrong = next((one for one in name if not (one.isascii() and (one.isalnum() or one in NAME_MARKS))), "")
    if wrong:
        raise ValueError(f"name of a snapshot must have letters, digits and {NAME_MARKS} only: {name}")
    if not name[0].isalnum() or name.isdigit():
        raise ValueError(f"name of a snapshot must begin with a letter or digit and must not be a number: {name}")
    return name
