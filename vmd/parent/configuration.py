"""The configuration in force: how it is loaded, reloaded and reset (*cat. 2.8*)."""

from collections.abc import Callable

from vmd.config.check import ConfigErrors
from vmd.config.model import Config, VmConfig
from vmd.errors import VmdError
from vmd.ipc.messages.children import SetVerbosity
from vmd.ipc.messages.clients import Caller, LoadRequest, LogRequest, Ok, ReloadRequest, ResetRequest
from vmd.log import log
from vmd.parent import instances, reload, service
from vmd.parent.clients import For
from vmd.parent.report import brief_notes, log_errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.imsg import Envelope
    from vmd.parent.core import Core
    from vmd.parent.life import Life
    from vmd.parent.network import Network
    from vmd.parent.vm import Vm

    # (path, known configuration, callback for warnings) -> configuration of the file.
    # Path None is the main file; it is read without a known configuration.
    Load = Callable[[str | None, Config | None, Callable[[str], None]], Config]


class Configuration:
    """The room of vm.conf."""

    def __init__(self, core: "Core", life: "Life", network: "Network", load: "Load", socket_path: str) -> None:
        self.core = core
        self.life = life
        self.network = network
        self.load_config = load
        self.on_effect: Callable[[], None] = lambda: None  # called when other settings are in force
        self.socket_path = socket_path
        if not core.adopts:
            self.register(core.config)

    # --- requests ----------------------------------------------------------------------------------------

    def serve_load(self, message: LoadRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Read a further file.  VMs that are known already stay as they are."""
        loaded, notes = self.load(message.path, self.core.config)
        config = loaded.replace(switches=(*self.core.config.switches, *loaded.switches))
        notes += self.network.configure(config)
        notes += self.register(config)
        self.take_effect(config)
        self.core.clients.answer(envelope.peerid, Ok(notes=brief_notes(notes)))

    def serve_reload(self, _message: ReloadRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Read the main file again."""
        self.core.clients.answer(envelope.peerid, Ok(notes=brief_notes(self.reload())))

    def serve_reset(self, message: ResetRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Kill and forget all VMs, or forget all switches, or both."""
        if message.switches:
            self.core.config = self.core.config.replace(switches=())
            self.network.configure(self.core.config)
        if message.vms:
            self.reset_vms()
        if any(vm.resetting for vm in self.core.vms):
            self.core.clients.wait(envelope.peerid, For.RESET)  # so that a reload after the answer finds no VM
        else:
            self.core.clients.answer(envelope.peerid, Ok())

    def serve_log(self, message: LogRequest, _caller: Caller, envelope: "Envelope") -> None:
        """Change the verbosity of all processes, including those that start later."""
        self.core.verbosity = log.verbosity = max(0, min(2, message.verbosity))
        self.core.changed()
        self.core.peers.send_all(SetVerbosity(verbosity=self.core.verbosity))
        self.core.clients.answer(envelope.peerid, Ok())

    def on_hangup(self) -> None:
        """SIGHUP: reload the configuration."""
        try:
            self.reload()
        except ConfigErrors as errors:
            log_errors(errors)
        except VmdError as error:
            log.error(f"configuration not reloaded: {error}")

    # --- steps of requests -------------------------------------------------------------------------------

    def register(self, config: Config) -> list[str]:
        """Add the VMs of a configuration.  VMs whose names are known already stay as they are (*cat. 2.5*).

        Returns notes for the operator.
        """
        vms, problems = self.resolved(config)
        for note in reload.register(self.core.vms, vms):
            log.debug(note)
        return problems

    def resolved(self, config: Config) -> tuple[list[VmConfig], list[str]]:
        """Return the VMs of a configuration with what instances inherit, and the reasons why some cannot exist."""
        vms, problems = instances.resolve(config.vms, self.core.vms.template)
        for problem in problems:
            log.error(problem)
        return vms, problems

    def reload(self) -> list[str]:
        """Read the main file again.  A file with errors changes nothing.

        Returns notes for the operator.  Raises ConfigErrors.
        """
        config, warnings = self.load(None, None)
        warnings += self.network.configure(config)
        vms, problems = self.resolved(config)
        wanted = {vm.name: vm for vm in reversed(vms)}
        notes: list[str] = []
        for vm in self.core.vms:
            if vm.name in wanted:
                notes += self.network.drop_forwards(vm, wanted[vm.name])
        notes += reload.replace_all(self.core.vms, vms, self.change_at_once)
        self.take_effect(config)
        self.core.events.add("reload")
        for note in notes:
            log.info(note)
        return warnings + problems + notes

    def change_at_once(self, vm: "Vm", wanted: VmConfig) -> list[str]:
        """Apply to a running VM the changes that do not wait for its next start.  Returns notes for the operator."""
        return self.life.bounds.change(vm, wanted) + self.network.change_forwards(vm, wanted)

    def load(self, path: str | None, known: Config | None) -> tuple[Config, list[str]]:
        """Return the configuration of a file, and warnings, which are also logged.  Raises ConfigErrors."""
        warnings: list[str] = []

        def warn(text: str) -> None:
            log.warn(text)
            warnings.append(text)

        config = self.load_config(path, known, warn)
        settings = config.settings
        if settings.first_id != self.core.config.settings.first_id:
            where = f"{settings.first_id_origin}: " if settings.first_id_origin else ""
            warn(f"warning: {where}ids {settings.first_id} count when vmd is started again")
        return config, warnings

    def take_effect(self, config: Config) -> None:
        """Put the global settings of a configuration in force, and start the VMs that wait to be started."""
        self.core.config = config
        for vm in self.core.vms:
            self.life.consoles.on_change(vm)
        service.own_socket(self.socket_path, config.settings.socket_owner)
        self.on_effect()
        self.life.start_batch_in_time()

    def reset_vms(self) -> None:
        """Kill all VMs that run.  Forget each VM, a killed one when it has ended."""
        for vm in self.core.vms:
            vm.from_config, vm.next_config, vm.successor = False, None, None
            vm.resetting = vm.alive
        for vm in list(self.core.vms):
            if vm.resetting:
                self.life.kill(vm)
            else:
                self.core.vms.remove(vm)
        self.core.vms.forget_ids()
