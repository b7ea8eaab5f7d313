"""One run of vmctl: the options before the command, and the connection."""

from vmctl.output import warn
from vmd.client import DEFAULT_SOCKET, Client
from vmd.errors import VmdError
from vmd.stdio import STDERR, STDOUT


class Session:
    """The options before the command, and the connection, which is made when a command first needs it."""

    def __init__(self, socket_path: str = DEFAULT_SOCKET, *, verbose: bool = False) -> None:
        self.socket_path = socket_path
        self.verbose = verbose
        self.json = False  # set by --json; a failure is then a document, too
        self.json_fd = STDOUT  # for the document
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The connection.  Raises ClientError."""
        if self._client is None:
            self._client = Client(self.socket_path, note=warn if self.verbose else None)
        return self._client

    def reconnect(self) -> None:
        """Close the connection; a new one is made when it is needed."""
        self.close()
        self._client = None

    def meant(self, name: str) -> str:
        """Return ": did you mean ...?" with a name of a VM that is close to `name`; "" if none is or `name` exists."""
        from vmctl.options import meant  # only a mistake needs it

        try:
            names = [vm.name for vm in self.client.list_vms()]
        except VmdError:
            return ""
        return "" if name in names else meant(name, names)

    @property
    def quiet(self) -> bool:
        """Whether only the document may go to standard error."""
        return self.json and self.json_fd == STDERR

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._client is not None:
            self._client.close()
