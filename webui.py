"""Starts Focale: settings → services → extensions → page → serve. Nothing else is decided here."""

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modules.extensions import Extension
    from modules.settings import Settings

STARTED = time.perf_counter()
NOTES_AFTER_S = 1.0

logger = logging.getLogger("focale")


def main(argv: Sequence[str]) -> int:
    """Serve, or run one command; returns the exit code."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for plugins reads every installed package
    if argv[:1] == ["generate"]:
        from modules.command_line import main as generate

        return generate(argv[1:])
    if argv[:1] == ["history"]:
        from modules.history_cli import main as history

        return history(argv[1:])
    return _serve(argv)


def _serve(argv: Sequence[str]) -> int:
    """Serve page and API until a signal comes."""
    gc.disable()  # nothing that start-up makes is garbage; collecting costs about a tenth of it
    from modules.errors import FocaleError
    from modules.extensions import load_extensions
    from modules.settings import Settings

    loaded = load_extensions()
    try:
        settings = Settings.load(argv, extra=loaded.argument_adders())
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        settings.prepare()
        settings.log()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # libraries never fetch by themselves; settings are read by now
        return _run(settings, loaded.extensions)
    except FocaleError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _run(settings: "Settings", extensions: "Sequence[Extension]") -> int:
    """Bind the ports, put everything together and serve."""
    from modules import serving
    from modules.assembly import build_services

    settings, listeners = serving.bind(settings)
    services = build_services(settings)
    services.jobs.begin()
    page = None
    if not settings.nowebui:
        from modules.ui.page import build_page

        page = build_page(services, extensions)
    application = serving.assemble(services, extensions, page=page, api_ports=listeners.api_ports)
    try:
        served = serving.serve(
            application,
            listeners,
            trusted_proxies=settings.trusted_proxies,
            on_ready=lambda: _announce(settings, services.provision.notes_at_start),
        )
    finally:
        services.history.close()
    return 0 if served else 1


def _announce(settings: "Settings", notes: Callable[[], list[str]]) -> None:
    """Tell where the server is, and what it lacks."""
    gc.freeze()
    gc.enable()
    host = "127.0.0.1" if settings.listen in ("0.0.0.0", "::") else settings.listen
    if not settings.nowebui:
        logger.info("The page is at http://%s:%d/", host, settings.webui_port)
    logger.info("The API is at http://%s:%d/docs", host, settings.api_port)
    if settings.exposure:
        logger.warning("%s", settings.exposure)
    logger.info("Ready after %.2f s.", time.perf_counter() - STARTED)
    telling = threading.Timer(NOTES_AFTER_S, _tell, [notes])  # the first callers come first
    telling.daemon = True
    telling.start()
    if settings.open_browser:
        import webbrowser

        webbrowser.open(f"http://{host}:{settings.webui_port}/")


def _tell(notes: Callable[[], list[str]]) -> None:
    for note in notes():
        logger.info("%s", note)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
