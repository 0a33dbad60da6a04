"""Encoders that run once for all rows that show the same images, in every family."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.data.collate import concatenate_rows, sequences
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.heads.output_head import inspect_head
from luthier.model.media.towers import _chosen, is_frozen, owner_of, sharing_fault
from luthier.model.multimodal import find_parts
from luthier.model.types import Models
from luthier.stages._causal import next_token_loss
from luthier.training.parts import collator, layout_of
from luthier.workflow.seeing import rows_that_share, samples_with_media
from tests.data.test_pixels import Seeing, paired
from tests.tiny import tiny_llama
from tests.torchvision_models import FAMILIES

UNABLE: dict[str, str] = {}
"""Family -> why its rows do not share features."""


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request, tmp_path_factory) -> Seeing:
    found = Seeing(tmp_path_factory.mktemp(request.param), request.param)
    found.family = request.param
    return found


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp("llava"), "llava")


def fault(seeing, concatenates):
    layout = layout_of(256, concatenate_rows if concatenates else None)
    return sharing_fault(seeing.model, lambda base: rows_that_share(seeing.pixels, layout, base.device), draws=True)


@contextmanager
def counted(model):
    """The numbers that enter the encoder, one entry for each of its runs."""
    runs = []

    def count(module, args, given):
        runs.append(next(value for value in (*args, *given.values()) if isinstance(value, torch.Tensor)).numel())

    encoder = model.get_submodule(find_parts(model).encoders[0])
    hook = encoder.register_forward_pre_hook(count, with_kwargs=True)
    yield runs
    hook.remove()


def learned(seeing, batch):
    """Loss, gradients of all weights, and what entered the encoder."""
    seeing.model.zero_grad()
    with counted(seeing.model) as runs:
        loss = next_token_loss(Models(seeing.model, inspect_head(seeing.model)), batch).total
    loss.backward()
    return loss.item(), {n: w.grad for n, w in seeing.model.named_parameters() if w.grad is not None}, sum(runs)


@contextmanager
def in_64_bits(seeing, batches):
    """Sums in another order differ by less than what is compared."""
    for batch in batches:
        batch["media"] = {n: v.double() if v.is_floating_point() else v for n, v in batch["media"].items()}
    seeing.model.double()
    yield
    seeing.model.float()


def require_same(seeing, rows, concatenates, share):
    plain, shared = (
        collator(256, concatenate_rows if concatenates else None, pixels=replace(seeing.pixels, shares=shares))(rows)
        for shares in (False, True)
    )
    expected = seeing.loss(plain)
    assert seeing.loss(shared) == pytest.approx(expected, rel=1e-6)
    with in_64_bits(seeing, (plain, shared)):
        expected, gradients, seen = learned(seeing, plain)
        found, own, own_seen = learned(seeing, shared)
        assert found == pytest.approx(expected, rel=1e-9)
        assert own_seen == seen * share
        assert own.keys() == gradients.keys()
        limit = 1e-6 * max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert float((own[name] - gradient).abs().max()) < limit, name


def layouts(seeing):
    yield False
    if isolates_samples(seeing.model, lambda base: samples_with_media(seeing.pixels)) is None:
        isolate_samples(seeing.model)
        yield True


def test_pairs_and_sampled_answers_of_a_prompt_share_its_features_and_both_teach_the_encoder(seeing):
    for concatenates in layouts(seeing):
        assert fault(seeing, concatenates) == UNABLE.get(seeing.family)
        if seeing.family not in UNABLE:
            require_same(seeing, paired(seeing.rows), concatenates, 1 / 2)
            first, second = seeing.rows[:2]
            answers = [{**row, "labels": row["labels"][:-end], "input_ids": row["input_ids"][:-end]}
                       for row in (first, second) for end in (1, 2, 3, 4)]  # fmt: skip
            require_same(seeing, answers, concatenates, 1 / 4)


def test_a_frozen_encoder_runs_once_for_two_halves_of_a_batch_and_a_learning_one_twice(llava):
    assert fault(llava, False) is None
    batch = collator(256, None, pixels=replace(llava.pixels, shares=True))(paired(llava.rows))
    halves = [sequences(batch, 0, 4), sequences(batch, 4, 8)]
    with counted(llava.model) as runs:
        expected = [llava.loss(half) for half in halves]
    assert len(runs) == 2 and not is_frozen(owner_of(llava.model))
    llava.model.model.vision_tower.requires_grad_(False)
    assert not is_frozen(owner_of(llava.model)), "its projector learns"
    llava.model.model.multi_modal_projector.requires_grad_(False)
    try:
        with counted(llava.model) as runs:
            assert [llava.loss(half) for half in halves] == expected
        assert len(runs) == 1
    finally:
        llava.model.requires_grad_(True)


def test_dropout_of_an_encoder_is_drawn_for_each_row(llava):
    layer = next(part for part in llava.model.model.vision_tower.modules() if "dropout" in vars(part))
    layer.dropout = 0.5
    try:
        assert fault(llava, False) == "its encoder has dropout, which is drawn for each row by itself"
    finally:
        layer.dropout = 0.0


def test_a_model_whose_features_do_not_fit_keeps_its_rows_apart(llava, monkeypatch):
    owner = owner_of(llava.model)
    own = type(owner).get_image_features

    def wrong(self, pixel_values, **more):
        found = own(self, pixel_values, **more)
        found.pooler_output = [features[:-1] for features in found.pooler_output] if len(pixel_values) == 2 else (
            found.pooler_output
        )  # fmt: skip
        return found

    monkeypatch.setattr(type(owner), "get_image_features", wrong)
    assert "failed: its encoder gives 6 vectors for 8 tokens" in fault(llava, False)

    def swapped(self, pixel_values, **more):
        found = own(self, pixel_values, **more)
        found.pooler_output = found.pooler_output[::-1]
        return found

    monkeypatch.setattr(type(owner), "get_image_features", swapped)
    assert "its outputs changed by" in fault(llava, False)


def test_a_text_model_has_no_features(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path))
    assert sharing_fault(model, None, draws=False) == "LlamaForCausalLM takes no features in place of pixels"


def test_samples_are_found_by_their_numbers_of_vectors():
    tiles = torch.arange(12.0).view(3, 2, 2)
    assert torch.equal(_chosen(tiles, (2, 4), (1, 0, 1)), torch.cat([tiles[1:], tiles[:1], tiles[1:]]))
    vectors = torch.arange(6.0).view(3, 2)
    assert torch.equal(_chosen(vectors, (1, 2), (1, 0)), torch.cat([vectors[1:], vectors[:1]]))
    listed = [torch.ones(2, 4), torch.zeros(1, 4)]
    assert [len(one) for one in _chosen(listed, (2, 1), (0, 1, 0))] == [2, 1, 2]
