"""Connects widgets to what they do: every button and box, by name, to the one door."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import gradio as gr
from gradio.components import Component

from modules.choices import FIXED_BY_PERFORMANCE, Performance, is_distilled
from modules.errors import FocaleError
from modules.extensions import Services
from modules.files import Kind
from modules.metadata_reader import KnownModels, ReadParameters, read_picture, read_text
from modules.presets import load_preset
from modules.ui import markup
from modules.ui.controls import Controls
from modules.ui.labels import sentence_of
from modules.ui.layout import Extras, Metadata, Switches, Viewer, ratios_title
from modules.ui.run_view import RunView
from modules.ui.runs import Runs

Update: TypeAlias = dict[str, Any]
"""Changed properties of one widget, as `gr.update` makes them."""
Updates: TypeAlias = dict[Component, Any]

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, **PRIVATE}
REMEMBER_TASK = "(id) => { window.focale.rememberTask(id); return []; }"
RECALL_TASK = "(id) => [window.focale.recallTask()]"


_NO_CHANGE: Update = gr.skip()


def _changed(**properties: object) -> Update:
    """New properties of a widget."""
    return {"__type__": "update", **properties}


class Bindings:
    """The events of the page. Values travel by name: `Controls` knows which widget holds which parameter."""

    def __init__(
        self,
        services: Services,
        *,
        controls: Controls,
        viewer: Viewer,
        switches: Switches,
        extras: Extras,
        metadata: Metadata,
        share_results: Callable[[], None],
        hint: Callable[[], str],
    ) -> None:
        """Hold the parts together.

        Args:
            share_results: makes the folders of results readable for the page's browser.
            hint: the sentence in the empty viewer.
        """
        self._services = services
        self._runs = Runs(services)
        self._controls = controls
        self._viewer = viewer
        self._switches = switches
        self._extras = extras
        self._metadata = metadata
        self._share_results = share_results
        self._hint = hint
        self._root = services.settings.paths.outputs

    def connect(self, page: gr.Blocks) -> None:
        """Attach everything."""
        self._connect_runs(page)
        self._connect_switches(page)
        self._connect_settings()
        self._connect_metadata()

    # -- runs ---------------------------------------------------------------------------------------------------

    def _connect_runs(self, page: gr.Blocks) -> None:
        viewer, shown = self._viewer, self._run_outputs()
        endless: dict[str, Any] = {"concurrency_limit": None, **PRIVATE}
        viewer.generate.click(self.generate, self._controls.inputs, shown, **endless)
        page.load(self.attach, viewer.task_id, shown, js=RECALL_TASK, **endless)
        viewer.task_id.change(None, viewer.task_id, None, js=REMEMBER_TASK, **AT_ONCE)
        viewer.stop.click(self.stop, viewer.task_id, viewer.stop, **AT_ONCE)
        viewer.skip.click(self.skip, viewer.task_id, viewer.skip, **AT_ONCE)
        viewer.gallery.select(self.select_picture, None, viewer.selected, **AT_ONCE)
        seed = list(self._controls.made["image_seed"].widgets)
        viewer.reuse_seed.click(self.reuse_seed, [viewer.task_id, viewer.selected], seed, **AT_ONCE)
        viewer.load.click(self.load_parameters, self._controls.widget("prompt"), self._field_outputs(), **AT_ONCE)

    def _run_outputs(self) -> list[Component]:
        viewer = self._viewer
        return [
            viewer.task_id, viewer.stage, viewer.gallery, viewer.progress, viewer.messages, viewer.seeds,
            viewer.reuse_seed, viewer.generate, viewer.skip, viewer.stop, self._extras.history,
            self._controls.made["image_seed"].widgets[1],
        ]  # fmt: skip

    def _field_outputs(self) -> list[Component]:
        return [
            *(widget for control in self._controls.working for widget in control.widgets),
            self._viewer.messages, self._switches.advanced,
        ]  # fmt: skip

    async def generate(self, values: Mapping[Component, object]) -> AsyncIterator[Updates]:
        """Submit what the page says and show the run."""
        async for updates in self._shown(self._runs.generate(self._controls.read(values))):
            yield updates

    async def attach(self, task_id: str) -> AsyncIterator[Updates]:
        """Show the run this browser tab started, if there is one."""
        async for updates in self._shown(self._runs.attach(task_id)):
            yield updates

    async def _shown(self, views: AsyncIterator[RunView]) -> AsyncIterator[Updates]:
        """What changes on the page from view to view."""
        last: Updates = {}
        async for view in views:
            if view.pictures:
                self._share_results()
            now = self._updates(view)
            yield {part: new for part, new in now.items() if last.get(part) != new} or {
                self._viewer.task_id: _NO_CHANGE
            }
            last = now

    def _updates(self, view: RunView) -> Updates:
        """Everything the page shows of a view."""
        viewer, busy = self._viewer, view.is_busy
        has_gallery = not busy and bool(view.pictures)
        paths = [str(self._root / path) for path in view.pictures] if has_gallery else []
        updates: Updates = {
            viewer.stage: _changed(value=markup.stage(view, self._root, self._hint()), visible=not has_gallery),
            viewer.gallery: _changed(value=paths, visible=has_gallery, selected_index=0 if has_gallery else None),
            viewer.progress: _changed(value=markup.progress_bar(view)),
            viewer.messages: _changed(value=markup.messages(view)),
            viewer.seeds: _changed(value="" if busy else markup.seeds(view)),
            viewer.reuse_seed: _changed(visible=has_gallery and bool(view.seeds)),
            viewer.generate: _changed(visible=not busy),
            viewer.skip: _changed(visible=busy, interactive=True, value="Skip"),
            viewer.stop: _changed(visible=busy, interactive=True, value="Stop"),
        }
        if view.task_id:
            updates[viewer.task_id] = _changed(value=view.task_id)
        if not busy:
            updates[self._extras.history] = _changed(value=markup.history_link(self._root, view))
        return updates | self._drawn_seed(view)

    def _drawn_seed(self, view: RunView) -> Updates:
        """The seed of the run, in its box: there to be read once Random is off."""
        job = self._services.jobs.get(view.task_id) if view.task_id else None
        box = self._controls.made["image_seed"].widgets[1]
        return {box: _changed(value=str(job.request.image_seed))} if job and view.is_busy else {}

    async def stop(self, task_id: str) -> Update:
        """Stop the run of this page, and say so before it has ended."""
        stopping = await self._runs.stop(task_id)
        return _changed(value="Stopping ...", interactive=False) if stopping else _NO_CHANGE

    async def skip(self, task_id: str) -> Update:
        """Skip the picture in work of this page's run."""
        await self._runs.skip(task_id)
        return _NO_CHANGE

    def select_picture(self, event: gr.SelectData) -> int:
        """Note which picture of the gallery is in front."""
        return event.index if isinstance(event.index, int) else 0

    async def reuse_seed(self, task_id: str, selected: float) -> list[Any]:
        """Put the seed of the picture in front into the seed box."""
        control = self._controls.made["image_seed"]
        seed = await self._runs.seed_of(task_id, int(selected or 0))
        if seed is None:
            return [_NO_CHANGE for _widget in control.widgets]
        return list(control.updates(seed).values())

    async def load_parameters(self, text: str) -> Updates:
        """Set the page to parameters that were pasted into the prompt."""
        found = await asyncio.to_thread(read_text, text, known=self._known_models())
        return self._set_page(found)

    def _known_models(self) -> KnownModels:
        files = self._services.files
        return KnownModels(
            checkpoints=files.names(Kind.CHECKPOINT), loras=files.names(Kind.LORA), vaes=files.names(Kind.VAE)
        )

    def _set_page(self, found: ReadParameters) -> Updates:
        updates = self._controls.updates(found.request)
        updates[self._viewer.messages] = _changed(value=markup.notes(found.problems))
        if found.request:
            updates[self._switches.advanced] = _changed(value=True)
        return updates

    # -- metadata -----------------------------------------------------------------------------------------------

    def _connect_metadata(self) -> None:
        part = self._metadata
        part.picture.change(self.read_picture, part.picture, [part.shown, part.apply, self._viewer.messages], **AT_ONCE)
        part.apply.click(self.apply_picture, part.picture, self._field_outputs(), **AT_ONCE)

    async def read_picture(self, path: str | None) -> list[Update]:
        """Show the parameters that a picture carries."""
        if path is None:
            return [_changed(visible=False, value=None), _changed(visible=False), _changed(value="")]
        try:
            found = await asyncio.to_thread(read_picture, Path(path), known=self._known_models())
        except FocaleError as error:
            return [_changed(visible=False), _changed(visible=False), _changed(value=markup.problem(str(error)))]
        shown = {"parameters": dict(found.rows) or found.request, "metadata_scheme": found.scheme}
        has_any = bool(found.request)
        return [
            _changed(visible=has_any, value=shown),
            _changed(visible=has_any),
            _changed(value=markup.notes(found.problems)),
        ]

    async def apply_picture(self, path: str | None) -> Updates:
        """Set the page to the parameters of one picture."""
        if path is None:
            return {self._viewer.messages: _NO_CHANGE}
        found = await asyncio.to_thread(read_picture, Path(path), known=self._known_models())
        return self._set_page(replace(found, request=found.of_this_picture()))

    # -- switches -----------------------------------------------------------------------------------------------

    def _connect_switches(self, page: gr.Blocks) -> None:
        switches, extras = self._switches, self._extras
        for box, panel in (
            (switches.input_image, switches.input_panel),
            (switches.enhance, switches.enhance_panel),
            (switches.advanced, switches.advanced_panel),
            (extras.debug_mode, extras.debug_panel),
        ):
            box.change(show_panel, box, panel, **AT_ONCE)
        extras.api_enabled.input(self.switch_api, extras.api_enabled, None, **AT_ONCE)
        page.load(self.api_state, None, extras.api_enabled, **AT_ONCE)

    def switch_api(self, enabled: bool) -> None:
        """Let the API answer, or not; on every port, at once, and after a restart as well."""
        self._services.state.api_enabled = bool(enabled)

    def api_state(self) -> bool:
        """Whether the API answers: another page may have switched it since this one was built."""
        return self._services.state.api_enabled

    # -- settings -----------------------------------------------------------------------------------------------

    def _connect_settings(self) -> None:
        controls, extras = self._controls, self._extras
        size = cast(gr.Radio, controls.widget("aspect_ratios_selection"))
        size.change(lambda chosen: _changed(label=ratios_title(chosen)), size, extras.ratios, **AT_ONCE)
        performance = cast(gr.Radio, controls.widget("performance_selection"))
        locked = [controls.widget(name) for name in forced_names()]
        more = [controls.widget("negative_prompt"), controls.widget("disable_intermediate_results")]
        performance.change(self.lock_forced, performance, [*locked, *more], **AT_ONCE)
        random, seed = controls.made["image_seed"].widgets
        cast(gr.Checkbox, random).change(lambda is_random: _changed(visible=not is_random), random, seed, **AT_ONCE)
        styles = controls.widget("style_selections")
        search = extras.style_search
        search.input(self.sort_styles, [search, styles], styles, trigger_mode="always_last", **AT_ONCE)
        search.blur(self.sort_styles, [search, styles], styles, **AT_ONCE)
        extras.refresh.click(self.refresh, controls.inputs, self._field_outputs(), **AT_ONCE)
        if extras.preset is not None:
            extras.preset.input(self.apply_preset, extras.preset, self._field_outputs(), **AT_ONCE)

    def lock_forced(self, performance: str) -> list[Any]:
        """Make what the performance mode imposes read-only; free it otherwise."""
        mode = Performance(performance)
        fixed = FIXED_BY_PERFORMANCE[mode].forced
        fast = is_distilled(mode)
        return [
            *(_changed(interactive=name not in fixed) for name in forced_names()),
            _changed(visible=not fast),
            _changed(value=fast),
        ]

    def sort_styles(self, search: str, chosen: list[str]) -> Update:
        """Matches first while someone searches, then what is chosen, then all others."""
        wanted = search.strip().casefold()
        names = self._services.styles.names
        matches = [name for name in names if wanted and wanted in name.casefold()]
        kept = [name for name in chosen if name not in matches]
        rest = [name for name in names if name not in matches and name not in kept]
        return _changed(choices=[*matches, *kept, *rest])

    async def refresh(self, values: Mapping[Component, object]) -> Updates:
        """Read the model folders anew and offer what is there now."""
        await asyncio.to_thread(self._services.files.refresh)
        fields = self._controls.read(values)
        files = ("base_model_name", "refiner_model_name", "vae_name", "loras")
        return self._controls.updates({name: fields[name] for name in files})

    async def apply_preset(self, name: str) -> Updates:
        """Set the page to a preset; what it does not name returns to the start values."""
        try:
            preset = await asyncio.to_thread(load_preset, self._services.settings.paths.presets, name)
        except FocaleError as error:
            return {self._viewer.messages: _changed(value=markup.problem(sentence_of(error)))}
        fields = {**self._start_values(), **preset.request_fields}
        model = preset.model(self._services.files.names(Kind.CHECKPOINT))
        if model:
            fields["base_model_name"] = model
        notes = [*preset.problems, *self._without_missing_loras(fields)]
        if not fields.get("prompt"):
            fields.pop("prompt", None)
        updates = self._controls.updates(fields)
        updates[self._viewer.messages] = _changed(value=markup.notes(notes))
        return updates

    def _start_values(self) -> dict[str, object]:
        """What the page began with, of the parameters that presets can set."""
        return dict(self._services.settings.page_defaults())

    def _without_missing_loras(self, fields: dict[str, object]) -> list[str]:
        """Switch off rows whose file is absent, in place; returns a sentence for each."""
        rows = [dict(row) for row in cast(list[dict[str, Any]], fields.get("loras", []))]
        notes = []
        for row in rows:
            missing = row["model_name"] != "None" and self._services.files.find(Kind.LORA, row["model_name"]) is None
            if missing and row["enabled"]:
                row["enabled"] = False
                notes.append(f"{row['model_name']} is not in models/loras; its row is switched off.")
        fields["loras"] = rows
        return notes


def show_panel(is_open: bool) -> Update:
    """Show or hide a panel."""
    return _changed(visible=is_open)


def forced_names() -> tuple[str, ...]:
    """Every parameter that some performance mode imposes."""
    return tuple(FIXED_BY_PERFORMANCE[Performance.LIGHTNING].forced)
