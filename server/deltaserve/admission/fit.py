"""What an adapter needs of this server beyond the base: a chat template, room in the context, a tokenizer for its
tokens. Each check raises ``AdapterRefused``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from deltaserve.errors import AdapterRefused, Reason
from deltaserve_store.added_tokens import AddedToken
from deltaserve_store.parsed import ParsedAdapter

TokenizerConflicts = Callable[[Sequence[AddedToken]], list[Reason]]


def no_tokenizer(tokens: Sequence[AddedToken]) -> list[Reason]:
    found = f"{len(tokens)} added tokens"
    return [Reason("added_tokens", "tokenizer", found, "none: there is no tokenizer here to add them to")]


def check_added_tokens(adapter: ParsedAdapter, conflicts: TokenizerConflicts) -> None:
    """They must be new to the base's tokenizer and get the ids that the files say."""
    if adapter.added_tokens and (reasons := conflicts(adapter.added_tokens)):
        raise AdapterRefused("The adapter's added tokens do not fit the base's tokenizer.", reasons=reasons)


def check_chat_template(adapter: ParsedAdapter, registered: Collection[str]) -> None:
    if adapter.chat_template is None or adapter.chat_template in registered:
        return
    known = ", ".join(sorted(registered)) or "none is registered; see --chat-template"
    reason = Reason("unknown_chat_template", "chat_template", repr(adapter.chat_template), known)
    raise AdapterRefused(f"The chat template {adapter.chat_template!r} is not registered here.", reasons=[reason])


def check_room(adapter: ParsedAdapter, limit: int) -> None:
    """A prefix must leave room for a token of prompt and one of answer in a context of ``limit`` tokens."""
    found = adapter.num_prefix_tokens
    if found + 2 > limit:
        allowed = f"at most {limit - 2}: the context of this server is {limit} tokens"
        reason = Reason("prefix_too_long", "prefix", f"{found} virtual tokens", allowed)
        raise AdapterRefused(f"The adapter's {found} virtual tokens leave no room here.", reasons=[reason])
