"""Optimization profiles: the shapes an engine is built for, and which of them takes a batch.

Two profiles overlap when both their batch and their token ranges share a number. Apart in one of
the two is enough: then every (batch, tokens) lies in one profile at most, so the choice at run time
needs no rule, and kernels tuned for one shape are never used for another profile's.

Knows no TensorRT, no recipe file and no tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jexport.errors import ProfileError
from jexport.recipe import ProfileSpec

COUNTS = range(2, 5)
"""TensorRT tunes for one shape a profile: one wide profile picks bad kernels, many cost memory."""

TOKEN_BUDGET = 16_384
"""Padded tokens of the largest batch of a profile."""

LARGEST_BATCH = 64
ROUND_TOKENS = 8
"""Borders between profiles are multiples of this: tensor cores work in tiles of 8 and 16."""

EDGES = (128, 512)
"""Borders without a histogram: a query or a sentence, a paragraph, and what is longer."""

CANDIDATES = 96
"""At most so many borders are tried: quantiles of the lengths."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Sizes of one axis.

    Args:
        min: the smallest.
        opt: the usual one; kernels are tuned at it.
        max: the largest.
    """

    min: int
    opt: int
    max: int

    def holds(self, size: int) -> bool:
        """Whether an axis of that size is inside.

        Args:
            size: of the axis.

        Returns:
            True from `min` to `max`, both included.
        """
        return self.min <= size <= self.max

    def meets(self, other: Range) -> bool:
        """Whether both hold a common size.

        Args:
            other: a range of the same axis.

        Returns:
            True where they do.
        """
        return self.min <= other.max and other.min <= self.max

    def __str__(self) -> str:
        return f"[{self.min}, {self.opt}, {self.max}]"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimization profile.

    Args:
        batch: texts in a batch.
        tokens: of the longest of them.
    """

    batch: Range
    tokens: Range

    def holds(self, batch: int, tokens: int) -> bool:
        """Whether that shape is inside.

        Args:
            batch: texts.
            tokens: of each, padding included.

        Returns:
            True where both are.
        """
        return self.batch.holds(batch) and self.tokens.holds(tokens)

    def __str__(self) -> str:
        return f"batch {self.batch} tokens {self.tokens}"

    def plain(self) -> dict[str, list[int]]:
        """As a recipe or a manifest writes it."""
        return {
            axis: [sizes.min, sizes.opt, sizes.max]
            for axis, sizes in (("batch", self.batch), ("tokens", self.tokens))
        }


def read(specs: Sequence[ProfileSpec], *, max_tokens: int) -> tuple[Profile, ...]:
    """The profiles that a recipe asks for, checked.

    Args:
        specs: the recipe's; without any, those of `standard` are taken.
        max_tokens: of the model.

    Returns:
        The profiles, in the order of `specs`.

    Raises:
        ProfileError: as of `check`.
    """
    if not specs:
        return standard(max_tokens)
    return from_tables(
        [{"batch": spec.batch, "tokens": spec.tokens} for spec in specs], max_tokens=max_tokens
    )


def from_tables(tables: Iterable[Mapping[str, Any]], *, max_tokens: int) -> tuple[Profile, ...]:
    """Profiles of tables, checked.

    Args:
        tables: like {batch=[1, 8, 32], tokens=[1, 64, 128]}.
        max_tokens: of the model.

    Returns:
        The profiles, in that order.

    Raises:
        ProfileError: an axis is not three whole numbers, or as of `check`.
    """
    result = []
    for number, table in enumerate(tables):
        for axis in ("batch", "tokens"):
            sizes = list(table.get(axis, ()))
            if len(sizes) != 3 or not all(type(size) is int for size in sizes):
                raise ProfileError(
                    f"profile {number} has no usable {axis} range",
                    evidence=f"{axis} = {sizes}",
                    fix="give three whole numbers: smallest, usual, largest",
                )
        batch, tokens = (
            Range(min=sizes[0], opt=sizes[1], max=sizes[2])
            for sizes in (table["batch"], table["tokens"])
        )
        result.append(Profile(batch=batch, tokens=tokens))
    return check(result, max_tokens=max_tokens)


def specs(profiles: Iterable[Profile]) -> tuple[ProfileSpec, ...]:
    """As a recipe holds them.

    Args:
        profiles: any.

    Returns:
        What `read` takes.
    """
    return tuple(
        ProfileSpec(
            batch=(one.batch.min, one.batch.opt, one.batch.max),
            tokens=(one.tokens.min, one.tokens.opt, one.tokens.max),
        )
        for one in profiles
    )


def check(profiles: Sequence[Profile], *, max_tokens: int) -> tuple[Profile, ...]:
    """Refuse profiles that are impossible, overlap or go beyond the model's length.

    Args:
        profiles: one to COUNTS[-1] of them.
        max_tokens: of the model.

    Returns:
        The same profiles.

    Raises:
        ProfileError: says which one, and why.
    """
    if not profiles or len(profiles) > COUNTS[-1]:
        raise ProfileError(
            f"an engine cannot have {len(profiles)} optimization profiles here",
            evidence="each costs build time and memory, and a single wide one picks bad kernels",
            fix=f"give one to {COUNTS[-1]} of them (recipe key compile.profiles)",
        )
    for number, profile in enumerate(profiles):
        for axis, sizes in (("batch", profile.batch), ("tokens", profile.tokens)):
            if not 1 <= sizes.min <= sizes.opt <= sizes.max:
                raise ProfileError(
                    f"profile {number} has an impossible {axis} range",
                    evidence=f"{axis} = {sizes}",
                    fix="write [smallest, usual, largest] with 1 <= smallest <= usual <= largest",
                )
        if profile.tokens.max > max_tokens:
            raise ProfileError(
                f"profile {number} is for longer texts than the model takes",
                evidence=f"tokens = {profile.tokens}; the model's limit is {max_tokens}",
                fix=f"end it at {max_tokens} tokens",
            )
    for (one, first), (two, second) in itertools.combinations(enumerate(profiles), 2):
        if first.batch.meets(second.batch) and first.tokens.meets(second.tokens):
            raise ProfileError(
                f"profiles {one} and {two} overlap",
                evidence=f"{one}: {first}\n{two}: {second}",
                fix=f"begin profile {two} at {first.tokens.max + 1} tokens",
            )
    return tuple(profiles)


def standard(max_tokens: int, *, token_budget: int = TOKEN_BUDGET) -> tuple[Profile, ...]:
    """Profiles for a model whose texts are not known: short, middle and long ones.

    Args:
        max_tokens: of the model, and the end of the last.
        token_budget: most padded tokens of a batch, unless one text has more.

    Returns:
        One to three profiles, apart, from 1 token up.
    """
    edges = [edge for edge in EDGES if edge < max_tokens] + [max_tokens]
    return _of_edges(edges, (), token_budget)


def choose(
    lengths: Sequence[int], *, max_tokens: int, count: int = 3, token_budget: int = TOKEN_BUDGET
) -> tuple[Profile, ...]:
    """Profiles for texts of these lengths, the whole range up to max_tokens covered.

    Borders are the ones with the fewest padded tokens when each text is padded to the border above
    it, found exactly (a shortest path over at most CANDIDATES quantiles), so the same lengths give
    the same profiles. When no text comes near max_tokens, one profile of `count` is kept for what
    is longer. opt is the middle text of each.

    Args:
        lengths: in tokens; those over max_tokens count as cut.
        max_tokens: of the model.
        count: most profiles, one of COUNTS.
        token_budget: most padded tokens of a batch, unless one text has more.

    Returns:
        The profiles, apart, from 1 token up.

    Raises:
        ProfileError: another count, or no length above 0.
    """
    if count not in COUNTS:
        raise ProfileError(
            f"cannot choose {count} profiles",
            evidence=f"possible: {COUNTS[0]} to {COUNTS[-1]}",
            fix=f"ask for {COUNTS[0]} to {COUNTS[-1]}",
        )
    known = sorted(min(length, max_tokens) for length in lengths if length > 0)
    if not known:
        raise ProfileError(
            "no profiles can be chosen from no texts",
            evidence=f"{len(lengths)} lengths, none above 0",
            fix="give a file with texts, or leave --profile-from away",
        )
    highest = min(-(-known[-1] // ROUND_TOKENS) * ROUND_TOKENS, max_tokens)
    rest = [max_tokens] if highest < max_tokens else []
    edges = _best_edges(known, highest, count - len(rest))
    return _of_edges([*edges, *rest], known, token_budget)


def _best_edges(known: Sequence[int], highest: int, count: int) -> list[int]:
    """Up to `count` borders, the last one `highest`, with the fewest padded tokens."""
    places = min(CANDIDATES, len(known))
    tried = {known[(len(known) - 1) * n // max(places - 1, 1)] for n in range(places)}
    edges = sorted({min(-(-one // ROUND_TOKENS) * ROUND_TOKENS, highest) for one in tried})
    below = [sum(length <= edge for length in known) for edge in edges]
    # cheapest[n][i]: fewest padded tokens of all texts up to edges[i] with n + 1 borders; the sum
    # of true lengths is the same for all and left out.
    cheapest: list[list[tuple[int, tuple[int, ...]]]] = [
        [(below[i] * edges[i], (edges[i],)) for i in range(len(edges))]
    ]
    for _ in range(count - 1):
        last = cheapest[-1]
        row = []
        for i, edge in enumerate(edges):
            ways = [last[i]]
            ways += [
                (last[j][0] + (below[i] - below[j]) * edge, (*last[j][1], edge)) for j in range(i)
            ]
            row.append(min(ways))
        cheapest.append(row)
    return list(cheapest[-1][-1][1])


def _of_edges(edges: Sequence[int], known: Sequence[int], token_budget: int) -> tuple[Profile, ...]:
    """Profiles with these upper borders, in order; the texts say where each is tuned."""
    result = []
    lower = 1
    for edge in edges:
        inside = [length for length in known if lower <= length <= edge]
        usual = inside[len(inside) // 2] if inside else (lower + edge + 1) // 2
        most = max(1, min(LARGEST_BATCH, token_budget // edge))
        result.append(
            Profile(
                batch=Range(min=1, opt=max(1, most // 2), max=most),
                tokens=Range(min=lower, opt=usual, max=edge),
            )
        )
        lower = edge + 1
    return tuple(result)


def pick(profiles: Sequence[Profile], batch: int, tokens: int) -> int | None:
    """The profile that takes this shape as it is.

    Args:
        profiles: of the engine.
        batch: texts.
        tokens: of each, padding included.

    Returns:
        Its place; None when the batch has to be split or padded.
    """
    return next((n for n, one in enumerate(profiles) if one.holds(batch, tokens)), None)


def split(profiles: Sequence[Profile], lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Rows of a batch as groups, each for one profile; texts of a group may be padded to its min.

    A text goes to the profile that pads it least, then the one with the largest batch.

    Args:
        profiles: of the engine.
        lengths: of the rows, in tokens.

    Returns:
        (place of the profile, its rows) of each group; a profile may have several.

    Raises:
        ProfileError: a text is longer than every profile.
    """
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(_home(profiles, row, length), []).append(row)
    batches = []
    for number in sorted(groups):
        rows, most = groups[number], profiles[number].batch.max
        batches += [(number, rows[at : at + most]) for at in range(0, len(rows), most)]
    return batches


def _home(profiles: Sequence[Profile], row: int, length: int) -> int:
    fitting = [
        (max(one.tokens.min, length), -one.batch.max, n)
        for n, one in enumerate(profiles)
        if length <= one.tokens.max
    ]
    if not fitting:
        longest = max(one.tokens.max for one in profiles)
        raise ProfileError(
            f"text {row} of a batch is longer than every profile of this engine",
            evidence=f"{length} tokens; the longest profile ends at {longest}",
            fix="cut the text, or compile again with a longer profile (compile.profiles)",
        )
    return min(fitting)[2]


def shape(profile: Profile, batch: int, tokens: int) -> tuple[int, int]:
    """What a group of that size is padded to.

    Args:
        profile: that it is for.
        batch: texts.
        tokens: of the longest.

    Returns:
        (batch, tokens): its own size, or the profile's smallest.
    """
    return max(batch, profile.batch.min), max(tokens, profile.tokens.min)
