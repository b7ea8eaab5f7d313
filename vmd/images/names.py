"""What snapshots may be called; for those, too, who look at no image."""

MAX_NAME = 64
NAME_MARKS = "._-+:"


def check_name(name: str) -> str:
    """Return the name of a new snapshot.  Raises ValueError.

    A number is none: QEMU takes it for an id.
    """
    if not name or len(name) > MAX_NAME:
        raise ValueError(f"name of a snapshot has 1 to {MAX_NAME} characters, not {len(name)}")
    wrong = next((one for one in name if not (one.isascii() and (one.isalnum() or one in NAME_MARKS))), "")
    if wrong:
        raise ValueError(f"name of a snapshot has letters, digits and {NAME_MARKS} only: {name}")
    if not name[0].isalnum() or name.isdigit():
        raise ValueError(f"name of a snapshot begins with a letter or digit and is no number: {name}")
    return name
