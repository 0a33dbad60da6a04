"""The plan of a run with videos and audio: what is counted is what a real batch and real encoders hold."""

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.data.prepare import prepare
from luthier.model.loading.config import load_config
from luthier.workflow.plan.images import images_of, trace_images, vectors_of
from luthier.workflow.plan.make import make_plan
from luthier.workflow.plan.shape import Unplanned, build_shape
from luthier.workflow.plan.text import as_json, lines_of
from luthier.workflow.seeing import pixels_for
from luthier.workflow.text import load_text_side
from tests.matrix import representatives
from tests.runs.test_audio import write as write_audio
from tests.runs.test_videos import write
from tests.workflow.plan.test_images import _OnRealTensors

pytest.importorskip("av")
pytest.importorskip("soundfile")


def sides(keys, tmp_path, **more):
    run = load_train({**keys, "output_dir": str(tmp_path / "out"), **more})
    stage, text = STAGES.get(run.stage), load_text_side(run)
    return run, stage, text, prepare(run, stage.rows, text.encoding), detect()


@pytest.mark.parametrize("family", representatives(["qwen2_vl", "qwen3_vl", "glm4v", "qwen2_5_omni"], "qwen2_5_omni"))
def test_traced_encoders_hold_what_real_ones_hold(family, tmp_path):
    (tmp_path / "world").mkdir()
    keys = write(tmp_path / "world", family)
    run, stage, text, data, machine = sides(keys, tmp_path)
    rows = [data.train[number] for number in range(len(data.train))]
    shape = build_shape(run, stage, text, load_config(text.source), machine)
    images = images_of(rows, text.media, None, torch.float32)
    assert "videos" in images.plurals and ("audio" in images.plurals) == (family == "qwen2_5_omni")
    kept, recomputed = (trace_images(shape.model, images, half=None, recomputes=again) for again in (False, True))
    assert recomputed.kept_bytes <= kept.kept_bytes
    real = shape.model.to_empty(device="cpu")
    for tensor in (*real.parameters(), *real.buffers()):
        torch.nn.init.constant_(tensor, 0.01)
    inputs = pixels_for(real, text).inputs(rows)
    counter = _OnRealTensors(real, inputs.values())
    counter.known |= {tensor.untyped_storage()._cdata for tensor in (*real.parameters(), *real.buffers())}
    with counter:
        vectors = list(vectors_of(real, type(images)(images.plurals, images.number, images.num_tokens, inputs)))
        num_forward, bytes_kept = counter.num_calls, counter.live_bytes
        torch.autograd.backward([one.float().sum() for one in vectors])
    real_bytes = (max(counter.history[:num_forward]), bytes_kept)
    assert (kept.early_bytes, kept.kept_bytes) == pytest.approx(real_bytes, rel=0.05)


def test_the_plan_counts_items_of_all_kinds(tmp_path):
    (tmp_path / "world").mkdir()
    keys = write(tmp_path / "world", "qwen2_5_omni")
    plan = make_plan(*sides(keys, tmp_path))
    assert plan.images.number == as_json(plan)["largest_batch"]["images"] == 6
    assert "  images, audio, videos of the largest batch: 6, " in "\n".join(lines_of(plan))


def test_an_encoder_without_a_function_has_no_plan(tmp_path):
    (tmp_path / "world").mkdir()
    with pytest.raises(Unplanned, match="what reads audio cannot be traced"):
        make_plan(*sides(write_audio(tmp_path / "world"), tmp_path))
