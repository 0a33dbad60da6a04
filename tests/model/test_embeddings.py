"""New rows: exactly where they belong, near the mean of the known ones, the same on every process."""

import pytest
import torch

from luthier.core.errors import ModelError
from luthier.model.embeddings import NewRows, NewTokens, add_missing_rows, fit_embeddings, num_rows
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from tests.tiny import byte_tokenizer, tiny_llama


@pytest.fixture
def model(tmp_path, request):
    tied = getattr(request, "param", False)
    return load_model(
        ModelSource(str(tiny_llama(tmp_path, vocab_size=261, tie_word_embeddings=tied))), dtype=torch.float32
    )


def with_tokens(*tokens):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def rows(model):
    return model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()


@pytest.mark.parametrize("model", [True, False], indirect=True)
def test_rows_become_a_multiple_of_64_and_start_at_the_mean_with_noise(model):
    before = rows(model)
    assert fit_embeddings(model, with_tokens("<a>", "<b>"), added_tokens=["<a>", "<b>"])
    assert num_rows(model) == model.config.vocab_size == 320
    for old, new in zip(before, rows(model), strict=True):
        assert torch.equal(new[:261], old)
        offsets = new[261:] - old.mean(0)
        assert offsets.mean().abs() < 0.02
        assert offsets.std() == pytest.approx(64**-0.5, rel=0.1)
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_new_changes_nothing(model):
    before = rows(model)
    assert not fit_embeddings(model, byte_tokenizer())
    assert num_rows(model) == 261
    assert torch.equal(rows(model)[0], before[0])


def test_tokens_that_fit_into_the_padding_are_started_as_well(tmp_path):
    model = load_model(ModelSource(str(tiny_llama(tmp_path, vocab_size=320))), dtype=torch.float32)
    before = rows(model)[0]
    assert fit_embeddings(model, with_tokens("<a>"), added_tokens=["<a>"])
    after = rows(model)[0]
    assert num_rows(model) == 320
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == [261]


@pytest.mark.parametrize("init", ["desc_init", "desc_init_w_noise"])
def test_a_described_token_starts_at_the_mean_of_its_description(model, init):
    tokenizer = with_tokens("<a>")
    fit_embeddings(model, tokenizer, added_tokens=["<a>"], descriptions={"<a>": "an end"}, init=init)
    for weight in rows(model):
        offset = weight[261] - weight[tokenizer.encode("an end")].mean(0)
        assert offset.std() == pytest.approx(0 if init == "desc_init" else 64**-0.5, rel=0.4, abs=1e-6)


def test_a_description_counts_by_the_tokens_that_the_model_has_seen(model):
    tokenizer = with_tokens("<a>", "<b>")
    told = {"<a>": "an<b>end", "<b>": "<a>"}
    fit_embeddings(model, tokenizer, added_tokens=["<a>", "<b>"], descriptions=told, init="desc_init")
    for weight in rows(model):
        torch.testing.assert_close(weight[261], weight[tokenizer.encode("anend")].mean(0))
        mean = weight[:261].mean(0)  # with noise, as for a token without a description
        assert (weight[262] - mean).std() == pytest.approx(64**-0.5, rel=0.4)


def test_the_same_seed_gives_the_same_rows(tmp_path):
    folder = str(tiny_llama(tmp_path, vocab_size=261))
    made = []
    for seed in (1, 1, 2):
        model = load_model(ModelSource(folder), dtype=torch.float32)
        torch.rand(seed)
        fit_embeddings(model, with_tokens("<a>"), added_tokens=["<a>"], seed=seed)
        made.append(rows(model)[0])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_rows_to_be_trained(model):
    assert NewTokens(byte_tokenizer()).give_rows(model) == NewRows()
    assert not NewRows() and NewTokens(byte_tokenizer(), trains_whole=True).give_rows(model)
    grown = NewTokens(with_tokens("<a>"), ("<a>",)).give_rows(model)
    assert grown == NewRows(tuple(range(261, 320)), is_whole=True)
    spare = NewTokens(with_tokens("<a>", "<b>"), ("<b>",)).give_rows(model)
    assert spare == NewRows((262,))


@pytest.mark.parametrize("model", [True, False], indirect=True)
def test_a_row_that_was_never_trained_is_the_mean_of_its_pieces(model, tmp_path, said):
    """Of the token's text in the tokenizer of the model; here each byte is a token."""
    source, tokenizer, before = ModelSource(str(tmp_path)), with_tokens("<ab>"), rows(model)
    assert add_missing_rows(model, tokenizer, source)
    for old, new in zip(before, rows(model), strict=True):
        assert torch.equal(new[:261], old)
        pieces = byte_tokenizer().encode("<ab>", add_special_tokens=False)
        assert len(pieces) == 4
        torch.testing.assert_close(new[261], old[pieces].mean(0))
        torch.testing.assert_close(new[262:], old.mean(0).expand(58, -1))
    assert any("never trained" in text for text in said)
    assert not add_missing_rows(model, tokenizer, source)


def test_an_embedding_with_an_adapter_cannot_get_rows(model, tmp_path):
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ModelError, match="1 tokens without a row"):
        add_missing_rows(adapted.get_base_model(), with_tokens("<a>"), ModelSource(str(tmp_path)))
