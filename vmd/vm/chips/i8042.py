"""A keyboard controller without keyboard.  It answers, so that drivers do not wait for it, and it can reset.

Without a controller, SeaBIOS and Linux poll the status port tens of thousands of times before they give up.  Here each
command that has an answer gets it at once.  A byte for a keyboard or mouse gets the answer "no response", as in a PC
where none is plugged in.  There are no interrupts.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DATA, STATUS = 0, 4  # offsets; writing STATUS is a command

STATUS_OBF = 0x01  # the output buffer has a byte
STATUS_SYS = 0x04  # self-test passed
STATUS_UNLOCKED = 0x10
STATUS_TIMEOUT = 0x40

CTR_SYS = 0x04
CTR_KBD_OFF = 0x10
CTR_AUX_OFF = 0x20

CMD_READ_CTR = 0x20
CMD_WRITE_CTR = 0x60
CMD_PASSWORD_TEST = 0xA4
CMD_AUX_OFF = 0xA7
CMD_AUX_ON = 0xA8
CMD_AUX_TEST = 0xA9
CMD_SELF_TEST = 0xAA
CMD_KBD_TEST = 0xAB
CMD_KBD_OFF = 0xAD
CMD_KBD_ON = 0xAE
CMD_READ_INPUT = 0xC0
CMD_READ_OUTPUT = 0xD0
CMD_WRITE_OUTPUT = 0xD1
CMD_KBD_LOOP = 0xD2
CMD_AUX_LOOP = 0xD3
CMD_AUX_SEND = 0xD4
CMD_PULSE = 0xF0  # to FFh: each low bit that is 0 pulses its output line; FEh is the usual reset

NO_PASSWORD = 0xF1
SELF_TEST_PASSED = 0x55
CLOCK_STUCK_LOW = 0x01  # result of a port test with nothing plugged in; SeaBIOS then ignores the port
NO_RESPONSE = 0xFE
INPUT_UNLOCKED = 0x80

OUTPUT_NO_RESET = 0x01
OUTPUT_A20 = 0x02


class I8042:
    """The controller of one VM.  `reset` runs on the vCPU thread that asks for it.

    There is no lock: two vCPUs that use it at the same time confuse each other, as with a real controller.
    """

    PORTS = 5  # 60h to 64h; KVM answers 61h, and 62h and 63h do not exist
    pio_width = 1

    def __init__(self, reset: "Callable[[], None]") -> None:
        self._reset = reset
        self._control = CTR_SYS | CTR_KBD_OFF | CTR_AUX_OFF
        self._output_port = OUTPUT_NO_RESET | OUTPUT_A20
        self._output = 0
        self._flags = 0  # OBF and TIMEOUT
        self._command = 0  # the command whose data byte has not come yet

    def pio_read(self, offset: int, size: int) -> int:
        """Read the status, or read and empty the output buffer."""
        if offset == STATUS:
            return STATUS_UNLOCKED | self._control & STATUS_SYS | self._flags
        if offset == DATA:
            self._flags = 0
            return self._output
        return 0xFF

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write a command, its data, or a byte for the keyboard, which does not exist."""
        if offset == STATUS:
            self._on_command(value)
        elif offset == DATA:
            self._on_data(value)

    def state(self) -> dict[str, int]:
        """Return the state, for `restore`."""
        return {
            "control": self._control,
            "output_port": self._output_port,
            "output": self._output,
            "flags": self._flags,
            "command": self._command,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a saved state.

        Raises:
            KeyError, TypeError: this is not the state of a keyboard controller.
        """
        self._control = state["control"] & 0xFF
        self._output_port = state["output_port"] & 0xFF | OUTPUT_NO_RESET
        self._output = state["output"] & 0xFF
        self._flags = state["flags"] & (STATUS_OBF | STATUS_TIMEOUT)
        self._command = state["command"] & 0xFF

    def _answer(self, byte: int, flags: int = 0) -> None:
        self._output = byte
        self._flags = STATUS_OBF | flags

    def _on_command(self, command: int) -> None:
        self._command = 0
        if command in ANSWERS:
            if command == CMD_SELF_TEST:
                self._control |= CTR_SYS
            self._answer(ANSWERS[command])
        elif command == CMD_READ_CTR:
            self._answer(self._control)
        elif CMD_READ_CTR < command < CMD_READ_CTR + 32:
            self._answer(0)  # the controller's RAM: only byte 0 has a meaning
        elif command == CMD_AUX_OFF:
            self._control |= CTR_AUX_OFF
        elif command == CMD_AUX_ON:
            self._control &= ~CTR_AUX_OFF
        elif command == CMD_KBD_OFF:
            self._control |= CTR_KBD_OFF
        elif command == CMD_KBD_ON:
            self._control &= ~CTR_KBD_OFF
        elif command == CMD_READ_OUTPUT:
            self._answer(self._output_port)
        elif command >= CMD_PULSE:
            if not command & OUTPUT_NO_RESET:
                self._reset()
        elif CMD_WRITE_CTR <= command < CMD_WRITE_CTR + 32 or CMD_WRITE_OUTPUT <= command <= CMD_AUX_SEND:
            self._command = command

    def _on_data(self, value: int) -> None:
        command, self._command = self._command, 0
        if command == CMD_WRITE_CTR:
            self._control = value
        elif command == CMD_WRITE_OUTPUT:
            self._output_port = value | OUTPUT_NO_RESET
            if not value & OUTPUT_NO_RESET:
                self._reset()
        elif command in (CMD_KBD_LOOP, CMD_AUX_LOOP):
            # The answer is not marked as coming from the second port: so Linux sees at once that there is no such port.
            self._answer(value)
        elif command in (0, CMD_AUX_SEND):
            self._answer(NO_RESPONSE, STATUS_TIMEOUT)


ANSWERS = {
    CMD_PASSWORD_TEST: NO_PASSWORD,
    CMD_AUX_TEST: CLOCK_STUCK_LOW,
    CMD_SELF_TEST: SELF_TEST_PASSED,
    CMD_KBD_TEST: CLOCK_STUCK_LOW,
    CMD_READ_INPUT: INPUT_UNLOCKED,
}
