"""How a command of vmctl can fail; every failure is one sentence and exit status 1."""

from vmd.errors import VmdError


class UsageError(VmdError):
    """The command line is wrong: an optional sentence, and then the usage of the command."""

    def __init__(self, what: str = "") -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return self.what


class CommandError(VmdError):
    """The command cannot be done; `code` is an errno or a VMD_* code where there is one."""

    def __init__(self, what: str, code: int | None = None) -> None:
        super().__init__(what, code)
        self.what = what
        self.code = code

    def __str__(self) -> str:
        return self.what


class Refused(VmdError):
    """The daemon answered Failed; commands put their own words before its sentence."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"command failed: {self.text}"
