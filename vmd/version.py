"""The version of this program.  `vmd -V` and `vmctl version` show it, and packages are named after it."""

VERSION = "0.2.0.dev0"
