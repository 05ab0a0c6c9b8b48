"""What this machine offers to planners, gathered from the settings: model files, styles, wildcards."""

from functools import lru_cache
from pathlib import Path

from modules.files import Catalogue, Kind
from modules.plan import PlanResources
from modules.prompts import PromptSources, lora_stems
from modules.settings import Settings
from modules.styles import StyleTable, load_styles
from modules.wildcards import Wildcards


class Resources:
    """The tables that planning reads; model folders are looked at anew whenever `plan_resources` is called."""

    def __init__(self, settings: Settings, catalogue: Catalogue | None = None) -> None:
        """Read styles and wildcards once; `refresh` reads them again."""
        self._settings = settings
        self.catalogue = catalogue or Catalogue.of(settings.paths)
        self.wildcards = Wildcards((settings.paths.wildcards, settings.paths.presets / "wildcards"))
        self.styles: StyleTable = styles_of(settings.paths.presets / "styles")

    def refresh(self) -> None:
        """Read model folders, styles and wildcards again."""
        styles_of.cache_clear()
        self.styles = styles_of(self._settings.paths.presets / "styles")
        self.wildcards.refresh()
        self.catalogue.refresh()

    def plan_resources(self) -> PlanResources:
        """What a planner may use at this moment."""
        config = self._settings.config
        return PlanResources(
            catalogue=self.catalogue,
            prompts=PromptSources(
                styles=self.styles,
                words=self.wildcards.words,
                lora_files=lora_stems(self.catalogue.names(Kind.LORA)),
            ),
            default_model=config.default_model,
            previous_default_models=() if self._settings.always_download_new_model else config.previous_default_models,
            default_loras=frozenset(row.model_name for row in config.default_loras),
            default_styles=config.default_styles,
            max_loras=config.default_max_lora_number,
            allow_metadata=not self._settings.disable_metadata,
        )


@lru_cache(maxsize=4)
def styles_of(folder: Path) -> StyleTable:
    """The style table of a folder, read once."""
    return load_styles(folder)
