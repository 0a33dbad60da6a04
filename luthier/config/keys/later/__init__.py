"""Keys of variants that this version does not have, and who would read them.

They are listed so that files written for the reference get a reason instead of "unknown key". When a variant is added,
its class moves to the variant's file and its line leaves this table.
"""

from luthier.config.keys.later import launch
from luthier.config.sections import Section

LATER = (
    Section("megatron", launch.MegatronSwitches, commands=("train",)),
    Section("hyper_parallel", launch.HyperParallelConfig, commands=("train",), key="use_hyper_parallel"),
)
