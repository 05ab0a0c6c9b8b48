"""Puts the services together from the settings: history, engine, queue, door."""

import logging
import shutil
from functools import partial

from modules.checks import RequestChecks
from modules.engine.environment import prepare_environment
from modules.extensions import Services
from modules.handlers import Handlers
from modules.history import History
from modules.jobs import JobQueue
from modules.provision import Provision
from modules.resources import Resources
from modules.save import remove_partial_files
from modules.settings import Settings
from modules.signing import UrlSigner
from modules.state import FILE_NAME, ServerState
from modules.worker import InlineEngine, MakeWorkbench, ProcessEngine, Workbench

logger = logging.getLogger(__name__)


def make_workbench(settings: Settings) -> Workbench:
    """The workbench of the worker process; imports torch, so only the worker calls it."""
    prepare_environment()
    from modules.generate import EngineWorkbench

    settings.log_in_worker()
    return EngineWorkbench(settings)


def build_services(settings: Settings, *, inline: bool = False, workbench: MakeWorkbench | None = None) -> Services:
    """All services of one server, none of them started.

    Args:
        inline: run tasks in a thread of this process instead of a worker process.
        workbench: what the worker holds; the real engine by default.
    Raises:
        HistoryLocked: another server uses the output folder.
        StorageFull: the output folder cannot be written.
    """
    resources = Resources(settings)
    provision = Provision(settings, resources)
    history = History(settings.paths.outputs, limit=settings.history_limit)
    remove_partial_files(settings.paths.outputs)
    _clean_temp(settings)
    make = workbench or partial(make_workbench, settings)
    engine = InlineEngine(make) if inline else ProcessEngine(make)
    queue = JobQueue(engine, history, preparer=provision, limit=settings.queue_limit)
    state = ServerState(settings.paths.outputs / FILE_NAME)
    return Services(
        settings=settings,
        state=state,
        handlers=Handlers(
            queue=queue,
            history=history,
            check=RequestChecks(resources.plan_resources, provision),
            tools=engine,
            output_root=settings.paths.outputs,
            stop_when_abandoned=settings.on_disconnect == "stop",
        ),
        jobs=queue,
        history=history,
        resources=resources,
        provision=provision,
        signer=UrlSigner(state.secret, enabled=bool(settings.api_keys)),
    )


def _clean_temp(settings: Settings) -> None:
    """Empty the temporary folder, unless the configuration keeps it."""
    if settings.config.temp_path_cleanup_on_launch and settings.paths.temp.is_dir():
        for entry in settings.paths.temp.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
