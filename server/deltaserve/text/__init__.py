"""Token ids <-> text: the tokenizer, chat rendering, streaming detokenisation and stop strings."""

from __future__ import annotations

from deltaserve.text.byte_detokenizer import ByteDetokenizer
from deltaserve.text.chat import ChatRenderer
from deltaserve.text.detokenizer import IncrementalDetokenizer
from deltaserve.text.stop_strings import StopStrings
from deltaserve.text.tokenizer import Tokenizer

__all__ = ["ByteDetokenizer", "ChatRenderer", "IncrementalDetokenizer", "StopStrings", "Tokenizer"]
