"""Tokens that the user adds, and the rows of the embedding for them (`luthier.model.embeddings`)."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.rules.engine import Rules, all_of, is_given, is_other_than, is_set, not_, warning
from luthier.model.features import Feature


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokensConfig:
    resize_vocab: bool = False
    """Enlarge the embeddings to the size of the tokenizer; always done when tokens are added."""
    add_tokens: tuple[str, ...] = ()
    """Ordinary tokens to add to the tokenizer."""
    add_special_tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer."""
    new_special_tokens_config: str | None = None
    """YAML file that maps each new special token to a description; replaces `add_special_tokens`."""
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = "noise_init"
    """Start of the new embedding rows: mean with noise, mean of the description's tokens, or the latter with noise."""

    @property
    def may_grow(self) -> bool:
        """Whether the embeddings may get new rows."""
        return self.resize_vocab or bool(self.add_tokens or self.add_special_tokens or self.new_special_tokens_config)


_has_descriptions = is_given("features.new_tokens", "new_special_tokens_config")

RULES = Rules(
    (
        warning(
            ("init_special_tokens", "new_special_tokens_config"),
            "there are no descriptions to start from, so the new rows start from noise",
            "give new_special_tokens_config",
            all_of(is_other_than("features.new_tokens", "init_special_tokens", "noise_init"), not_(_has_descriptions)),
        ),
        warning(
            ("add_special_tokens", "new_special_tokens_config"),
            "is not read, since new_special_tokens_config replaces it",
            "give one of the two",
            all_of(is_set("features.new_tokens", "add_special_tokens"), _has_descriptions),
        ),
    )
)


FEATURE = Feature(name="new_tokens", config=NewTokensConfig, check=RULES)
