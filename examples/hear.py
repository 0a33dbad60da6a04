"""Teach a small model to hear, from nothing, in three minutes on a CPU: does this tone rise or fall?

    python examples/hear.py

It makes 800 tones of one second in noise, makes a model of the Qwen2-Audio form with 0.4 M random weights, trains it
with examples/hear.yaml, and asks it about 100 new tones. Silence is the control.
"""

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path("hear")
RATE, SECONDS, NUM_TONES, NUM_ASKED = 16_000, 1, 800, 100
QUESTION, ANSWERS = "Does it rise or fall?", ("rise", "fall")
MARK = "<|AUDIO|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    f"{{% if part.type == 'audio' %}}<|audio_bos|>{MARK}<|audio_eos|>{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tone(answer: str, chance: Any) -> Any:
    """A pitch that goes up or down by one or two octaves, anywhere between 200 and 3,000 Hz, in noise."""
    import numpy as np

    low = chance.uniform(200, 750)
    high = low * 2 ** chance.uniform(1, 2)
    start, end = (low, high) if answer == "rise" else (high, low)
    pitch = np.linspace(start, end, RATE * SECONDS)
    wave = np.sin(2 * np.pi * np.cumsum(pitch) / RATE + chance.uniform(0, 6)) * chance.uniform(0.2, 0.8)
    return (wave + chance.normal(0, 0.02, len(wave))).astype(np.float32)


def make(folder: Path, num_tones: int, *, seed: int) -> list[dict]:
    """Write tones and return their rows."""
    import numpy as np
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    chance, rows = np.random.default_rng(seed), []
    for number in range(num_tones):
        answer = ANSWERS[int(chance.integers(2))]
        path = folder / f"{number}.wav"
        soundfile.write(path, tone(answer, chance), RATE)
        messages = [{"role": "user", "content": f"<audio>{QUESTION}"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "audios": [str(path.resolve())]})
    return rows


def silence(path: Path) -> None:
    import numpy as np
    import soundfile

    soundfile.write(path, np.zeros(RATE * SECONDS, np.float32), RATE)


def write_data(folder: Path, rows: list[dict]) -> None:
    (folder / "tones.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", "audios": "audios"}
    info = {"tones": {"file_name": "tones.json", "formatting": "openai", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def byte_tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", MARK, "<|audio_bos|>", "<|audio_eos|>")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "audio_token": MARK,
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
    )


def make_model(folder: Path) -> None:
    """An audio tower, a projector and a language model with random weights, and their processor."""
    import torch
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = byte_tokenizer()
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 64,
            "d_model": 96,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "max_source_positions": 50 * SECONDS,
            "initializer_range": 0.15,  # with a smaller one, what it hears is lost beside its positions
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 264,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        audio_token_index=tokenizer.audio_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config)
    part = WhisperFeatureExtractor(feature_size=64, chunk_length=SECONDS, sampling_rate=RATE)
    processor = Qwen2AudioProcessor(feature_extractor=part, tokenizer=tokenizer, chat_template=TEMPLATE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{folder}: {sum(weight.numel() for weight in model.parameters()):,} weights")


def share_right(chat: Any, rows: list[dict], files: Sequence[str]) -> float:
    """The share of answers about `files` that are those of `rows`."""
    right = 0
    for row, file in zip(rows, files, strict=True):
        chat.clear()
        right += chat.ask(QUESTION, audios=[file]).strip() == row["messages"][1]["content"]
    return right / len(rows)


def main() -> None:
    import yaml

    import luthier

    if importlib.util.find_spec("soundfile") is None:
        sys.exit("hear: soundfile is not installed: pip install 'luthier[audio]'")
    start = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_data(FOLDER / "data", make(FOLDER / "data" / "tones", NUM_TONES, seed=0))
    make_model(FOLDER / "model")
    unseen = make(FOLDER / "new", NUM_ASKED, seed=1)
    silence(FOLDER / "silence.wav")
    luthier.train(yaml.safe_load(Path(__file__).with_name("hear.yaml").read_text(encoding="utf-8")))
    chat = luthier.chat({"model_name_or_path": str(FOLDER / "out"), "temperature": 0, "max_new_tokens": 8})
    new = share_right(chat, unseen, [row["audios"][0] for row in unseen])
    deaf = share_right(chat, unseen, [str(FOLDER / "silence.wav")] * NUM_ASKED)
    print(f"{NUM_ASKED} new tones: {new:.0%} right; silence: {deaf:.0%}; {time.monotonic() - start:.0f} s")
    if new < 0.9 or deaf > 0.7:
        sys.exit("hear: the model does not hear")


if __name__ == "__main__":
    main()
