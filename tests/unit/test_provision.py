"""Which missing files a request may have fetched, from where, under which flags, and how that is told."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules import provision
from modules.checks import RequestChecks
from modules.control import Control
from modules.downloads import Transfer
from modules.errors import DownloadFailed, Interrupted, InvalidRequest, UnknownName
from modules.events import Noticed, Progress
from modules.plan import make_plan
from modules.provision import Provision, progress_text
from modules.record import Record
from modules.request import GenerationRequest, to_params
from modules.resources import Resources
from modules.settings import Settings
from tests.model_server import ModelServer, model_bytes, model_server

ROOT = Path(__file__).resolve().parents[2]
ANIME = "animaPencilXL_v500.safetensors"
ANIME_PATH = f"mashb1t/fav_models/resolve/main/fav/{ANIME}"
DEFAULT = "juggernautXL_v8Rundiffusion.safetensors"
OFFSET = "sd_xl_offset_example-lora_1.0.safetensors"
LIGHTNING = "sdxl_lightning_4step_lora.safetensors"


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as running:
        yield running


class Machine:
    """A program folder with presets of its own, and what decides about downloads in it."""

    def __init__(self, root: Path, *flags: str) -> None:
        self.root = root
        (root / "presets").mkdir(exist_ok=True)
        for preset in (ROOT / "presets").glob("*.json"):
            (root / "presets" / preset.name).write_bytes(preset.read_bytes())
        (root / "models").mkdir(exist_ok=True)
        self.add("embedded", "focale-tiny.safetensors")
        self.settings = Settings.load(["--temp-path", str(root / "temp"), *flags], env={}, root=root)
        self.settings.prepare()
        self.resources = Resources(self.settings)
        self.provision = Provision(self.settings, self.resources)
        self.check = RequestChecks(self.resources.plan_resources, self.provision)

    def add(self, folder: str, name: str) -> None:
        path = self.root / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model_bytes(1000))

    def preset(self, name: str, **entries: object) -> None:
        (self.root / "presets" / f"{name}.json").write_text(json.dumps(entries))

    def request(self, **sent: object) -> GenerationRequest:
        defaults = self.settings.request_defaults()
        return GenerationRequest.model_validate({**defaults, "style_selections": [], "image_seed": 1, **sent})

    def lacks(self, **sent: object) -> list[str]:
        return [lack.name for lack in self.provision.lacks(self.request(**sent))]

    def offers(self, **sent: object) -> list[str]:
        return [lack.name for lack in self.provision.offers(self.request(**sent))]

    def fetch(self, control: Control | None = None, **sent: object) -> list[object]:
        record = Record(task_id="1" * 32, req_params=to_params(self.request(**sent)))
        assert self.provision.is_needed(record)
        return list(self.provision.run(record, control or Control()))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# -- what is fetched ---------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_without_being_asked_for(machine: Machine) -> None:
    assert machine.lacks() == []
    machine.check(machine.request())


def test_what_the_default_request_lacks_is_offered(machine: Machine) -> None:
    assert machine.offers() == [DEFAULT, OFFSET]


def test_a_request_may_ask_for_what_it_lacks(machine: Machine) -> None:
    assert machine.lacks(download_missing=True) == [DEFAULT, OFFSET]


def test_naming_a_preset_is_asking(machine: Machine) -> None:
    assert machine.lacks(preset="anime", base_model_name=ANIME, loras=[]) == [ANIME]


def test_only_what_the_request_names_is_fetched(machine: Machine) -> None:
    machine.add("checkpoints", "mine.safetensors")
    assert machine.lacks(preset="anime", base_model_name="mine.safetensors", loras=[]) == []


def test_every_kind_of_file_has_its_folder(machine: Machine) -> None:
    machine.preset(
        "all",
        checkpoint_downloads={"base.safetensors": "https://h/base.safetensors", "re.safetensors": "https://h/re"},
        vae_downloads={"v.safetensors": "https://h/v"},
        lora_downloads={"sub/row.safetensors": "https://h/row", "tag.safetensors": "https://h/tag", "no.pt": "https://h/n"},
        embeddings_downloads={"bad-hands.pt": "https://h/e", "other.pt": "https://h/o"},
    )  # fmt: skip
    request = machine.request(
        preset="all",
        prompt="a cat <lora:tag:0.5>",
        negative_prompt="(embedding:bad-hands:1.1)",
        base_model_name="base.safetensors",
        refiner_model_name="re.safetensors",
        vae_name="v.safetensors",
        loras=[
            {"enabled": True, "model_name": "sub\\row.safetensors"},
            {"enabled": False, "model_name": "no.pt"},
        ],
    )
    found = {
        lack.name: str(lack.folder.relative_to(machine.root / "models")) for lack in machine.provision.lacks(request)
    }
    assert found == {
        "base.safetensors": "checkpoints",
        "re.safetensors": "checkpoints",
        "v.safetensors": "vae",
        "sub/row.safetensors": "loras",
        "tag.safetensors": "loras",
        "bad-hands.pt": "embeddings",
    }


def test_a_predecessor_that_is_here_spares_the_download(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.add("checkpoints", "animaPencilXL_v310.safetensors")
    assert machine.lacks(preset="anime", base_model_name=ANIME, loras=[]) == []
    plan = make_plan(machine.request(base_model_name=ANIME, loras=[]), machine.resources.plan_resources())
    assert plan.models.checkpoint.name == "animaPencilXL_v310.safetensors"
    always = Machine(tmp_path, "--always-download-new-model")
    assert always.lacks(preset="anime", base_model_name=ANIME, loras=[]) == [ANIME]


def test_the_default_model_has_predecessors_as_well(machine: Machine) -> None:
    machine.add("checkpoints", "juggernautXL_v6Rundiffusion.safetensors")
    assert machine.lacks(download_missing=True) == [OFFSET]


def test_a_mode_that_needs_a_lora_fetches_it_when_a_real_model_is_there(machine: Machine) -> None:
    machine.add("checkpoints", DEFAULT)
    machine.add("loras", OFFSET)
    assert machine.lacks(performance_selection="Lightning") == [LIGHTNING]
    machine.check(machine.request(performance_selection="Lightning"))
    machine.add("loras", LIGHTNING)
    assert machine.lacks(performance_selection="Lightning") == []


def test_the_demo_model_needs_no_mode_lora(machine: Machine) -> None:
    assert machine.lacks(performance_selection="Lightning") == []
    plan = make_plan(machine.request(performance_selection="Lightning"), machine.resources.plan_resources())
    assert any("focale-few-step.safetensors is not in models/embedded/loras" in notice for notice in plan.notices)
    machine.add("embedded/loras", "focale-few-step.safetensors")
    machine.resources.catalogue.refresh()
    for mode in ("Lightning", "Hyper-SD", "Extreme Speed"):
        plan = make_plan(machine.request(performance_selection=mode), machine.resources.plan_resources())
        assert [(lora.name, lora.weight) for lora in plan.images[0].loras] == [("focale-few-step.safetensors", 1.0)]
        assert not any("LoRA" in notice and "default" not in notice.lower() for notice in plan.notices)


def test_a_mode_lora_comes_along_with_the_model_it_is_for(machine: Machine) -> None:
    asked = {"download_missing": True, "loras": [], "performance_selection": "Hyper-SD"}
    assert machine.lacks(**asked) == [DEFAULT, "sdxl_hyper_sd_4step_lora.safetensors"]


def test_a_refiner_that_the_mode_leaves_out_is_not_fetched(machine: Machine) -> None:
    asked = {"base_model_name": "sd_xl_base_1.0_0.9vae.safetensors", "loras": [], "download_missing": True}
    refiner = {"refiner_model_name": "sd_xl_refiner_1.0_0.9vae.safetensors"}
    assert "sd_xl_refiner_1.0_0.9vae.safetensors" in machine.lacks(**asked, **refiner)
    assert "sd_xl_refiner_1.0_0.9vae.safetensors" not in machine.lacks(
        **asked, **refiner, performance_selection="Extreme Speed"
    )


@pytest.mark.parametrize(("flags", "names"), [((), (DEFAULT, OFFSET)), (("--preset", "anime"), (ANIME,))])
def test_a_start_tells_what_is_missing_and_fetches_nothing(
    server: ModelServer, tmp_path: Path, flags: tuple[str, ...], names: tuple[str, ...]
) -> None:
    Machine(tmp_path)
    machine = Machine(tmp_path, "--hf-mirror", server.url, *flags)
    notes = machine.provision.notes_at_start()
    assert [note.split()[0] for note in notes] == list(names)
    assert machine.lacks() == []
    assert server.asked == []
    (note,) = Machine(tmp_path, "--offline", *flags).provision.notes_at_start()
    assert all(name in note for name in (*names, "--offline"))


# -- where it comes from -----------------------------------------------------------------------------------------------


def test_the_own_preset_wins_over_config_and_config_over_other_presets(tmp_path: Path) -> None:
    (tmp_path / "config.txt").write_text(json.dumps({"checkpoint_downloads": {"x.safetensors": "https://config/x"}}))
    machine = Machine(tmp_path)
    for name in ("a", "b"):
        machine.preset(name, checkpoint_downloads={"x.safetensors": f"https://{name}/x"})
    asked = {"base_model_name": "x.safetensors", "loras": [], "download_missing": True}
    url_of = lambda **sent: machine.provision.lacks(machine.request(**asked, **sent))[0].url  # noqa: E731
    assert url_of() == "https://config/x"
    assert url_of(preset="b") == "https://b/x"


def test_a_preset_that_is_put_there_later_counts_at_once(machine: Machine) -> None:
    asked = {"base_model_name": "late.safetensors", "loras": [], "download_missing": True}
    assert machine.lacks(**asked) == []
    machine.preset("late", checkpoint_downloads={"late.safetensors": "https://h/late"})
    assert machine.lacks(**asked) == ["late.safetensors"]


def test_a_request_never_brings_an_address(machine: Machine) -> None:
    asked = {"download_missing": True, "base_model_name": "https://evil.example/x.safetensors", "loras": []}
    assert machine.lacks(**asked) == []
    with pytest.raises(UnknownName):
        machine.check(machine.request(**asked))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--offline", "--disable-preset-download"])
@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({"preset": "anime", "base_model_name": ANIME}, ("preset",)),
        ({"download_missing": True, "base_model_name": ANIME}, ("download_missing",)),
    ],
)
def test_a_switched_off_download_is_refused_with_names_and_addresses(
    tmp_path: Path, flag: str, sent: dict[str, object], field: tuple[str, ...]
) -> None:
    machine = Machine(tmp_path, flag, "--hf-mirror", "mirror.example")
    with pytest.raises(InvalidRequest) as caught:
        machine.check(machine.request(**sent, loras=[]))
    assert caught.value.field == field
    assert ANIME in caught.value.message
    assert f"https://mirror.example/{ANIME_PATH}" in caught.value.message
    assert flag in caught.value.message
    assert "models/checkpoints" in caught.value.message
    record = Record(req_params=to_params(machine.request(**sent, loras=[])))
    assert not machine.provision.is_needed(record)


def test_a_mode_without_its_lora_is_refused_when_downloads_are_off(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "--offline")
    machine.add("checkpoints", DEFAULT)
    with pytest.raises(InvalidRequest, match=LIGHTNING) as caught:
        machine.check(machine.request(performance_selection="Lightning", loras=[]))
    assert caught.value.field == ("performance_selection",)


def test_a_named_file_with_a_source_says_how_to_get_it(machine: Machine) -> None:
    asked = {"refiner_model_name": "sd_xl_refiner_1.0_0.9vae.safetensors", "loras": []}
    with pytest.raises(InvalidRequest, match='"download_missing": true') as caught:
        machine.check(machine.request(**asked))
    assert caught.value.field == ("refiner_model_name",)
    machine.check(machine.request(**asked, download_missing=True))


def test_a_name_without_a_source_stays_unknown(machine: Machine) -> None:
    with pytest.raises(UnknownName):
        machine.check(machine.request(vae_name="nowhere.safetensors", download_missing=True, loras=[]))


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_the_files_come_with_progress_and_are_found_at_once(server: ModelServer, tmp_path: Path) -> None:
    server.add(ANIME_PATH, model_bytes(900_000))
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    machine.resources.plan_resources()
    events = machine.fetch(preset="anime", base_model_name=ANIME, loras=[])
    percents = [event.percent for event in events if isinstance(event, Progress)]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert events[-1] == Noticed(f"Downloaded {ANIME}, 900.1 KB.")
    assert any(isinstance(event, Progress) and "of 900.1 KB ..." in event.message for event in events)
    assert machine.lacks(preset="anime", base_model_name=ANIME, loras=[]) == []
    plan = make_plan(machine.request(base_model_name=ANIME, loras=[]), machine.resources.plan_resources())
    assert plan.models.checkpoint.name == ANIME


def test_several_files_share_the_bar_by_their_sizes(server: ModelServer, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    machine.preset(
        "two",
        checkpoint_downloads={"big.safetensors": "https://huggingface.co/big"},
        lora_downloads={"small.safetensors": "https://huggingface.co/small"},
    )
    server.add("big", model_bytes(900_000))
    server.add("small", model_bytes(100_000))
    loras = [{"enabled": True, "model_name": "small.safetensors"}]
    events = machine.fetch(preset="two", base_model_name="big.safetensors", loras=loras)
    starts = {
        event.message: event.percent for event in events if isinstance(event, Progress) and "," not in event.message
    }
    assert starts == {"Downloading big.safetensors ...": 0, "Downloading small.safetensors ...": 89}


def test_progress_is_told_a_few_times_a_second(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.downloads.CHUNK_BYTES", 1000)
    server.add(ANIME_PATH, model_bytes(900_000), chunk=1000)
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    events = machine.fetch(preset="anime", base_model_name=ANIME, loras=[])
    assert len(events) < 40


def test_stop_ends_it_and_what_came_is_kept(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provision, "PROGRESS_INTERVAL_S", 0.0)
    server.add(ANIME_PATH, model_bytes(900_000))
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    control = Control()
    request = machine.request(preset="anime", base_model_name=ANIME, loras=[])
    events = machine.provision.run(Record(req_params=to_params(request)), control)
    next(event for event in events if isinstance(event, Progress) and event.percent >= 30)
    control.ask("stop")
    with pytest.raises(Interrupted):
        next(events)
    left = sorted(os.listdir(tmp_path / "models" / "checkpoints"))
    assert left == [f"{ANIME}.part", f"{ANIME}.part.json"]
    assert machine.offers(base_model_name=ANIME, loras=[]) == [ANIME]


def test_a_file_that_somebody_else_has_fetched_meanwhile_is_not_told_as_downloaded(
    server: ModelServer, tmp_path: Path
) -> None:
    server.add(ANIME_PATH, model_bytes())
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    request = machine.request(preset="anime", base_model_name=ANIME, loras=[])
    events = machine.provision.run(Record(req_params=to_params(request)), Control())
    next(events)
    machine.add("checkpoints", ANIME)
    assert not [event for event in events if isinstance(event, Noticed)]
    assert server.asked == []


def test_an_embedding_that_is_here_is_not_missing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.preset("hands", embeddings_downloads={"bad-hands.pt": "https://h/e"})
    asked = {
        "preset": "hands",
        "prompt": "embedding:bad-hands",
        "loras": [],
        "base_model_name": "focale-tiny.safetensors",
    }
    assert machine.lacks(**asked) == ["bad-hands.pt"]
    machine.add("embeddings", "bad-hands.pt")
    assert machine.lacks(**asked) == []


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/evil.safetensors", ".hidden.safetensors"])
def test_a_preset_writes_nothing_outside_its_folder(server: ModelServer, tmp_path: Path, name: str) -> None:
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    machine.preset("evil", checkpoint_downloads={name: "https://huggingface.co/evil"})
    server.add("evil", model_bytes())
    with pytest.raises(DownloadFailed, match="cannot be the name"):
        machine.fetch(preset="evil", base_model_name=name, loras=[])
    assert server.asked == []


def test_a_preset_may_fetch_model_files_only(server: ModelServer, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    machine.preset("evil", checkpoint_downloads={"run_me.py": "https://huggingface.co/evil"})
    with pytest.raises(DownloadFailed, match="cannot be the name"):
        machine.fetch(preset="evil", base_model_name="run_me.py", loras=[])


def test_the_size_of_an_offer_is_asked_for_unless_that_is_switched_off(server: ModelServer, tmp_path: Path) -> None:
    server.add(ANIME_PATH, model_bytes())
    machine = Machine(tmp_path, "--hf-mirror", server.url)
    (offer,) = machine.provision.offers(machine.request(base_model_name=ANIME, loras=[]))
    assert machine.provision.size(offer) == len(model_bytes())
    offline = Machine(tmp_path, "--hf-mirror", server.url, "--offline")
    assert offline.provision.size(offer) is None
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("transfer", "text"),
    [
        (Transfer("receiving", 1_200_000_000, 6_600_000_000), "Downloading x, 1.2 of 6.6 GB ..."),
        (Transfer("receiving", 5_000_000, 6_600_000_000), "Downloading x, 0.0 of 6.6 GB ..."),
        (Transfer("receiving", 5_000_000, None), "Downloading x, 5.0 MB ..."),
        (Transfer("waiting", 5_000_000, None), "Waiting for another download of x, 5.0 MB so far ..."),
        (Transfer("checking", 5, 10), "Checking x, 5 bytes of 10 bytes ..."),
        (
            Transfer("retrying", 1_000, 2_000),
            "The connection broke off; trying again to download x, 1.0 of 2.0 KB ...",
        ),
    ],
)
def test_progress_is_told_in_words(transfer: Transfer, text: str) -> None:
    assert progress_text("x", transfer) == text
