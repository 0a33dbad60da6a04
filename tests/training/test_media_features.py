"""Features of frozen encoders are computed once, for all epochs and runs."""

import functools

import pytest
import torch
from transformers.models.llava.modeling_llava import LlavaModel

import luthier
from luthier.core.errors import InvalidInput, ModelError
from luthier.data.collate import concatenate_rows, model_inputs
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.multimodal import find_parts, in_parts
from luthier.training.media_features import FeatureKeeper
from luthier.training.parts import collator
from luthier.workflow.seeing import samples_with_media
from tests.data.test_pixels import Seeing, paired
from tests.model.media.test_towers import UNABLE, counted, fault
from tests.runs.test_images import STAGES, losses, world
from tests.torchvision_models import FAMILIES


class Rows(list):
    column_names = ("chosen_input_ids", "images")


def keeper(seeing, folder, *, bf16=False):
    from dataclasses import replace
    from types import SimpleNamespace

    from luthier.data.cache.store import Cache

    args = SimpleNamespace(device=torch.device("cpu"), bf16=bf16, fp16=False, eval_batch_size=2)
    folder.mkdir(exist_ok=True)
    return FeatureKeeper(seeing.model, replace(seeing.pixels, shares=True), "processor", args, Cache(folder))


def freeze(model):
    parts = find_parts(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not in_parts(name, (*parts.encoders, *parts.projector)))


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_features_give_the_loss_of_images_in_every_family_and_layout(family, tmp_path):
    seeing = Seeing(tmp_path, family)
    if family in UNABLE or fault(seeing, False) is not None:
        pytest.skip("takes no features")
    freeze(seeing.model)
    rows = paired(seeing.rows)
    with counted(seeing.model) as runs:
        pixels = keeper(seeing, tmp_path / "cache").keep([Rows(rows)], {})
        assert runs
        runs.clear()
        again = keeper(seeing, tmp_path / "cache").keep([Rows(rows[::-1])], {})
        assert not runs, "the rows of another run have the same images"
        assert again.stored.folder == pixels.stored.folder
    for concatenates in (False, True):
        if concatenates:
            if isolates_samples(seeing.model, lambda base: samples_with_media(seeing.pixels)) is not None:
                return
            isolate_samples(seeing.model)
        expected = seeing.loss(collator(256, concatenate_rows if concatenates else None, pixels=seeing.pixels)(rows))
        with counted(seeing.model) as runs:
            batch = collator(256, concatenate_rows if concatenates else None, pixels=pixels)(rows)
            assert "pixel_values" not in {*batch["media"], *model_inputs(batch)}
            assert seeing.loss(batch) == pytest.approx(expected, rel=1e-6)
            single = collator(256, concatenate_rows if concatenates else None, pixels=pixels)(seeing.rows[:1])
        assert not runs
        assert seeing.loss(single) == pytest.approx(
            seeing.loss(
                collator(256, concatenate_rows if concatenates else None, pixels=seeing.pixels)(seeing.rows[:1])
            ),
            rel=1e-6,
        )


def test_features_are_computed_in_the_numbers_of_the_run(tmp_path):
    """With `bf16: true`, weights in float32 compute in bfloat16, here as in training."""
    seeing = Seeing(tmp_path, "llava")
    assert fault(seeing, False) is None
    freeze(seeing.model)
    pixels = keeper(seeing, tmp_path / "cache", bf16=True).keep([Rows(paired(seeing.rows))], {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (seeing.loss(collator(256, None, pixels=p)(seeing.rows)) for p in (seeing.pixels, pixels))
    assert found == expected


@pytest.fixture
def llava(tmp_path):
    seeing = Seeing(tmp_path, "llava")
    assert fault(seeing, False) is None
    return seeing


def test_other_weights_have_other_features(llava, tmp_path):
    freeze(llava.model)
    first = keeper(llava, tmp_path / "cache").keep([Rows(paired(llava.rows))], {})
    next(llava.model.model.language_model.parameters()).data.add_(1)
    assert keeper(llava, tmp_path / "cache").keep([Rows(paired(llava.rows))], {}).stored == first.stored
    next(llava.model.model.multi_modal_projector.parameters()).data.add_(1)
    assert keeper(llava, tmp_path / "cache").keep([Rows(paired(llava.rows))], {}).stored != first.stored


def test_features_that_change_are_not_kept(llava, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"^cache_media_features: .*vision_tower.* learns, so the features of images"):
        keeper(llava, tmp_path / "cache").keep([Rows(paired(llava.rows))], {})
    freeze(llava.model)
    (tmp_path / "other").mkdir()
    other = Seeing(tmp_path / "other", "llava")
    next(other.model.model.vision_tower.parameters()).data.add_(1)
    with pytest.raises(ModelError, match=r"^cache_media_features: the teacher model has its own encoder"):
        keeper(llava, tmp_path / "cache").keep([Rows(paired(llava.rows))], {"teacher": other.model})
    monkeypatch.setenv("LUTHIER_CACHE_GB", "0.000001")
    with pytest.raises(InvalidInput, match=r"take .* MB, and the cache may take 0\.001 MB -> raise LUTHIER_CACHE_GB"):
        keeper(llava, tmp_path / "cache").keep([Rows(paired(llava.rows))], {})


@pytest.mark.parametrize("stage", ["dpo", pytest.param("grpo", marks=pytest.mark.thorough)])
def test_no_epoch_and_no_second_run_encodes_an_image(stage, tmp_path, monkeypatch, capsys):
    own, seen = LlavaModel.get_image_features, []

    @functools.wraps(own)
    def counting(self, pixel_values, **more):
        if not pixel_values.is_meta:  # the plan traces it without numbers
            seen.append(len(pixel_values))
        return own(self, pixel_values, **more)

    monkeypatch.setattr(LlavaModel, "get_image_features", counting)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    keys = {**world(tmp_path / "w", "llava"), **STAGES[stage], "max_steps": 6}
    if stage == "grpo":
        keys["reward_funcs"] = "tests.runs.test_images:more_images_and_letters"
    expected = losses(luthier.train({**keys, "output_dir": str(tmp_path / "plain")}))
    counts, logged = [], []
    for name in ("first", "second"):
        seen.clear()
        result = luthier.train({**keys, "cache_media_features": True, "output_dir": str(tmp_path / name)})
        assert losses(result) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        counts.append(sum(seen))
        logged.append(capsys.readouterr().err)
    tried = 3 + 5
    assert counts == [tried + 12, tried], "12 images in 12 rows, each encoded once"
    assert "cache_media_features: computing the features of 8 samples once" in logged[0]
    assert "features of 8 samples with media" in logged[1]
