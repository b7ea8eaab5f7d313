"""The memory use of processes."""

from pathlib import Path


def pss_kib(pid: int) -> int:
    """Return a process's proportional share of private and file-backed memory, without guest memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return values["Pss_Anon"] + values["Pss_File"]
