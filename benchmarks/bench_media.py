"""CPU seconds of preparing videos and audio against reading them alone, and the disk that an item takes.

    python -m benchmarks.bench_media

A video of 60 s in 1080p at 30 frames a second, of which Qwen2-VL's processor takes 2 a second, is prepared, and the
same frames are decoded alone. 1,000 flac files of 5 s are prepared for Qwen2-Audio's processor, and read alone. The
models are tiny, and their processors those of the real ones. The two alternate, and the best of each counts. `--small`
is a try with a tenth of each. Needs torchvision, PyAV and soundfile.
"""

import argparse
import json
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HEIGHT, WIDTH, RATE, SECONDS = 1080, 1920, 30, 60
NUM_CLIPS, CLIP_SECONDS = 1000, 5
VIDEO_GOAL, AUDIO_GOAL, DISK_GOAL = 1.2, 1.3, 20_000


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Of all threads and processes that `work` used."""

    def used() -> float:
        return sum(
            getattr(resource.getrusage(who), name)
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            for name in ("ru_utime", "ru_stime")
        )

    start = used()
    work()
    return used() - start


def write_video(path: Path, seconds: int) -> None:
    """A noisy image that moves: the decoder has motion to follow and detail to draw."""
    import av
    import numpy as np

    chance = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([rows * 255 // HEIGHT, columns * 255 // WIDTH, (rows + columns) % 256], -1)
    image = (image * 0.8 + chance.integers(0, 50, image.shape)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(np.roll(image, 4 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_rows(folder: Path, kind: str, names: Sequence[str]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"<{kind}>What is this?"}, {"role": "assistant", "content": "It."}],
         f"{kind}s": [name]}
        for name in names
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", f"{kind}s": f"{kind}s"}
    info = {"rows": {"file_name": "rows.json", "formatting": "openai", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def text_side(folder: Path, **more: Any) -> tuple[Any, Any]:
    from luthier.config.load import load_train
    from luthier.workflow.text import load_text_side

    keys = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "dataset": "rows", "stage": "sft"}
    run = load_train({**keys, "do_train": True, "output_dir": str(folder / "out"), **more})
    return run, load_text_side(run)


def prepared(run: Any, side: Any, num_items: int) -> None:
    from luthier.core.kinds import STAGES
    from luthier.data.prepare import prepare

    table = prepare(run, STAGES.get("sft").rows, side.encoding).table
    assert table is not None and len(table) == num_items, "all rows are kept"


def compare(
    folder: Path, reading: Callable[[], Any], num_items: int, repeats: int, **more: Any
) -> tuple[float, float, int]:
    """(CPU seconds of reading alone, of preparation, bytes on disk)."""
    from luthier.data.media.kinds import video

    alone, ours, num_bytes = [], [], 0
    for _ in range(repeats):
        cache = Path(tempfile.mkdtemp(dir=folder))  # a new name each time, as a process remembers what it measured
        os.environ["LUTHIER_CACHE"] = str(cache)
        video._require_readable.cache_clear()  # what a new process would not know
        run, side = text_side(folder, **more)  # nor the blocks
        alone.append(cpu_seconds(reading))
        ours.append(cpu_seconds(partial(prepared, run, side, num_items)))
        num_bytes = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return min(alone), min(ours), num_bytes


def videos(folder: Path, seconds: int, repeats: int) -> None:
    from transformers import AutoProcessor

    from luthier.data.media import frames
    from luthier.data.media.kinds import media_kind
    from luthier.data.media.kinds.video import HEAD
    from tests.omni_models import in_order
    from tests.torchvision_models import tiny_qwen2_vl

    tiny_qwen2_vl(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    slot = in_order(video="<|vision_start|><|video_pad|><|vision_end|>")
    processor.chat_template = processor.tokenizer.chat_template = slot
    processor.save_pretrained(folder / "model")
    path = str(folder / "a.mp4")
    write_video(Path(path), seconds)
    write_rows(folder, "video", ["a.mp4"])
    limits = {"video_fps": 2.0, "cutoff_len": 100_000}
    _, side = text_side(folder, **limits)
    kind = media_kind("video")
    size = kind.size(kind.measured(path), side.media.processor)
    numbers = [int(number) for number in size[HEAD:]]
    alone, ours, _ = compare(folder, lambda: frames.frames_of(path, numbers, size[3]), 1, repeats, **limits)
    print(f"video of {seconds} s, {len(numbers)} frames of {WIDTH}x{HEIGHT}")
    tell(alone, ours, VIDEO_GOAL)


def audio(folder: Path, num_clips: int, repeats: int) -> None:
    from transformers import AutoProcessor, WhisperFeatureExtractor

    from luthier.data.media.kinds.audio import load_audio
    from tests.hearing_models import RATE as AUDIO_RATE
    from tests.hearing_models import tiny_qwen2_audio, tone

    tiny_qwen2_audio(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    processor.feature_extractor = WhisperFeatureExtractor(feature_size=128)  # that of the real one: 30 seconds
    processor.save_pretrained(folder / "model")
    names = [f"{number}.flac" for number in range(num_clips)]
    for number, name in enumerate(names):
        tone(folder / name, seconds=CLIP_SECONDS, start=200 + number % 400)
    write_rows(folder, "audio", names)

    def reading() -> None:
        for name in names:
            load_audio(str(folder / name), AUDIO_RATE)

    for template in ("auto", "qwen2_audio"):
        alone, ours, num_bytes = compare(folder, reading, num_clips, repeats, template=template)
        print(f"{num_clips:,} flac files of {CLIP_SECONDS} s, template: {template}")
        tell(alone, ours, AUDIO_GOAL)
        print(f"  on disk   {num_bytes / num_clips:10,.0f} bytes an item (goal: at most {DISK_GOAL:,})")


def tell(alone: float, ours: float, goal: float) -> None:
    print(f"  read      {alone:10.2f} CPU s")
    print(f"  prepared  {ours:10.2f} CPU s, {ours / alone:.2f} times as much (goal: at most {goal})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tenth of each")
    parser.add_argument("--only", choices=("video", "audio"))
    options = parser.parse_args()
    share = 10 if options.small else 1
    for name, work, size in (("video", videos, SECONDS), ("audio", audio, NUM_CLIPS)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                work(Path(folder), size // share, options.repeats)


if __name__ == "__main__":
    main()
