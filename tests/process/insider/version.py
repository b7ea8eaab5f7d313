"""Says which code a process runs."""

VERSION = "old"
