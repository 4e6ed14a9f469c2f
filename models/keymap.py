"""Two-way renaming of parameters between two naming schemes, from one table of pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable


class KeyMap:
    """Renames parameters between a left and a right scheme.

    Each pair names the same module (or parameter) in both schemes; `{}` stands for an index that both share,
    e.g. `("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj")`. What follows the module's name (`.weight`) is
    kept. A name that no pair covers comes back unchanged, so that key checks report it in the file's own
    spelling.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self.left = tuple(left for left, _ in pairs)
        self.right = tuple(right for _, right in pairs)
        self._to_right = [_rule(left, right) for left, right in pairs]
        self._to_left = [_rule(right, left) for left, right in pairs]

    def to_right(self, name: str) -> str:
        return _apply(self._to_right, name)

    def to_left(self, name: str) -> str:
        return _apply(self._to_left, name)


def _rule(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\{\}", r"(\d+)")
    return re.compile(rf"{pattern}(?=\.|$)"), target


def _apply(rules: list[tuple[re.Pattern[str], str]], name: str) -> str:
    for pattern, target in rules:
        if match := pattern.match(name):
            return target.format(*match.groups()) + name[match.end():]
    return name
