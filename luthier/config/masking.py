"""Secrets are shown as stars wherever keys are printed or saved."""

from collections.abc import Mapping
from typing import Any

SECRET_ENDINGS = ("token", "api_key", "secret", "webhook_url")


def is_secret(key: str) -> bool:
    """Whether the value of this key must not be shown."""
    return key.endswith(SECRET_ENDINGS)


def masked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys as they may be shown: plain YAML values, secrets hidden."""
    return {
        key: "***" if is_secret(key) and value is not None else list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
    }
