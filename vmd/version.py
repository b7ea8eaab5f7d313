"""The version of this program: what `vmd -V` and `vmctl version` show, and what packages are called after."""

VERSION = "0.2.0.dev0"
