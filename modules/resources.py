"""What this machine offers to planners, gathered from the settings: model files, styles, wildcards, presets."""

from collections.abc import Callable

from modules.expansion import expand_prompt
from modules.files import Catalogue, Kind
from modules.plan import PlanResources
from modules.presets import PresetFolder
from modules.prompts import PromptSources, lora_stems
from modules.settings import Settings
from modules.styles import StyleFolder, StyleTable
from modules.wildcards import Wildcards


class Resources:
    """The tables that planning reads. All follow their files: what is added, changed or removed counts at once."""

    def __init__(self, settings: Settings, *, expand: Callable[[str, int], str] = expand_prompt) -> None:
        """Read nothing yet.

        Args:
            expand: what "Fooocus V2" makes of (main line, seed).
        """
        self._settings = settings
        self._expand = expand
        self._styles = StyleFolder(settings.paths.presets / "styles")
        self.catalogue = Catalogue.of(settings.paths)
        self.wildcards = Wildcards((settings.paths.wildcards, settings.paths.presets / "wildcards"))
        self.presets = PresetFolder(settings.paths.presets)

    @property
    def styles(self) -> StyleTable:
        """The style table as its files say now."""
        return self._styles.table

    def refresh(self) -> None:
        """Read model folders and wildcards again, whether they seem to have changed or not."""
        self.wildcards.refresh()
        self.catalogue.refresh()

    def plan_resources(self) -> PlanResources:
        """What a planner may use at this moment."""
        config = self._settings.config
        uses_previous = not self._settings.always_download_new_model
        self.catalogue.notice_changes()
        return PlanResources(
            catalogue=self.catalogue,
            prompts=PromptSources(
                styles=self.styles,
                words=self.wildcards.words,
                lora_files=lora_stems(self.catalogue.names(Kind.LORA)),
                expand=self._expand,
            ),
            default_model=config.default_model,
            previous_default_models=config.previous_default_models if uses_previous else (),
            predecessors=self.presets.predecessors() if uses_previous else {},
            default_loras=frozenset(row.model_name for row in config.default_loras),
            default_styles=config.default_styles,
            default_size=config.default_aspect_ratio,
            max_loras=config.default_max_lora_number,
            allow_metadata=not self._settings.disable_metadata,
        )
