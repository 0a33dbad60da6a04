"""Keys of the stage ppo. The class moves to the file of its stage when the stage arrives."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoConfig:
    ppo_buffer_size: int = 1
    """Batches of answers collected before the policy learns from them."""
    ppo_epochs: int = 4
    """Passes over the collected answers."""
    ppo_score_norm: bool = False
    """Bring the scores to mean 0 and variance 1."""
    ppo_target: float = 6.0
    """Divergence from the reference model that the adaptive penalty aims at."""
    ppo_whiten_rewards: bool = False
    """Bring the rewards to variance 1 before the advantages are computed."""
    ref_model: str | None = None
    """The reference model, if it is not the base model."""
    ref_model_adapters: tuple[str, ...] = ()
    """Adapters of the reference model."""
    ref_model_quantization_bit: int | None = None
    """Bits to load the reference model with."""
    reward_model: str | None = None
    """The model that scores answers: an adapter, a model, or the address of a server."""
    reward_model_adapters: str | None = None
    """Adapters of the reward model."""
    reward_model_quantization_bit: int | None = None
    """Bits to load the reward model with."""
    reward_model_type: Literal["lora", "full", "api"] = "lora"
    """What `reward_model` is: an adapter on the same base, a model of its own, or a server."""
