"""The style table: reading, names, and the shipped templates."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import UnknownName
from modules.styles import SHIPPED_FILES, StyleTable, StyleTemplate, load_styles, normalise_name

FOLDER = Path(__file__).parents[2] / "presets" / "styles"
NAMES = Path(__file__).with_name("style_names.txt").read_text(encoding="utf-8").splitlines()
SHIPPED = load_styles(FOLDER)
NEGATIVE_ONLY = {"Fooocus Enhance", "Fooocus Semi Realistic", "Fooocus Negative"}


def write(path: Path, entries: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries), encoding="utf-8")


def words_of(text: str) -> frozenset[str]:
    small = {"a", "and", "in", "of", "on", "the", "with", "prompt"}
    return frozenset(re.findall(r"[^\W\d_]+", text.casefold())) - small


def test_all_279_names_come_in_the_known_order():
    assert len(NAMES) == 277
    assert SHIPPED.names == ("Fooocus V2", "Random Style", *NAMES)
    assert SHIPPED.problems == ()


def test_names_and_files_are_used_once():
    assert len(set(NAMES)) == len(NAMES)
    entries = [entry for file in SHIPPED_FILES for entry in json.loads((FOLDER / file).read_text(encoding="utf-8"))]
    assert [entry["name"] for entry in entries] == NAMES
    assert sorted(path.name for path in FOLDER.glob("*.json")) == sorted(SHIPPED_FILES)


def test_every_shipped_template_has_both_parts_and_one_place_for_the_prompt():
    for template in SHIPPED.templates:
        assert len(template.negative_prompt.split()) >= 6, template.name
        if template.name in NEGATIVE_ONLY:
            assert template.prompt == ""
        else:
            assert template.prompt.count("{prompt}") == 1, template.name
            assert 12 <= len(template.prompt.replace("{prompt}", "").split()) <= 35, template.name


def test_shipped_templates_are_single_clean_lines():
    for template in SHIPPED.templates:
        for text in (template.prompt, template.negative_prompt):
            assert text == text.strip(" ,.")
            assert not re.search(r",,|  |\n", text), template.name


def test_no_two_templates_are_nearly_the_same():
    for part in ("prompt", "negative_prompt"):
        bags = [(template.name, words_of(getattr(template, part))) for template in SHIPPED.templates]
        for (name, bag), (other, other_bag) in itertools.combinations([pair for pair in bags if pair[1]], 2):
            assert len(bag & other_bag) / len(bag | other_bag) < 0.5, (part, name, other)


def test_no_stock_phrase_runs_through_the_templates():
    count: dict[str, int] = {}
    for template in SHIPPED.templates:
        for phrase in re.split(r", |\{prompt\}", template.prompt):
            if len(phrase.split()) > 2:
                count[phrase] = count.get(phrase, 0) + 1
    assert max(count.values()) <= 3


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("sai-3d-model", "SAI 3D Model"), ("mre-sumi-e-symbolic", "MRE Sumi E Symbolic"), ("ads-luxury", "Ads Luxury"),
        ("flat 2d art", "Flat 2d Art"), ("cinematic (soft)", "Cinematic (Soft)"), ("fooocus v2", "Fooocus V2"),
    ],
)  # fmt: skip
def test_names_are_normalised(written, shown):
    assert normalise_name(written) == shown


def test_listed_names_are_normal():
    assert [normalise_name(name) for name in NAMES] == NAMES


@given(st.text(alphabet="abS3d-( ", max_size=20))
def test_normalising_twice_changes_nothing_more(name):
    assert normalise_name(normalise_name(name)) == normalise_name(name)


def test_users_files_come_first_and_unchanged(tmp_path):
    write(tmp_path / "sai.json", [{"name": "SAI Anime", "prompt": "ours {prompt}"}])
    write(tmp_path / "zz_mine.json", [{"name": "my-look", "prompt": "fog", "negative_prompt": "sun"}])
    write(tmp_path / "a_mine.json", [{"name": "other"}])
    table = load_styles(tmp_path)
    assert table.templates == (
        StyleTemplate("Other"), StyleTemplate("My Look", "fog", "sun"), StyleTemplate("SAI Anime", "ours {prompt}"),
    )  # fmt: skip


def test_a_users_text_replaces_a_shipped_one_in_its_place(tmp_path):
    write(tmp_path / "sai.json", [{"name": "SAI Anime", "prompt": "a"}, {"name": "SAI Comic Book", "prompt": "b"}])
    write(tmp_path / "own" / "sdxl_styles_sai.json", [{"name": "sai-comic book", "prompt": "mine"}])
    table = load_styles(tmp_path, tmp_path / "own", tmp_path / "missing")
    assert [(style.name, style.prompt) for style in table.templates] == [("SAI Anime", "a"), ("SAI Comic Book", "mine")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ('{"name": "x"}', "must hold a list"),
        ('["x"]', "Entry 1 is left out: it is not an object"),
        ('[{"prompt": "x"}]', "it has no name"),
        ('[{"name": 3}]', "its name is not text"),
        ('[{"name": "x", "prompt": ["y"]}]', "its prompt is not text"),
        ('[{"name": "fooocus-v2"}]', "built-in"),
        ('[{"name": "Random Style"}]', "built-in"),
    ],
)
def test_a_bad_file_is_reported_and_the_others_load(tmp_path, caplog, text, reason):
    (tmp_path / "bad.json").write_text(text)
    write(tmp_path / "good.json", [{"name": "Good", "prompt": None}])
    table = load_styles(tmp_path)
    assert [style.name for style in table.templates] == ["Good"]
    assert [problem.file for problem in table.problems] == ["bad.json"]
    assert reason in table.problems[0].reason
    assert "bad.json" in caplog.text


def test_a_file_in_another_encoding_is_reported(tmp_path):
    (tmp_path / "latin.json").write_bytes('[{"name": "café"}]'.encode("latin-1"))
    assert load_styles(tmp_path).problems[0].file == "latin.json"


@pytest.mark.parametrize("written", ["SAI Anime", "sai anime", "sai-anime"])
def test_a_name_resolves_to_its_listed_spelling(written):
    assert SHIPPED.resolve(written) == "SAI Anime"
    assert SHIPPED.resolve("fooocus v2") == "Fooocus V2"


def test_an_unknown_name_is_an_error_with_near_matches():
    with pytest.raises(UnknownName) as caught:
        SHIPPED.resolve("Fooocus Cinematik")
    assert caught.value.near[0] == "Fooocus Cinematic"
    assert SHIPPED.near("sai animee")[0] == "SAI Anime"


def test_special_names_are_legal_but_have_no_template():
    assert "Fooocus V2" in SHIPPED
    assert "Random Style" in SHIPPED
    assert "Nope" not in SHIPPED
    with pytest.raises(UnknownName):
        SHIPPED.template("Random Style")


def test_every_style_can_be_drawn_with_one_choice():
    rng, same = random.Random(3), random.Random(3)
    assert [SHIPPED.draw(rng) for _ in range(20)] == [same.choice(NAMES) for _ in range(20)]


def test_drawing_from_an_empty_table_is_an_error():
    with pytest.raises(UnknownName):
        StyleTable(()).draw(random.Random(0))


def test_every_line_of_a_template_is_a_text_of_its_own():
    template = StyleTemplate("x", "a {prompt}\nb {prompt}")
    assert template.positive_lines("fox") == ["a fox", "b fox"]
