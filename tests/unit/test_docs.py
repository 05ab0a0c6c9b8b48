"""Generated documents say what the code says."""

from modules.request import GenerationRequest
from tools.make_docs import parameters_page, stale_pages


def test_generated_pages_are_fresh() -> None:
    assert stale_pages() == [], "run python tools/make_docs.py"


def test_every_request_key_is_documented() -> None:
    text = parameters_page()
    assert [name for name in GenerationRequest.model_fields if f"`{name}`" not in text] == []
