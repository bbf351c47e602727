"""The base model's tokenizer, read from its folder. Never from the network."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaserve.errors import ConfigError, Reason
from deltaserve.text.byte_detokenizer import ByteDetokenizer, ByteTable
from deltaserve.text.chat import ChatRenderer, Message
from deltaserve.text.detokenizer import IncrementalDetokenizer
from deltaserve.text.token_bytes import BYTE_TOKEN, bytes_of_symbols, bytes_of_token
from deltaserve_store.added_tokens import AddedToken

MAX_GROWN = 16
"""Tokenizers with added tokens that are kept; each has a vocabulary of its own in memory."""


class Tokenizer:
    """Wraps a transformers tokenizer; safe to use from several threads, because no call changes its settings."""

    def __init__(
        self, hf_tokenizer: Any, *, eos_token_ids: Sequence[int] = (), templates: Mapping[str, str] | None = None
    ) -> None:
        self._hf = hf_tokenizer
        self._backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        added: dict[int, Any] = dict(hf_tokenizer.added_tokens_decoder)
        self._special = {i: token.content for i, token in added.items() if token.special}
        self._ordinary_added = {i: token.content for i, token in added.items() if not token.special}
        decoder = self._pipeline_state("decoder")
        self._is_byte_level = "ByteLevel" in decoder
        self._is_byte_fallback = "ByteFallback" in decoder
        self._byte_tokens = self._find_byte_tokens()
        self._byte_tables: dict[bool, ByteTable] = {}
        if decoder and json.loads(decoder).get("type") == "ByteLevel":
            self._byte_tables = {True: ByteTable(self._raw_bytes, self._special), False: ByteTable(self._raw_bytes)}
        own_eos = () if hf_tokenizer.eos_token_id is None else (int(hf_tokenizer.eos_token_id),)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*own_eos, *eos_token_ids)))
        self._templates = templates
        self._grown: OrderedDict[tuple[AddedToken, ...], Tokenizer] = OrderedDict()
        self._growing = threading.Lock()
        self.chat = ChatRenderer(
            hf_tokenizer,
            self,
            {text: i for i, text in self._special.items()},
            {text: i for i, text in self._ordinary_added.items()},
            templates,
        )

    @classmethod
    def from_folder(cls, path: Path | str, *, templates: Mapping[str, str] | None = None) -> Tokenizer:
        """Reads ``tokenizer.json`` and its companions. ``templates`` are chat templates the operator registered.

        End-of-sequence ids also come from ``generation_config.json`` and ``config.json``. Raises ConfigError.
        """
        from transformers import AutoTokenizer  # slow to import; a command that needs no text must not pay

        folder = Path(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"the model folder {folder.name!r} has no tokenizer that can be read: expected tokenizer.json and "
                f"tokenizer_config.json beside config.json ({type(error).__name__})"
            ) from error
        return cls(tokenizer, eos_token_ids=_eos_ids_of_configs(folder), templates=templates)

    def with_added(self, tokens: tuple[AddedToken, ...]) -> Tokenizer:
        """This tokenizer with an adapter's tokens, which ``conflicts`` found nothing against; itself without any.

        Adapters of one training share theirs. Making one copies the vocabulary, which blocks for up to a second: off
        the event loop, please, unless ``has_added`` says that it is there.
        """
        if not tokens:
            return self
        with self._growing:
            found = self._grown.pop(tokens, None) or self._grow(tokens)
            self._grown[tokens] = found
            while len(self._grown) > MAX_GROWN:
                self._grown.popitem(last=False)
        return found

    def has_added(self, tokens: tuple[AddedToken, ...]) -> bool:
        """Whether ``with_added`` answers at once."""
        return not tokens or tokens in self._grown

    def conflicts(self, tokens: Sequence[AddedToken]) -> list[Reason]:
        """Why these tokens cannot be added: texts that are tokens already, or ids that they would not get."""
        reasons = []
        for place, token in enumerate(tokens):
            where = f"tokenizer:{token.content[:80]}"
            known = self._hf.convert_tokens_to_ids(token.content)
            if known is not None and self._hf.convert_ids_to_tokens(known) == token.content:
                reasons.append(Reason("added_tokens", where, f"a text that is token {known} already", "a new text"))
            elif token.id != self.vocab_size + place:
                reasons.append(Reason("added_tokens", where, f"token id {token.id}", f"{self.vocab_size + place}"))
        return reasons

    def _grow(self, tokens: tuple[AddedToken, ...]) -> Tokenizer:
        from transformers import AddedToken as Added

        hf = copy.deepcopy(self._hf)
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        hf.add_tokens(
            [
                Added(token.content, special=token.is_special, **{flag: getattr(token, flag) for flag in flags})
                for token in tokens
            ]
        )
        found = hf.convert_tokens_to_ids([token.content for token in tokens])
        if found != [token.id for token in tokens]:
            raise ConfigError(f"the tokenizer gave added tokens the ids {found[:8]}, not those of the adapter")
        return Tokenizer(hf, eos_token_ids=self.eos_token_ids, templates=self._templates)

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows, added tokens included; the base's matrix may be larger."""
        return len(self._hf)

    @property
    def chat_template(self) -> str | None:
        """Text of the base's own chat template."""
        return self.chat.base_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``. Control tokens written in it count as such: callers with untrusted parts use ``chat``."""
        if self._backend is not None:
            # encode_batch releases the interpreter lock, so that a long prompt in a worker thread stalls nobody.
            return list(self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
        return list(self._hf.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids`` without any cleaning up of spaces; ids outside the vocabulary give nothing."""
        if self._backend is not None:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def detokenizer(
        self, *, context_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> ByteDetokenizer | IncrementalDetokenizer:
        """A streaming decoder for one sequence that continues ``context_ids``."""
        if self._byte_tables:
            return ByteDetokenizer(self._byte_tables[skip_special_tokens], context_ids=context_ids)
        return IncrementalDetokenizer(self, context_ids=context_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Prompt ids of a chat; see ``ChatRenderer.render_ids``."""
        return self.chat.render_ids(
            messages, template=template, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def is_known(self, token_id: int) -> bool:
        """False for an id outside the vocabulary, which decodes to nothing (a base's matrix may have spare rows)."""
        if self._backend is not None:
            return self._backend.id_to_token(token_id) is not None
        return 0 <= token_id < self.vocab_size

    def is_byte_token(self, token_id: int) -> bool:
        """True for the single-byte tokens of a byte-fallback vocabulary."""
        return token_id in self._byte_tokens

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id outside the vocabulary."""
        added = self._special.get(token_id) or self._ordinary_added.get(token_id)
        if added is not None:
            return added.encode("utf-8", "replace")
        piece = self._hf.convert_ids_to_tokens(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            return b""
        return bytes_of_token(piece, is_byte_level=self._is_byte_level, is_byte_fallback=self._is_byte_fallback)

    def token_text(self, token_id: int) -> str:
        """Printable form of one token; ``bytes:\\xe2\\x82`` where it is not whole characters, as OpenAI writes it."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _raw_bytes(self, token_id: int) -> bytes | None:
        """What a byte-level decoder makes of one id, added tokens included; None for an id outside the vocabulary."""
        piece = self._backend.id_to_token(token_id) if self._backend is not None else None
        return None if piece is None else bytes_of_symbols(piece)

    def _pipeline_state(self, part: str) -> str:
        """JSON of one part of the backend's pipeline, for the kinds named in it; empty without a backend."""
        if self._backend is None or getattr(self._backend, part, None) is None:
            return ""
        state = getattr(self._backend, part).__getstate__()
        return state.decode() if isinstance(state, bytes) else str(state)

    def _find_byte_tokens(self) -> frozenset[int]:
        if not self._is_byte_fallback:
            return frozenset()
        return frozenset(i for piece, i in self._hf.get_vocab().items() if BYTE_TOKEN.fullmatch(piece))


def _eos_ids_of_configs(folder: Path) -> tuple[int, ...]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
                ids += [found] if isinstance(found, int) else [int(i) for i in found or ()]
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{name} of the model folder {folder.name!r} cannot be read: expected a JSON object whose "
                    f"eos_token_id is null, a number or a list of numbers ({type(error).__name__})"
                ) from error
    return tuple(dict.fromkeys(ids))
