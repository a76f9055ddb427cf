"""Text to token ids, as transformers does it. Knows nothing of Triton."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

# The ensemble's inputs, for hints to a client that misspelled one.
CLIENT_INPUTS = (
    "text_input",
    "max_tokens",
    "stream",
    "apply_chat_template",
    "stop_words",
    "bad_words",
    "end_id",
    "pad_id",
    "exclude_input_in_output",
    "skip_special_tokens",
    "top_k",
    "top_p",
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
    "min_tokens",
    "min_length",
    "seed",
    "random_seed",
    "beam_width",
    "num_return_sequences",
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "priority",
)

# Of tokenizer_config.json; chat templates use them by these names.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


# Encoding a megabyte takes a second, and all others wait. So a long text is encoded from its beginning, this many
# characters for every token that the engine takes and then twice as many, until it is known to be too long.
_CHARACTERS_PER_TOKEN = 8

_MAX_BAD_WORDS = 256
_MAX_BAD_WORD_CHARACTERS = 1000


class PromptError(Exception):
    """This prompt cannot be encoded: one sentence for the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """Encodes prompts for one engine. `bos_token_id` is what an empty prompt becomes."""

    tokenizer: Tokenizer
    bos_token_id: int | None
    max_input_len: int
    max_seq_len: int
    default_max_tokens: int
    chat_template: jinja2.Template | None

    @classmethod
    def load(cls, engine_folder: Path, *, default_max_tokens: int) -> PromptEncoder:
        manifest = json.loads((engine_folder / "engine.json").read_text())
        tokenizer = Tokenizer.from_file(str(engine_folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        template = engine_folder / "chat_template.jinja"
        special_tokens = _special_tokens(engine_folder / "tokenizer_config.json")
        return cls(
            tokenizer=tokenizer,
            bos_token_id=manifest["bos_token_id"],
            max_input_len=manifest["limits"]["max_input_len"],
            max_seq_len=manifest["limits"]["max_seq_len"],
            default_max_tokens=default_max_tokens,
            chat_template=_compile(template.read_text(), special_tokens) if template.exists() else None,
        )

    def encode(self, prompt: str, *, as_chat: bool = False) -> list[int]:
        """At least one id. Raises PromptError when there is none, or more than the engine takes."""
        if as_chat:
            # A template writes the special tokens that it wants.
            ids = self._encode_text(self._apply_chat_template(prompt), add_special_tokens=False)
        else:
            ids = self._encode_text(prompt, add_special_tokens=True)
            if self._is_doubled(ids):  # the client applied a chat template, which wrote it, and the tokenizer added it
                ids = ids[1:]
        if not ids and self.bos_token_id is not None:
            ids = [self.bos_token_id]
        if not ids:
            raise PromptError("text_input is empty and this model has no token to begin with; send some text")
        if len(ids) > self.max_input_len:
            raise PromptError(
                f"text_input has {len(ids)} tokens; this engine takes at most {self.max_input_len} "
                "(--max-input-len of the build); shorten it"
            )
        return ids

    def _encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """All ids of `text`, unless they are certain to be too many: then PromptError, soon."""
        length = _CHARACTERS_PER_TOKEN * self.max_input_len
        while length < len(text):
            beginning = self.tokenizer.encode(text[:length], add_special_tokens=False).ids
            if len(beginning) > 2 * self.max_input_len:  # twice: its end may merge what the cut kept apart
                raise PromptError(
                    f"text_input has {len(text)} characters, more than {2 * self.max_input_len} tokens; this engine "
                    f"takes at most {self.max_input_len} (--max-input-len of the build); shorten it"
                )
            length *= 2
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def _is_doubled(self, ids: Sequence[int]) -> bool:
        """Whether the text began with the token that the tokenizer itself puts before every text."""
        return ids[:2] == [self.bos_token_id] * 2 and self.tokenizer.encode("").ids[:1] == [self.bos_token_id]

    def max_tokens_by_default(self, prompt_ids: Sequence[int]) -> int:
        """For a request that does not say: what is usual, or what is left."""
        return max(1, min(self.default_max_tokens, self.max_seq_len - len(prompt_ids)))

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Ids of words that may not appear: each alone and after a space, which most tokenizers tell apart."""
        words = [word for word in words if word]
        if len(words) > _MAX_BAD_WORDS:
            raise PromptError(f"bad_words has {len(words)} words; at most {_MAX_BAD_WORDS} can be kept out")
        if (longest := max(map(len, words), default=0)) > _MAX_BAD_WORD_CHARACTERS:
            raise PromptError(
                f"bad_words has a word of {longest} characters; a word may have {_MAX_BAD_WORD_CHARACTERS}"
            )
        encoded = []
        for word in words:
            for spelling in dict.fromkeys((word, " " + word)):
                ids = self.tokenizer.encode(spelling, add_special_tokens=False).ids
                if ids and ids not in encoded:
                    encoded.append(ids)
        return encoded

    def _apply_chat_template(self, prompt: str) -> str:
        if self.chat_template is None:
            raise PromptError(
                "apply_chat_template is true, but this model's tokenizer has no chat template; leave it out"
            )
        try:
            messages = [{"role": "user", "content": prompt}]
            return self.chat_template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise PromptError(f"the model's chat template refuses this prompt: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is to be trained on; for us there is only its content."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, special_tokens: Mapping[str, object]) -> jinja2.Template:
    """With what transformers gives a template: its block trimming, tags, functions, and the special tokens by name."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **kwargs: json.dumps(
        value, ensure_ascii=ensure_ascii, **kwargs
    )
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        **special_tokens,
    }
    return environment.from_string(source)


def _special_tokens(path: Path) -> dict[str, object]:
    """`{"bos_token": "<s>", ...}`: what tokenizer_config.json names, as text. Without the file there are none."""

    def text(value: str | dict) -> str:
        return value["content"] if isinstance(value, dict) else value

    config = json.loads(path.read_text()) if path.exists() else {}
    tokens = {name: text(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None}
    if several := config.get("additional_special_tokens"):
        tokens["additional_special_tokens"] = [text(value) for value in several]
    return tokens


def decode_utf8(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} is not UTF-8: byte {error.start} is 0x{value[error.start]:02x}") from None


def word_list_array(words: Sequence[Sequence[int]]) -> np.ndarray:
    """NVIDIA's form, INT32 [2, n]: ids one word after the other; where each word ends, filled up with -1."""
    ids = [token_id for word in words for token_id in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    return np.array([ids, ends + [-1] * (len(ids) - len(ends))], dtype=np.int32)
