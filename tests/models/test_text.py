"""Tokenizers and chat templates: of a tiny GGUF file and a published folder; what is missing or broken is named.

Against the reference's ids: `test_smollm2.py`, with SmolLM2's own tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.text import load_text
from tests.models.tiny_gguf import write_tiny_gguf

SAID = [{"role": "user", "content": "the \N{LATIN SMALL LETTER E WITH ACUTE} 42"}]
RENDERED = f"<|im_start|>user\n{SAID[0]['content']}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.fixture
def folder(path, tmp_path) -> Path:
    """What is published beside config.json and the weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    load_text(write_tiny_gguf(path)).tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def settings(folder: Path, **told: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def test_text_to_tokens_and_back(path):
    text = load_text(write_tiny_gguf(path))
    rendered = text.chat(SAID)
    assert rendered == RENDERED
    ids = text.encode(rendered).tolist()
    assert ids.count(text.tokenizer.token_to_id("<|im_start|>")) == 2, "markers are one token each"
    assert len(ids) < len(rendered.encode()), "markers, and merged bytes"
    assert text.decode(ids) == f"user\n{SAID[0]['content']}\nassistant\n"
    assert text.stops == {2}


def test_a_published_folder_has_the_same_tokens(path, folder):
    of_file = load_text(path)
    settings(folder, eos_token={"content": "<|im_end|>"}, bos_token="<|im_start|>", add_bos_token=True)
    text = load_text(folder)
    assert text.stops == {2}
    assert text.encode("the moth").tolist() == [1, *of_file.encode("the moth").tolist()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, r"no tokenizer, or half of one: tokenizer\.ggml\.tokens is missing"),
        ({"tokenizer.ggml.model": None}, r"tokenizer\.ggml\.model is missing"),
        ({"tokenizer.ggml.token_type": None}, r"tokenizer\.ggml\.token_type is missing"),
        ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.merges": ["t h", "zz h"]}, "merge 'zz h' must be two tokens that make a third"),
        ({"tokenizer.ggml.merges": ["th"]}, "merge 'th' must be two tokens"),
        ({"tokenizer.ggml.merges": ["h t"]}, "merge 'h t' must be two tokens that make a third"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokens, but 2 token_type"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer 'bert' is none of \['gpt2', 'llama'\]"),
        ({"tokenizer.ggml.pre": "qwen2"}, "how text is split before merging, 'qwen2', is not known"),
        ({"tokenizer.chat_template": "{% if %}"}, "the chat template is none"),
    ],
    ids=str,
)
def test_what_is_missing_or_unknown_is_named(path, changes, message):
    write_tiny_gguf(path, changes=changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_text(path)
    assert "tiny.gguf" in str(raised.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must take turns') }}", "refuses these messages: roles must take turns"),
        ("{{ messages[0].content.nothing() }}", "the chat template fails"),
    ],
)
def test_a_template_that_does_not_take_the_messages(path, template, message):
    text = load_text(write_tiny_gguf(path, changes={"tokenizer.chat_template": template}))
    with pytest.raises(ValueError, match=message):
        text.chat(SAID)


def test_a_folder_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json: publish it beside config\.json"):
        load_text(folder)


def test_a_template_in_a_file_of_its_own(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    settings(folder, chat_template="{{ nothing }}")
    assert load_text(folder).chat(SAID) == f"{SAID[0]['content']}!"


def test_settings_that_cannot_be_used(folder, tmp_path):
    settings(folder, chat_template=[{"name": "default", "template": ""}])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be one template, not list"):
        load_text(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: no JSON"):
        load_text(folder)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_text(tmp_path / "nowhere")


def test_a_folder_with_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer that library `tokenizers` reads"):
        load_text(folder)
