"""Text to token ids and back: bytes, a BPE trained on the corpus, or a pretrained tokenizer.

All three are one `tokenizers.Tokenizer` inside, so all three are saved as the `tokenizer.json` that
other programs read. Every one has an end-of-text token, the separator that opens each document.
"""

from __future__ import annotations

import codecs
import enum
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mamba2lm.data.sources import digest
from mamba2lm.schema import ConfigError

END_OF_TEXT: Final = "<|endoftext|>"

# How a trained BPE divides text before merging: a short English ending after an apostrophe, a word
# or up to three digits or a run of signs, each with one space before it, line ends, other blanks
# (all but the last, which goes with the word that follows).
SPLIT_PATTERN: Final = (
    r"'(?i:s|t|d|m|re|ve|ll)(?!\p{L})"
    r"| ?[\p{L}\p{M}]+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Names of the end-of-text token in tokenizers that do not say which token it is.
_KNOWN_ENDS: Final = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)

_PIECE_CHARACTERS: Final = 1 << 16
# Between two words, before the blank; or after a single line end.
_SAFE_CUT: Final = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=[\w!-~。！？]\n)(?=\w)")
_PROBES: Final = (
    *("It", " is", " one", " of", " the", " things", " that", " I", " was", " in", " a hurry\n"),
    *("for", " as", " well", " as", " to be.\n", 'A "quote!"\n', "12\n", "lines\n1815\n", "end"),
)


class TokenizerKind(enum.Enum):
    """Where the tokenizer comes from."""

    bytes = "bytes"
    bpe = "bpe"
    pretrained = "pretrained"


@dataclass
class TokenizerConfig:
    """Which tokenizer to use.

    Attributes:
        kind: ``bytes`` (256 ids, MambaByte), ``bpe`` (trained on the training part of the corpus)
            or ``pretrained``.
        vocab_size: Size of a BPE's vocabulary, its 256 bytes and the end-of-text token included;
            a small corpus may give fewer.
        path: A pretrained tokenizer's `tokenizer.json`, its folder, or its hub name.
    """

    kind: TokenizerKind = TokenizerKind.bpe
    vocab_size: int | None = 4096
    path: str | None = None


class Tokenizer:
    """Encode and decode text."""

    def __init__(
        self, inner: tokenizers.Tokenizer, eos_token: str, chat_template: str | None = None
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            inner: The tokenizer; its padding and truncation are switched off.
            eos_token: The token that separates documents; must be in its vocabulary.
            chat_template: How a conversation reads as one text, in Jinja as transformers has it.
        """
        inner.no_padding()
        inner.no_truncation()
        # "<|endoftext|>" written in a document is text, not a separator.
        inner.encode_special_tokens = True
        eos_id = inner.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"eos_token={eos_token!r} is not in the tokenizer's vocabulary")
        self._inner = inner
        self._parsing: tokenizers.Tokenizer | None = None
        self.eos_token = eos_token
        self.chat_template = chat_template
        self.eos_id: int = eos_id
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        state = json.loads(inner.to_str())
        self.fingerprint: str = digest([state, eos_token])
        self._byte_level = (state.get("decoder") or {}).get("type") == "ByteLevel"
        self._special_ids = frozenset(
            token["id"] for token in state.get("added_tokens", []) if token["special"]
        )
        self._bytes = _Remembered(self._find_bytes)
        self._cuttable: bool | None = None
        # Bytes need no search for merges: theirs are encoded several times faster without.
        model = state["model"]
        self._bytes_only = model.get("vocab") == _BYTE_VALUES and not model.get("merges")

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """Return the byte tokenizer: id = byte value, and 256 ends a text."""
        characters = byte_characters()
        vocabulary = {characters[value]: value for value in range(256)}
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([END_OF_TEXT])
        return cls(inner, END_OF_TEXT)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
    ) -> Tokenizer:
        """Train a byte-level BPE; the same texts give the same tokenizer.

        Args:
            texts: The training texts, read once.
            vocab_size: Ids wanted, 257 or more; fewer result when the texts have no more pairs.
            show_progress: Draw a progress bar.
        """
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        pieces = (piece for text in texts for piece in _cut(text))
        inner.train_from_iterator(pieces, trainer)
        return cls(inner, END_OF_TEXT)

    @classmethod
    def load(cls, path: str | Path, key: str = "data.tokenizer.path") -> Tokenizer:
        """Load a tokenizer from a folder, a `tokenizer.json` file or the hub.

        Args:
            path: The folder, the file, or a hub name such as ``EleutherAI/gpt-neox-20b``.
            key: Config key for error messages.

        Raises:
            ConfigError: Nothing is there, it cannot be read, or it has no end-of-text token.
        """
        place = Path(path).expanduser()
        if place.is_dir():
            file = place / "tokenizer.json"
            if not file.is_file():
                raise ConfigError(key, str(path), "this folder holds no tokenizer.json.")
            settings = _read_settings(place / "tokenizer_config.json", key)
        elif place.is_file():
            file = place
            settings = _read_settings(place.with_name("tokenizer_config.json"), key)
        elif place.is_absolute() or place.suffix == ".json" or str(path).count("/") > 1:
            raise ConfigError(key, str(path), "no such file or folder.")
        else:
            file, settings = _fetch(str(path), key)
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise ConfigError(
                key, str(path), f"not a tokenizer.json that `tokenizers` can read ({error})."
            ) from error
        end = settings.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        known = [end] if isinstance(end, str) else list(_KNOWN_ENDS)
        found = next((token for token in known if inner.token_to_id(token) is not None), None)
        if found is None:
            raise ConfigError(
                key,
                str(path),
                "no end-of-text token found (looked for "
                f"{', '.join(known)}); name it as eos_token in a tokenizer_config.json beside it.",
            )
        return cls(inner, found, _chat_template(settings, file.with_name("chat_template.jinja")))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any separator."""
        return self.encode_batch([text])[0]

    def encode_with_specials(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are written out, as templates do."""
        if self._parsing is None:
            self._parsing = tokenizers.Tokenizer.from_str(self._inner.to_str())
            self._parsing.encode_special_tokens = False
        return self._parsing.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of several texts, encoded in parallel threads."""
        if self._bytes_only:
            return [list(text.encode()) for text in texts]
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD.

        Ids without a token (the padding of a model's vocabulary) give no text.
        """
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self) -> TextStream:
        """Return a decoder that takes one id at a time."""
        return ByteStream(self) if self._byte_level else WindowStream(self)

    def pieces(self, text: str) -> list[str]:
        """Cut a long text where that changes no token, so that its parts encode in parallel.

        Cuts lie between words and after line ends; whether this tokenizer never joins what they
        part is tried out once on common words. Where it does, the text stays whole.
        """
        if self._cuttable is None:
            whole = self.encode("".join(_PROBES))
            self._cuttable = whole == [i for ids in self.encode_batch(list(_PROBES)) for i in ids]
        return list(_cut(text)) if self._cuttable else [text]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that transformers reads.

        Args:
            folder: Made if needed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids"],
        }
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def to_json(self) -> str:
        """Return what `tokenizer.json` holds."""
        return self._inner.to_str()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that an id of a byte-level tokenizer stands for.

        A special token and an id without a token stand for none.
        """
        return self._bytes[token_id]

    def joined_bytes(self, token_ids: Iterable[int]) -> bytes:
        """Return the bytes that several such ids stand for, one after the other."""
        known = self._bytes
        return b"".join([known[token_id] for token_id in token_ids])

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._inner.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        values = byte_values()
        try:
            return bytes(values[character] for character in token)
        except KeyError:  # an added token is kept as plain text
            return token.encode()


class _Remembered(dict[int, bytes]):
    """Bytes of the ids asked for so far; an id known costs a look into a dict."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._find(token_id)
        return found


class TextStream:
    """Turn ids into text as they come, never giving out half a character."""

    quick: ClassVar[bool] = False
    """Whether many ids at once take next to no time."""

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain, often one token behind."""
        raise NotImplementedError

    def extend(self, token_ids: Iterable[int]) -> str:
        """Take several."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """Return what was held back and start anew."""
        raise NotImplementedError


class ByteStream(TextStream):
    """Stream of a byte-level tokenizer: an incremental UTF-8 decoder."""

    quick = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def extend(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(self._tokenizer.joined_bytes(token_ids))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class WindowStream(TextStream):
    """Stream of any other tokenizer: decode the last few ids again and give out what is new.

    How such a token reads can depend on the one before it (a leading blank, a byte of a
    character), so the ids given out last stay in the window as context.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        new = self._new()
        # A replacement character at the end may be the first bytes of one still to come. Where a
        # vocabulary falls back to bytes, one bad byte spoils its whole run until the run ends.
        if not new or new.endswith("\ufffd"):
            return ""
        self._given, self._held = self._held, []
        return new

    def flush(self) -> str:
        new = self._new()
        self._given, self._held = [], []
        return new

    def _new(self) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + self._held)[len(before) :]


def byte_characters() -> dict[int, str]:
    """Return the printable character by which byte-level tokenizers write each byte.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for the characters from
    U+0100 on (Radford et al., 2019, GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    table = {value: chr(value) for value in printable}
    table.update({value: chr(0x100 + index) for index, value in enumerate(others)})
    return table


def byte_values() -> dict[str, int]:
    """Return the inverse of `byte_characters`."""
    return _BYTE_VALUES


_BYTE_VALUES: Final = {character: value for value, character in byte_characters().items()}


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        found = _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _read_settings(file: Path, key: str) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(key, str(file), f"not JSON ({error}).") from error
    return settings if isinstance(settings, dict) else {}


def _chat_template(settings: dict[str, Any], file: Path) -> str | None:
    """Return the template from beside a tokenizer, in any of the places that have been usual."""
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _fetch(name: str, key: str) -> tuple[Path, dict[str, Any]]:
    """Get a tokenizer's two files from the hub or its local cache."""
    # Imported here: only this case needs the hub's client.
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
        try:
            config = Path(huggingface_hub.hf_hub_download(name, "tokenizer_config.json"))
        except EntryNotFoundError:
            return file, {}
        return file, _read_settings(config, key)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ConfigError(
            key,
            name,
            f"no such local file or folder, and the hub did not give it ({type(error).__name__}: "
            f"{reason}). Without a network give a tokenizer.json or its folder.",
        ) from error
