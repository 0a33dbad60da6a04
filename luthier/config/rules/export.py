"""Rules about the keys of `luthier export`."""

import re

from luthier.config.rules.engine import (
    Rule,
    Rules,
    When,
    all_of,
    at_least,
    is_changed,
    is_given,
    is_set,
    not_,
    warning,
)

GPTQ_BITS = (2, 3, 4, 8)
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w([\w.-]*\w)?", re.ASCII)
"""A name that the hub takes: the owner, if it is not that of the token, and the repository."""

_quantizes = is_given("export", "export_quantization_bit")
_with_gptq = When(_quantizes)


def _of_gptq(key: str) -> Rule:
    return warning(
        (key, "export_quantization_bit"),
        "is read only if export_quantization_bit is given",
        "give it, or leave this out",
        all_of(is_changed(key), not_(_quantizes)),
    )


EXPORT_RULES = Rules(
    (
        Rule(("export_dir",), "is missing", "say which folder to write to", not_(is_set("export", "export_dir"))),
        Rule(
            ("export_hub_model_id",),
            "the hub takes no repository of this name, so the export could not be uploaded",
            "write owner/name, with letters, digits and - _ . between them",
            lambda run: (
                bool(run.export.export_hub_model_id) and not _REPOSITORY.fullmatch(run.export.export_hub_model_id)
            ),
        ),
        at_least("export", "export_size", 1),
        at_least("export", "export_max_kl", 0),
        warning(
            ("export_max_kl", "export_check"),
            "is not read, since the check is switched off",
            "leave it out, or set export_check: true",
            all_of(is_given("export", "export_max_kl"), not_(is_set("export", "export_check"))),
        ),
        _with_gptq.refuses(
            ("export_quantization_bit",),
            "GPTQ has layouts for 2, 3, 4 and 8 bits",
            "give one of these",
            lambda run: run.export.export_quantization_bit not in GPTQ_BITS,
        ),
        _with_gptq.refuses(
            ("export_quantization_bit", "export_quantization_dataset"),
            "the weights are rounded so that outputs on real texts stay close, and no texts are named",
            "give export_quantization_dataset: a file of texts, or a dataset of the hub",
            not_(is_set("export", "export_quantization_dataset")),
        ),
        _with_gptq.refuses(
            ("export_quantization_bit", "adapter_name_or_path"),
            "an export merges adapters or quantizes the model, one at a time",
            "export the merged model first, then quantize its folder",
            is_set("model", "adapter_name_or_path"),
        ),
        _with_gptq.refuses(
            ("export_gguf", "export_quantization_bit"),
            "a GGUF file is written from full-precision weights, and these are quantized to GPTQ",
            "leave one of the two out; two exports give both",
            is_given("export", "export_gguf"),
        ),
        at_least("export", "export_quantization_nsamples", 1),
        at_least("export", "export_quantization_maxlen", 1),
        _of_gptq("export_quantization_dataset"),
        _of_gptq("export_quantization_nsamples"),
        _of_gptq("export_quantization_maxlen"),
    )
)
