"""What a training step costs, from sizes alone: parameters, floating-point operations, tokens, memory, hours.

Operations are those of matrix products (a product of (m, k) and (k, n) is 2 m k n), as everywhere; a backward pass
needs each product twice, but for what needs no gradient: the encoder, and inputs that are given. All figures are exact
counts but memory and hours, which are estimates (docs/training.md, "Dry run").
"""

import dataclasses
from dataclasses import dataclass

from ..configuration_vjepa2_ac import VJEPA2ACConfig

CONDITIONING_TOKENS = 2


@dataclass(frozen=True)
class Hardware:
    """Peak of dense matrix products in TFLOP/s and memory in bytes of one device, by the maker's data sheet."""

    bf16_tflops: float
    float32_tflops: float
    memory: float


# NVIDIA's data sheets (SXM versions, without sparsity; float32 without TF32, which PyTorch leaves off by default).
HARDWARE = {
    "a100": Hardware(312.0, 19.5, 80e9),
    "h100": Hardware(989.0, 67.0, 80e9),
    "h200": Hardware(989.0, 67.0, 141e9),
}


# ------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class StepFlops:
    """Operations of one forward and backward pass over a batch on one device."""

    encoder: int  # forward, 0 with cached features
    predictor_forward: int  # teacher forcing and rollout
    predictor_backward: int  # their backward pass
    recomputed: int  # second forward pass of the layers with gradient checkpointing; not part of `model`

    @property
    def model(self) -> int:
        """What the mathematics needs: the figure that utilisation (MFU) is about."""
        return self.encoder + self.predictor_forward + self.predictor_backward

    @property
    def computed(self) -> int:
        """What the device computes."""
        return self.model + self.recomputed


def encoder_flops(config: VJEPA2ACConfig, batch_size: int) -> int:
    """Operations of encoding `batch_size` clips."""
    encoder, tokens = config.encoder_config, config.num_tokens
    width, inner = encoder.hidden_size, int(encoder.hidden_size * encoder.mlp_ratio)
    sequence = tokens if config.encoding == "tubelet" else tokens * config.num_steps
    patch = 2 * encoder.in_chans * encoder.tubelet_size * encoder.patch_size**2 * width
    layers = encoder.num_hidden_layers * (2 * (4 * width**2 + 2 * width * inner) + 4 * sequence * width)
    return encoder_tokens(config, batch_size) * (patch + layers)


def predictor_flops(config: VJEPA2ACConfig, batch_size: int) -> tuple[int, int, int]:
    """Operations of the predictor on `batch_size` clips: forward, backward, and what checkpointing computes again."""
    assert config.action_dim is not None
    frames, width, depth = config.num_tokens, config.pred_hidden_size, config.pred_num_hidden_layers
    tokens, inner = frames + CONDITIONING_TOKENS, int(width * config.pred_mlp_ratio)
    # Step t of teacher forcing attends to t + 1 steps; so does step t of the rollout, over cached keys and values.
    rollout = range(1, config.auto_steps)
    times = [*range(config.num_steps - 1), *rollout]
    steps = len(times)
    linear = 2 * tokens * (4 * width**2 + 2 * width * inner)
    layers = depth * sum(linear + 4 * tokens * (t + 1) * tokens * width for t in times)
    embed_frames = 2 * frames * config.feature_size * width
    embed_conditions = 2 * (config.action_dim + config.state_dim) * width
    head = 2 * frames * width * config.feature_size
    forward = layers + steps * (embed_frames + embed_conditions + head)
    # Actions, states and the encoder's features need no gradient: their embeddings' weights alone do.
    backward = 2 * layers + (steps + len(rollout)) * embed_frames + steps * (embed_conditions + 2 * head)
    # A layer's second pass stops before its last product (fc2), whose result no gradient needs.
    again = layers - steps * depth * 2 * tokens * width * inner
    return batch_size * forward, batch_size * backward, batch_size * again


def step_flops(
    config: VJEPA2ACConfig, batch_size: int, *, cached_features: bool = False, gradient_checkpointing: bool = False
) -> StepFlops:
    """Operations of one pass over `batch_size` clips."""
    forward, backward, again = predictor_flops(config, batch_size)
    encoder = 0 if cached_features else encoder_flops(config, batch_size)
    return StepFlops(encoder, forward, backward, again if gradient_checkpointing else 0)


def predictor_tokens(config: VJEPA2ACConfig, batch_size: int) -> int:
    """Tokens that go through the predictor: action, state and frames of every step of teacher forcing and rollout."""
    steps = config.num_steps - 1 + config.auto_steps - 1
    return batch_size * steps * (config.num_tokens + CONDITIONING_TOKENS)


def encoder_tokens(config: VJEPA2ACConfig, batch_size: int) -> int:
    """Tokens that go through the encoder."""
    return batch_size * config.num_steps * config.num_tokens


# ------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `total` counts gradients and activations as if all were there at once."""

    # Encoder and predictor, float32, the average of the predictor's where there is one, and in bf16 the copies that
    # autocast makes of the predictor's.
    weights: float
    gradients: float  # of the predictor, float32; several processes send them from where they are
    optimizer: float  # AdamW's two moments, float32
    activations: float  # what the forward pass keeps for the backward pass, pixels and features included
    working: float  # held for a moment beside it: one layer's backward pass, or the encoder's forward pass

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def layer_activations(config: VJEPA2ACConfig, number: int, norm_number: int) -> float:
    """Bytes that one layer of the predictor keeps for the backward pass, a token of teacher forcing.

    In widths: the norms' inputs, the inputs of qkv and fc1, queries, keys and values before and after rotation,
    attention's output and its copy for the projection, and the two of the MLP.

    Args:
        config: the model's sizes.
        number: bytes of a number in products: 4, under bf16 autocast 2.
        norm_number: bytes of a number in norms: 4, under bf16 autocast on a CPU 2.
    """
    width, inner = config.pred_hidden_size, int(config.pred_hidden_size * config.pred_mlp_ratio)
    return 2 * norm_number * width + number * ((2 + 3 + 2 + 2) * width + 2 * inner)


def _kept_by_layers(
    config: VJEPA2ACConfig, batch_size: int, number: int, norm_number: int, checkpointed: bool
) -> float:
    """Bytes that all layers keep for the backward pass."""
    width, per_layer = config.pred_hidden_size, layer_activations(config, number, norm_number)
    tokens = batch_size * (config.num_tokens + CONDITIONING_TOKENS)  # of one step
    # Checkpointed, a layer keeps its input; of keys and values, those of step 0 live on where the rollout needs them.
    total = (config.num_steps - 1) * tokens * (number * width if checkpointed else per_layer)
    if checkpointed and config.auto_steps > 1:
        total += tokens * number * 2 * width
    for step in range(1, config.auto_steps):
        # A step of the rollout copies the keys and values of all steps before it.
        if not checkpointed:
            total += tokens * (per_layer + number * 2 * (step - 1) * width)
        else:
            total += tokens * number * (1 + (2 * (step + 1) if step < config.auto_steps - 1 else 0)) * width
    return total * config.pred_num_hidden_layers


def step_memory(
    config: VJEPA2ACConfig,
    encoder_parameters: int,
    predictor_parameters: int,
    batch_size: int,
    *,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    cached_features: bool = False,
    averaged: bool = False,
    device: str = "cuda",
) -> Memory:
    """Estimate of the memory of one device in a training step of `batch_size` clips (docs/training.md, "Dry run").

    `device` matters for bf16: on CUDA, autocast runs norms in float32, on a CPU in bf16.
    """
    encoder = config.encoder_config
    number = 2 if bf16 else 4
    norm_number = 2 if bf16 and device == "cpu" else 4
    frames, width, feature_width = config.num_tokens, config.pred_hidden_size, config.feature_size
    frame_tokens = encoder_tokens(config, batch_size)
    predicted_tokens = predictor_tokens(config, batch_size) // (frames + CONDITIONING_TOKENS) * frames

    layers = _kept_by_layers(config, batch_size, number, norm_number, gradient_checkpointing)
    working = predictor_tokens(config, batch_size) * layer_activations(config, number, norm_number)
    # Around the layers: input of the final norm and of the head; input of the embedding, predictions before and after
    # their normalisation; on a CPU in bf16 both sides of the loss are copied to float32.
    numbers_of_loss = number + 2 * norm_number + (8 if norm_number == 2 else 0)
    around = predicted_tokens * ((norm_number + number) * width + numbers_of_loss * feature_width)
    features = frame_tokens * norm_number * feature_width
    pixels = 0.0
    if not cached_features:
        height, across = config.frame_shape
        pixels = 4.0 * batch_size * config.frames_per_clip * encoder.in_chans * height * across
        encoder_width, inner = encoder.hidden_size, int(encoder.hidden_size * encoder.mlp_ratio)
        encoding = frame_tokens * (number * (3 * encoder_width + 2 * inner) + norm_number * encoder_width)
        working = max(working, encoding - layers)  # the encoder has finished before the layers keep anything
    weights = 4.0 * (encoder_parameters + predictor_parameters)
    weights += (4.0 * averaged + 2.0 * bf16) * predictor_parameters
    return Memory(
        weights=weights,
        gradients=4.0 * predictor_parameters,
        optimizer=8.0 * predictor_parameters,
        activations=layers + around + features + pixels,
        working=working,
    )


# ------------------------------------------------------------------------------------------------- time


def training_hours(flops_per_step: float, steps: int, devices: int, tflops: float, utilisation: float) -> float:
    """Hours of `steps` steps of `flops_per_step` (all devices together), at a share of the devices' peak."""
    return flops_per_step * steps / (devices * tflops * 1e12 * utilisation) / 3600


def peak_tflops(hardware: str | None, tflops: float | None, bf16: bool) -> float | None:
    """Peak of one device in TFLOP/s: as given, else by name (`h100`, `h100x8`), else None."""
    if tflops is not None:
        return tflops
    if hardware is None:
        return None
    device = HARDWARE[hardware.lower().partition("x")[0]]
    return device.bf16_tflops if bf16 else device.float32_tflops


def as_dict(value: StepFlops | Memory) -> dict[str, float]:
    """Fields and totals, for JSON."""
    totals = ("model", "computed") if isinstance(value, StepFlops) else ("total",)
    return dataclasses.asdict(value) | {name: getattr(value, name) for name in totals}
