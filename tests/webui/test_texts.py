"""Five languages with the same keys, and no text that is left in English."""

import re

import pytest

from luthier.config.key_table import sections
from luthier.webui.form import USUAL, groups, usual_fields
from luthier.webui.texts import LANGUAGES, key_help, preferred, texts

OTHERS = [language for language in LANGUAGES if language != "en"]


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_has_every_text_with_the_same_placeholders(language):
    english, own = texts("en"), texts(language)
    assert own.keys() == english.keys()
    for key, text in english.items():
        assert sorted(re.findall(r"{\w+}", own[key])) == sorted(re.findall(r"{\w+}", text)), key
        assert own[key] != text, f"{key} is English"


def test_the_help_of_usual_keys_is_translated_as_it_is_now():
    """`key_help/en.toml` says what was translated, so that a new English text is not shown beside old ones."""
    english = {field.name: field.help for command in USUAL for field in usual_fields(command)}
    assert key_help("en") == english, "translate what has changed, then bring en.toml up to date"
    for language in OTHERS:
        own = key_help(language)
        assert own.keys() == english.keys(), language
        for key, text in own.items():
            named = {name for name in re.findall(r"`[^`]+`", text) if "<" not in name}
            assert named <= set(re.findall(r"`[^`]+`", english[key])) and text != english[key], (language, key)


def test_every_topic_of_keys_has_a_title():
    """Keys of one method are shown under the name that a run file has for it."""
    of_one_method = {section.name for section in sections() if section.key}
    shown = {group.name for command in USUAL for group in groups(command, {})[1:]}
    assert {f"group.{name}" for name in shown - of_one_method} <= texts("en").keys()


@pytest.mark.parametrize(
    ("chosen", "accepted", "language"),
    [
        ("ko", "ru", "ko"),
        (None, "fr, ru;q=0.8, en", "ru"),
        (None, "zh-CN,zh;q=0.9", "zh"),
        (None, "", "en"),
        ("../../etc", "xx", "en"),
    ],
)
def test_the_language_that_is_shown(chosen, accepted, language):
    assert preferred(chosen, accepted) == language
