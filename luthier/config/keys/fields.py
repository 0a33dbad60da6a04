"""How a key says what luthier does with it. A plain dataclass field is supported; the functions here mark the rest.

    rank: int = 8                                       # supported
    shift: bool = refused(False, "reason", "remedy")    # any value but the default is an error, with reason and remedy
    old: str = no_effect("all", "reason")               # accepted; any value but the default is a warning
    stage: str = variant("sft")                         # supported; the values are the names of the registry `stage`
    kernel: Literal["a"] = choice("a", {"alpha": "..."})  # supported; what to write instead of a name from elsewhere
    former: str = renamed("", "current")                # accepted with a warning, and stored under the key `current`
    start: bool = never_unread(False)                   # supported; an error, not a warning, if nothing reads it

The help of a key is the string under the field; `luthier.config.describe` reads it from the source, since only
`explain`, `schema` and the docs need it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


def refused(default: Any, reason: str, remedy: str, allowed: tuple[Any, ...] = ()) -> Any:
    """A known key that this version does not support. Its default and the values in `allowed` still pass."""
    metadata = {"status": "refused", "reason": reason, "remedy": remedy, "allowed": (default, *allowed)}
    return dataclasses.field(default=default, metadata=metadata)


def no_effect(default: Any, reason: str, fulfilled: tuple[Any, ...] = ()) -> Any:
    """A known key that users' files carry and that changes nothing here, for the given reason.

    Its default, and the values in `fulfilled` (which ask for what happens anyway), pass without a warning.
    """
    metadata = {"status": "no_effect", "reason": reason, "allowed": (default, *fulfilled)}
    return dataclasses.field(default=default, metadata=metadata)


def variant(default: str, also: tuple[str, ...] = (), remedies: Mapping[str, str] | None = None) -> Any:
    """A key whose values are file names: those of the registry of `luthier.core.kinds` with the same key.

    `also`: further names that are accepted, and that a rule must refuse. `remedies`: what to write instead of names, in
    lower case, that people write here and that belong to other keys.
    """
    note = {"status": "supported", "variant": True, "also": also, "remedies": remedies or {}}
    return dataclasses.field(default=default, metadata=note)


def choice(default: str, remedies: Mapping[str, str]) -> Any:
    """A supported key with a fixed set of values. `remedies` as in `variant`: of names that other programs have."""
    return dataclasses.field(default=default, metadata={"status": "supported", "remedies": remedies})


def never_unread(default: Any) -> Any:
    """A key that changes what is trained, so that ignoring it would be an error and not a warning.

    If no chosen variant reads it, any value but the default is an error.
    """
    return dataclasses.field(default=default, metadata={"status": "supported", "is_never_unread": True})


def renamed(default: Any, current: str, becomes: str = "") -> Any:
    """A key that is now called `current`; what it holds is stored there, in the same type.

    `becomes`: of a switch that is now a value of `current`. It is stored if the switch is on.
    """
    reason = (
        f"now written {current}: {becomes}, and stored so" if becomes else f"now called {current}, and stored there"
    )
    metadata = {"status": "renamed", "current": current, "becomes": becomes, "reason": reason}
    return dataclasses.field(default=default, metadata=metadata)
