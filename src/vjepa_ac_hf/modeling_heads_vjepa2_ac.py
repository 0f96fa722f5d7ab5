"""Heads over the features of an action-conditioned V-JEPA 2 model: inverse dynamics, anticipation, classification.

Letters in the names of tensors, beside those of `modeling_vjepa2_ac.py`: W width of the head, G tokens along an edge of
a frame (N = G * G), P pairs of consecutive steps, h heads of the token matching, d width of one of them, F future
actions. What the heads compute: docs/applications.md. Shipped to the Hub with the models: imports the standard library,
torch, transformers and its siblings only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .actions_vjepa2_ac import CONTINUOUS_COLUMNS
from .configuration_heads_vjepa2_ac import (
    NOT_THE_HEADS,
    VJEPA2ACActionAnticipationConfig,
    VJEPA2ACActionHeadConfig,
    VJEPA2ACHeadConfig,
    VJEPA2ACInverseDynamicsConfig,
    VJEPA2ACVideoClassificationConfig,
)
from .modeling_vjepa2_ac import VJEPA2ACModel, VJEPA2ACPreTrainedModel, returns_output


@dataclass
class VJEPA2ACActionHeadOutput(ModelOutput):
    """What the heads that tell actions return. `...` is `(B, T-1)` for inverse dynamics, `(B, T, F)` for anticipation.

    Args:
        loss: `()`, sum of the losses below, float32; with labels only, as they are.
        continuous_loss: `()`, Huber loss of `continuous`.
        binary_loss: `()`, cross-entropy of `binary_logits`, pressed keys weighted by `pos_weight`.
        slot_loss: `()`, cross-entropy of `slot_logits`.
        continuous: `(..., columns)`, `config.continuous_columns`, normalised as the labels are.
        binary_logits: `(..., columns)`, `config.binary_columns`.
        slot_logits: `(..., 9)`, where the action space holds all hotbar columns.
    """

    loss: Tensor | None = None
    continuous_loss: Tensor | None = None
    binary_loss: Tensor | None = None
    slot_loss: Tensor | None = None
    continuous: Tensor | None = None
    binary_logits: Tensor | None = None
    slot_logits: Tensor | None = None


@dataclass
class VJEPA2ACVideoClassificationOutput(ModelOutput):
    """What `VJEPA2ACForVideoClassification` returns.

    Args:
        loss: `()`, cross-entropy, float32; with labels only.
        logits: `(B, classes)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


def binary_pos_weight(actions: Tensor, max_weight: float = 20.0) -> list[float]:
    """How much more a pressed key counts than one that is not, so that both weigh the same in the loss.

    Args:
        actions: `(..., columns)`, 0 or 1, of the training split.
        max_weight: weights are kept within `[1 / max_weight, max_weight]`; a column that is never pressed gets it.

    Returns:
        For each column (unpressed / pressed), clipped.

    Raises:
        ValueError: no rows, or values that are neither 0 nor 1.
    """
    rows = actions.reshape(-1, actions.shape[-1]).double()
    if not len(rows) or not bool(((rows == 0) | (rows == 1)).all()):
        raise ValueError(
            f"binary columns must hold 0 and 1 in at least one row, found {len(rows)} rows or other values"
        )
    pressed = rows.sum(dim=0)
    return ((len(rows) - pressed) / pressed).clamp(1 / max_weight, max_weight).tolist()


def check_values(fine: Tensor, message: str, found: Callable[[], str] | None = None) -> None:
    """Check values without waiting for a GPU, where the device's own assertion ends the program a little later.

    Not within compiled graphs, which what depends on data would break.

    Args:
        fine: `()`, whether they are.
        message: of the device's assertion.
        found: the error's message in full, where values are at hand; None: `message`.

    Raises:
        ValueError: they are not, on a device other than a GPU of CUDA.
    """
    if torch.compiler.is_compiling():
        return
    try:
        torch._assert_async(fine, message)
    except RuntimeError:  # on a CPU at once; or a device that has no assertions, which is waited for
        if not bool(fine):
            raise ValueError(found() if found else message) from None


def pick_columns(values: Tensor, columns: list[int]) -> Tensor:
    """`values[..., columns]`, without the list's way to the device, for which the host would wait."""
    return torch.stack([values[..., c] for c in columns], dim=-1) if columns else values[..., :0]


class VJEPA2ACHeadLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block; `causal` keeps a token from seeing later ones."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLW: Tensor, causal: bool = False) -> Tensor:
        q_BHLd, k_BHLd, v_BHLd = (
            self.qkv(self.norm1(x_BLW)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=causal)
        x_BLW = x_BLW + self.proj(attended.transpose(1, 2).flatten(2))
        return x_BLW + self.fc2(F.gelu(self.fc1(self.norm2(x_BLW))))


class VJEPA2ACAttentivePooling(nn.Module):
    """One learnt query attends to all tokens, then an MLP: the attentive probe of V-JEPA (arXiv 2404.08471)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Embedding(1, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.kv, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLW: Tensor) -> Tensor:
        """`(B, L, W)` -> `(B, W)`."""
        k_BHLd, v_BHLd = self.kv(self.norm1(x_BLW)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query_1W = self.query(torch.zeros(1, dtype=torch.long, device=x_BLW.device))
        q_BH1d = query_1W.view(1, self.num_heads, 1, -1).expand(x_BLW.shape[0], -1, -1, -1)
        pooled_BW = self.proj(F.scaled_dot_product_attention(q_BH1d, k_BHLd, v_BHLd).flatten(1))
        return pooled_BW + self.fc2(F.gelu(self.fc1(self.norm2(pooled_BW))))


class VJEPA2ACSimilarityScale(nn.Module):
    """Learnt inverse temperatures of the token matching, one a head; a module of its own, for initialisation."""

    def __init__(self, num_heads: int, start: float):
        super().__init__()
        self.start = start
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(start)))

    def forward(self) -> Tensor:
        return self.log_scale.exp().clamp(max=1000.0)


class VJEPA2ACTokenMatching(nn.Module):
    """Where did every token of a frame go, and where did every token of the next come from? A soft optical flow.

        step t tokens   --embed--> q (N, h, d) unit vectors  \\   S = q k'  (h, N, N)   softmax over its rows: forward
        step t+1 tokens --embed--> k (N, h, d) unit vectors  /                          over its columns: backward

    From each softmax and head, per token: expected displacement (dx, dy), its standard deviation, the greatest
    probability, and the greatest similarity. Camera motion moves all tokens alike, so for every head the similarities
    are also summed along each displacement (a cross-correlation of the token grids, by FFT), and the softmax over
    displacements gives the same five numbers for the frame as a whole. Both frames share one projection: a token
    and its unchanged successor have similarity 1 from the start, whatever the encoder.
    """

    FIELD_CHANNELS = 5

    def __init__(self, config: VJEPA2ACHeadConfig):
        super().__init__()
        self.num_heads, self.grid = config.head_num_attention_heads, config.grid
        self.embed = nn.Linear(config.feature_size, config.head_hidden_size, bias=False)
        self.token_scale = VJEPA2ACSimilarityScale(self.num_heads, start=20.0)
        self.frame_scale = VJEPA2ACSimilarityScale(self.num_heads, start=100.0)
        self.field_size = 2 * self.FIELD_CHANNELS * self.num_heads
        self.summary_size = (self.FIELD_CHANNELS + 4) * self.num_heads

    def forward(self, before_PND: Tensor, after_PND: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            before_PND: tokens of a step, `(P, N, D)`.
            after_PND: those of the next, in the same order.

        Returns:
            `(P, N, field_size)`: of every token place, forward and backward; lengths in quarters of a grid's side (the
            geometric mean of both).
            `(P, summary_size)`: of the frame as a whole, and the mean displacements weighted by confidence.
        """
        q_PNhd, k_PNhd = self._unit_vectors(before_PND), self._unit_vectors(after_PND)
        with torch.autocast(before_PND.device.type, enabled=False):  # angles and softmaxes of small differences
            q_PhNd, k_PhNd = q_PNhd.float().transpose(1, 2), k_PNhd.float().transpose(1, 2)
            similarity_PhNN = q_PhNd @ k_PhNd.transpose(-1, -2)
            forward_PhNc = self._displacements(similarity_PhNN)
            backward_PhNc = self._displacements(similarity_PhNN.transpose(-1, -2))
            backward_PhNc = torch.cat([-backward_PhNc[..., :2], backward_PhNc[..., 2:]], dim=-1)
            summary = [self._frame_displacement(q_PhNd, k_PhNd)]
            for field_PhNc in (forward_PhNc, backward_PhNc):
                confidence = field_PhNc[..., 3:4] / field_PhNc[..., 3:4].sum(dim=2, keepdim=True)
                summary.append((confidence * field_PhNc[..., :2]).sum(dim=2))
            fields = torch.cat([forward_PhNc, backward_PhNc], dim=-1).transpose(1, 2).flatten(2)
        return fields, torch.cat(summary, dim=-1).flatten(1)

    def _unit_vectors(self, tokens_PND: Tensor) -> Tensor:
        # What all tokens of a frame have in common says nothing about which is which.
        centred = tokens_PND - tokens_PND.mean(dim=1, keepdim=True)
        return F.normalize(self.embed(centred).unflatten(-1, (self.num_heads, -1)).float(), dim=-1)

    def _displacements(self, similarity_PhNN: Tensor) -> Tensor:
        """`(P, h, N, 5)`: of every row's token, the place where it is found less its own."""
        probability = (similarity_PhNN * self.token_scale().view(1, -1, 1, 1)).softmax(dim=-1)
        down, across = (torch.arange(side, dtype=torch.float32, device=probability.device) for side in self.grid)
        places = torch.stack([across.repeat(len(down)), down.repeat_interleave(len(across))], dim=1)
        moments = probability @ torch.cat([places, places.square()], dim=1)
        mean, square = moments.split(2, dim=-1)
        spread = (square - mean.square()).sum(dim=-1, keepdim=True).clamp(min=1e-4).sqrt()
        peaks = [probability.amax(dim=-1, keepdim=True), similarity_PhNN.amax(dim=-1, keepdim=True)]
        return torch.cat([(mean - places) / self._unit, spread / self._unit, *peaks], dim=-1)

    @property
    def _unit(self) -> float:
        """What lengths are measured in: one unit for both axes, so that a turn is as long across as down."""
        return math.sqrt(self.grid[0] * self.grid[1]) / 4

    def _frame_displacement(self, q_PhNd: Tensor, k_PhNd: Tensor) -> Tensor:
        """`(P, h, 5)`: the one displacement of the whole grid that fits best."""
        R, C = self.grid
        padded = (2 * R, 2 * C)
        spectra = [torch.fft.rfft2(m.unflatten(2, (R, C)), s=padded, dim=(2, 3)) for m in (q_PhNd, k_PhNd)]
        crossed = (spectra[0].conj() * spectra[1]).sum(dim=-1)
        sums = torch.fft.fftshift(torch.fft.irfft2(crossed, s=padded), dim=(-2, -1))[..., 1:, 1:]
        down, across = (torch.arange(1 - G, G, dtype=torch.float32, device=sums.device) for G in (R, C))
        overlap = (R - down.abs())[:, None] * (C - across.abs())
        # Displacements that leave few tokens in view are means of few: drawn towards 0.
        similarity = (sums / (overlap + R * C / 8)).flatten(-2)
        probability = (similarity * self.frame_scale().view(1, -1, 1)).softmax(dim=-1)
        places = torch.stack([across.repeat(len(down)), down.repeat_interleave(len(across))], dim=1)
        mean, square = (probability @ torch.cat([places, places.square()], dim=1)).split(2, dim=-1)
        spread = (square - mean.square()).sum(dim=-1, keepdim=True).clamp(min=1e-4).sqrt()
        peaks = [probability.amax(dim=-1, keepdim=True), similarity.amax(dim=-1, keepdim=True)]
        return torch.cat([mean / self._unit, spread / self._unit, *peaks], dim=-1)


class VJEPA2ACMotionEncoder(nn.Module):
    """Two consecutive steps -> one vector: token matching beside the tokens, transformer layers, attentive pooling."""

    def __init__(self, config: VJEPA2ACHeadConfig):
        super().__init__()
        width, heads = config.head_hidden_size, config.head_num_attention_heads
        self.matching = VJEPA2ACTokenMatching(config)
        self.embed_tokens = nn.Linear(2 * config.feature_size, width)
        self.embed_field = nn.Linear(self.matching.field_size, width)
        self.embed_place = nn.Embedding(config.num_tokens, width)
        self.layers = nn.ModuleList([VJEPA2ACHeadLayer(width, heads) for _ in range(config.head_num_hidden_layers)])
        self.pooling = VJEPA2ACAttentivePooling(width, heads)
        self.norm = nn.LayerNorm(width)
        self.output_size = width + self.matching.summary_size

    def forward(self, before_PND: Tensor, after_PND: Tensor) -> Tensor:
        """`(P, N, D)` twice -> `(P, output_size)`, the matching's own summary at the end of it."""
        field_PNc, summary_PC = self.matching(before_PND, after_PND)
        dtype = self.norm.weight.dtype
        x_PNW = self.embed_tokens(torch.cat([before_PND, after_PND], dim=-1)) + self.embed_field(field_PNc.to(dtype))
        x_PNW = x_PNW + self.embed_place(torch.arange(x_PNW.shape[1], device=x_PNW.device))
        for layer in self.layers:
            x_PNW = layer(x_PNW)
        return torch.cat([self.norm(self.pooling(x_PNW)), summary_PC.to(dtype)], dim=-1)


class VJEPA2ACHeadPreTrainedModel(VJEPA2ACPreTrainedModel):
    """A world model `vjepa2_ac` and a `head` over its features.

    `from_pretrained` takes a saved head, or a saved `VJEPA2ACModel` (the head is then new); `from_world_model` one in
    memory. The world model's predictor is kept only where features come from it.
    """

    config_class = VJEPA2ACHeadConfig
    _keys_to_ignore_on_load_unexpected = [r"predictor\."]
    _no_split_modules = [
        *VJEPA2ACPreTrainedModel._no_split_modules,
        "VJEPA2ACInverseDynamicsHead",
        "VJEPA2ACActionAnticipationHead",
        "VJEPA2ACVideoClassificationHead",
    ]

    def __init__(self, config: VJEPA2ACHeadConfig):
        config.check()
        super().__init__(config)
        self.vjepa2_ac = VJEPA2ACModel(config)
        if config.features_from == "encoder":
            self.vjepa2_ac.predictor = None  # type: ignore[assignment]
        self.head = self._make_head(config)
        for module in self.head.modules():
            if isinstance(module, nn.Linear):  # variance kept from layer to layer: heads are shallow and narrow
                module.init_divisor = config.initializer_range * module.in_features**0.5
        self.post_init()
        self.freeze()

    def _make_head(self, config: Any) -> nn.Module:
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VJEPA2ACSimilarityScale):
            init.constant_(module.log_scale, math.log(module.start))

    def freeze(self) -> None:
        """Freeze the world model, or make it trainable, as the configuration says."""
        self.vjepa2_ac.requires_grad_(not self.config.freeze_encoder).encoder.train(self.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the world model comes out frozen where the configuration says so."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze()
        return loaded

    @classmethod
    def from_world_model(cls, world_model: VJEPA2ACModel, **config_kwargs: Any) -> Any:
        """A new head over a world model in memory, whose encoder (and predictor, where used) it shares.

        Args:
            world_model: a `VJEPA2ACModel`.
            config_kwargs: the head's own fields, or `action_space` where the head's is another one than the model's.
        """
        values = {k: v for k, v in world_model.config.to_dict().items() if k not in NOT_THE_HEADS} | config_kwargs
        if "action_space" in config_kwargs:
            values.pop("action_dim")
        # The encoder is shared, and so is its configuration, which it reads its attention from.
        encoder_config = values["encoder_config"] = world_model.config.encoder_config
        values["attn_implementation"] = {
            "": world_model.config._attn_implementation,
            "encoder_config": encoder_config._attn_implementation,
        }
        config = cls.config_class(**values)
        if config.features_from == "predictor" and config.action_dim != world_model.config.action_dim:
            raise ValueError(
                f"features_from 'predictor' needs the world model's action_dim {world_model.config.action_dim}, the "
                f"head's action space has {config.action_dim} columns"
            )
        with torch.device("meta"):
            model = cls(config)
        model.vjepa2_ac.encoder = world_model.encoder
        if config.features_from == "predictor":
            model.vjepa2_ac.predictor = world_model.predictor
        model.head.to_empty(device=world_model.device)
        model.head.apply(model._init_weights)
        model.freeze()
        return model

    def read_features(self, pixel_values_videos: Tensor | None, features: Tensor | None, min_steps: int) -> Tensor:
        """Features `(B, T, N, D)` that the head reads, in the type of its weights.

        Raises:
            ValueError: both or none given, shapes that are not the model's, or less than `min_steps` steps.
        """
        if (pixel_values_videos is None) == (features is None):
            raise ValueError("give either pixel_values_videos or features, and not both")
        config, world = self.config, self.vjepa2_ac
        tubelet = config.encoder_config.tubelet_size
        if pixel_values_videos is not None:
            frames = pixel_values_videos.shape[1] if pixel_values_videos.ndim == 5 else tubelet * min_steps
            if frames < tubelet * min_steps:
                raise ValueError(
                    f"a clip must have at least {tubelet * min_steps} frames ({min_steps} tubelets of {tubelet}), "
                    f"found {frames}"
                )
            features = world.encode(pixel_values_videos)
        assert features is not None
        expected = (config.num_tokens, config.feature_size)
        if features.ndim != 4 or tuple(features.shape[2:]) != expected:
            raise ValueError(
                f"features must be (batch, steps, {expected[0]}, {expected[1]}), found {tuple(features.shape)}"
            )
        steps = features.shape[1]
        if not min_steps <= steps <= config.num_steps:
            raise ValueError(f"features must have {min_steps} to {config.num_steps} steps, found {steps}")
        if config.features_from == "predictor":
            with torch.set_grad_enabled(torch.is_grad_enabled() and not config.freeze_encoder):
                # Recorded actions and states would tell the answer: zeros stand for the mean turn and no key.
                unknown = [
                    features.new_zeros(features.shape[0], steps, n) for n in (config.action_dim, config.state_dim)
                ]
                features = world.predict(features, *unknown)
        return features.to(next(m for m in self.head.modules() if isinstance(m, nn.LayerNorm)).weight.dtype)


class VJEPA2ACActionHeadPreTrainedModel(VJEPA2ACHeadPreTrainedModel):
    """What inverse dynamics and anticipation share: kinds of columns, losses, decoding."""

    config_class = VJEPA2ACActionHeadConfig

    @property
    def _columns(self) -> tuple[list[int], list[int], list[int]]:
        """Places in the action space of continuous, binary and slot columns."""
        config = self.config
        kinds = (config.continuous_columns, config.binary_columns, config.slot_columns)
        return tuple([config.action_space.index(c) for c in kind] for kind in kinds)  # type: ignore[return-value]

    def _output(
        self, values: Tensor, labels: Tensor | None, at: list[tuple[int, int]] | None = None
    ) -> VJEPA2ACActionHeadOutput:
        """Numbers `(..., A)` of the head, continuous, then keys, then slots, with their losses where there are labels.

        Labels `(B, len(at), A)` are given for the predictions `[:, t, j]` of the pairs in `at`; None: for all.
        """

        def told(predictions: Tensor) -> Tensor:
            chosen = predictions if at is None else torch.stack([predictions[:, t, j] for t, j in at], dim=1)
            return chosen.float()

        columns = self._columns
        continuous, binary, slot = (p if p.shape[-1] else None for p in values.split([len(c) for c in columns], dim=-1))
        losses: list[Tensor | None] = [None, None, None]
        if labels is not None:
            true = [pick_columns(labels, c).to(values.device) for c in columns]
            if continuous is not None:
                losses[0] = F.smooth_l1_loss(told(continuous), true[0])
            if binary is not None:
                logits, weights = told(binary), self.config.pos_weight
                weight = None if weights is None else torch.stack([logits.new_full((), w) for w in weights])
                losses[1] = F.binary_cross_entropy_with_logits(logits, true[1], pos_weight=weight)
            if slot is not None:
                # Actions without a slot (recorders before 6.11 log none) have no label: they count for nothing.
                known, logits = true[2].any(dim=-1).flatten(), told(slot).flatten(0, -2)
                target = torch.where(known, true[2].argmax(dim=-1).flatten(), -100)
                summed = F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
                losses[2] = summed / known.sum().clamp(min=1)
        loss = None if labels is None else torch.stack([one for one in losses if one is not None]).sum()
        return VJEPA2ACActionHeadOutput(loss, losses[0], losses[1], losses[2], continuous, binary, slot)

    def _check_actions(self, name: str, actions: Tensor, batch: int, steps: int) -> Tensor:
        """Actions as float32 after a check of shape and values."""
        config = self.config
        if tuple(actions.shape) != (batch, steps, config.action_dim):
            raise ValueError(
                f"{name} must be (batch {batch}, {steps} actions, {config.action_dim} columns of {config.action_space}"
                f"), found {tuple(actions.shape)}"
            )
        actions = actions.float()
        _, binary, slot = self._columns
        discrete = pick_columns(actions, binary + slot)
        column_fine = actions.isfinite().flatten(0, 1).all(dim=0)
        discrete_fine = ((discrete == 0) | (discrete == 1)).flatten(0, 1).all(dim=0)
        slots_fine = (discrete[..., len(binary) :].sum(dim=-1) <= 1).all()  # none: not known

        def found() -> str:
            column_fine[binary + slot] &= discrete_fine
            column_fine[slot] &= slots_fine
            names = [c for c, fine in zip(config.action_space, column_fine.tolist(), strict=True) if not fine]
            return (
                f"{name}: columns {names} hold values that are not finite, keys that are neither 0 nor 1, or more than "
                "one hotbar slot"
            )

        check_values(column_fine.all() & discrete_fine.all() & slots_fine, f"{name}: actions out of range", found)
        return actions

    def normalized_actions(self, output: VJEPA2ACActionHeadOutput) -> Tensor:
        """The actions that an output tells, `(..., A)` in the order of the action space, as a world model takes them.

        Continuous columns are as predicted; keys are 1 where their logit is above its threshold (`key_thresholds`); the
        slot is the likeliest one.
        """
        continuous, binary, slot = self._columns
        some = next(p for p in (output.continuous, output.binary_logits, output.slot_logits) if p is not None)
        actions = torch.zeros(*some.shape[:-1], self.config.action_dim, device=some.device)
        if output.continuous is not None:
            actions[..., continuous] = output.continuous.float()
        if output.binary_logits is not None:
            logits = output.binary_logits.float()
            thresholds = self.config.key_thresholds
            actions[..., binary] = (logits > (0 if thresholds is None else logits.new_tensor(thresholds))).float()
        if output.slot_logits is not None:
            actions[..., slot] = F.one_hot(output.slot_logits.argmax(dim=-1), len(slot)).float()
        return actions

    def decode_actions(self, output: VJEPA2ACActionHeadOutput) -> dict[str, Tensor]:
        """The actions that an output tells, in raw units, by column name; each of shape `...`.

        Returns:
            Mouse in pixels, yaw and pitch changes in degrees (float64), keys as booleans, and, where the action space
            holds the hotbar, `hotbar`: the slot 0 .. 8.

        Raises:
            ValueError: the configuration has no `action_statistics`, and there are columns to scale.
        """
        config, actions = self.config, self.normalized_actions(output).double()
        statistics = config.action_statistics
        decoded: dict[str, Tensor] = {}
        for at, column in enumerate(config.action_space):
            values = actions[..., at]
            if column in CONTINUOUS_COLUMNS:
                if statistics is None:
                    raise ValueError(
                        f"column {column!r} has no raw units: config.action_statistics is None; set it to "
                        "the processor's"
                    )
                i = CONTINUOUS_COLUMNS.index(column)
                decoded[column] = values * (statistics["std"][i] or 1.0) + statistics["mean"][i]
            elif column in config.binary_columns:
                decoded[column] = values > 0.5
        if config.slot_columns:
            slots = [int(c.removeprefix("hotbar.")) for c in config.action_space if c in config.slot_columns]
            assert output.slot_logits is not None
            decoded["hotbar"] = torch.tensor(slots, device=actions.device)[output.slot_logits.argmax(dim=-1)]
        return decoded


class VJEPA2ACInverseDynamicsHead(nn.Module):
    """Motion of two steps -> numbers of one action; the matching's summary also has a straight way out."""

    def __init__(self, config: VJEPA2ACInverseDynamicsConfig):
        super().__init__()
        assert config.action_dim is not None
        self.motion = VJEPA2ACMotionEncoder(config)
        self.fc1 = nn.Linear(self.motion.output_size, 2 * config.head_hidden_size)
        self.fc2 = nn.Linear(2 * config.head_hidden_size, config.action_dim)
        self.direct = nn.Linear(self.motion.matching.summary_size, config.action_dim, bias=False)

    def forward(self, features_BTND: Tensor) -> Tensor:
        """`(B, T, N, D)` -> `(B, T-1, A)`."""
        pairs = [f.flatten(0, 1) for f in (features_BTND[:, :-1], features_BTND[:, 1:])]
        motion_PM = self.motion(*pairs)
        summary_PC = motion_PM[:, -self.motion.matching.summary_size :]
        values = self.fc2(F.gelu(self.fc1(motion_PM))) + self.direct(summary_PC)
        return values.unflatten(0, (-1, features_BTND.shape[1] - 1))


class VJEPA2ACForInverseDynamics(VJEPA2ACActionHeadPreTrainedModel):
    """Which action led from each step to the next? (As VPT's inverse dynamics model, arXiv 2206.11795, over features.)

    `forward(features)` `(B, T, N, D)` tells T-1 actions: action k covers the ticks from the start of tubelet k to that
    of tubelet k+1, so its first half is seen within tubelet k, too.
    """

    config_class = VJEPA2ACInverseDynamicsConfig

    def _make_head(self, config: VJEPA2ACInverseDynamicsConfig) -> nn.Module:
        return VJEPA2ACInverseDynamicsHead(config)

    @returns_output
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> VJEPA2ACActionHeadOutput:
        """
        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels, at least two tubelets; or
            features: `(B, T, N, D)` of `VJEPA2ACModel.encode`, instead.
            labels: `(B, T-1, A)`, the actions as `VJEPA2ACProcessor` normalises them; with them comes the loss.
        """
        features = self.read_features(pixel_values_videos, features, min_steps=2)
        values = self.head(features)
        if labels is not None:
            labels = self._check_actions("labels", labels, features.shape[0], features.shape[1] - 1)
        return self._output(values, labels)


class VJEPA2ACActionAnticipationHead(nn.Module):
    """Steps up to t -> the F actions from t on, for every t: a token a step, causal transformer layers.

    step 0          step 1          step 2
    [look(0)]       [look(1)]       [look(2)]        attentive pooling of the step's tokens
    [start]         [motion(0,1)]   [motion(1,2)]    how the picture has moved since the step before
    [no action]     [action 0]      [action 1]       if told: the last action that is over
    [state 0]       [state 1]       [state 2]        if told
    = token 0       = token 1       = token 2   -->  a_t .. a_{t+F-1} for each
    """

    def __init__(self, config: VJEPA2ACActionAnticipationConfig):
        super().__init__()
        assert config.action_dim is not None
        width, heads = config.head_hidden_size, config.head_num_attention_heads
        self.action_shape = (config.anticipation_steps, config.action_dim)
        self.embed = nn.Linear(config.feature_size, width)
        self.look = VJEPA2ACAttentivePooling(width, heads)
        self.motion = VJEPA2ACMotionEncoder(config)
        self.embed_motion = nn.Linear(self.motion.output_size, width)
        self.embed_step = nn.Embedding(config.num_steps, width)
        self.embed_action = nn.Linear(config.action_dim, width) if config.use_past_actions else None
        self.embed_state = nn.Linear(config.state_dim, width) if config.use_states else None
        self.layers = nn.ModuleList([VJEPA2ACHeadLayer(width, heads) for _ in range(config.head_num_hidden_layers)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.anticipation_steps * config.action_dim)

    def forward(self, features_BTND: Tensor, actions_BTA: Tensor | None, states_BTS: Tensor | None) -> Tensor:
        """Features, actions and states of T steps -> `(B, T, F, A)`; at t, actions before t alone are used."""
        B, T = features_BTND.shape[:2]
        x_BTW = self.look(self.embed(features_BTND.flatten(0, 1))).unflatten(0, (B, T))
        x_BTW = x_BTW + self.embed_step(torch.arange(T, device=x_BTW.device))
        if T > 1:
            pairs = [f.flatten(0, 1) for f in (features_BTND[:, :-1], features_BTND[:, 1:])]
            motion_BTW = self.embed_motion(self.motion(*pairs)).unflatten(0, (B, T - 1))
            x_BTW = x_BTW + F.pad(motion_BTW, (0, 0, 1, 0))
            if self.embed_action is not None:
                assert actions_BTA is not None
                x_BTW = x_BTW + F.pad(self.embed_action(actions_BTA[:, : T - 1].to(x_BTW.dtype)), (0, 0, 1, 0))
        if self.embed_state is not None:
            assert states_BTS is not None
            x_BTW = x_BTW + self.embed_state(states_BTS[:, :T].to(x_BTW.dtype))
        for layer in self.layers:
            x_BTW = layer(x_BTW, causal=True)
        return self.out(self.norm(x_BTW)).unflatten(-1, self.action_shape)


class VJEPA2ACForActionAnticipation(VJEPA2ACActionHeadPreTrainedModel):
    """Which actions come next? At every step t of a clip, from the steps 0 .. t alone: actions t .. t+F-1.

    Action t has begun when tubelet t is seen (it covers the ticks from the start of tubelet t to that of tubelet t+1):
    the first of the F actions is half over, the second is the first that lies wholly ahead.
    """

    config_class = VJEPA2ACActionAnticipationConfig

    def __init__(self, config: VJEPA2ACActionAnticipationConfig):
        if config.encoding != "tubelet":
            raise ValueError(
                f"anticipation needs encoding 'tubelet', found {config.encoding!r}: features of a whole clip have seen "
                "the future"
            )
        super().__init__(config)

    def _make_head(self, config: VJEPA2ACActionAnticipationConfig) -> nn.Module:
        return VJEPA2ACActionAnticipationHead(config)

    @returns_output
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        features: Tensor | None = None,
        actions: Tensor | None = None,
        states: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> VJEPA2ACActionHeadOutput:
        """
        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels; or
            features: `(B, T, N, D)` of `VJEPA2ACModel.encode`, instead.
            actions: `(B, T-1, A)`, past actions, normalised, with `use_past_actions`; step t is told those before t.
            states: `(B, T, S)`, normalised, with `use_states`.
            labels: `(B, T-1, A)`, all actions of the clip, normalised; with them comes the loss, over the actions that
                lie within the clip.

        Returns:
            Predictions `(B, T, F, ...)`: at `[:, t, j]` those of action t + j.
        """
        config = self.config
        features = self.read_features(pixel_values_videos, features, min_steps=1)
        B, T = features.shape[:2]
        if config.use_past_actions:
            if actions is None:
                raise ValueError("use_past_actions is set, but no actions are given")
            actions = self._check_actions("actions", actions, B, T - 1)
        if config.use_states and (states is None or tuple(states.shape) != (B, T, config.state_dim)):
            found = None if states is None else tuple(states.shape)
            raise ValueError(f"use_states is set: states must be ({B}, {T}, {config.state_dim}), found {found}")
        values = self.head(features, actions, states)
        if labels is None:
            return self._output(values, None)
        if T < 2:
            raise ValueError(f"labels need a clip of at least 2 tubelets, found {T}")
        labels = self._check_actions("labels", labels, B, T - 1)
        # Places, not a mask: how many there are follows from the shapes alone, which compilers need.
        told = [(t, j) for t in range(T) for j in range(config.anticipation_steps) if t + j < T - 1]
        return self._output(values, torch.stack([labels[:, t + j] for t, j in told], dim=1), told)

    def targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `(B, T-1, A)` of a clip as what each step is to tell, `(B, T, F, A)`, and which of them lie in the
        clip, `(T, F)`."""
        T = labels.shape[1] + 1
        steps = torch.arange(T, device=labels.device)
        at = steps[:, None] + torch.arange(self.config.anticipation_steps, device=labels.device)
        return labels[:, at.clamp(max=T - 2)], at < T - 1


class VJEPA2ACVideoClassificationHead(nn.Module):
    """Attentive probe over the tokens of all steps, each told its step (tubelets are encoded one by one)."""

    def __init__(self, config: VJEPA2ACVideoClassificationConfig):
        super().__init__()
        width, heads = config.head_hidden_size, config.head_num_attention_heads
        self.embed = nn.Linear(config.feature_size, width)
        self.embed_step = nn.Embedding(config.num_steps, width)
        self.layers = nn.ModuleList([VJEPA2ACHeadLayer(width, heads) for _ in range(config.head_num_hidden_layers)])
        self.pooling = VJEPA2ACAttentivePooling(width, heads)
        self.norm = nn.LayerNorm(width)
        assert config.num_labels is not None
        self.out = nn.Linear(width, config.num_labels)

    def forward(self, features_BTND: Tensor) -> Tensor:
        """`(B, T, N, D)` -> `(B, classes)`."""
        step_TW = self.embed_step(torch.arange(features_BTND.shape[1], device=features_BTND.device))
        x_BTNW = self.embed(features_BTND) + step_TW[:, None]
        x_BLW = x_BTNW.flatten(1, 2)
        for layer in self.layers:
            x_BLW = layer(x_BLW)
        return self.out(self.norm(self.pooling(x_BLW)))


class VJEPA2ACForVideoClassification(VJEPA2ACHeadPreTrainedModel):
    """Clip -> one label, or several, by an attentive probe as V-JEPA's (arXiv 2404.08471, 2506.09985)."""

    config_class = VJEPA2ACVideoClassificationConfig

    def _make_head(self, config: VJEPA2ACVideoClassificationConfig) -> nn.Module:
        return VJEPA2ACVideoClassificationHead(config)

    @returns_output
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> VJEPA2ACVideoClassificationOutput:
        """
        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels; or
            features: `(B, T, N, D)` of `VJEPA2ACModel.encode`, instead.
            labels: `(B,)` int64, the class of each clip; or `(B, classes)`, 0 and 1, for several labels a clip.
        """
        features = self.read_features(pixel_values_videos, features, min_steps=1)
        logits = self.head(features)
        loss = None if labels is None else self._loss(logits.float(), labels)
        return VJEPA2ACVideoClassificationOutput(loss, logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        names: dict[Any, Any] = {**(self.config.id2label or {})}
        classes, kind = len(names), self.config.problem_type
        if kind is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if not torch.compiler.is_compiling():
            self.config.problem_type = kind
        labels = labels.to(logits.device)
        if kind == "multi_label_classification":
            if labels.shape != logits.shape:
                raise ValueError(
                    f"for several labels a clip, labels must be {tuple(logits.shape)} (batch, classes), found "
                    f"{tuple(labels.shape)}"
                )
            labels = labels.float()
            message = "labels must be 0 or 1, found values that are not finite or between them"
            check_values(((labels == 0) | (labels == 1)).all(), message)
            return F.binary_cross_entropy_with_logits(logits, labels)
        if kind != "single_label_classification":
            raise ValueError(f"problem_type must be single_label_ or multi_label_classification, found {kind!r}")
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"for one label a clip, labels must be whole numbers ({logits.shape[0]},), found {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        check_values(
            ((labels >= 0) & (labels < classes)).all(),
            f"labels must be classes 0 to {classes - 1}",
            lambda: (
                f"labels reach from {labels.min().item()} to {labels.max().item()}, the label map has the {classes} "
                f"classes 0 to {classes - 1}: {names}"
            ),
        )
        return F.cross_entropy(logits, labels)


VJEPA2ACForInverseDynamics.register_for_auto_class("AutoModel")
VJEPA2ACForActionAnticipation.register_for_auto_class("AutoModel")
VJEPA2ACForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")

__all__ = [
    "VJEPA2ACActionHeadOutput",
    "VJEPA2ACForActionAnticipation",
    "VJEPA2ACForInverseDynamics",
    "VJEPA2ACForVideoClassification",
    "VJEPA2ACVideoClassificationOutput",
    "binary_pos_weight",
]
