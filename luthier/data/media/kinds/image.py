"""Images: files that Pillow opens, upright and in RGB (`luthier.data.media.reader`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.media import reader
from luthier.data.media.items import path_of
from luthier.data.media.kinds import Measure, MediaKind, Processor, Size
from luthier.data.types import PLACE

if TYPE_CHECKING:
    from PIL.Image import Image


def _measured(path: str) -> Measure:
    return reader.size_of(path)


def _size(measure: Measure, processor: Processor) -> Size:
    return measure


def _blank(size: Size, processor: Processor) -> "Image":
    from PIL import Image

    height, width = size
    return Image.new("RGB", (int(width), int(height)))


def _noise(size: Size, processor: Processor) -> "Image":
    import numpy as np
    from PIL import Image

    height, width = map(int, size)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _loaded(path: str, processor: Processor) -> "Image":
    return reader.load_image(path)


def _given(samples: "Sequence[Sequence[Image]]", processor: Processor) -> dict[str, Any]:
    return {"images": [list(some) for some in samples], "images_kwargs": {"return_tensors": "pt"}}


def _shown(measure: Measure) -> str:
    height, width = measure
    return f"{height:.0f}x{width:.0f}"


KIND = MediaKind(
    name="image",
    noun="an image",
    one="image",
    column="images",
    place=PLACE,
    tag=("IMAGE_PLACEHOLDER", "<image>"),
    parts=("image", "image_url", "input_image"),
    keys=("image", "image_url", "url", "path", "bytes", "base64", "value"),
    path_of=path_of,
    measured=_measured,
    size=_size,
    blank=_blank,
    noise=_noise,
    loaded=_loaded,
    given=_given,
    former=reader.former_size,
    of_loaded=lambda image: f"{image.height}x{image.width} pixels",
    shown=_shown,
    unit=" pixels",
)
