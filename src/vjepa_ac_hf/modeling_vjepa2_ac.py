"""Action-conditioned V-JEPA 2 (V-JEPA 2-AC, arXiv 2506.09985, section 3): frozen encoder, frame-causal predictor.

Letters in the names of tensors: B batch, T tubelet steps, C context steps, N frame tokens a step, K = N + 2 tokens a
step with action and state, L sequence (steps x K), D feature width, E predictor width, H heads, A action columns,
S state columns. Equations: docs/model.md. Shipped to the Hub with the model: imports the standard library, torch,
transformers and its siblings only.
"""

import copy
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import Cache, DynamicCache, PreTrainedModel, VJEPA2Config
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_encoder_vjepa2_ac import EncoderFields
from .configuration_vjepa2_ac import VJEPA2ACConfig
from .modeling_encoder_vjepa2_ac import VJEPA21Encoder, VJEPA21EncoderModel

KeyValues = tuple[Tensor, Tensor]
Past = Cache | Sequence[KeyValues]
LOSSES: dict[str, Callable] = {"mse": F.mse_loss, "l1": F.l1_loss}
CONDITIONING_TOKENS = 2  # the action token and the state token in front of every step's frame tokens


def returns_output(forward: Callable) -> Callable:
    """Decorates a `forward` that returns a `ModelOutput`: a tuple where `return_dict`, given or configured, is False.

    `output_hidden_states` and `output_attentions` are refused by name: neither is computed (docs/model.md).
    """
    with_tuple = can_return_tuple(forward)

    @functools.wraps(forward)
    def wrapped(
        self: Any, *args: Any, output_hidden_states: bool = False, output_attentions: bool = False, **kwargs: Any
    ) -> ModelOutput | tuple:
        if output_hidden_states or output_attentions:
            raise ValueError(
                "output_hidden_states and output_attentions are not computed: hook model.encoder.layer[i] or "
                "model.predictor.layers[i] (docs/model.md)"
            )
        return with_tuple(self, *args, **kwargs)

    return wrapped


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
        self.grid = config.grid
        self.head_dim = config.pred_hidden_size // config.pred_num_attention_heads
        self._tables: dict[tuple[torch.device, torch.dtype], KeyValues] = {}

    def forward(self, first_step: int, num_steps: int, device: torch.device, dtype: torch.dtype) -> KeyValues:
        """Tables `(L, head_dim)` for the steps from `first_step` on; angles in float32, made once a device and type."""
        tokens_per_step = self.grid[0] * self.grid[1] + CONDITIONING_TOKENS
        last = (first_step + num_steps) * tokens_per_step
        tables = self._tables.get((device, dtype))
        if tables is None or len(tables[0]) < last:
            tables = self._build(first_step + num_steps, device, dtype)
            # What is made while tracing belongs to the graph, and what is made under inference mode cannot be used in
            # training later: neither is kept.
            if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
                self._tables[device, dtype] = tables
        return tables[0][first_step * tokens_per_step : last], tables[1][first_step * tokens_per_step : last]

    def _build(self, num_steps: int, device: torch.device, dtype: torch.dtype) -> KeyValues:
        axis_dim = 2 * ((self.head_dim // 3) // 2)
        half = torch.arange(axis_dim // 2, dtype=torch.float32, device=device)
        frequencies = (10000.0 ** -(half / (axis_dim / 2))).repeat(2)

        steps = torch.arange(num_steps, dtype=torch.float32, device=device)
        down, across = (torch.arange(side, dtype=torch.float32, device=device) for side in self.grid)
        unrotated = steps.new_zeros(CONDITIONING_TOKENS)
        rows = torch.cat([unrotated, down.repeat_interleave(len(across))])
        columns = torch.cat([unrotated, across.repeat(len(down))])
        positions = torch.stack(
            [steps.repeat_interleave(len(rows)), rows.repeat(num_steps), columns.repeat(num_steps)], dim=1
        )  # (L, 3)
        angles = (positions[:, :, None] * frequencies).flatten(1)
        angles = F.pad(angles, (0, self.head_dim - angles.shape[1]))
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHLd: Tensor, cos_Ld: Tensor, sin_Ld: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension by tables of the same type."""
    even, odd = x_BHLd.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.addcmul(x_BHLd * cos_Ld, turned, sin_Ld)


# Attention in which the tokens of a step see all tokens of that step and of every earlier one, in three ways that give
# the same numbers. Queries (B, H, L, head_dim) are those of the last L / tokens_per_step steps of keys and values.


def sdpa_frame_causal_attention(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, tokens_per_step: int) -> Tensor:
    """One unmasked fused attention a step: computes the blocks that count (half of a long clip's), stores no mask."""
    seen, steps = k_BHLd.shape[2] - q_BHLd.shape[2], []
    for q_BHKd in q_BHLd.split(tokens_per_step, dim=2):
        seen += q_BHKd.shape[2]
        steps.append(F.scaled_dot_product_attention(q_BHKd, k_BHLd[:, :, :seen], v_BHLd[:, :, :seen], dropout_p=0.0))
    return steps[0] if len(steps) == 1 else torch.cat(steps, dim=2)


def eager_frame_causal_attention(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, tokens_per_step: int) -> Tensor:
    """The definition, with a dense mask and all scores in memory: to check the others against."""
    length, total = q_BHLd.shape[2], k_BHLd.shape[2]
    step = torch.arange(total, device=q_BHLd.device) // tokens_per_step
    allowed = step[total - length :, None] >= step
    scores = (q_BHLd @ k_BHLd.transpose(-1, -2)) * q_BHLd.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(v_BHLd.dtype) @ v_BHLd


def flex_frame_causal_attention(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, tokens_per_step: int) -> Tensor:
    """FlexAttention over a block mask: one kernel for all steps, compiled on first use."""
    if q_BHLd.shape[2] == tokens_per_step:  # one step sees everything: nothing to mask
        return F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, dropout_p=0.0)
    if q_BHLd.device.type == "cpu" and torch.is_grad_enabled() and q_BHLd.requires_grad:
        raise ValueError(
            "attn_implementation 'flex_attention' has no gradients on a CPU; use 'sdpa', which has the same result"
        )
    mask = frame_causal_block_mask(q_BHLd.shape[2], k_BHLd.shape[2], tokens_per_step, q_BHLd.device)
    kernel = uncompiled_flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return kernel(q_BHLd, k_BHLd, v_BHLd, block_mask=mask)


uncompiled_flex_attention: Callable = flex_attention


@functools.cache
def compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=32)
def frame_causal_block_mask(length: int, total: int, tokens_per_step: int, device: torch.device) -> BlockMask:
    """Which blocks of 128 queries and keys are seen wholly or in part: from the steps alone, without a dense mask."""
    block = 128
    past = total - length

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query + past) // tokens_per_step >= key // tokens_per_step

    first_query = torch.arange(0, length, block, device=device)
    last_query = (first_query + block - 1).clamp(max=length - 1)
    first_key = torch.arange(0, total, block, device=device)
    last_key = (first_key + block - 1).clamp(max=total - 1)
    seen_by_all = ((first_query + past) // tokens_per_step)[:, None] >= last_key // tokens_per_step
    seen_by_some = ((last_query + past) // tokens_per_step)[:, None] >= first_key // tokens_per_step
    blocks: list[Tensor] = []
    for chosen in (seen_by_some & ~seen_by_all, seen_by_all):
        count = chosen.sum(dim=1, dtype=torch.int32)
        order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
        blocks += [count[None, None], order[None, None]]
    partial_count, partial_order, full_count, full_order = blocks
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_order,
        full_count,
        full_order,
        BLOCK_SIZE=block,
        mask_mod=seen,
        seq_lengths=(length, total),
    )


FRAME_CAUSAL_ATTENTION = {
    "sdpa": sdpa_frame_causal_attention,
    "flex_attention": flex_frame_causal_attention,
    "eager": eager_frame_causal_attention,
}


def shared_context_attention(q_BHLd: Tensor, shared: KeyValues, own: KeyValues) -> Tensor:
    """Attention of many candidates over a context they share and over keys and values of their own, all of them seen.

    The context is attended to once for all candidates, their queries laid end to end, so that its keys and values are
    never copied; both parts are joined by the logarithms of their normalisers. Where no kernel gives these, or
    gradients are needed, the context is expanded and joined to the candidates' own keys and values.

    Args:
        q_BHLd: `(contexts * candidates, H, K, head_dim)`.
        shared: keys and values `(contexts, H, P, head_dim)`.
        own: keys and values `(contexts * candidates, H, O, head_dim)`.
    """
    contexts = shared[0].shape[0]
    candidates, length = q_BHLd.shape[0] // contexts, q_BHLd.shape[2]
    attention = None if torch.is_grad_enabled() and q_BHLd.requires_grad else attention_with_normaliser(q_BHLd)
    if attention is None:
        keys, values = (
            torch.cat([c.repeat_interleave(candidates, dim=0), o], dim=2) for c, o in zip(shared, own, strict=True)
        )
        return F.scaled_dot_product_attention(q_BHLd, keys, values, dropout_p=0.0)
    folded = q_BHLd.unflatten(0, (contexts, candidates)).transpose(1, 2).flatten(2, 3)
    parts = [attention(folded, *shared), attention(q_BHLd, *own)]
    out, normaliser = (part.unflatten(2, (candidates, length)).transpose(1, 2).flatten(0, 1) for part in parts[0])
    weight = torch.sigmoid(normaliser - parts[1][1]).unsqueeze(-1)
    return torch.lerp(parts[1][0].float(), out.float(), weight.float()).to(q_BHLd.dtype)


def attention_with_normaliser(q_BHLd: Tensor) -> Callable[[Tensor, Tensor, Tensor], KeyValues] | None:
    """Fused attention that also gives log(sum(exp(scores))) `(B, H, L)` of every query, or None where there is none.

    These are the kernels behind `scaled_dot_product_attention`, whose public form keeps the normalisers to itself.
    """
    ops = torch.ops.aten
    if q_BHLd.device.type == "cpu" and q_BHLd.dtype in (torch.float32, torch.float64, torch.bfloat16):
        return lambda q, k, v: ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    if q_BHLd.device.type != "cuda" or q_BHLd.shape[-1] % 8:
        return None
    # Which of them this GPU has for this type and head width, PyTorch knows.
    parameters = torch.backends.cuda.SDPAParams(q_BHLd, q_BHLd, q_BHLd, None, 0.0, False, False)
    if torch.backends.cuda.can_use_flash_attention(parameters):
        return lambda q, k, v: ops._scaled_dot_product_flash_attention(q, k, v)[:2]
    if torch.backends.cuda.can_use_efficient_attention(parameters):

        def efficient(q: Tensor, k: Tensor, v: Tensor) -> KeyValues:
            out, normaliser = ops._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
            return out, normaliser[..., : q.shape[2]]  # padded by the kernel

        return efficient
    return None


class VJEPA2ACAttention(nn.Module):
    """Frame-causal self-attention with rotary embeddings, over new tokens and the keys and values of past steps."""

    def __init__(self, config: VJEPA2ACConfig, layer_index: int):
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.num_heads = config.pred_num_attention_heads
        self.tokens_per_step = config.num_tokens + CONDITIONING_TOKENS
        self.qkv = nn.Linear(config.pred_hidden_size, 3 * config.pred_hidden_size)
        self.proj = nn.Linear(config.pred_hidden_size, config.pred_hidden_size)

    def forward(
        self, x_BLE: Tensor, cos_Ld: Tensor, sin_Ld: Tensor, past: Cache | KeyValues | None, shared: KeyValues | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # `unbind` here and `split` in attention, not indices: the gradient of an index is a tensor of zeros around it.
        qkv = self.qkv(x_BLE).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q_BHLd, k_BHLd, v_BHLd = (part.transpose(1, 2) for part in qkv)
        q_BHLd, k_BHLd = rotate(q_BHLd, cos_Ld, sin_Ld), rotate(k_BHLd, cos_Ld, sin_Ld)
        if isinstance(past, Cache):
            k_BHLd, v_BHLd = past.update(k_BHLd, v_BHLd, self.layer_index)
        elif past is not None:
            k_BHLd = torch.cat([past[0], k_BHLd], dim=2)
            v_BHLd = torch.cat([past[1], v_BHLd], dim=2)
        if shared is not None:
            out_BHLd = shared_context_attention(q_BHLd, shared, (k_BHLd, v_BHLd))
        else:
            attention = FRAME_CAUSAL_ATTENTION[self.config._attn_implementation or "sdpa"]
            out_BHLd = attention(q_BHLd, k_BHLd, v_BHLd, self.tokens_per_step)
        return self.proj(out_BHLd.transpose(1, 2).flatten(2)), k_BHLd, v_BHLd


class VJEPA2ACMLP(nn.Module):
    def __init__(self, config: VJEPA2ACConfig):
        super().__init__()
        inner = int(config.pred_hidden_size * config.pred_mlp_ratio)
        self.fc1 = nn.Linear(config.pred_hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.pred_hidden_size)

    def forward(self, x_BLE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLE)))


class VJEPA2ACLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block. Returns its output, and the keys and the values of all steps seen so far.

    Arguments and results are tensors, not tuples of them: re-entrant checkpointing loses the gradients of nested ones.
    """

    def __init__(self, config: VJEPA2ACConfig, layer_index: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.pred_hidden_size, eps=config.layer_norm_eps)
        self.attention = VJEPA2ACAttention(config, layer_index)
        self.norm2 = nn.LayerNorm(config.pred_hidden_size, eps=config.layer_norm_eps)
        self.mlp = VJEPA2ACMLP(config)
        # Read where weights are initialised, at the leaves: transformers skips containers of custom models there.
        for projection in (self.attention.proj, self.mlp.fc2):
            projection.init_divisor = (2 * (layer_index + 1)) ** 0.5

    def forward(
        self,
        x_BLE: Tensor,
        cos_Ld: Tensor,
        sin_Ld: Tensor,
        cache: Cache | None,
        past_k: Tensor | None,
        past_v: Tensor | None,
        shared_k: Tensor | None,
        shared_v: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        past = cache if past_k is None or past_v is None else (past_k, past_v)
        shared = None if shared_k is None or shared_v is None else (shared_k, shared_v)
        attended_BLE, k_BHLd, v_BHLd = self.attention(self.norm1(x_BLE), cos_Ld, sin_Ld, past, shared)
        x_BLE = x_BLE + attended_BLE
        return x_BLE + self.mlp(self.norm2(x_BLE)), k_BHLd, v_BHLd


class VJEPA2ACEncoder(VJEPA21Encoder):
    """The encoder of V-JEPA 2 or 2.1, frozen: without gradients, and in eval mode whatever `train()` says.

    Where a head has made its parameters trainable again, its layers are checkpointed in training like all others.
    """

    def __init__(self, config: VJEPA2Config):
        super().__init__(config)
        self.freeze()

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VJEPA2ACEncoder":
        super().train(False)
        trained = mode and any(p.requires_grad for p in self.parameters())
        for layer in self.layer:
            layer.training = trained  # of the layer alone, which checkpointing asks for: what is in it keeps eval mode
        return self


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
        feature_dim, width = config.feature_size, config.pred_hidden_size
        self.frame_embed = nn.Linear(feature_dim, width)
        self.action_embed = nn.Linear(config.action_dim, width)
        self.state_embed = nn.Linear(config.state_dim, width)
        self.rotary = VJEPA2ACRotaryEmbedding(config)
        self.layers = nn.ModuleList([VJEPA2ACLayer(config, i) for i in range(config.pred_num_hidden_layers)])
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, feature_dim)

    def forward(
        self,
        features: Tensor,
        actions: Tensor,
        states: Tensor,
        past_key_values: Past | None = None,
        first_step: int = 0,
        shared_context: Sequence[KeyValues] | None = None,
        present_steps: int | None = None,
    ) -> tuple[Tensor, list[KeyValues]]:
        """
        Args:
            features: `(B, T, N, D)` of steps `first_step .. first_step + T - 1`.
            actions: `(B, T, A)`, action t leads from step t to t+1.
            states: `(B, T, S)`.
            past_key_values: keys and values `(B, H, steps * K, head_dim)` of the earlier steps: one pair a layer, or a
                `transformers.Cache`, which the new ones are added to.
            first_step: how many steps `past_key_values` and `shared_context` hold.
            shared_context: keys and values `(contexts, H, steps * K, head_dim)` of a context that comes before
                `past_key_values`, one pair a layer; B is a multiple of `contexts`. With it, T must be 1.
            present_steps: of how many steps keys and values are to be returned, copied, so that those of the others
                need not stay in memory; None: of all.

        Returns:
            Predictions `(B, T, N, D)`, not normalised, and the keys and values of all steps up to here (those of the
            shared context left out), or of the first `present_steps`; one pair a layer.
        """
        T, N = features.shape[1:3]
        assert shared_context is None or T == 1
        dtype = self.norm.weight.dtype  # the others' may be those of quantised numbers
        x_BTNE = self.frame_embed(features.to(dtype))
        # Layers may lie on several devices, each of which accelerate's hooks bring their arguments to.
        a_BT1E = self.action_embed(actions.to(dtype)).unsqueeze(2).to(x_BTNE.device)
        s_BT1E = self.state_embed(states.to(dtype)).unsqueeze(2).to(x_BTNE.device)
        x_BLE = torch.cat([a_BT1E, s_BT1E, x_BTNE], dim=2).flatten(1, 2)
        cos_Ld, sin_Ld = self.rotary(first_step, T, x_BLE.device, x_BLE.dtype)

        presents = []
        nothing: tuple[None, None] = (None, None)
        cache, pasts = (past_key_values, None) if isinstance(past_key_values, Cache) else (None, past_key_values)
        for i, layer in enumerate(self.layers):
            past = nothing if pasts is None else pasts[i]
            shared = nothing if shared_context is None else shared_context[i]
            x_BLE, k_BHLd, v_BHLd = layer(x_BLE, cos_Ld, sin_Ld, cache, *past, *shared)
            if present_steps is not None:
                kept = present_steps * (N + CONDITIONING_TOKENS)
                k_BHLd, v_BHLd = k_BHLd[:, :, :kept].clone(), v_BHLd[:, :, :kept].clone()
            presents.append((k_BHLd, v_BHLd))
        x_BTNE = x_BLE.unflatten(1, (T, N + CONDITIONING_TOKENS))[:, :, CONDITIONING_TOKENS:]
        return self.head(self.norm(x_BTNE)).to(features.device), presents


class VJEPA2ACPreTrainedModel(PreTrainedModel):
    config_class = VJEPA2ACConfig
    base_model_prefix = "vjepa2_ac"
    main_input_name = "pixel_values_videos"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_set_attn_implementation_cached_value = True  # attention is looked up in the configuration at every call
    _no_split_modules = ["VJEPA2ACLayer", "VJEPA21Layer"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a predictor or head trained without hierarchical features is not given them.

        Raises:
            ValueError: `hierarchical_features` other than the saved model's; before weights are read.
        """
        asked = getattr(kwargs.get("config"), "hierarchical_features", kwargs.get("hierarchical_features"))
        if asked is not None and pretrained_model_name_or_path is not None:  # None: of a `state_dict`
            saved, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **kwargs)
            trained = saved.get("hierarchical_features", False)
            if saved.get("model_type") == cls.config_class.model_type and asked != trained:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: hierarchical_features is asked to be {asked}, the model "
                    f"was trained with {trained}: its predictor takes features of that width alone"
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _flash_attn_can_dispatch(self, flash_attn_version: int, is_init_check: bool = False) -> bool:
        raise ValueError(
            f"attn_implementation 'flash_attention_{flash_attn_version}' cannot be used: attention is frame-causal, "
            "which the flash-attn package has no mask for. 'sdpa' runs such kernels step by step and is exact; so "
            "are 'flex_attention' and 'eager'"
        )

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As in transformers, for the predictor; the encoder, whose attention has no mask, takes `sdpa` or `eager`."""
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation, "encoder_config": attn_implementation}
        if "encoder_config" in attn_implementation:
            asked = attn_implementation["encoder_config"]
            used = _encoder_attention(asked, attn_implementation.get("", self.config._attn_implementation))
            attn_implementation = {**attn_implementation, "encoder_config": used}
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for module in self.modules():
            if isinstance(module, VJEPA2ACAttention):  # of a world model, whose configuration is not the head's
                module.config._attn_implementation_internal = self.config._attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        """The first layer that sees pixels, as in transformers' V-JEPA 2."""
        return self.get_encoder().embeddings.patch_embeddings

    def get_encoder(self, modality: str | None = None) -> Any:
        """The encoder, of a head's world model too."""
        return getattr(self, self.base_model_prefix, self).encoder

    def enable_input_require_grads(self) -> None:
        """As in transformers, at the layer through which frozen features enter the predictor, beside the pixels'."""
        super().enable_input_require_grads()
        predictor = getattr(self, self.base_model_prefix, self).predictor
        if predictor is not None:
            hook = predictor.frame_embed.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
            self._require_grads_hooks.append(hook)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            init.trunc_normal_(module.weight, std=std / getattr(module, "init_divisor", 1.0))


def _encoder_attention(asked: str | None, models: str | None) -> str:
    """What the encoder uses, where it was asked for `asked` by itself or along with the model's `models`."""
    if asked in ("sdpa", "eager"):
        return asked
    if asked in (None, models):
        return "sdpa"
    raise ValueError(f"attn_implementation of encoder_config must be 'sdpa' or 'eager', found {asked!r}")


class VJEPA2ACModel(VJEPA2ACPreTrainedModel):
    """Frozen V-JEPA 2 encoder and trainable action-conditioned predictor: `encode`, `predict`, `rollout`, both losses.

    Source: V-JEPA 2, arXiv 2506.09985, section 3. Pixels, actions and states come from `VJEPA2ACProcessor`.
    """

    def __init__(self, config: VJEPA2ACConfig):
        config.check()
        super().__init__(config)
        # The encoder is a plain module of a sub-configuration: it would fall back to eager attention by itself.
        config.encoder_config._attn_implementation = _encoder_attention(
            config.encoder_config._attn_implementation, config._attn_implementation
        )
        self.encoder = VJEPA2ACEncoder(config.encoder_config)
        # Before the predictor draws anything: an encoder's random weights at a seed are the same whatever predicts from
        # it, and so are its features. On the meta device there is nothing to initialise.
        if self.encoder.embeddings.patch_embeddings.proj.weight.device.type != "meta":
            self.encoder.apply(self._initialize_weights)
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
        *,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **config_kwargs: Any,
    ) -> "VJEPA2ACModel":
        """A model with a pretrained V-JEPA 2 or 2.1 encoder (repository or folder of transformers) and a new predictor.

        The encoder is in memory once: nothing is made that the checkpoint then replaces.

        Args:
            encoder_name_or_path: for instance `facebook/vjepa2-vitl-fpc64-256`, or the folder that
                `convert_vjepa2_ac_to_hf.py` has made of an official file.
            config: the predictor's sizes; its `encoder_config` is replaced by the pretrained encoder's.
            dtype: of the encoder's weights, as `from_pretrained` of transformers takes it (None: the checkpoint's); the
                predictor, which is to be trained, is float32.
            device_map: the device to load to, such as `"cuda:0"`; the predictor goes there as well.
            config_kwargs: fields of `VJEPA2ACConfig`, where no `config` is given.

        Raises:
            ValueError: weights that the encoder's config.json does not describe, or a frame size that its patches do
                not divide.
        """
        described = VJEPA2Config.from_pretrained(encoder_name_or_path)
        if config is None:
            config = cls.config_class(encoder_config=described, **config_kwargs)
        else:
            config = copy.deepcopy(config)
            described._attn_implementation = config.encoder_config._attn_implementation
            config.encoder_config = described
            config.check()  # before weights are read
        pretrained = VJEPA21EncoderModel.load(encoder_name_or_path, dtype=dtype, device_map=device_map)
        described.dtype = pretrained.config.dtype
        with torch.device("meta"):
            model = cls(config)
        model.encoder.load_state_dict(pretrained.encoder.state_dict(), strict=True, assign=True)
        model.encoder.freeze()
        model.predictor.to_empty(device=pretrained.device)
        model.predictor.apply(model._init_weights)
        return model

    def encode(self, pixel_values_videos: Tensor, *, as_pictures: bool = False) -> Tensor:
        """Features of every tubelet, without gradients as long as the encoder is frozen.

        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels, frames a multiple of the tubelet size.
            as_pictures: every frame is a picture of its own, by the encoder's image path, and a step (docs/model.md).

        Returns:
            `(B, T, N, D)`. With `encoding="tubelet"` step t depends on the frames of tubelet t alone.

        Raises:
            ValueError: another rank, channel count, frame size, a number of frames that is no multiple, or pictures
                for an encoder without an image path.
        """
        encoder = self.config.encoder_config
        if as_pictures and not EncoderFields.of(encoder).use_image_patch_embedder:
            raise ValueError("as_pictures needs an encoder with use_image_patch_embedder (V-JEPA 2.1), it has none")
        expected = (encoder.in_chans, *self.config.frame_shape)
        if pixel_values_videos.ndim != 5 or tuple(pixel_values_videos.shape[2:]) != expected:
            raise ValueError(
                f"pixel_values_videos must be (batch, frames, {expected[0]}, {expected[1]}, {expected[2]}), found "
                f"{tuple(pixel_values_videos.shape)}"
            )
        frames = pixel_values_videos.shape[1]
        per_step = 1 if as_pictures else encoder.tubelet_size
        if frames == 0 or frames % per_step:
            raise ValueError(f"{frames} frames are not a multiple of the tubelet size {encoder.tubelet_size}")
        steps, clips = frames // per_step, pixel_values_videos
        if self.config.encoding not in ("tubelet", "clip"):
            raise ValueError(f"encoding must be 'tubelet' or 'clip', found {self.config.encoding!r}")
        if self.config.encoding == "tubelet" or as_pictures:
            clips = clips.unflatten(1, (steps, per_step)).flatten(0, 1)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(trained):  # heads may train the encoder
            output = self.encoder(clips, output_hierarchical=self.config.hierarchical_features)
            hidden = output.hierarchical_hidden_state if self.config.hierarchical_features else output.last_hidden_state
            hidden = hidden.to(pixel_values_videos.device)
            return self._normalize(hidden.reshape(pixel_values_videos.shape[0], steps, -1, hidden.shape[-1]))

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

    def rollout(
        self,
        features: Tensor,
        actions: Tensor,
        states: Tensor,
        *,
        past_key_values: Cache | None = None,
        max_batch_tokens: int | None = None,
    ) -> Tensor:
        """Imagined features of the steps after a context, feeding predictions back.

        The context runs once; every further step attends to the keys and values of the past ones, which never change
        because attention is frame-causal. Gradients flow where the caller enabled them.

        With an axis of candidates (M action sequences from one context, as in planning) the context is run once for all
        of them, and its keys and values are neither computed again nor copied for each.

        Args:
            features: `(B, C, N, D)` of the context.
            actions: `(B, C - 1 + H, A)`: those of the context, then those of the H imagined steps; or, for candidates,
                `(B, M, C - 1 + H, A)`, the context's being the same in all.
            states: `(B, C - 1 + H, S)` or more (see `VJEPA2ACProcessor.integrate_states`); for candidates
                `(B, M, C - 1 + H, S)` or more.
            past_key_values: keys and values of P steps before `features`, from an earlier call; C, actions and states
                then count from step P on. Steps P .. P + C + H - 2 are added to it; `crop(-(H - 1) * (N + 2))` takes
                the imagined ones off again. A new `DynamicCache()` starts one. Not for candidates.
            max_batch_tokens: for candidates, how many tokens (B x candidates x (N + 2)) go through the predictor at
                once; more candidates go in several parts. Keys and values of H steps are held for one part at a time.
                None: all at once.

        Returns:
            `(B, H, N, D)`: the steps C .. C + H - 1; `(B, M, H, N, D)` for candidates.

        Raises:
            ValueError: shapes, types or devices that do not fit together or to the model, a cache of another model or
                batch, candidates that do not share their context.
        """
        if actions.ndim == 4:
            if past_key_values is not None:
                raise ValueError(
                    "candidates (4-dimensional actions) take no past_key_values: give their context instead"
                )
            return self._rollout_candidates(features, actions, states, max_batch_tokens)
        if max_batch_tokens is not None:
            raise ValueError(
                "max_batch_tokens divides candidates: actions must be (B, M, steps, A), found 3 dimensions"
            )
        self._check_inputs(features, actions, states, num_actions=None)
        past_steps = self._check_cache(past_key_values, features)
        context = features.shape[1]
        predicted, past = self.predictor(
            features, actions[:, :context], states[:, :context], past_key_values, first_step=past_steps
        )
        first = self._normalize(predicted[:, -1:])
        past = past if past_key_values is None else past_key_values
        return self._continue_rollout(first, past, actions, states, context, actions.shape[1], past_steps)

    def _rollout_candidates(
        self, features: Tensor, actions: Tensor, states: Tensor, max_batch_tokens: int | None
    ) -> Tensor:
        """`rollout` of `(B, M, C - 1 + H, A)` actions: context steps 0 .. C - 2 once, then parts of candidates."""
        context, (batch, candidates, last_step) = features.shape[1], actions.shape[:3]
        self._check_candidates(features, actions, states)
        shared = None
        if context > 1:
            before = slice(0, context - 1)
            _, shared = self.predictor(features[:, before], actions[:, 0, before], states[:, 0, before])
        size = candidates if max_batch_tokens is None else self.candidates_at_once(max_batch_tokens, batch)
        parts = []
        for start in range(0, candidates, size):
            a, s = (t[:, start : start + size].flatten(0, 1) for t in (actions, states))
            latest = features[:, -1:].to(self.predictor.norm.weight.dtype)
            latest = latest.repeat_interleave(a.shape[0] // batch, dim=0)
            # The last context step holds the first action that differs: it is the first step of every candidate.
            rolled = self._continue_rollout(latest, None, a, s, context - 1, last_step, shared_context=shared)
            parts.append(rolled[:, 1:].unflatten(0, (batch, -1)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def candidates_at_once(self, max_batch_tokens: int, batch: int = 1) -> int:
        """How many candidates of a batch of contexts hold `max_batch_tokens` tokens in a step.

        Raises:
            ValueError: not one.
        """
        per_candidate = batch * (self.config.num_tokens + CONDITIONING_TOKENS)
        if max_batch_tokens < per_candidate:
            raise ValueError(
                f"max_batch_tokens must be at least {per_candidate}, a step of one candidate, found {max_batch_tokens}"
            )
        return max_batch_tokens // per_candidate

    def _continue_rollout(
        self,
        latest: Tensor,
        past: Past | None,
        actions: Tensor,
        states: Tensor,
        first_step: int,
        last_step: int,
        past_steps: int = 0,
        shared_context: Sequence[KeyValues] | None = None,
    ) -> Tensor:
        """`latest` (the features of `first_step`) and its successors up to `last_step`, `(B, steps, N, D)`."""
        imagined = [latest]
        for step in range(first_step, last_step):
            at = slice(step, step + 1)
            latest, presents = self.predictor(
                latest, actions[:, at], states[:, at], past, past_steps + step, shared_context
            )
            past = past if isinstance(past, Cache) else presents
            latest = self._normalize(latest)
            imagined.append(latest)
        return torch.cat(imagined, dim=1)

    @returns_output
    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        features: Tensor | None = None,
        actions: Tensor | None = None,
        states: Tensor | None = None,
        return_loss: bool = True,
        auto_steps: int | None = None,
    ) -> VJEPA2ACOutput:
        """Teacher forcing and rollout over a clip, with their losses.

        Args:
            pixel_values_videos: `(B, frames, 3, Y, X)`, normalised pixels; or
            features: `(B, T, N, D)` of `encode`, instead.
            actions: `(B, T-1, A)`.
            states: `(B, T-1, S)` or more.
            return_loss: whether to compute the losses.
            auto_steps: steps of the rollout, instead of the configuration's.

        With `return_dict=False` a tuple of those that are not None.
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

        # Step 0 of the rollout is step 0 of teacher forcing: its prediction, keys and values are reused.
        predicted, past = self.predictor(target[:, :-1], actions, states[:, : steps - 1], present_steps=1)
        predicted = self._normalize(predicted)
        rollout = self._continue_rollout(predicted[:, :1], past, actions, states, 1, auto_steps)

        loss = teacher_forcing_loss = rollout_loss = None
        if return_loss:
            teacher_forcing_loss = self._distance(predicted, target[:, 1:])
            rollout_loss = self._distance(rollout, target[:, 1 : auto_steps + 1])
            loss = teacher_forcing_loss + rollout_loss
        return VJEPA2ACOutput(loss, teacher_forcing_loss, rollout_loss, predicted, rollout, target)

    def _distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean distance over steps, tokens and width, in float32."""
        if self.config.loss_type not in LOSSES:
            raise ValueError(f"loss_type must be one of {tuple(LOSSES)}, found {self.config.loss_type!r}")
        return LOSSES[self.config.loss_type](predicted.float(), target.float())

    def _normalize(self, features: Tensor) -> Tensor:
        if not self.config.normalize_features:
            return features
        # Every level by itself, as the targets of V-JEPA 2.1's training are (app/vjepa_2_1/train.py, forward_target).
        levels = features.unflatten(-1, (self.config.feature_levels, -1))
        return F.layer_norm(levels, levels.shape[-1:]).flatten(-2)

    @property
    def _hooked(self) -> bool:
        """Whether hooks of accelerate (`device_map`, offloading) bring whatever is given to where a layer computes."""
        return hasattr(self.predictor.norm, "_hf_hook")

    def _check_inputs(self, features: Tensor, actions: Tensor, states: Tensor, num_actions: int | None) -> None:
        """Ranks and sizes against the configuration; `num_actions` None: at least one action a context step."""
        config = self.config
        tokens, width = config.num_tokens, config.feature_size
        if features.ndim != 4 or tuple(features.shape[2:]) != (tokens, width):
            raise ValueError(
                f"features must be (batch, steps, {tokens}, {width}) for a grid of {config.grid[0]} x "
                f"{config.grid[1]} and hierarchical_features {config.hierarchical_features}, found "
                f"{tuple(features.shape)}"
            )
        batch, steps = features.shape[:2]
        device = self.predictor.norm.weight.device
        for name, tensor, columns in (
            ("features", features, width),
            ("actions", actions, config.action_dim),
            ("states", states, config.state_dim),
        ):
            if name != "features" and (tensor.ndim != 3 or tensor.shape[-1] != columns or tensor.shape[0] != batch):
                raise ValueError(f"{name} must be (batch {batch}, steps, {columns}), found {tuple(tensor.shape)}")
            if tensor.device != device and not self._hooked:
                raise ValueError(f"{name} are on {tensor.device}, the predictor is on {device}: move them there")
            if not tensor.is_floating_point():
                raise ValueError(f"{name} must be floating-point numbers (see VJEPA2ACProcessor), found {tensor.dtype}")
        if num_actions is not None and (actions.shape[1] != num_actions or num_actions < 1):
            raise ValueError(f"{steps} steps of features need {num_actions} actions, found {actions.shape[1]}")
        if num_actions is None and not 1 <= steps <= actions.shape[1]:
            raise ValueError(
                f"a context of {steps} steps needs at least {max(steps, 1)} actions (one leads out of it), found "
                f"{actions.shape[1]}"
            )
        if states.shape[1] < actions.shape[1]:
            raise ValueError(f"{actions.shape[1]} actions need at least as many states, found {states.shape[1]}")

    def _check_candidates(self, features: Tensor, actions: Tensor, states: Tensor) -> None:
        """As `_check_inputs`, with an axis of candidates that must share what lies before their first own action."""
        if states.ndim != 4 or states.shape[:2] != actions.shape[:2] or actions.shape[1] == 0:
            raise ValueError(
                f"for candidates, actions must be (batch, candidates, steps, {self.config.action_dim}) and states "
                f"(batch, candidates, steps, {self.config.state_dim}) with at least one candidate, found "
                f"{tuple(actions.shape)} and {tuple(states.shape)}"
            )
        self._check_inputs(features, actions[:, 0], states[:, 0], num_actions=None)
        context = features.shape[1]
        for name, tensor, shared in (("actions", actions, context - 1), ("states", states, context)):
            known = tensor[:, :, :shared]
            if torch.compiler.is_compiling():  # what depends on data would break the graph
                continue
            if known.shape[1] > 1 and not torch.equal(known, known[:, :1].expand_as(known)):
                raise ValueError(
                    f"candidates must share their context: {name} of its first {shared} steps differ among the "
                    f"{known.shape[1]} candidates"
                )

    def _check_cache(self, cache: Cache | None, features: Tensor) -> int:
        """How many steps a cache holds, 0 without one; it must be this model's, and of this batch."""
        if cache is None:
            return 0
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"past_key_values must be a transformers.DynamicCache, found {type(cache).__name__}")
        if self.is_activation_checkpointing and self.training:
            raise ValueError(
                "past_key_values cannot be used in training with gradient checkpointing: call eval() first"
            )
        held = [layer.keys for layer in cache.layers if layer.get_seq_length()]
        if not held:
            return 0
        config, tokens = self.config, self.config.num_tokens + CONDITIONING_TOKENS
        heads = config.pred_num_attention_heads
        device = None if self._hooked else self.predictor.norm.weight.device
        expected = (features.shape[0], heads, config.pred_hidden_size // heads, device)
        found = {(k.shape[0], k.shape[1], k.shape[3], device and k.device) for k in held}
        if len(held) != config.pred_num_hidden_layers or found != {expected}:
            raise ValueError(
                f"past_key_values are of another model or batch: expected {config.pred_num_hidden_layers} layers of "
                f"(batch, heads, head width, device) {expected}, found {len(held)} of {sorted(found, key=str)}"
            )
        lengths = sorted({k.shape[2] for k in held})
        if len(lengths) != 1 or lengths[0] % tokens:
            raise ValueError(f"past_key_values must hold whole steps of {tokens} tokens, found {lengths} tokens")
        return lengths[0] // tokens


VJEPA2ACModel.register_for_auto_class("AutoModel")

__all__ = ["VJEPA2ACModel", "VJEPA2ACOutput", "VJEPA2ACPreTrainedModel", "VJEPA2ACPredictor"]
