"""What the page shows of a run, from events and from records, and the markup it is shown with."""

from pathlib import Path

import pytest

from modules.config import ASPECT_RATIOS
from modules.errors import InvalidRequest, UnknownName
from modules.events import (
    Failed,
    Finished,
    ImageSaved,
    Noticed,
    Progress,
    Queued,
    Retrying,
    Skipped,
    Started,
    Stopped,
)
from modules.record import Record
from modules.ui import markup
from modules.ui.controls import declared_fields
from modules.ui.labels import aspect_label, nearest_size, sentence_of
from modules.ui.layout import PANELS_TO_COME
from modules.ui.run_view import RunView, after, view_of_record, with_estimate


def test_panels_to_come_hold_nothing_that_works() -> None:
    early = [name for name, one in declared_fields().items() if one.ui.place in PANELS_TO_COME and one.ui.works]
    assert early == []


@pytest.mark.parametrize(
    ("width", "height", "size"), [(1920, 1080, "1344*768"), (1080, 1920, "768*1344"), (5, 5, "1024*1024")]
)
def test_recommended_size_has_the_nearest_ratio(width: int, height: int, size: str) -> None:
    assert nearest_size(width, height, ASPECT_RATIOS) == size


def view_after(*events: object) -> RunView:
    view = RunView(task_id="t", images=2)
    for event in events:
        view = after(view, event)
    return view


def test_view_collects_pictures_seeds_and_notes() -> None:
    saved = ImageSaved("2026-01-01/a.png", 0, 7, 64, 64)
    view = view_after(Queued(0), Started(), Noticed("Demo."), Noticed("Demo."), Progress(40, "x", b"j"), saved)
    assert (view.pictures, view.seeds, view.notes, view.percent, view.preview) == (
        ("2026-01-01/a.png",), (7,), ("Demo.",), 40, b"j",
    )  # fmt: skip
    assert view.is_busy
    assert not after(view, Finished()).is_busy


@pytest.mark.parametrize(
    ("event", "problem", "outcome"),
    [
        (Finished(), "", ""),
        (Stopped(), "", "Stopped: no picture was finished."),
        (Skipped(), "", "Skipped: no picture was made."),
        (Failed("No memory."), "No memory.", ""),
    ],
)
def test_end_of_a_run_is_told(event: object, problem: str, outcome: str) -> None:
    view = view_after(Started(), event)
    assert (view.phase, view.problem, view.outcome) == ("ended", problem, outcome)


def test_preview_stays_when_a_step_has_none() -> None:
    assert view_after(Started(), Progress(1, "a", b"x"), Progress(2, "b")).preview == b"x"


def test_lost_worker_is_told() -> None:
    assert view_after(Started(), Retrying("the worker died")).text == "Starting again: the worker died"


@pytest.mark.parametrize(("percent", "left_s"), [(20, None), (29, None), (30, 70), (60, 10), (100, 0)])
def test_time_left_follows_from_the_steps_so_far(percent: int, left_s: int | None) -> None:
    first = view_after(Started(), Progress(20, "x", step=1))
    assert with_estimate(after(first, Progress(percent, "x", step=2)), first, 10).left_s == left_s


def test_time_left_is_shown_in_minutes_and_seconds() -> None:
    assert "2 min 5 s left" in markup.progress_bar(RunView(phase="running", percent=50, left_s=125))
    assert "left" not in markup.progress_bar(RunView(phase="running", percent=5))


def test_many_notes_show_the_first_and_keep_the_others_behind_it() -> None:
    assert "details" not in markup.notes(["One."])
    shown = markup.notes(["One.", "Two.", "Three."])
    assert shown.index("One.") < shown.index("2 more") < shown.index("Two.") < shown.index("Three.")


def test_record_of_an_ended_task_gives_the_view_its_events_gave() -> None:
    record = Record(
        task_id="t", req_params={"image_number": 2}, task_status="stop", result=("d/a.png",), seeds=(3,), notes=("N.",)
    )
    events = (Started(), Noticed("N."), ImageSaved("d/a.png", 0, 3, 64, 64), Stopped())
    assert view_of_record(record) == view_after(*events)


def test_texts_are_escaped() -> None:
    view = RunView(phase="running", text="<b>", problem="<i>", notes=("<u>",), pictures=('2026-01-01/"<.png',))
    html = markup.stage(view, Path("/o")) + markup.progress_bar(view) + markup.messages(view)
    for tag in ("<b>", "<i>", "<u>", '"<.png'):
        assert tag not in html


def test_sentences_begin_with_the_label_of_the_widget() -> None:
    assert sentence_of(InvalidRequest("vae_name", "is gone")) == "VAE: is gone"
    assert sentence_of(UnknownName(("loras", 1, "model_name"), "x", ["y"], what="LoRA")).startswith("LoRAs 2: ")


@pytest.mark.parametrize(("size", "label"), [("1152*896", "1152×896 ∣ 9:7"), ("1024*1024", "1024×1024 ∣ 1:1")])
def test_sizes_show_their_ratio(size: str, label: str) -> None:
    assert aspect_label(size) == label


def test_history_link_leads_to_the_newest_day(tmp_path: Path) -> None:
    assert "href" not in markup.history_link(tmp_path, RunView())
    for day in ("2026-01-01", "2026-01-02", "2026-01-03"):
        (tmp_path / day).mkdir()
    (tmp_path / "2026-01-02" / "log.html").write_text("x")
    assert "2026-01-02/log.html" in markup.history_link(tmp_path, RunView())
