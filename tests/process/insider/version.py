"""Tells the tests which version of the code a process runs."""

VERSION = "old"
