"""The model hubs beside Hugging Face. An environment variable says that the names in a run file are names there."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.sections import is_on

if TYPE_CHECKING:
    from luthier.config.keys.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Hub:
    """One hub and its client library."""

    title: str
    variable: str
    """The environment variable that switches it on."""
    module: str
    """The module that fetches models, with a function `snapshot_download`."""
    extra: str
    """Its name in pyproject.toml."""
    token_key: str
    """The key of the run file that holds its token."""
    url_key: str
    """The key of dataset_info.json that names a dataset of this hub."""
    host: str
    host_variables: tuple[str, ...]
    """Variables of the library that replace `host`."""
    main_branch: str
    """What `model_revision: main` is called there."""
    errors: str = ""
    """The module of the library's exceptions, where these are not all of Python's own kinds."""


HUBS = (
    Hub(
        title="ModelScope",
        variable="USE_MODELSCOPE_HUB",
        module="modelscope",
        extra="modelscope",
        token_key="ms_hub_token",
        url_key="ms_hub_url",
        host="modelscope.cn",
        host_variables=("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN", "MODELSCOPE_PREFER_AI_SITE"),
        main_branch="master",
        errors="modelscope.hub.errors",
    ),
    Hub(
        title="Modelers",
        variable="USE_OPENMIND_HUB",
        module="openmind_hub",
        extra="openmind",
        token_key="om_hub_token",
        url_key="om_hub_url",
        host="modelers.cn",
        host_variables=("OPENMIND_HUB_ENDPOINT", "OPENMIND_PLATFORM"),
        main_branch="main",
    ),
)
"""In the order in which they are asked about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTokens:
    """Each hub receives only its own token. The fields are named like the kinds of source of a dataset."""

    hf_hub: str | None = None
    ms_hub: str | None = None
    om_hub: str | None = None

    @classmethod
    def of(cls, keys: "ModelConfig") -> "HubTokens":
        return cls(hf_hub=keys.hf_hub_token, ms_hub=keys.ms_hub_token, om_hub=keys.om_hub_token)


NO_TOKENS = HubTokens()


def hub_in_use() -> Hub | None:
    """The hub that the environment asks for; None for Hugging Face."""
    return next((hub for hub in HUBS if is_on(os.environ, hub.variable)), None)
