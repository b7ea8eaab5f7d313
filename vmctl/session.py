"""What one run of vmctl was asked, besides the command."""

from vmctl.output import warn
from vmd.client import DEFAULT_SOCKET, Client
from vmd.errors import VmdError
from vmd.stdio import STDERR, STDOUT


class Session:
    """The options before the command, and the connection, made when a command first needs it."""

    def __init__(self, socket_path: str = DEFAULT_SOCKET, *, verbose: bool = False) -> None:
        self.socket_path = socket_path
        self.verbose = verbose
        self.json = False  # set by --json; failures are then a document, too
        self.json_fd = STDOUT  # where that goes
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The connection.  Raises ClientError."""
        if self._client is None:
            self._client = Client(self.socket_path, note=warn if self.verbose else None)
        return self._client

    def reconnect(self) -> None:
        """Hang up; the connection is made anew when it is needed."""
        self.close()
        self._client = None

    def meant(self, name: str) -> str:
        """Return the end of a sentence that asks for the VM whose name is close to one that no VM has."""
        from vmctl.options import meant  # only a mistake needs it

        try:
            names = [vm.name for vm in self.client.list_vms()]
        except VmdError:
            return ""
        return "" if name in names else meant(name, names)

    @property
    def quiet(self) -> bool:
        """Whether standard error is for the document alone."""
        return self.json and self.json_fd == STDERR

    def close(self) -> None:
        """Hang up, if we ever called."""
        if self._client is not None:
            self._client.close()
