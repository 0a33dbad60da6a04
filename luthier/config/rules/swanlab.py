"""Rules about the keys of the tracker SwanLab."""

from luthier.config.rules.engine import Rules, When, all_of, is_set, not_

_with_swanlab = When(is_set("swanlab", "use_swanlab"))

SWANLAB_RULES = Rules(
    (
        _with_swanlab.warns(
            ("swanlab_api_key", "swanlab_mode"),
            "is not read, since local records need no account",
            "leave it out",
            lambda run: run.swanlab.swanlab_mode == "local" and bool(run.swanlab.swanlab_api_key),
        ),
        _with_swanlab.refuses(
            ("swanlab_lark_secret", "swanlab_lark_webhook_url"),
            "signs messages, and there is no address to send them to",
            "give swanlab_lark_webhook_url",
            all_of(is_set("swanlab", "swanlab_lark_secret"), not_(is_set("swanlab", "swanlab_lark_webhook_url"))),
        ),
    )
)
