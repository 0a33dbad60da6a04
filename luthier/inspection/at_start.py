"""At the start of a run: how its chat format differs from the model's own chat template."""

from luthier.core.log import info, warn
from luthier.data.rows.encoding import Encoding
from luthier.inspection.agreement import ONLY_DEFAULT_SYSTEM, compare, default_systems
from luthier.inspection.sample_dialogues import SHORT
from luthier.inspection.server import Server


def report_template(training: Encoding, model: str, stop_ids: tuple[int, ...]) -> None:
    """Log in a line or two how the named format of a run differs from the model's own chat template.

    Two short conversations show most differences; `luthier template check` shows all.
    """
    name = training.template.name
    server = Server(training.encoder.tokenizer, training.enable_thinking, training.preserve_thinking)
    for sample in SHORT:
        finding = compare(training, server, sample.dialogue, stop_ids)
        if finding.status == "differs":
            place, what = finding.difference, finding.reason
            if place is not None and not what:
                what = f"from token {place.position} on {place.training!r} in training, there {place.server!r}"
            if what == ONLY_DEFAULT_SYSTEM:
                what += " ({!r} in training, there {!r})".format(*default_systems(training, server))
            warn(f"template: {name} differs from the model's own chat template: {what}")
            takes_over = training.template.replace_chat_template
            fate = "the saved model gets one made from it" if takes_over else "template: auto trains the model's own"
            info(f"  `luthier template check {model} {name}` shows more; {fate}")
            return
