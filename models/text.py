"""Text and tokens of a model: its tokenizer, its chat template, and the tokens that end an answer.

    messages [{"role": "user", "content": "..."}] --template--> text --tokenizer--> token ids --tokenizer--> text

From the header of a GGUF file, or from tokenizer.json and tokenizer_config.json of a published folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from models.gguf_file import GgufFile, opened

TOKENIZER = "tokenizer.ggml."  # its keys in a GGUF header
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens in a GGUF header
Messages = Sequence[Mapping[str, str]]  # of {"role": "system", "user" or "assistant", "content": text}


@dataclass(frozen=True)
class Text:
    """bos: the token that every text begins with, if any; stops: tokens that end an answer"""

    tokenizer: Tokenizer
    bos: int | None
    stops: frozenset[int]
    template: jinja2.Template | None

    def encode(self, text: str) -> np.ndarray:
        """int32[n]; markers such as <|im_start|> are one token each."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Without markers."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, after which the model answers. ValueError for a model without a chat template."""
        if self.template is None:
            raise ValueError("this model has no chat template: it continues plain text")
        bos = "" if self.bos is None else self.tokenizer.id_to_token(self.bos)
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "bos_token": bos}
        try:
            return self.template.render(given)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template fails: {error}") from error


def load_text(source: Path | GgufFile) -> Text:
    """Of what `load_model` loads. ValueError says what is missing or unknown."""
    source = opened(source)
    return _from_gguf(source) if isinstance(source, GgufFile) else _from_folder(source)


def _template(path: Path, source: str | None) -> jinja2.Template | None:
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"{path}: the chat template is none: {error}") from error


def _refuse(message: str) -> None:
    raise ValueError(f"the chat template refuses these messages: {message}")


def _from_folder(folder: Path) -> Text:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (path := folder / "tokenizer.json").exists():
        raise ValueError(f"{folder}: no tokenizer.json: publish it beside config.json, or use a GGUF file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing else
        raise ValueError(f"{path}: no tokenizer that library `tokenizers` reads: {error}") from error
    config = _settings(folder / "tokenizer_config.json")
    if (path := folder / "chat_template.jinja").exists():
        config["chat_template"] = path.read_text()

    def number(name: str) -> int | None:
        token = config.get(name)
        return None if token is None else tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)

    stop, bos = number("eos_token"), number("bos_token")
    stops = frozenset() if stop is None else frozenset({stop})
    return Text(
        tokenizer, bos if config.get("add_bos_token") else None, stops, _template(folder, config.get("chat_template"))
    )


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(settings.get("chat_template"), str | None):
        raise ValueError(f"{path}: chat_template must be one template, not {type(settings['chat_template']).__name__}")
    return settings


class _Told(dict[str, Any]):
    """What a GGUF header says of the tokenizer."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        super().__init__((key.removeprefix(TOKENIZER), value) for key, value in metadata.items())
        self.path = path

    def __missing__(self, key: str):
        raise ValueError(f"{self.path}: the header has no tokenizer, or half of one: {TOKENIZER}{key} is missing")


def _from_gguf(file: GgufFile) -> Text:
    path, metadata = file.path, file.metadata
    told = _Told(path, metadata)
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if (build := builders.get(told["model"])) is None:
        raise ValueError(f"{path}: tokenizer {told['model']!r} is none of {sorted(builders)}")
    if len(told["token_type"]) != len(told["tokens"]):
        raise ValueError(f"{path}: {len(told['tokens'])} tokens, but {len(told['token_type'])} token_type")
    tokenizer = build(path, told)
    for kind, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        names = [name for name, of in zip(told["tokens"], told["token_type"], strict=True) if of == kind]
        added = [AddedToken(name, special=is_special, normalized=False) for name in names]
        tokenizer.add_special_tokens(added) if is_special else tokenizer.add_tokens(added)
    bos = told["bos_token_id"] if told.get("add_bos_token", told["model"] == "llama") else None
    stops = frozenset(int(told[key]) for key in ("eos_token_id", "eot_token_id") if key in told)
    return Text(tokenizer, bos, stops, _template(path, metadata.get("tokenizer.chat_template")))


def _vocabulary(told: Mapping[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(told["tokens"])}


def _byte_level(path: Path, told: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's: pieces of bytes, merged in the order of a list."""
    if told.get("pre") != "smollm":
        raise ValueError(
            f"{path}: how text is split before merging, {told.get('pre')!r}, is not known: only 'smollm' is"
        )
    vocabulary, merges = _vocabulary(told), [tuple(merge.split(" ")) for merge in told["merges"]]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(f"{path}: merge {' '.join(merge)!r} must be two tokens that make a third")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(path: Path, told: Mapping[str, Any]) -> Tokenizer:
    """The file has scores and no merges: a token can come of every two that make it, and the best score goes first."""
    vocabulary, merges = _vocabulary(told), []
    for token, i in vocabulary.items():
        if told["token_type"][i] == NORMAL:
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            pairs = sorted(
                (pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary),
                key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
            )
            merges += [(-told["scores"][i], i, pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[:2])
    model = models.BPE(
        vocabulary, [pair for _, _, pair in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
