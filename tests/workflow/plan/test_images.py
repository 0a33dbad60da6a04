"""The plan of a run with images: what is counted is what a real batch and a real encoder hold."""

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.data.prepare import prepare
from luthier.model.loading.config import load_config
from luthier.workflow.plan.images import _ImageCounter, images_of, trace_images
from luthier.workflow.plan.make import make_plan
from luthier.workflow.plan.shape import Unplanned, build_shape
from luthier.workflow.plan.text import as_json, lines_of
from luthier.workflow.seeing import pixels_for
from luthier.workflow.text import load_text_side
from tests.matrix import representatives
from tests.runs.test_images import EYES, world
from tests.runs.test_images import STAGES as OF_STAGES
from tests.torchvision_models import FAMILIES

UNTRACED = ("idefics3", "smolvlm", "mistral3", "gemma4", "lfm2_vl", "llama4")
"""Their encoders read numbers, which tensors without data do not have."""
TRACED = [family for family in FAMILIES if family not in UNTRACED]


@pytest.fixture
def sides(tmp_path):
    def of(family, **keys):
        run = load_train({**world(tmp_path / family, family), "output_dir": str(tmp_path / "out"), **keys})
        stage, text = STAGES.get(run.stage), load_text_side(run)
        return run, stage, text, prepare(run, stage.rows, text.encoding), detect()

    return of


@pytest.mark.parametrize("family", representatives(TRACED, "llava", "paddleocr_vl"))
def test_a_traced_encoder_holds_what_a_real_one_holds(sides, family):
    run, stage, text, data, machine = sides(family, **EYES)
    rows = [data.train[number] for number in range(3)]
    shape = build_shape(run, stage, text, load_config(text.source), machine)
    images = images_of(rows, text.media, None, torch.float32)
    kept, recomputed = (trace_images(shape.model, images, half=None, recomputes=again) for again in (False, True))
    assert recomputed.kept_bytes < kept.kept_bytes
    real = shape.model.to_empty(device="cpu")
    for tensor in (*real.parameters(), *real.buffers()):
        torch.nn.init.constant_(tensor, 0.01)
    inputs = pixels_for(real, text).inputs(rows)
    counter = _OnRealTensors(real, inputs.values())
    counter.known |= {tensor.untyped_storage()._cdata for tensor in (*real.parameters(), *real.buffers())}
    with counter:
        found = real.get_image_features(**inputs, return_dict=True).pooler_output
        vectors = list(found) if isinstance(found, list | tuple) else [found]
        del found
        num_forward, bytes_kept = counter.num_calls, counter.live_bytes
        torch.autograd.backward([one.float().sum() for one in vectors])
    planned, real_bytes = (kept.early_bytes, kept.kept_bytes), (max(counter.history[:num_forward]), bytes_kept)
    if family == "pixtral":  # each layer of the plan has a mask of its own in float32
        assert all(more >= less for more, less in zip(planned, real_bytes, strict=True))
    else:
        assert planned == pytest.approx(real_bytes, rel=0.05)


class _OnRealTensors(_ImageCounter):
    """Tensors have numbers here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.num_calls += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        self.history.append(self.live_bytes)
        return result


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_images_are_those_of_the_largest_batch(sides, stage):
    """Rows have one, two and no images in turn, and each half of a pair needs the images of its prompt."""
    keys = OF_STAGES["dpo"] if stage == "dpo" else {}
    run, stage_, text, data, machine = sides("llava", **keys, per_device_train_batch_size=12)
    plan = make_plan(run, stage_, text, data, machine)
    num_parts = 2 if stage == "dpo" else 1
    assert (plan.images.number, plan.images.num_tokens) == (12, 12 * 4 * num_parts)
    assert plan.images.pixel_bytes == 12 * num_parts * 3 * 28 * 28 * 4
    found = as_json(plan)["largest_batch"]
    assert (found["images"], found["image_tokens"], found["pixel_bytes"]) == (
        12, plan.images.num_tokens, plan.images.pixel_bytes,
    )  # fmt: skip
    assert f"  images of the largest batch: 12, {plan.images.num_tokens} tokens, " in "\n".join(lines_of(plan))


def test_what_learns_takes_more(sides):
    frozen, learning = (make_plan(*sides("llava", **keys)) for keys in ({}, EYES))
    assert learning.traces.kept.early_bytes > frozen.traces.kept.early_bytes
    assert learning.traces.kept.num_operations > frozen.traces.kept.num_operations
    blind = make_plan(*sides("llava", dataset="texts"))
    assert blind.images is None and as_json(blind)["largest_batch"]["images"] == 0
    assert blind.peak_bytes < frozen.peak_bytes


def test_an_encoder_that_reads_numbers_has_no_plan(sides):
    with pytest.raises(Unplanned, match="what reads images cannot be traced"):
        make_plan(*sides("idefics3"))
