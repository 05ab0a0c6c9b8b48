"""Connects widgets to what they do: every button and box, by name, to the one door."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import gradio as gr
from gradio.components import Component

from modules.choices import FIXED_BY_PERFORMANCE, ContentType, Performance, is_distilled
from modules.errors import FocaleError
from modules.extensions import Services
from modules.files import Kind
from modules.images import read_image
from modules.metadata_reader import KnownModels, ReadParameters, read_picture, read_text
from modules.presets import INITIAL, load_preset, preset_names
from modules.ui import markup
from modules.ui.controls import Controls
from modules.ui.labels import aspect_label, nearest_size, sentence_of
from modules.ui.layout import Describe, Extras, Metadata, Missing, Switches, Viewer, ratios_title
from modules.ui.offers import Offer, Offers, without_missing_loras
from modules.ui.run_view import RunView
from modules.ui.runs import Runs

Update: TypeAlias = dict[str, Any]
"""Changed properties of one widget, as `gr.update` makes them."""
Updates: TypeAlias = dict[Component, Any]

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE: dict[str, Any] = {"queue": False, **PRIVATE}
IN_STEPS: dict[str, Any] = {"concurrency_limit": None, **PRIVATE}
"""For what answers more than once; Gradio lets only queued events do that."""
REMEMBER_TASK = "(id) => { window.focale.rememberTask(id); return []; }"
FILE_FIELDS = ("base_model_name", "refiner_model_name", "vae_name", "loras")
STYLES_FOR: Mapping[ContentType, tuple[str, ...]] = {
    ContentType.PHOTOGRAPH: ("Fooocus V2", "Fooocus Enhance", "Fooocus Sharp"),
    ContentType.ART: ("Fooocus V2", "Fooocus Masterpiece"),
}
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
        missing: Missing,
        switches: Switches,
        extras: Extras,
        describe: Describe,
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
        self._missing = missing
        self._offers = Offers(services.provision, services.resources)
        self._switches = switches
        self._extras = extras
        self._describe = describe
        self._metadata = metadata
        self._share_results = share_results
        self._hint = hint
        self._root = services.settings.paths.outputs

    def connect(self, page: gr.Blocks) -> None:
        """Attach everything."""
        self._connect_runs(page)
        self._connect_missing(page)
        self._connect_switches(page)
        self._connect_settings()
        self._connect_describe()
        self._connect_metadata()

    # -- runs ---------------------------------------------------------------------------------------------------

    def _connect_runs(self, page: gr.Blocks) -> None:
        viewer, shown = self._viewer, self._run_outputs()
        viewer.generate.click(self.generate, self._all_inputs(), shown, **IN_STEPS).then(
            self.look_again, self._all_inputs(), [*self._missing_outputs(), *self._file_widgets()], **AT_ONCE
        )
        page.load(self.attach, viewer.task_id, shown, js=RECALL_TASK, **IN_STEPS)
        viewer.task_id.change(None, viewer.task_id, None, js=REMEMBER_TASK, **AT_ONCE)
        viewer.stop.click(self.stop, viewer.task_id, viewer.stop, **AT_ONCE)
        viewer.skip.click(self.skip, viewer.task_id, viewer.skip, **AT_ONCE)
        viewer.gallery.select(self.select_picture, None, viewer.selected, **AT_ONCE)
        seed = list(self._controls.made["image_seed"].widgets)
        viewer.reuse_seed.click(self.reuse_seed, [viewer.task_id, viewer.selected], seed, **AT_ONCE)
        loaded = viewer.load.click(
            self.load_parameters, self._controls.widget("prompt"), self._field_outputs(), **AT_ONCE
        )
        loaded.then(self.look, self._all_inputs(), self._missing_outputs(), **AT_ONCE)

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
        fields = self._controls.read(values)
        offer = await self._offers.of(fields)
        fields["download_missing"] = bool(offer.lacks) and bool(values[self._missing.download])
        if offer.lacks and not fields["download_missing"]:
            fields["loras"] = without_missing_loras(cast(list[dict[str, object]], fields["loras"]), offer)
        async for updates in self._shown(self._runs.generate(fields)):
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

    # -- missing files ------------------------------------------------------------------------------------------

    def _connect_missing(self, page: gr.Blocks) -> None:
        # What people change, not what events change: while an event's updates are applied one by one, the values of the
        # other widgets do not fit their choices yet.
        chosen = [self._controls.widget("performance_selection"), *self._file_widgets()]
        inputs, outputs = self._all_inputs(), self._missing_outputs()
        changes = [cast(Any, widget).input for widget in chosen]
        gr.on([page.load, *changes], self.look, inputs, outputs, trigger_mode="always_last", **AT_ONCE)
        self._missing.download.input(self.look_at_sizes, inputs, outputs, **IN_STEPS)

    def _all_inputs(self) -> set[Any]:
        return {*self._controls.inputs, self._missing.download}

    def _missing_outputs(self) -> list[Component]:
        return [cast(Component, self._missing.panel), self._missing.note, self._missing.download]

    def _file_widgets(self) -> list[Component]:
        """The widgets that choose files."""
        return [widget for name in FILE_FIELDS for widget in self._controls.made[name].widgets]

    async def look(self, values: Mapping[Component, object]) -> Updates:
        """Say what is missing for what the page says now."""
        offer = await self._offers.of(self._controls.read(values))
        return self._offered(offer, is_wanted=bool(values[self._missing.download]))

    async def look_at_sizes(self, values: Mapping[Component, object]) -> AsyncIterator[Updates]:
        """The same with sizes, once somebody wants the files."""
        fields, is_wanted = self._controls.read(values), bool(values[self._missing.download])
        yield self._offered(await self._offers.of(fields), is_wanted=is_wanted)
        if is_wanted:
            yield self._offered(await self._offers.of(fields, with_sizes=True), is_wanted=is_wanted)

    async def look_again(self, values: Mapping[Component, object]) -> Updates:
        """After a run: what was fetched is missing no longer, and its names say so no longer."""
        fields = self._controls.read(values)
        offer = await self._offers.of(fields)
        is_wanted = bool(values[self._missing.download]) and bool(offer.lacks)
        updates = self._offered(offer, is_wanted=is_wanted)
        if values[self._missing.download] and not offer.lacks:
            updates |= self._controls.updates({name: fields[name] for name in FILE_FIELDS})
        return updates

    def _offered(self, offer: Offer, *, is_wanted: bool) -> Updates:
        """What the panel shows of an offer."""
        part = self._missing
        return {
            cast(Component, part.panel): _changed(visible=bool(offer.lacks)),
            part.note: _changed(value=markup.missing(offer.sentences)),
            part.download: _changed(value=is_wanted, label=offer.label, visible=not offer.is_needed),
        }

    # -- describe -----------------------------------------------------------------------------------------------

    def _connect_describe(self) -> None:
        part = self._describe
        part.picture.change(self.size_of_picture, part.picture, part.size, **AT_ONCE)
        part.button.click(
            self.describe,
            [part.picture, part.content, part.set_styles],
            [
                part.button, self._viewer.messages, self._controls.widget("prompt"),
                self._controls.widget("style_selections"),
            ],
            **IN_STEPS,
        )  # fmt: skip

    async def size_of_picture(self, path: str | None) -> Update:
        """Tell the size of a picture, and the size to choose for one like it."""
        if path is None:
            return _changed(value="")
        try:
            picture = await asyncio.to_thread(read_image, Path(path), field="Image")
        except FocaleError as error:
            return _changed(value=markup.problem(sentence_of(error)))
        assert picture is not None  # a path is never "no picture"
        nearest = nearest_size(*picture.size, self._services.settings.config.available_aspect_ratios)
        return _changed(value=markup.picture_size(*picture.size, aspect_label(nearest)))

    async def describe(self, path: str | None, content: list[str], set_styles: bool) -> AsyncIterator[Updates]:
        """Write words for a picture into the prompt, and choose the styles that suit what it is."""
        button, messages = self._describe.button, self._viewer.messages
        chosen = [ContentType(value) for value in content]
        if path is None or not chosen:
            way_out = (
                "Put a picture into the Describe tab first."
                if path is None
                else "Choose Photograph, Art/Anime or both."
            )
            yield {messages: _changed(value=markup.problem(f"There is nothing to describe. {way_out}"))}
            return
        yield {button: _changed(value="Describing ...", interactive=False), messages: _changed(value="")}
        ready = {button: _changed(value=button.value, interactive=True)}
        try:
            words = await self._services.handlers.describe(path, tuple(one.kind for one in chosen))
        except FocaleError as error:
            yield ready | {messages: _changed(value=markup.problem(sentence_of(error)))}
            return
        fields: dict[str, object] = {"prompt": words}
        if set_styles:
            fields["style_selections"] = [style for style in styles_for(chosen) if style in self._services.styles.names]
        yield ready | self._controls.updates(fields)

    # -- metadata -----------------------------------------------------------------------------------------------

    def _connect_metadata(self) -> None:
        part = self._metadata
        part.picture.change(self.read_picture, part.picture, [part.shown, part.apply, self._viewer.messages], **AT_ONCE)
        applied = part.apply.click(self.apply_picture, part.picture, self._field_outputs(), **AT_ONCE)
        applied.then(self.look, self._all_inputs(), self._missing_outputs(), **AT_ONCE)

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
        refreshed = [*self._field_outputs(), *([extras.preset] if extras.preset is not None else [])]
        extras.refresh.click(self.refresh, controls.inputs, refreshed, **AT_ONCE).then(
            self.look, self._all_inputs(), self._missing_outputs(), **AT_ONCE
        )
        if extras.preset is not None:
            outputs = [*self._field_outputs(), *self._missing_outputs()]
            extras.preset.input(self.apply_preset, extras.preset, outputs, **IN_STEPS)

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
        """Read all folders anew and offer what is there now: models, styles, wildcards and presets."""
        await asyncio.to_thread(self._services.resources.refresh)
        fields = self._controls.read(values)
        updates = self._controls.updates({name: fields[name] for name in (*FILE_FIELDS, "style_selections")})
        if self._extras.preset is not None:
            updates[self._extras.preset] = _changed(choices=self._presets())
        return updates

    def _presets(self) -> list[str]:
        return preset_names(self._services.settings.paths.presets)

    async def apply_preset(self, name: str) -> AsyncIterator[Updates]:
        """Set the page to a preset; what it does not name returns to the start values. Offers what it lacks."""
        try:
            preset = await asyncio.to_thread(load_preset, self._services.settings.paths.presets, name)
        except FocaleError as error:
            yield {self._viewer.messages: _changed(value=markup.problem(sentence_of(error)))}
            return
        fields = {**self._start_values(), **preset.request_fields}
        always_new = self._services.settings.always_download_new_model
        model = preset.model(self._services.files.names(Kind.CHECKPOINT), always_new=always_new)
        if model:
            fields["base_model_name"] = model
        refusal = await asyncio.to_thread(self._offers.refusal, fields)
        offer = await self._offers.of(fields)
        notes = [*preset.problems, *([refusal] if refusal else []), *self._without_missing_loras(fields, offer)]
        shown = {name: value for name, value in fields.items() if name != "prompt" or value}
        updates = self._controls.updates(shown)
        updates[self._viewer.messages] = _changed(value=markup.notes(notes))
        is_wanted = name != INITIAL  # choosing a preset is asking for its files; the box takes that back
        yield updates | self._offered(offer, is_wanted=is_wanted)
        if offer.lacks and is_wanted:
            yield self._offered(await self._offers.of(fields, with_sizes=True), is_wanted=is_wanted)

    def _start_values(self) -> dict[str, object]:
        """What the page began with, of the parameters that presets can set."""
        return dict(self._services.settings.page_defaults())

    def _without_missing_loras(self, fields: dict[str, object], offer: Offer) -> list[str]:
        """Switch off rows whose file is absent and not offered, in place; returns a sentence for each."""
        offered = {lack.name for lack in offer.lacks}
        rows = [dict(row) for row in cast(list[dict[str, Any]], fields.get("loras", []))]
        notes = []
        for row in rows:
            missing = row["model_name"] != "None" and self._services.files.find(Kind.LORA, row["model_name"]) is None
            if missing and row["enabled"] and row["model_name"] not in offered:
                row["enabled"] = False
                notes.append(f"{row['model_name']} is not in models/loras; its row is switched off.")
        fields["loras"] = rows
        return notes


def styles_for(content: Iterable[ContentType]) -> list[str]:
    """The styles that Fooocus sets for described pictures of these kinds, each once."""
    return list(dict.fromkeys(style for one in content for style in STYLES_FOR[one]))


def show_panel(is_open: bool) -> Update:
    """Show or hide a panel."""
    return _changed(visible=is_open)


def forced_names() -> tuple[str, ...]:
    """Every parameter that some performance mode imposes."""
    return tuple(FIXED_BY_PERFORMANCE[Performance.LIGHTNING].forced)
