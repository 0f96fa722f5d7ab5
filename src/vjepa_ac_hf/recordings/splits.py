"""Which sessions are for training and which for validation (docs/data.md, "Splits")."""

import difflib
import hashlib
import math
from collections.abc import Iterable, Sequence

DEFAULT_VALIDATION_FRACTION = 0.05


def session_share(session_id: str) -> float:
    """Place of a session in [0, 1): the first 8 bytes of its name's SHA-256 over 2**64. Stable for ever."""
    return int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:8], "big") / 2**64


def validation_set(
    sessions: Iterable[str],
    validation_fraction: float | None = None,
    validation_sessions: Sequence[str] | None = None,
) -> set[str]:
    """Which sessions are for validation.

    Args:
        sessions: all sessions there are.
        validation_fraction: share of sessions in [0, 1), chosen by `session_share`. None: 0.05, and where that leaves
            a split without sessions, none is for validation.
        validation_sessions: their names, instead of a share.

    Raises:
        ValueError: both options at once, a fraction out of range, an unknown session, a split asked for that comes
            out empty, or none left for training. The message has names and counts.
    """
    known = sorted(set(sessions))
    if validation_sessions is not None:
        if validation_fraction is not None:
            raise ValueError(
                f"give validation_fraction or validation_sessions, found both: {validation_fraction} and "
                f"{list(validation_sessions)}"
            )
        chosen = _named_sessions(known, validation_sessions)
    else:
        fraction = DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
        if not 0 <= fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), found {fraction}")
        chosen = {session for session in known if session_share(session) < fraction}
        if validation_fraction is None and (not chosen or len(chosen) == len(known)):
            return set()
        if fraction > 0 and not chosen:
            raise ValueError(
                f"validation_fraction={fraction} leaves the validation split empty: none of {len(known)} sessions "
                f"falls below it, the lowest share is {min(map(session_share, known), default=math.nan):.3f}; raise "
                "it or name sessions with validation_sessions"
            )
    if known and len(chosen) == len(known):
        raise ValueError(f"the train split is empty: all {len(known)} sessions are for validation: {known}")
    return chosen


def _named_sessions(known: list[str], names: Sequence[str]) -> set[str]:
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"validation_sessions leaves the validation split empty: no name given, {len(known)} known")
    unknown = [name for name in names if name not in known]
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        hint = f"did you mean {near}?" if near else f"there are {known[:10]}{' ...' if len(known) > 10 else ''}"
        raise ValueError(
            f"validation_sessions names sessions that are not to be built: {unknown}; of {len(known)} sessions {hint}"
        )
    return set(names)
