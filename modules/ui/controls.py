"""Makes the page's widgets from the parameter declarations, and translates between their values and request fields."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias, cast

import gradio as gr
from annotated_types import Ge, Le
from gradio.blocks import Block
from gradio.components import Component
from pydantic.fields import FieldInfo

from modules.choices import DEFAULT_VAE, NO_MODEL, MetadataScheme, OutputFormat
from modules.params import PAGE_GROUPS, Lora, Ui, parse_size, ui_of
from modules.ui.labels import aspect_label, missing_label

Properties: TypeAlias = dict[str, Any]

MOST_RADIO_CHOICES = 5
DISTINCT_LABELS: Mapping[object, str] = {
    MetadataScheme.FOOOCUS: "fooocus (json)",
    MetadataScheme.A1111: "a1111 (plain text)",
}
PAGE_RANGES: Mapping[str, tuple[float, float]] = {"adm_scaler_positive": (0.1, 3), "adm_scaler_negative": (0.1, 3)}
DROPDOWNS = frozenset({"refiner_swap_method", "inpaint_engine"})
PAGE_TITLES: Mapping[str, str] = {"aspect_ratios_selection": "Aspect Ratios"}
PLAIN = frozenset({"prompt", "negative_prompt", "performance_selection", "image_number", "output_format"})
"""Fields whose widget needs no explanation below its title."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What can be chosen on this machine.

    checkpoints, loras, vaes, styles: names, in order. ratios: sizes as `W*H`.
    max_images: most pictures of one run. lora_rows: how many there are. lora_weights: lowest and highest.
    """

    checkpoints: Sequence[str] = ()
    loras: Sequence[str] = ()
    vaes: Sequence[str] = ()
    styles: Sequence[str] = ()
    ratios: Sequence[str] = ()
    max_images: int = 32
    lora_rows: int = 5
    lora_weights: tuple[float, float] = (-2, 2)


@dataclass(frozen=True)
class Declared:
    """A parameter as it is declared: its wire name, its pydantic field, and its place on the page."""

    name: str
    info: FieldInfo
    ui: Ui

    @property
    def title(self) -> str:
        """Label of the widget."""
        return self.info.title or self.name

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value the page lets someone choose."""
        low = next(float(cast(float, mark.ge)) for mark in self.info.metadata if isinstance(mark, Ge))
        high = next(float(cast(float, mark.le)) for mark in self.info.metadata if isinstance(mark, Le))
        return PAGE_RANGES.get(self.name, (low, high))


def declared_fields() -> dict[str, Declared]:
    """Wire name → declaration, of every parameter that has a place on the page."""
    return {
        name: Declared(name, info, ui)
        for group in PAGE_GROUPS
        for name, info in group.model_fields.items()
        if (ui := ui_of(group, name)).place
    }


@dataclass(frozen=True)
class Control:
    """The widgets of one parameter.

    read: widget values, in order → value of the field. show: value of the field → properties of each widget.
    """

    declared: Declared
    widgets: tuple[Component, ...]
    read: Callable[[Sequence[Any]], object]
    show: Callable[[Any], Sequence[Properties]]

    def updates(self, value: object) -> dict[Component, Any]:
        """What makes the widgets show a value."""
        shown = self.show(value)
        return {widget: gr.update(**new) for widget, new in zip(self.widgets, shown, strict=True)}


Maker: TypeAlias = Callable[[Declared, object, Callable[[], Offer]], Control]


@dataclass
class Controls:
    """All widgets of parameters, in the order in which they were put on the page.

    offer: what can be chosen now. defaults: start values by wire name; the declared default where one is absent.
    """

    offer: Callable[[], Offer]
    defaults: Mapping[str, object]
    declared: Mapping[str, Declared] = field(default_factory=declared_fields)
    made: dict[str, Control] = field(default_factory=dict)

    def put(self, *names: str) -> None:
        """Add the widgets of these parameters here."""
        for name in names:
            declared = self.declared[name]
            self.made[name] = maker_of(declared)(declared, self.default(name), self.offer)

    def put_rest(self, place: str) -> None:
        """Add the widgets of all parameters of a place that are not on the page yet."""
        self.put(*(name for name, one in self.declared.items() if one.ui.place == place and name not in self.made))

    def default(self, name: str) -> object:
        """Start value of a parameter."""
        return self.defaults.get(name, self.declared[name].info.get_default())

    def widget(self, name: str) -> Component:
        """The first widget of a parameter."""
        return self.made[name].widgets[0]

    @property
    def working(self) -> list[Control]:
        """The controls whose values go into a request."""
        return [control for control in self.made.values() if control.declared.ui.works]

    @property
    def inputs(self) -> set[Block]:
        """Every widget whose value goes into a request."""
        return {widget for control in self.working for widget in control.widgets}

    def read(self, values: Mapping[Component, object]) -> dict[str, object]:
        """Wire name → value, as the page stands."""
        return {
            control.declared.name: control.read([values[widget] for widget in control.widgets])
            for control in self.working
        }

    def updates(self, fields: Mapping[str, object]) -> dict[Component, Any]:
        """What makes the page show these values; parameters without a widget that works are passed over."""
        changed: dict[Component, Any] = {}
        for name, value in fields.items():
            if name in self.made and self.declared[name].ui.works:
                changed |= self.made[name].updates(value)
        return changed


def maker_of(declared: Declared) -> Maker:
    """Which kind of widget a parameter gets."""
    if declared.name in SPECIAL:
        return SPECIAL[declared.name]
    kind = declared.info.annotation
    if kind is bool:
        return _checkbox
    if kind in (int, float):
        return _slider
    if kind is str:
        return _textbox
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _choice
    raise TypeError(f"{declared.name} of type {kind} has no widget; add one to SPECIAL")


def _common(declared: Declared) -> Properties:
    """Properties that every widget of a parameter has."""
    info = None if declared.name in PLAIN else declared.info.description
    return {
        "label": PAGE_TITLES.get(declared.name, declared.title),
        "info": info,
        "interactive": declared.ui.works,
        "elem_id": declared.name,
    }


def _single(declared: Declared, widget: Component, show: Callable[[Any], Properties] | None = None) -> Control:
    """The control of one widget whose value is the field's."""
    shown = show or (lambda value: {"value": value})
    return Control(declared, (widget,), lambda values: values[0], lambda value: [shown(value)])


def _checkbox(declared: Declared, value: object, _offer: Callable[[], Offer]) -> Control:
    return _single(declared, gr.Checkbox(value=bool(value), container=False, **_common(declared)))


def _slider(declared: Declared, value: object, _offer: Callable[[], Offer]) -> Control:
    low, high = declared.bounds
    return _single(
        declared, gr.Slider(low, high, value=cast(float, value), step=declared.ui.step, buttons=[], **_common(declared))
    )


def _textbox(declared: Declared, value: object, _offer: Callable[[], Offer]) -> Control:
    lines = declared.ui.lines
    return _single(declared, gr.Textbox(value=str(value), lines=lines, max_lines=lines + 8, **_common(declared)))


def _prompt(declared: Declared, value: object, _offer: Callable[[], Offer]) -> Control:
    box = gr.Textbox(
        value=str(value),
        show_label=False,
        container=False,
        label=declared.title,
        lines=declared.ui.lines,
        max_lines=12,
        autofocus=True,
        placeholder="Type prompt here or paste parameters.",
        elem_id="positive_prompt",
    )
    return _single(declared, box)


def _choice(declared: Declared, value: object, _offer: Callable[[], Offer]) -> Control:
    kind = cast(type[StrEnum], declared.info.annotation)
    members = [member for member in kind if member is not OutputFormat.JPG]
    choices = [(DISTINCT_LABELS.get(member, member.value), member.value) for member in members]
    is_radio = len(choices) <= MOST_RADIO_CHOICES and declared.name not in DROPDOWNS
    make = gr.Radio if is_radio else gr.Dropdown
    widget = make(choices=choices, value=str(value), **_common(declared))
    return _single(declared, widget, lambda value: {"value": "jpeg" if value == "jpg" else str(value)})


def _image_number(declared: Declared, value: object, offer: Callable[[], Offer]) -> Control:
    low, high = declared.bounds
    most = min(int(high), offer().max_images)
    widget = gr.Slider(low, most, value=min(cast(int, value), most), step=1, buttons=[], **_common(declared))
    return _single(declared, widget, lambda value: {"value": min(value, most)})


def _aspect_ratio(declared: Declared, value: object, offer: Callable[[], Offer]) -> Control:
    def show(size: str) -> Properties:
        size = "{}*{}".format(*parse_size(size))
        sizes = list(offer().ratios)
        listed = sizes if size in sizes else [size, *sizes]
        return {"choices": [(aspect_label(one), one) for one in listed], "value": size}

    common = _common(declared) | {"info": "width × height", "show_label": False}
    return _single(declared, gr.Radio(**show(str(value)), **common), show)


def _styles(declared: Declared, value: object, offer: Callable[[], Offer]) -> Control:
    def show(chosen: Sequence[str]) -> Properties:
        known = offer().styles
        names = [name for name in chosen if name in known]
        return {"choices": [*names, *(name for name in known if name not in names)], "value": names}

    common = _common(declared) | {"info": None, "show_label": False}
    widget = gr.CheckboxGroup(**show(cast(Sequence[str], value)), **common, elem_classes=["focale-styles"])
    return _single(declared, widget, show)


def _file(names: Callable[[Offer], Sequence[str]], none: str | None) -> Maker:
    """A dropdown of files; a value whose file is absent is offered too, and says so."""

    def make(declared: Declared, value: object, offer: Callable[[], Offer]) -> Control:
        def show(chosen: str) -> Properties:
            return {"choices": file_choices(names(offer()), chosen, none), "value": chosen}

        return _single(declared, gr.Dropdown(**show(str(value)), **_common(declared)), show)

    return make


def file_choices(present: Iterable[str], chosen: str, none: str | None) -> list[tuple[str, str]]:
    """(label, value) of the files present, with the choice for "no file" first if there is one."""
    choices = [(name, name) for name in present]
    if none is not None:
        choices.insert(0, (none, none))
    if chosen not in (value for _label, value in choices):
        choices.insert(0, (missing_label(chosen), chosen))
    return choices


def _seed(declared: Declared, value: object, _offer: Callable[[], Offer]) -> Control:
    """A switch for random seeds and a text box: numbers of JavaScript would lose digits."""

    def show(seed: int) -> Sequence[Properties]:
        is_random = int(seed) < 0
        return [{"value": is_random}, {"value": "0" if is_random else str(seed), "visible": not is_random}]

    def read(values: Sequence[Any]) -> object:
        is_random, text = values
        return -1 if is_random or not str(text).strip().isdecimal() else int(str(text).strip())

    switch, box = show(cast(int, value))
    widgets = (
        gr.Checkbox(
            label="Random", info="Draw a new seed for every run.", elem_id="seed_random", container=False, **switch
        ),
        gr.Textbox(label=declared.title, info="Picture i uses seed + i.", max_lines=1, elem_id=declared.name, **box),
    )
    return Control(declared, widgets, read, show)


def _loras(declared: Declared, value: object, offer: Callable[[], Offer]) -> Control:
    rows = offer().lora_rows
    low, high = offer().lora_weights

    def show(given: Sequence[object]) -> list[Properties]:
        sent = [row if isinstance(row, Lora) else Lora.model_validate(row) for row in given][:rows]
        sent += [Lora(enabled=True, model_name=NO_MODEL, weight=1.0)] * (rows - len(sent))
        properties: list[Properties] = []
        for row in sent:
            choices = file_choices(offer().loras, row.model_name, NO_MODEL)
            properties += [
                {"value": row.enabled},
                {"value": row.model_name, "choices": choices},
                {"value": min(high, max(low, row.weight))},
            ]
        return properties

    def read(values: Sequence[Any]) -> object:
        return [
            {"enabled": bool(enabled), "model_name": name or NO_MODEL, "weight": weight}
            for enabled, name, weight in zip(values[::3], values[1::3], values[2::3], strict=True)
        ]

    shown = show(cast(Sequence[object], value))
    widgets: list[Component] = []
    for row in range(rows):
        with gr.Row(elem_classes=["focale-lora"]):
            enabled, name, weight = shown[3 * row : 3 * row + 3]
            widgets += [
                gr.Checkbox(label="Enable", elem_id=f"lora_{row + 1}_enabled", scale=1, min_width=60, **enabled),
                gr.Dropdown(label=f"LoRA {row + 1}", elem_id=f"lora_{row + 1}_model", scale=5, min_width=120, **name),
                gr.Slider(
                    low, high, step=0.01, label="Weight", elem_id=f"lora_{row + 1}_weight", scale=4, min_width=110,
                    buttons=[], **weight,
                ),
            ]  # fmt: skip
    return Control(declared, tuple(widgets), read, show)


SPECIAL: Mapping[str, Maker] = {
    "prompt": _prompt,
    "image_number": _image_number,
    "aspect_ratios_selection": _aspect_ratio,
    "style_selections": _styles,
    "image_seed": _seed,
    "loras": _loras,
    "base_model_name": _file(lambda offer: offer.checkpoints, None),
    "refiner_model_name": _file(lambda offer: offer.checkpoints, NO_MODEL),
    "vae_name": _file(lambda offer: offer.vaes, DEFAULT_VAE),
}
