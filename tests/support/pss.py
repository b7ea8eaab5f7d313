"""What processes cost in memory."""

from pathlib import Path


def pss_kib(pid: int) -> int:
    """Return what a process costs beyond guest memory: its share of private and file-backed memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return values["Pss_Anon"] + values["Pss_File"]
