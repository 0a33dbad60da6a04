"""Rules about FP8 training."""

from luthier.config.rules.engine import Rules, When, all_of, is_given, is_set, not_, warning

_with_fp8 = When(is_set("fp8", "fp8"))
_gathers = is_set("fp8", "fp8_enable_fsdp_float8_all_gather")

FP8_RULES = Rules(
    (
        _with_fp8.refuses(
            ("fp8", "quantization_bit"),
            "multiplies by weights in 8 bits, and quantized weights are kept in formats of their own",
            "leave one of the two out",
            is_given("quantization", "quantization_bit"),
        ),
        _with_fp8.refuses(
            ("fp8", "bf16", "pure_bf16", "fp16"),
            "everything but these matrix products is computed in bfloat16",
            "set bf16: true",
            lambda run: run.training["fp16"] or not (run.training["bf16"] or run.finetuning.pure_bf16),
        ),
        warning(
            ("fp8_enable_fsdp_float8_all_gather", "fp8"),
            "is not read, since fp8 is off",
            "set fp8: true, or leave it out",
            all_of(_gathers, not_(is_set("fp8", "fp8"))),
        ),
        _with_fp8.warns(
            ("fp8_enable_fsdp_float8_all_gather", "fsdp"),
            "has no effect, since FSDP shards no weights in this run",
            "set fsdp, or leave it out",
            all_of(_gathers, not_(is_set("training", "fsdp"))),
        ),
        _with_fp8.refuses(
            ("fp8_enable_fsdp_float8_all_gather", "fp8_backend"),
            "is done by torchao only",
            "set fp8_backend: torchao",
            all_of(_gathers, lambda run: run.fp8.fp8_backend in ("te", "msamp")),
        ),
    )
)
