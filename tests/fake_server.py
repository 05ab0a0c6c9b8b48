"""A server with the fake engine, for checks from outside: `python -m tests.fake_server --port 7865 [flags]`.

Prints `ready URL` when it accepts connections. Results go to a temporary folder unless `--output-path` says otherwise;
`--folder DIR` as the first flag keeps everything, models too, in that one.
"""

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from PIL import Image

from modules.serving import assemble, bind, serve
from modules.settings import Settings


def main(argv: list[str]) -> int:
    """Serve until a signal ends it."""
    from extensions.rest_api.extension import RestApi
    from tests.rest.conftest import ROOT, make_services

    rest = RestApi()
    own = argv[1] if argv[:1] == ["--folder"] else ""
    with nullcontext(own) if own else tempfile.TemporaryDirectory(prefix="focale-fake-") as folder:
        root = Path(folder)
        argv = argv[2:] if own else argv
        if not (root / "presets").exists():
            (root / "presets").symlink_to(ROOT / "presets")
        argv = ["--temp-path", str(root / "temp"), *argv]
        settings = Settings.load(argv, env={}, root=root, extra=[rest.add_arguments])
        settings.prepare()
        settings, listeners = bind(settings)
        services, engine, _check, history = make_services(settings)
        engine.answers.update(unload_models=None, describe="two colours", generate_mask=str(_mask(root)))
        application = assemble(services, [rest], api_ports=listeners.api_ports)
        try:
            ready = f"ready http://127.0.0.1:{settings.api_port}"
            return 0 if serve(application, listeners, on_ready=lambda: print(ready, flush=True)) else 1
        finally:
            history.close()


def _mask(folder: Path) -> Path:
    """A mask for whoever asks for one."""
    path = folder / "mask.png"
    Image.new("L", (32, 24), 255).save(path)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
