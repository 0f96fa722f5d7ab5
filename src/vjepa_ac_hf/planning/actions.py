"""What a plan may choose, and the whole actions that follow from it (docs/planning.md, "What is searched").

Letters: M candidates, H steps of the horizon, V continuous variables, K keys and buttons. Raw units throughout: pixels,
degrees, 0 and 1; tensors are float64 on the CPU, whatever the model's device: they are small, and results are the same.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..actions_vjepa2_ac import (
    ACTION_COLUMNS,
    CONTINUOUS_COLUMNS,
    DEGREES_PER_PIXEL,
    resolve_action_space,
    wrap_degrees,
)
from ..processing_vjepa2_ac import PITCH_SCALE, add_view_changes

COLUMN = {name: index for index, name in enumerate(ACTION_COLUMNS)}
NUM_SLOTS = 9
NUMBER_KEYS = tuple(f"key.{i}" for i in range(1, NUM_SLOTS + 1))
SLOTS = tuple(f"hotbar.{i}" for i in range(NUM_SLOTS))
_NUMBER_KEYS = slice(COLUMN[NUMBER_KEYS[0]], COLUMN[NUMBER_KEYS[-1]] + 1)
_SLOTS = slice(COLUMN[SLOTS[0]], COLUMN[SLOTS[-1]] + 1)
VIEW_OF_MOUSE = {"mouse_dx": "yaw_delta", "mouse_dy": "pitch_delta"}
MOUSE_OF_VIEW = {view: mouse for mouse, view in VIEW_OF_MOUSE.items()}

# A plan with these pressed would leave the world that it imagines: e and escape open a GUI, while gui_open is 0; q
# drops the item in hand, which hardly shows and cannot be undone. Right shift does nothing in Minecraft; MineRL
# lacks it.
DEFAULT_FIXED: dict[str, float] = {"gui_open": 0, "key.q": 0, "key.e": 0, "key.escape": 0, "key.right.shift": 0}

_LIMITS = {"yaw_delta": (-180.0, math.nextafter(180.0, 0.0)), "pitch_delta": (-180.0, 180.0)}
_BOUND_STD = 3.0  # default bounds: as far from the mean of the training data, in standard deviations
_WARM_START = 0.8  # share of a warm start's choice in the probabilities of keys; the rest is the initial one


@dataclass(frozen=True)
class Distribution:
    """Independent distributions of all variables at all steps.

    Args:
        mean: `(H, V)`, of the normal distributions, which are cut off at the bounds.
        std: `(H, V)`, likewise.
        press: `(H, K)`, probability that a key or button is pressed.
        number: `(H, 10)`, probability of no number key (0) and of the keys 1 to 9.
    """

    mean: Tensor
    std: Tensor
    press: Tensor
    number: Tensor


class SearchSpace:
    """The variables of a plan, their bounds, and the 38 action columns that follow from them.

    A *decision* is a vector of V continuous values, K zeros or ones, and the number key (0: none, 1 to 9).
    Columns that depend on each other are not chosen independently: mouse movement is the view change / 0.15 (with a GUI
    open the view stands still, and the mouse moves the cursor as far), the hotbar slot follows from the number keys
    pressed so far. Columns that the action space lacks are 0, unless they follow.

    Args:
        action_space: the model's, a name or a list of columns.
        bounds: `{column: (low, high)}` of continuous columns, raw units, for every step. Default: mean +- 3 standard
            deviations of the training data. Bounds of a mouse column and its view change hold both.
        fixed: `{column: value}`, columns that are not searched, beside `DEFAULT_FIXED`.
        free: columns of `DEFAULT_FIXED` that are searched all the same.
        statistics: the processor's `action_statistics`, for default bounds.
        press_probability: that of a key or button, and of any number key, before anything is known.

    Raises:
        ValueError: unknown columns or ones that the space lacks, bounds or values that contradict each other.
    """

    def __init__(
        self,
        action_space: str | Sequence[str],
        *,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        fixed: Mapping[str, float] | None = None,
        free: Sequence[str] = (),
        statistics: Mapping | None = None,
        press_probability: float = 0.25,
    ):
        self.columns = resolve_action_space(action_space)
        self.press_probability = press_probability
        if not 0 < press_probability < 1:
            raise ValueError(f"press_probability must be between 0 and 1, found {press_probability}")
        self.fixed = self._check_fixed(dict(fixed or {}), free)
        intervals = self._intervals(dict(bounds or {}), statistics)
        self.continuous = list(intervals)
        self.low, self.high = torch.tensor(list(intervals.values()), dtype=torch.float64).reshape(-1, 2).unbind(1)
        pressed = [c for c in ACTION_COLUMNS if c not in (*CONTINUOUS_COLUMNS, *NUMBER_KEYS, *SLOTS)]
        self.keys = [c for c in pressed if c in self.columns and c not in self.fixed]
        self.numbers = self._number_choices()

    @property
    def width(self) -> int:
        """Length of a decision, V + K + 1."""
        return len(self.continuous) + len(self.keys) + 1

    # --- what is searched -------------------------------------------------------------------------------------

    def _can_set(self, column: str) -> bool:
        """Whether the space has a column, or one that it follows from."""
        partners = (VIEW_OF_MOUSE.get(column), MOUSE_OF_VIEW.get(column))
        if column in NUMBER_KEYS:
            partners = (SLOTS[NUMBER_KEYS.index(column)], None)
        return column in self.columns or any(partner in self.columns for partner in partners)

    def _check_column(self, column: str, where: str) -> None:
        if column not in COLUMN:
            near = difflib.get_close_matches(str(column), ACTION_COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown action column {column!r}{hint}")
        if column in SLOTS:
            raise ValueError(
                f"{where}: the slot {column!r} follows from the number keys; name {NUMBER_KEYS[SLOTS.index(column)]!r}"
            )
        if not self._can_set(column):
            raise ValueError(f"{where}: the action space lacks {column!r}, it has {self.columns}")

    def _check_fixed(self, fixed: dict[str, float], free: Sequence[str]) -> dict[str, float]:
        for name in free:
            self._check_column(name, "free")
            if name in fixed:
                raise ValueError(f"column {name!r} cannot be both free and fixed to {fixed[name]}")
        for name, value in fixed.items():
            self._check_column(name, "fixed")
            if not math.isfinite(value) or (name not in CONTINUOUS_COLUMNS and value not in (0, 1)):
                expected = "a finite number" if name in CONTINUOUS_COLUMNS else "0 or 1"
                raise ValueError(f"fixed: column {name!r} must be {expected}, found {value}")
        defaults = {c: v for c, v in DEFAULT_FIXED.items() if c in self.columns and c not in free}
        return {**defaults, **fixed}

    def _intervals(self, bounds: dict, statistics: Mapping | None) -> dict[str, tuple[float, float]]:
        """Bounds of every continuous variable, in its own unit."""
        for name, (low, high) in bounds.items():
            self._check_column(name, "bounds")
            if name not in CONTINUOUS_COLUMNS:
                raise ValueError(f"bounds: column {name!r} is not one of {CONTINUOUS_COLUMNS}; use fixed")
            least, most = _LIMITS.get(name, (-math.inf, math.inf))
            if not (math.isfinite(low) and math.isfinite(high)) or low > high or low < least or high > most:
                within = f" within [{least:g}, 180)" if name == "yaw_delta" else ""
                within = " within [-180, 180]" if name == "pitch_delta" else within
                raise ValueError(
                    f"bounds: column {name!r} needs finite low <= high{within}, found low {low} and high {high}"
                )
        given = {name: [bounds[name]] for name in bounds}
        for name in set(self.fixed) & set(CONTINUOUS_COLUMNS):
            given.setdefault(name, []).append((self.fixed[name], self.fixed[name]))
        found = {}
        for mouse, view in VIEW_OF_MOUSE.items():
            known = [c for c in (view, mouse) if c in self.columns]
            if known:  # the view, if the space has it; the mouse follows
                variable, partner = known[0], mouse if known[0] == view else view
                scale = DEGREES_PER_PIXEL if variable == view else 1 / DEGREES_PER_PIXEL
                limits = {
                    variable: given.get(variable, []),
                    partner: [(low * scale, high * scale) for low, high in given.get(partner, [])],
                }
                found[variable] = _intersect(variable, limits, statistics)
        return found

    def _number_choices(self) -> list[int]:
        """Number keys that may be pressed (0: none)."""
        forced = [i for i, name in enumerate(NUMBER_KEYS, 1) if self.fixed.get(name) == 1]
        if len(forced) > 1:
            raise ValueError(f"fixed: at most one number key can be 1, found {[NUMBER_KEYS[i - 1] for i in forced]}")
        free = [i for i, name in enumerate(NUMBER_KEYS, 1) if self._can_set(name) and name not in self.fixed]
        return forced or [0, *free]

    # --- distributions ----------------------------------------------------------------------------------------

    def initial(self, horizon: int) -> Distribution:
        """Before anything is known: the middle of the bounds with a quarter of their width as standard deviation."""
        number = torch.zeros(NUM_SLOTS + 1, dtype=torch.float64)
        others = [choice for choice in self.numbers if choice]
        if others:
            number[others] = self.press_probability / len(others)
        number[self.numbers[0]] += 1 - number.sum()
        press = torch.full((horizon, len(self.keys)), self.press_probability, dtype=torch.float64)
        mean, std = (self.low + self.high) / 2, (self.high - self.low) / 4
        return Distribution(mean.repeat(horizon, 1), std.repeat(horizon, 1), press, number.repeat(horizon, 1))

    def warm_start(self, decisions: Tensor, shift: int, horizon: int) -> Distribution:
        """Around the decisions `(H', width)` of an earlier plan, of which `shift` steps are done; then as `initial`.

        Its `mode` is the rest of the earlier plan.
        """
        if decisions.ndim != 2 or decisions.shape[1] != self.width:
            raise ValueError(
                f"a warm start needs decisions (steps, {self.width}) of this search space, found "
                f"{tuple(decisions.shape)}"
            )
        if shift < 0:
            raise ValueError(f"shift must be at least 0, found {shift}")
        strange = sorted({int(n) for n in decisions[:, -1].tolist()} - set(self.numbers))
        if strange:
            raise ValueError(f"a warm start presses the number keys {strange}, this space has {self.numbers}")
        initial, rest = self.initial(horizon), decisions[shift : shift + horizon].cpu()
        fitted, steps = self.fit(rest[None], torch.ones(1, dtype=torch.float64)), len(rest)
        mean, press, number = initial.mean.clone(), initial.press.clone(), initial.number.clone()
        mean[:steps] = fitted.mean.clamp(self.low, self.high)
        press[:steps] = torch.lerp(press[:steps], fitted.press, _WARM_START)
        number[:steps] = torch.lerp(number[:steps], fitted.number, _WARM_START)
        return Distribution(mean, initial.std, press, number)

    def shift(self, decisions: Tensor, shift: int, horizon: int) -> Tensor:
        """What is left of decisions `(P, H', width)` once `shift` steps are done, then as `initial` has it at most."""
        rest = decisions[:, shift : shift + horizon].cpu()
        later = self.mode(self.initial(horizon))[rest.shape[1] :]
        return torch.cat([rest, later.expand(len(rest), -1, -1)], dim=1)

    def mode(self, distribution: Distribution) -> Tensor:
        """The mean of the continuous variables, and keys as they most probably are: `(H, width)`."""
        number = distribution.number.argmax(dim=-1, keepdim=True)
        mean = distribution.mean.clamp(self.low, self.high)
        return torch.cat([mean, (distribution.press > 0.5).double(), number.double()], dim=-1)

    def sample(
        self, distribution: Distribution, count: int, generator: torch.Generator, *, noise_exponent: float = 0.0
    ) -> Tensor:
        """Decisions `(count, H, width)` within the bounds, on the CPU; drawn where the generator lives.

        The noise of continuous variables is white over the steps, or `colored_noise`.
        """
        device, (horizon, variables) = generator.device, distribution.mean.shape
        options: dict[str, Any] = dict(generator=generator, device=device, dtype=torch.float64)
        noise = colored_noise(torch.randn(count, horizon, variables, **options).cpu(), noise_exponent)
        values = (distribution.mean + noise * distribution.std).clamp(self.low, self.high)
        press = torch.rand(count, horizon, len(self.keys), **options).cpu() < distribution.press
        number = torch.multinomial(distribution.number.to(device), count, replacement=True, generator=generator)
        return torch.cat([values, press.double(), number.T[..., None].cpu().double()], dim=-1)

    def fit(self, decisions: Tensor, weights: Tensor) -> Distribution:
        """Weighted means, standard deviations and frequencies of decisions `(M, H, width)`; weights `(M,)` sum to 1."""
        variables = len(self.continuous)
        mean = torch.einsum("m,mhv->hv", weights, decisions)
        deviation = (decisions - mean)[..., :variables] ** 2
        chosen = torch.nn.functional.one_hot(decisions[..., -1].long(), NUM_SLOTS + 1).double()
        return Distribution(
            mean[:, :variables],
            torch.einsum("m,mhv->hv", weights, deviation).sqrt(),
            mean[:, variables:-1],
            torch.einsum("m,mhn->hn", weights, chosen),
        )

    # --- whole actions ----------------------------------------------------------------------------------------

    def complete(self, decisions: Tensor, *, pitch: float, slot: int | None) -> Tensor:
        """All action columns that follow from decisions.

        Args:
            decisions: `(M, H, width)`.
            pitch: degrees at the first step: a view change beyond +-90 is cut to what is left.
            slot: hotbar slot 0..8 at the first step, None where it is not known: no slot is set then, until a number
                key is pressed. A number key pressed at a step selects its slot for the next.

        Returns:
            `(M, H, 38)`, raw units, columns `ACTION_COLUMNS`.
        """
        variables, keys = len(self.continuous), len(self.keys)
        raw = decisions.new_zeros(*decisions.shape[:2], len(ACTION_COLUMNS))
        for name, value in self.fixed.items():
            if name not in CONTINUOUS_COLUMNS and name not in NUMBER_KEYS:
                raw[..., COLUMN[name]] = value
        raw[..., [COLUMN[name] for name in self.keys]] = decisions[..., variables : variables + keys]
        raw[..., [COLUMN[name] for name in self.continuous]] = decisions[..., :variables]
        for mouse, view in VIEW_OF_MOUSE.items():
            _follow_view(raw, view, pitch, by_mouse=mouse in self.continuous)
        number = decisions[..., -1].long()
        raw[..., _NUMBER_KEYS] = torch.nn.functional.one_hot(number, NUM_SLOTS + 1).double()[..., 1:]
        _follow_slots(raw, number, torch.full_like(number[:, 0], -1 if slot is None else slot))
        return raw


def colored_noise(white: Tensor, exponent: float) -> Tensor:
    """White noise `(M, H, V)` made to vary slowly over the H steps: its power falls with frequency ** -exponent.

    Each value keeps mean 0 and variance 1; steps are correlated, around the ends too (the noise is periodic in H). The
    lowest frequency stands for the mean, too. 0 changes nothing. Pinneri et al., arXiv 2008.06389, section 3.1.
    """
    horizon = white.shape[1]
    if exponent == 0 or horizon == 1 or not white.numel():
        return white
    frequencies = torch.fft.fftfreq(horizon, dtype=white.dtype).abs().clamp(min=1 / horizon)
    power = frequencies**-exponent
    gains = (power / power.mean()).sqrt()
    return torch.fft.ifft(torch.fft.fft(white, dim=1) * gains[:, None], dim=1).real


def vary_columns(actions: Tensor, chosen: Mapping[str, Tensor], *, pitch: float) -> Tensor:
    """Recorded actions with columns of the first step chosen, and what follows from them: as a player could have acted.

    Mouse movement and view change follow each other (yaw wraps; pitch stops at +-90); with a GUI open the view stands
    still and the mouse moves the cursor. A number key that is newly pressed is pressed instead of others, and selects
    its slot from the next step on. A chosen slot is held until a number key is pressed; one that is deselected gives
    way to the slot before it (the first one to the second). View and mouse of later steps stay as recorded.

    Args:
        actions: `(H, 38)`, raw.
        chosen: `{column: (M,)}`, raw units.
        pitch: degrees at the first step.

    Returns:
        `(M, H, 38)`, float64.
    """
    raw = actions.double().repeat(len(next(iter(chosen.values()))), 1, 1)
    first = raw[:, :1]
    for column, values in chosen.items():
        first[:, 0, COLUMN[column]] = values
    as_recorded = first[:, 0, COLUMN["gui_open"]] == actions[0, COLUMN["gui_open"]]
    for mouse, view in VIEW_OF_MOUSE.items():
        if mouse in chosen or view in chosen:
            _follow_view(first, view, pitch, by_mouse=mouse in chosen)
        elif not as_recorded.all():
            moved = first[~as_recorded]
            _follow_view(moved, view, pitch, by_mouse=True)
            first[~as_recorded] = moved
    if not chosen.keys().isdisjoint((*NUMBER_KEYS, *SLOTS)):
        _choose_slots(raw, actions, chosen)
    return raw


def _choose_slots(raw: Tensor, actions: Tensor, chosen: Mapping[str, Tensor]) -> None:
    """Number keys of the first step, and slots of all, made to agree with the chosen ones, in place."""
    keys, recorded = [c for c in NUMBER_KEYS if c in chosen], actions[:, _SLOTS]
    others = [COLUMN[c] for c in NUMBER_KEYS if c not in chosen]
    for key in keys:
        newly = (chosen[key] != 0) & (actions[0, COLUMN[key]] == 0)
        raw[:, 0, others] *= (~newly).to(raw)[:, None]
    slot = torch.where(recorded[0].any(), recorded[0].argmax(), -1).expand(len(raw)).clone()  # -1: none is recorded
    for column in SLOTS:
        if column in chosen:
            this = SLOTS.index(column)
            slot[chosen[column] != 0] = this
            slot[(chosen[column] == 0) & (slot == this)] = abs(this - 1)
    pressed = raw[..., _NUMBER_KEYS] != 0
    # Of several keys in a step, the one whose slot was recorded next; else the last one.
    told = pressed & (torch.cat([recorded[1:], torch.zeros_like(recorded[:1])]) != 0)
    order = torch.arange(1, NUM_SLOTS + 1) * pressed + NUM_SLOTS * told
    number = torch.where(pressed.any(dim=-1), order.argmax(dim=-1) + 1, 0)
    _follow_slots(raw, number, slot)


def _follow_view(raw: Tensor, view: str, pitch: float, *, by_mouse: bool) -> None:
    """A view change made to follow its mouse column, or the mouse the view, in raw actions `(M, H, 38)`, in place."""
    world = raw[..., COLUMN["gui_open"]] == 0
    pixels, degrees = raw[..., COLUMN[MOUSE_OF_VIEW[view]]], raw[..., COLUMN[view]]
    if by_mouse:
        degrees.copy_(pixels * DEGREES_PER_PIXEL)
    # An open GUI holds the view still; the mouse moves the cursor.
    cursor = pixels.clone() if by_mouse else degrees / DEGREES_PER_PIXEL
    degrees.masked_fill_(~world, 0)
    if view == "yaw_delta":
        degrees.copy_(wrap_degrees(degrees))
    else:
        wanted = degrees.clone()
        clamp_pitch(degrees, pitch)
        cursor = torch.where((degrees != wanted) & world, degrees / DEGREES_PER_PIXEL, cursor)
    pixels.copy_(cursor)


def _follow_slots(raw: Tensor, number: Tensor, slot: Tensor) -> None:
    """Slots of raw actions, in place: `slot` `(M,)` (-1: unknown), then what number keys `(M, H)` (0: none) choose."""
    for step in range(number.shape[1]):
        raw[:, step, _SLOTS] = torch.nn.functional.one_hot(slot + 1, NUM_SLOTS + 1)[:, 1:].to(raw)
        slot = torch.where(number[:, step] > 0, number[:, step] - 1, slot)


def _intersect(
    variable: str, limits: dict[str, list[tuple[float, float]]], statistics: Mapping | None
) -> tuple[float, float]:
    """What all limits of a variable (by column, in the variable's unit) leave of it."""
    found = [(name, *interval) for name, intervals in limits.items() for interval in intervals]
    least, most = _LIMITS.get(variable, (-math.inf, math.inf))
    if not found:
        if statistics is None:
            raise ValueError(
                f"column {variable!r} has no bounds, and there are no action statistics to take them from: give bounds "
                "or processor.set_action_statistics(...)"
            )
        at = CONTINUOUS_COLUMNS.index(variable)
        mean, reach = statistics["mean"][at], _BOUND_STD * statistics["std"][at]
        found = [(variable, mean - reach, mean + reach)]
    low, high = max(least, *(f[1] for f in found)), min(most, *(f[2] for f in found))
    if low > high:
        text = " and ".join(f"[{a:g}, {b:g}] of {name!r}" for name, a, b in found)
        raise ValueError(f"bounds do not overlap: {text}, in units of {variable!r}")
    return low, high


def clamp_pitch(changes: Tensor, pitch: float) -> None:
    """Cut pitch changes `(..., H)`, in place, to those that keep the pitch, integrated from `pitch`, in [-90, 90]."""
    current = torch.full_like(changes[..., 0], pitch)
    for step in range(changes.shape[-1]):
        reached = (current + changes[..., step]).clamp(-PITCH_SCALE, PITCH_SCALE)
        at_limit = reached != current + changes[..., step]
        changes[..., step] = torch.where(at_limit, reached - current, changes[..., step])
        current = reached


def integrate_view(state: Tensor, actions: Tensor) -> Tensor:
    """Yaw and pitch at the steps that raw actions lead to, as `VJEPA2ACProcessor.integrate_states` has them.

    It goes by the columns `yaw_delta` and `pitch_delta` of whole actions, so it does not need the action space to have
    them.

    Args:
        state: `(2,)`, degrees, at the first action's step.
        actions: `(..., H, 38)`, raw.

    Returns:
        `(..., H + 1, 2)`, degrees, float64: yaw wrapped to [-180, 180), pitch clamped to [-90, 90].
    """
    changes = actions[..., [COLUMN["yaw_delta"], COLUMN["pitch_delta"]]].double()
    start = changes.new_zeros(*changes.shape[:-2], 1, 2)  # the first state is only wrapped and clamped
    return add_view_changes(state.to(changes), torch.cat([start, changes], dim=-2))
