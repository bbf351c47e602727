"""Which linears of the base a PEFT config means, as PEFT decides it, without ever running an uploaded regex.

PEFT (0.21) treats parts of its config as regular expressions: a string in ``target_modules`` or ``exclude_modules``,
the keys of ``rank_pattern`` and ``alpha_pattern``, ``layers_pattern``. Strings are refused; keys are accepted in the
small grammar that people write (see ``PATTERN_KEY``) and then matched by PEFT's own rule,
``(.*\\.)?(KEY)$`` at the start of the module path, first key of the file wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from deltaserve_store.spec import BaseSpec

MODULE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
LAYERS_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,127}")
# Plain path characters, '\.', at most three of '\d+' and '[0-9]+', at most one '.*'; optional '^' and '$'. Nothing
# nests, so a match costs at most the square of a short path.
_WILDCARD = r"(?:\\d\+?|\[0-9\]\+?|\.\*)"
PATTERN_KEY = re.compile(rf"\^?(?:[A-Za-z0-9_-]|\\?\.(?!\*)|{_WILDCARD})+\$?")
MAX_PATTERN_KEY = 256
MAX_DIGIT_RUNS = 3
MAX_PATTERN_KEYS = 2048

HEAD_NAMES = frozenset({"lm_head", "embed_tokens", "embed_out", "embed_in", "wte", "wpe", "embed_positions"})
"""Last path segments of output heads and embeddings, which are no linears of the decoder."""

_FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def is_head(module: str) -> bool:
    return module.rpartition(".")[2] in HEAD_NAMES


def is_pattern_key(key: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` is inside the accepted grammar."""
    if len(key) > MAX_PATTERN_KEY or PATTERN_KEY.fullmatch(key) is None:
        return False
    wildcards = re.findall(_WILDCARD, key)
    return wildcards.count(".*") <= 1 and len(wildcards) <= MAX_DIGIT_RUNS


class PatternTable:
    """``rank_pattern`` or ``alpha_pattern``: the first key that matches a module gives its value."""

    def __init__(self, patterns: Mapping[str, float]) -> None:
        """Keys must have passed ``is_pattern_key``."""
        self._rules = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
        self._found: dict[str, float | None] = {}

    def value_for(self, module: str, default: float) -> float:
        """Readers ask several times for each module; the rules, maybe thousands, are gone through once."""
        if module not in self._found:
            self._found[module] = next((value for rule, value in self._rules if rule.match(module)), None)
        found = self._found[module]
        return default if found is None else found


@dataclass(frozen=True, slots=True)
class TargetRules:
    """``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern``.

    ``modules`` None is ``all-linear``: every linear but the head. ``layers`` None does not restrict.
    """

    modules: frozenset[str] | None
    excluded: frozenset[str] = frozenset()
    layers: frozenset[int] | None = None
    layers_patterns: tuple[str, ...] = ()

    def matches(self, module: str) -> bool:
        """PEFT's rule: an exact path matches whatever the layers say, a suffix only in the layers asked for."""
        if _is_named(module, self.excluded):
            return False
        if self.modules is None:
            return not is_head(module)
        if module in self.modules:
            return True
        if not _is_named(module, self.modules):
            return False
        return self.layers is None or self._layer_of(module) in self.layers

    def select(self, base: BaseSpec) -> tuple[str, ...]:
        """Matching linears of the base, in the base's order."""
        return tuple(module for module in base.linears if self.matches(module))

    def _layer_of(self, module: str) -> int | None:
        if not self.layers_patterns:
            found = _FIRST_INDEX.match(module)
            return int(found["idx"]) if found else None
        for pattern in self.layers_patterns:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module)
            if found:
                return int(found["idx"])
        return None


def _is_named(module: str, names: frozenset[str]) -> bool:
    if module in names:
        return True
    # Every suffix that begins after a dot; as many look-ups as the path has segments.
    position = module.find(".")
    while position >= 0:
        if module[position + 1 :] in names:
            return True
        position = module.find(".", position + 1)
    return False
