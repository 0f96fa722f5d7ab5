"""Action-conditioned V-JEPA 2 (V-JEPA 2-AC, arXiv 2506.09985, section 3): frozen encoder, frame-causal predictor.

Letters in the names of tensors: B batch, T tubelet steps, C context steps, N frame tokens a step, K = N + 2 tokens a
step with action and state, L sequence (steps x K), D encoder width, E predictor width, H heads, A action columns,
S state columns. Equations: docs/model.md. Shipped to the Hub with the model: imports the standard library, torch,
transformers and its siblings only.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, VJEPA2Config, VJEPA2Model
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Encoder
from transformers.utils import ModelOutput

from .configuration_vjepa2_ac import VJEPA2ACConfig

KeyValues = tuple[Tensor, Tensor]
CONDITIONING_TOKENS = 2  # the action token and the state token in front of every step's frame tokens


@dataclass
class VJEPA2ACOutput(ModelOutput):
    """What `VJEPA2ACModel` returns.

    Args:
        loss: `()`, sum of both losses, float32.
        teacher_forcing_loss: `()`, mean distance of `predicted_features` to the true next features.
        rollout_loss: `()`, mean distance of `rollout_features` to the true features of steps 1..auto_steps.
        predicted_features: `(B, T-1, N, D)`, at t the prediction of step t+1 from the true steps 0..t.
        rollout_features: `(B, auto_steps, N, D)`, predictions of steps 1..auto_steps from step 0 alone.
        target_features: `(B, T, N, D)`, the encoder's features, detached.
    """

    loss: Tensor | None = None
    teacher_forcing_loss: Tensor | None = None
    rollout_loss: Tensor | None = None
    predicted_features: Tensor | None = None
    rollout_features: Tensor | None = None
    target_features: Tensor | None = None


class VJEPA2ACRotaryEmbedding(nn.Module):
    """Cosine and sine tables for the three axes time, height and width, as V-JEPA 2 defines them.

    Each axis owns `d = 2 * ((head_dim // 3) // 2)` dimensions with frequencies `10000 ** (-i / (d / 2))`; dimensions
    left over are not rotated. V-JEPA 2 repeats the d/2 angles as `[f, f]` while it rotates the pairs (0, 1), (2, 3),
    ..., so the two members of a pair turn by different angles. It looks like a slip, but released weights were
    trained with it: keep it. Action and state tokens are rotated on the time axis only.
    """

    def __init__(self, config: VJEPA2ACConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.head_dim = config.pred_hidden_size // config.pred_num_attention_heads
        self._tables: dict[torch.device, KeyValues] = {}

    def forward(self, first_step: int, num_steps: int, device: torch.device) -> KeyValues:
        """Tables `(L, head_dim)` in float32 for the steps from `first_step` on, made once a device."""
        tokens_per_step = self.grid_size**2 + CONDITIONING_TOKENS
        last = (first_step + num_steps) * tokens_per_step
        tables = self._tables.get(device)
        if tables is None or len(tables[0]) < last:
            # Made under inference mode they could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                tables = self._tables[device] = self._build(first_step + num_steps, device)
        return tables[0][first_step * tokens_per_step : last], tables[1][first_step * tokens_per_step : last]

    def _build(self, num_steps: int, device: torch.device) -> KeyValues:
        axis_dim = 2 * ((self.head_dim // 3) // 2)
        half = torch.arange(axis_dim // 2, dtype=torch.float32, device=device)
        frequencies = (10000.0 ** -(half / (axis_dim / 2))).repeat(2)

        steps = torch.arange(num_steps, dtype=torch.float32, device=device)
        edge = torch.arange(self.grid_size, dtype=torch.float32, device=device)
        unrotated = edge.new_zeros(CONDITIONING_TOKENS)
        rows = torch.cat([unrotated, edge.repeat_interleave(self.grid_size)])
        columns = torch.cat([unrotated, edge.repeat(self.grid_size)])
        positions = torch.stack(
            [steps.repeat_interleave(len(rows)), rows.repeat(num_steps), columns.repeat(num_steps)], dim=1
        )  # (L, 3)
        angles = (positions[:, :, None] * frequencies).flatten(1)
        angles = F.pad(angles, (0, self.head_dim - angles.shape[1]))
        return angles.cos(), angles.sin()


def rotate(x_BHLd: Tensor, cos_Ld: Tensor, sin_Ld: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension; angles in float32, result in the input's type."""
    even, odd = x_BHLd.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x_BHLd * cos_Ld.to(x_BHLd.dtype) + turned * sin_Ld.to(x_BHLd.dtype)


def frame_causal_attention(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, tokens_per_step: int) -> Tensor:
    """Attention in which the tokens of a step see all tokens of that step and of every earlier one.

    The queries are those of the last `L_q / tokens_per_step` steps of the keys. One unmasked attention a step: it
    equals a block-triangular mask, computes only the blocks that count (half of them in a long clip) and stores no
    mask over the clip.
    """
    past = k_BHLd.shape[2] - q_BHLd.shape[2]
    steps = []
    for start in range(0, q_BHLd.shape[2], tokens_per_step):
        stop = start + tokens_per_step
        seen = past + stop
        steps.append(
            F.scaled_dot_product_attention(
                q_BHLd[:, :, start:stop], k_BHLd[:, :, :seen], v_BHLd[:, :, :seen], dropout_p=0.0
            )
        )
    return steps[0] if len(steps) == 1 else torch.cat(steps, dim=2)


class VJEPA2ACAttention(nn.Module):
    """Frame-causal self-attention with rotary embeddings, over new tokens and the keys and values of past steps."""

    def __init__(self, config: VJEPA2ACConfig):
        super().__init__()
        self.num_heads = config.pred_num_attention_heads
        self.tokens_per_step = config.grid_size**2 + CONDITIONING_TOKENS
        self.qkv = nn.Linear(config.pred_hidden_size, 3 * config.pred_hidden_size)
        self.proj = nn.Linear(config.pred_hidden_size, config.pred_hidden_size)

    def forward(
        self, x_BLE: Tensor, cos_Ld: Tensor, sin_Ld: Tensor, past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        q_BHLd, k_BHLd, v_BHLd = self.qkv(x_BLE).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHLd, k_BHLd = rotate(q_BHLd, cos_Ld, sin_Ld), rotate(k_BHLd, cos_Ld, sin_Ld)
        if past is not None:
            k_BHLd = torch.cat([past[0], k_BHLd], dim=2)
            v_BHLd = torch.cat([past[1], v_BHLd], dim=2)
        out_BHLd = frame_causal_attention(q_BHLd, k_BHLd, v_BHLd, self.tokens_per_step)
        return self.proj(out_BHLd.transpose(1, 2).flatten(2)), (k_BHLd, v_BHLd)


class VJEPA2ACMLP(nn.Module):
    def __init__(self, config: VJEPA2ACConfig):
        super().__init__()
        inner = int(config.pred_hidden_size * config.pred_mlp_ratio)
        self.fc1 = nn.Linear(config.pred_hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.pred_hidden_size)

    def forward(self, x_BLE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLE)))


class VJEPA2ACLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block. Returns its output and the keys and values of all steps seen so far."""

    def __init__(self, config: VJEPA2ACConfig, layer_index: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.pred_hidden_size, eps=config.layer_norm_eps)
        self.attention = VJEPA2ACAttention(config)
        self.norm2 = nn.LayerNorm(config.pred_hidden_size, eps=config.layer_norm_eps)
        self.mlp = VJEPA2ACMLP(config)
        # Read where weights are initialised, at the leaves: transformers skips containers of custom models there.
        for projection in (self.attention.proj, self.mlp.fc2):
            projection.init_divisor = (2 * layer_index) ** 0.5

    def forward(
        self, x_BLE: Tensor, cos_Ld: Tensor, sin_Ld: Tensor, past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        attended_BLE, present = self.attention(self.norm1(x_BLE), cos_Ld, sin_Ld, past)
        x_BLE = x_BLE + attended_BLE
        return x_BLE + self.mlp(self.norm2(x_BLE)), present


class VJEPA2ACEncoder(VJEPA2Encoder):
    """The V-JEPA 2 encoder of transformers, frozen: without gradients, and in eval mode whatever `train()` says."""

    def __init__(self, config: VJEPA2Config):
        super().__init__(config)
        self.freeze()

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VJEPA2ACEncoder":
        return super().train(False)


class VJEPA2ACPredictor(nn.Module):
    """Predicts the features of step t+1 from features, actions and states of steps <= t.

    Token layout, K = N + 2 tokens a step; a token sees its own step and all earlier ones:

        step 0                     step 1                     step 2
        [action][state][N frame]   [action][state][N frame]   [action][state][N frame]  ...
                        |                          |                          |
                    features of 1              features of 2              features of 3
    """

    def __init__(self, config: VJEPA2ACConfig):
        super().__init__()
        assert config.action_dim is not None
        feature_dim, width = config.encoder_config.hidden_size, config.pred_hidden_size
        self.frame_embed = nn.Linear(feature_dim, width)
        self.action_embed = nn.Linear(config.action_dim, width)
        self.state_embed = nn.Linear(config.state_dim, width)
        self.rotary = VJEPA2ACRotaryEmbedding(config)
        self.layers = nn.ModuleList([VJEPA2ACLayer(config, i + 1) for i in range(config.pred_num_hidden_layers)])
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, feature_dim)

    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        states: Tensor,
        past_key_values: list[KeyValues] | None = None,
        first_step: int = 0,
    ) -> tuple[Tensor, list[KeyValues]]:
        """
        Args:
            features: `(B, T, N, D)` of steps `first_step .. first_step + T - 1`.
            actions: `(B, T, A)`, action t leads from step t to t+1.
            states: `(B, T, S)`.
            past_key_values: keys and values `(B, H, first_step * K, head_dim)` of the earlier steps, one pair a layer.
            first_step: how many steps `past_key_values` hold.

        Returns:
            Predictions `(B, T, N, D)`, not normalised, and the keys and values of all steps up to here.
        """
        T, N = features.shape[1:3]
        dtype = self.frame_embed.weight.dtype
        x_BTNE = self.frame_embed(features.to(dtype))
        a_BT1E = self.action_embed(actions.to(dtype)).unsqueeze(2)
        s_BT1E = self.state_embed(states.to(dtype)).unsqueeze(2)
        x_BLE = torch.cat([a_BT1E, s_BT1E, x_BTNE], dim=2).flatten(1, 2)
        cos_Ld, sin_Ld = self.rotary(first_step, T, x_BLE.device)

        presents = []
        for i, layer in enumerate(self.layers):
            x_BLE, present = layer(x_BLE, cos_Ld, sin_Ld, None if past_key_values is None else past_key_values[i])
            presents.append(present)
        x_BTNE = x_BLE.unflatten(1, (T, N + CONDITIONING_TOKENS))[:, :, CONDITIONING_TOKENS:]
        return self.head(self.norm(x_BTNE)), presents


class VJEPA2ACPreTrainedModel(PreTrainedModel):
    config_class = VJEPA2ACConfig
    base_model_prefix = "vjepa2_ac"
    main_input_name = "pixel_values_videos"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VJEPA2ACLayer", "VJEPA2Layer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            init.trunc_normal_(module.weight, std=std / getattr(module, "init_divisor", 1.0))


class VJEPA2ACModel(VJEPA2ACPreTrainedModel):
    """Frozen V-JEPA 2 encoder and trainable action-conditioned predictor: `encode`, `predict`, `rollout`, both losses.

    Source: V-JEPA 2, arXiv 2506.09985, section 3. Pixels, actions and states come from `VJEPA2ACProcessor`.
    """

    def __init__(self, config: VJEPA2ACConfig):
        super().__init__(config)
        # The encoder is a plain module of a sub-configuration: it would fall back to eager attention by itself.
        config.encoder_config._attn_implementation = config._attn_implementation
        self.encoder = VJEPA2ACEncoder(config.encoder_config)
        self.predictor = VJEPA2ACPredictor(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the encoder comes out frozen (loading replaces parameters by trainable ones)."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.encoder.freeze()
        return loaded

    @classmethod
    def from_pretrained_encoder(
        cls,
        encoder_name_or_path: str | os.PathLike,
        config: VJEPA2ACConfig | None = None,
        **config_kwargs: Any,
    ) -> "VJEPA2ACModel":
        """A model with a pretrained V-JEPA 2 encoder (a repository or folder of transformers) and a new predictor.

        Args:
            encoder_name_or_path: for instance `facebook/vjepa2-vitl-fpc64-256`.
            config: the predictor's sizes; its `encoder_config` is replaced by the pretrained encoder's.
            config_kwargs: fields of `VJEPA2ACConfig`, where no `config` is given.
        """
        pretrained = VJEPA2Model.from_pretrained(encoder_name_or_path)
        if config is None:
            config = cls.config_class(encoder_config=pretrained.config, **config_kwargs)
        else:
            config = copy.deepcopy(config)
            config.encoder_config = pretrained.config
            config.check()
        model = cls(config)
        # Assigned, not copied: the pretrained tensors become the model's, the random ones are dropped.
        model.encoder.load_state_dict(pretrained.encoder.state_dict(), strict=True, assign=True)
        model.encoder.freeze()
        return model

    def encode(self, pixel_values_videos: Tensor) -> Tensor:
        """Features of every tubelet, without gradients.

        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels, frames a multiple of the tubelet size.

        Returns:
            `(B, T, N, D)`. With `encoding="tubelet"` step t depends on the frames of tubelet t alone.

        Raises:
            ValueError: another rank, channel count, frame size, or a number of frames that is no multiple.
        """
        encoder = self.config.encoder_config
        expected = (encoder.in_chans, encoder.crop_size, encoder.crop_size)
        if pixel_values_videos.ndim != 5 or tuple(pixel_values_videos.shape[2:]) != expected:
            raise ValueError(
                f"pixel_values_videos must be (batch, frames, {expected[0]}, {expected[1]}, {expected[2]}), found "
                f"{tuple(pixel_values_videos.shape)}"
            )
        frames = pixel_values_videos.shape[1]
        if frames == 0 or frames % encoder.tubelet_size:
            raise ValueError(f"{frames} frames are not a multiple of the tubelet size {encoder.tubelet_size}")
        steps, clips = frames // encoder.tubelet_size, pixel_values_videos
        if self.config.encoding == "tubelet":
            clips = clips.unflatten(1, (steps, encoder.tubelet_size)).flatten(0, 1)
        with torch.no_grad():
            hidden = self.encoder(clips).last_hidden_state
            return self._normalize(hidden.reshape(len(pixel_values_videos), steps, -1, hidden.shape[-1]))

    def predict(self, features: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predictions of the next step at every step, from the true past (teacher forcing).

        Args:
            features: `(B, T, N, D)` of `encode`.
            actions: `(B, T, A)`, action t leads from step t to t+1.
            states: `(B, T, S)`; later ones are not used.

        Returns:
            `(B, T, N, D)`: at t the prediction of step t+1, normalised as features are.
        """
        self._check_inputs(features, actions, states, num_actions=features.shape[1])
        predicted, _ = self.predictor(features, actions, states[:, : features.shape[1]])
        return self._normalize(predicted)

    def rollout(self, features: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Imagined features of the steps after a context, feeding predictions back.

        The context runs once; every further step attends to the keys and values of the past ones, which never change
        because attention is frame-causal. Gradients flow where the caller enabled them.

        Args:
            features: `(B, C, N, D)` of the context.
            actions: `(B, C - 1 + H, A)`: those of the context, then those of the H imagined steps.
            states: `(B, C - 1 + H, S)` or more (see `VJEPA2ACProcessor.integrate_states`).

        Returns:
            `(B, H, N, D)`: the steps C .. C + H - 1.
        """
        context = features.shape[1]
        self._check_inputs(features, actions, states, num_actions=None)
        predicted, past = self.predictor(features, actions[:, :context], states[:, :context])
        first = self._normalize(predicted[:, -1:])
        return self._continue_rollout(first, past, actions, states, context, actions.shape[1])

    def _continue_rollout(
        self,
        latest: Tensor,
        past: list[KeyValues],
        actions: Tensor,
        states: Tensor,
        first_step: int,
        last_step: int,
    ) -> Tensor:
        """`latest` (the features of `first_step`) and its successors up to `last_step`, `(B, steps, N, D)`."""
        imagined = [latest]
        for step in range(first_step, last_step):
            at = slice(step, step + 1)
            latest, past = self.predictor(latest, actions[:, at], states[:, at], past, first_step=step)
            latest = self._normalize(latest)
            imagined.append(latest)
        return torch.cat(imagined, dim=1)

    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        features: Tensor | None = None,
        actions: Tensor | None = None,
        states: Tensor | None = None,
        return_loss: bool = True,
        auto_steps: int | None = None,
        return_dict: bool | None = None,
    ) -> VJEPA2ACOutput | tuple:
        """Teacher forcing and rollout over a clip, with their losses.

        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels; or
            features: `(B, T, N, D)` of `encode`, instead.
            actions: `(B, T-1, A)`.
            states: `(B, T-1, S)` or more.
            return_loss: whether to compute the losses.
            auto_steps: steps of the rollout, instead of the configuration's.
            return_dict: False returns a tuple.
        """
        if (pixel_values_videos is None) == (features is None):
            raise ValueError("give either pixel_values_videos or features, and not both")
        if actions is None or states is None:
            raise ValueError("actions and states are needed; for features alone call model.encode(pixel_values_videos)")
        if pixel_values_videos is not None:
            if pixel_values_videos.shape[1] != self.config.frames_per_clip:
                raise ValueError(
                    f"a clip must have frames_per_clip {self.config.frames_per_clip} frames, found "
                    f"{pixel_values_videos.shape[1]}"
                )
            features = self.encode(pixel_values_videos)
        assert features is not None
        target = features.detach()
        steps = target.shape[1]
        self._check_inputs(target, actions, states, num_actions=steps - 1)
        auto_steps = self.config.auto_steps if auto_steps is None else auto_steps
        if not 1 <= auto_steps <= steps - 1:
            raise ValueError(f"auto_steps must be between 1 and {steps - 1} for {steps} steps, found {auto_steps}")

        predicted, past = self.predictor(target[:, :-1], actions, states[:, : steps - 1])
        predicted = self._normalize(predicted)
        # Step 0 of the rollout is step 0 of teacher forcing: its prediction, keys and values are reused.
        tokens = target.shape[2] + CONDITIONING_TOKENS
        past = [(k[:, :, :tokens], v[:, :, :tokens]) for k, v in past]
        rollout = self._continue_rollout(predicted[:, :1], past, actions, states, 1, auto_steps)

        loss = teacher_forcing_loss = rollout_loss = None
        if return_loss:
            teacher_forcing_loss = self._distance(predicted, target[:, 1:])
            rollout_loss = self._distance(rollout, target[:, 1 : auto_steps + 1])
            loss = teacher_forcing_loss + rollout_loss
        output = VJEPA2ACOutput(loss, teacher_forcing_loss, rollout_loss, predicted, rollout, target)
        return output.to_tuple() if return_dict is False else output

    def _distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean distance over steps, tokens and width, in float32."""
        loss = F.mse_loss if self.config.loss_type == "mse" else F.l1_loss
        return loss(predicted.float(), target.float())

    def _normalize(self, features: Tensor) -> Tensor:
        return F.layer_norm(features, features.shape[-1:]) if self.config.normalize_features else features

    def _check_inputs(self, features: Tensor, actions: Tensor, states: Tensor, num_actions: int | None) -> None:
        """Ranks and sizes against the configuration; `num_actions` None: at least one action a context step."""
        config = self.config
        tokens, width = config.grid_size**2, config.encoder_config.hidden_size
        if features.ndim != 4 or tuple(features.shape[2:]) != (tokens, width):
            raise ValueError(
                f"features must be (batch, steps, {tokens}, {width}) for a grid of {config.grid_size} x "
                f"{config.grid_size}, found {tuple(features.shape)}"
            )
        steps = features.shape[1]
        for name, tensor, columns in (
            ("actions", actions, config.action_dim),
            ("states", states, config.state_dim),
        ):
            if tensor.ndim != 3 or tensor.shape[-1] != columns or tensor.shape[0] != len(features):
                raise ValueError(
                    f"{name} must be (batch {len(features)}, steps, {columns}), found {tuple(tensor.shape)}"
                )
        if num_actions is not None and (actions.shape[1] != num_actions or num_actions < 1):
            raise ValueError(f"{steps} steps of features need {num_actions} actions, found {actions.shape[1]}")
        if num_actions is None and not 1 <= steps <= actions.shape[1]:
            raise ValueError(
                f"a context of {steps} steps needs at least {max(steps, 1)} actions (one leads out of it), found "
                f"{actions.shape[1]}"
            )
        if states.shape[1] < actions.shape[1]:
            raise ValueError(f"{actions.shape[1]} actions need at least as many states, found {states.shape[1]}")


VJEPA2ACModel.register_for_auto_class("AutoModel")

__all__ = ["VJEPA2ACModel", "VJEPA2ACOutput", "VJEPA2ACPreTrainedModel", "VJEPA2ACPredictor"]
