"""Which recordings are for training and which for validation (docs/data.md, "Splits")."""

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .names import player_id_of, session_id_of

DEFAULT_VALIDATION_FRACTION = 0.05
# A share of clips more than this many times the share asked for, or less than its part, is warned of.
FAR_FACTOR = 2.0

_UNIT_OF: dict[str, Callable[[str], str]] = {"player": player_id_of, "session": session_id_of}
_NAMED = {"player": "validation_players", "session": "validation_sessions"}


def stable_share(name: str) -> float:
    """Place of a name in [0, 1): the first 8 bytes of its SHA-256 over 2**64. Stable for ever."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


@dataclass(frozen=True)
class SplitOptions:
    """How recordings are split.

    Args:
        split_by: `player` or `session`: all recordings of one are in one split.
        validation_fraction: share of players (or sessions) in [0, 1), chosen by `stable_share`. None: 0.05, and where
            that leaves a split without recordings, none is for validation.
        validation_players: their names, instead of a share.
        validation_sessions: likewise.

    Raises:
        ValueError: values out of range, or several ways at once.
    """

    split_by: str = "player"
    validation_fraction: float | None = None
    validation_players: tuple[str, ...] | None = None
    validation_sessions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.split_by not in _UNIT_OF:
            raise ValueError(f"split_by must be one of {tuple(_UNIT_OF)}, found {self.split_by!r}")
        ways = {name: getattr(self, name) for name in ("validation_fraction", *_NAMED.values())}
        given = {name: value for name, value in ways.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"give one of {tuple(ways)}, found {given}")
        if self.validation_fraction is not None and not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), found {self.validation_fraction}")
        for name in _NAMED.values():
            if getattr(self, name) == ():
                raise ValueError(f"{name} leaves the validation split empty: no name given")

    @property
    def unit_of(self) -> Callable[[str], str]:
        """From a recording's id to what stays in one split as a whole."""
        return _UNIT_OF[self.split_by]

    @property
    def asks_for_validation(self) -> bool:
        named = self.validation_players is not None or self.validation_sessions is not None
        return named or bool(self.validation_fraction)

    @property
    def wanted_share(self) -> float | None:
        """Share of clips that validation should have; None where its recordings are named."""
        if self.validation_players is not None or self.validation_sessions is not None:
            return None
        return DEFAULT_VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction


def split_options_from(values: Mapping[str, Any]) -> SplitOptions:
    """`SplitOptions` from a flat mapping such as a builder's configuration; other keys are left alone."""
    chosen = {option.name: values[option.name] for option in fields(SplitOptions)}
    for name in _NAMED.values():
        names = [chosen[name]] if isinstance(chosen[name], str) else chosen[name]
        chosen[name] = None if names is None else tuple(sorted(set(names)))
    return SplitOptions(**chosen)


def validation_recordings(recordings: Iterable[str], options: SplitOptions | None = None) -> set[str]:
    """The recordings that are for validation, from their names alone.

    Args:
        recordings: ids of all that are to be built.
        options: how to split.

    Raises:
        ValueError: a player or session that is not there, named sessions whose player has others that are not (with
            `split_by="player"`), a split asked for that comes out empty, or none left for training. The message has
            names and counts.
    """
    options, known = options or SplitOptions(), sorted(set(recordings))
    for unit, option in _NAMED.items():
        names = getattr(options, option)
        if names is not None:
            chosen = _recordings_of(known, unit, names)
            break
    else:
        chosen = _by_share(known, options)
    if known and len(chosen) == len(known):
        units = sorted(set(map(_UNIT_OF[options.split_by], known)))
        shown = f"{units[:10]}{' ...' if len(units) > 10 else ''}"
        raise ValueError(f"the train split is empty: all {len(units)} {options.split_by}s are for validation: {shown}")
    if options.split_by == "player":
        _refuse_torn_players(known, chosen)
    return chosen


def _by_share(known: list[str], options: SplitOptions) -> set[str]:
    unit_of, fraction = _UNIT_OF[options.split_by], options.wanted_share
    assert fraction is not None
    shares = {unit: stable_share(unit) for unit in set(map(unit_of, known))}
    chosen = {recording for recording in known if shares[unit_of(recording)] < fraction}
    if options.validation_fraction is None and (not chosen or len(chosen) == len(known)):
        return set()
    if fraction > 0 and not chosen:
        raise ValueError(
            f"validation_fraction={fraction} leaves the validation split empty: none of {len(shares)} "
            f"{options.split_by}s falls below it, the lowest share is {min(shares.values(), default=math.nan):.3f}; "
            "raise it or name some with validation_players or validation_sessions"
        )
    return chosen


def _recordings_of(known: list[str], unit: str, names: Sequence[str]) -> set[str]:
    units = sorted(set(map(_UNIT_OF[unit], known)))
    unknown = sorted(set(names) - set(units))
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(name, units, n=1, cutoff=0)]
        raise ValueError(
            f"{_NAMED[unit]} names {unit}s that are not to be built: {unknown}; the nearest of {len(units)} {unit}s: "
            f"{near}"
        )
    return {recording for recording in known if _UNIT_OF[unit](recording) in names}


def _refuse_torn_players(known: list[str], chosen: set[str]) -> None:
    torn = sorted(set(map(player_id_of, chosen)) & set(map(player_id_of, set(known) - chosen)))
    if torn:
        rest = sorted({session_id_of(recording) for recording in known if player_id_of(recording) == torn[0]})
        raise ValueError(
            f"validation_sessions puts {len(torn)} players into both splits, which is leakage; the first is "
            f'{torn[0]!r}, with the sessions {rest}: name players with validation_players, or pass split_by="session"'
        )


def check_given_splits(split_of: Iterable[tuple[str, str]], split_by: str) -> None:
    """Refuse splits that someone else has made where they share a player (or session).

    Args:
        split_of: every recording's id and split.
        split_by: `player` or `session`.

    Raises:
        ValueError: with the first that is in two splits.
    """
    seen: dict[str, str] = {}
    for recording, split in split_of:
        unit = _UNIT_OF[split_by](recording)
        other = seen.setdefault(unit, split)
        if other != split:
            raise ValueError(
                f"{split_by} {unit!r} is in the splits {other!r} and {split!r} (recording {recording!r}): recordings "
                f"of one {split_by} in two splits is leakage"
            )


def split_facts(options: SplitOptions, splits: Mapping[str, Mapping[str, int]], what: str = "clips") -> dict[str, Any]:
    """How recordings were split and what came of it, as JSON.

    Args:
        options: what was asked for.
        splits: counts (clips, recordings, players, ...) of each split.
        what: the count that the share asked for is compared with.

    Returns:
        The options; `wanted`, the share asked for (None where recordings are named); `reached`, the share of validation
        in each count; `warning`, a sentence where the share reached is more than `FAR_FACTOR` times the one asked for
        or less than its part, else None.
    """
    totals = {name: sum(part[name] for part in splits.values()) for part in splits.values() for name in part}
    reached = {name: splits.get("validation", {}).get(name, 0) / total for name, total in totals.items() if total}
    wanted, warning = options.wanted_share, None
    # Without an option, few players give no validation split: that is said where recordings are split.
    by_default = options.validation_fraction is None and reached.get(what) == 0
    if (
        wanted
        and what in reached
        and not by_default
        and not wanted / FAR_FACTOR <= reached[what] <= wanted * FAR_FACTOR
    ):
        warning = (
            f"validation has {reached[what]:.1%} of the {what}, {wanted:.1%} were wanted: {options.split_by}s are "
            "chosen whole, and differ in how much they played; choose another validation_fraction, or name some with "
            "validation_players or validation_sessions"
        )
    return {**asdict(options), "wanted": wanted, "reached": reached, "warning": warning}
