"""`early_stopping_steps`: training ends after so many evaluations without a better metric, in a resumed run too.

transformers counts from 0 again after a resume, so a run that was stopped would train on for longer than one that was
not, and a run that had ended early would go on when it is started again.
"""

from typing import Any

import transformers

from luthier.core.log import info


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """Named as in transformers, since the checkpoint keeps the count under the name of the class."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        match state.stateful_callbacks.get(NAME):
            case {"attributes": {"early_stopping_patience_counter": int(count)}} if state.global_step:
                self.early_stopping_patience_counter = count
        # A checkpoint of a run without this key has no such entry, and transformers replaces one only.
        state.stateful_callbacks[NAME] = self.state()
        count, patience = self.early_stopping_patience_counter, self.early_stopping_patience
        if count >= patience and state.global_step < state.max_steps:
            info(
                f"early_stopping_steps: {patience}: the metric was not better in {count} evaluations up to step"
                f" {state.global_step}, so training has ended -> a larger number lets it go on"
            )
            control.should_training_stop = True


NAME = EarlyStoppingCallback.__name__
"""In `stateful_callbacks` of trainer_state.json."""
