"""Packs hold every row once, are full, and their samples are to each other as if they were alone."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.config.load import load_train
from luthier.core.errors import ModelError
from luthier.core.kinds import STAGES
from luthier.data.collate import concatenate_rows, pad_rows
from luthier.data.packing import best_fit as packing
from luthier.data.packing.best_fit import Packs, best_fit, packs_of
from luthier.data.prepare import PreparedData, prepare
from luthier.data.rows.arrow import table_of
from luthier.data.rows.columns import IDS, LABELS, WEIGHTS, columns_of_part, with_media
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.inspection.terminal import sequences_of
from luthier.workflow.text import load_text_side

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "data"


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 60))
def test_every_row_is_in_one_pack_and_no_two_packs_fit_together(lengths, capacity):
    packs = packs_of(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    used = sorted(sum(lengths[row] for row in pack) for pack in packs)
    assert all(total <= capacity for total in used)
    assert len(used) < 2 or used[0] + used[1] > capacity
    assert [pack.min() for pack in packs] == sorted(pack.min() for pack in packs)
    assert len(packs) <= len(best_fit(np.array(lengths, dtype=np.int64), capacity))


def test_a_row_goes_where_it_leaves_least_room():
    """Decreasing: 7, 6, 4, 3 into packs of 10. The 4 fills up the 6, and the 3 the 7."""
    assert best_fit(np.array([3, 6, 7, 4]), 10) == [[2, 0], [1, 3]]


def test_small_datasets_are_packed_as_full_as_they_go():
    """Best fit makes 5 + 4, 4 + 3 + 2 and 2 of them; 5 + 3 + 2 and 4 + 4 + 2 are full."""
    lengths = np.array([5, 4, 4, 3, 2, 2])
    assert len(best_fit(lengths, 10)) == 3
    assert [pack.tolist() for pack in packs_of(lengths, 10)] == [[0, 3, 4], [1, 2, 5]]


def test_packs_of_many_rows_are_full():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 10, 1024)
    packs = packs_of(lengths, 1024)
    assert lengths.sum() / (len(packs) * 1024) > 0.995
    assert sorted(np.concatenate(packs)) == list(range(len(lengths)))


ROWS = st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=12)
"""Tokens of a row, whether it has weights of its own, and whether its first token is an image."""


@given(ROWS, st.integers(9, 30), st.integers(1, 3))
def test_a_pack_has_all_that_its_rows_have(sizes, size_tokens, packs_per_batch):
    rows = []
    for number, (length, is_weighted, shows) in enumerate(sizes):
        ids = list(range(10 * number, 10 * number + length))
        weights = [token / 256 for token in ids] if is_weighted else []
        rows.append((ids, ids, weights, [0, 1] if shows else [], [f"{number}.png"] if shows else []))
    table = table_of(rows, with_media(columns_of_part("", IDS, LABELS, WEIGHTS)))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACKS_PER_BATCH", packs_per_batch)
        for arrays in Packs(size_tokens).join(table):
            found += zip(*(array.to_pylist() for array in arrays), strict=True)
    numbers = []
    for ids, labels, weights, lengths, blocks, images in found:
        own = [(token // 10, sizes[token // 10]) for token in ids if token % 10 == 0]
        numbers += [number for number, _ in own]
        assert sum(lengths) == len(ids) <= size_tokens and lengths == [length for _, (length, _, _) in own]
        assert labels == [IGNORE_INDEX if token % 10 == 0 else token for token in ids]
        is_weighted = any(weighs for _, (_, weighs, _) in own)
        assert weights == ([t / 256 if sizes[t // 10][1] else 1 for t in ids] if is_weighted else [])
        assert images == [f"{number}.png" for number, (_, _, shows) in own if shows]
        assert [ids[start] for start in blocks[::2]] == [10 * number for number, (_, _, shows) in own if shows]
        assert blocks[1::2] == [start + 1 for start in blocks[::2]]
    assert sorted(numbers) == list(range(len(sizes)))


def prepared(folder: Path, model: Path, **changes) -> PreparedData:
    values = {"model_name_or_path": str(model), "dataset_dir": str(EXAMPLES), "template": "chatml"}
    run = load_train({**values, "dataset": "identity", "output_dir": str(folder / "out"), **changes})
    return prepare(run, STAGES.get(run.stage).rows, load_text_side(run).encoding)


@pytest.mark.parametrize("key", ["packing", "neat_packing"])
def test_packs_are_the_rows_put_together(tmp_path, llama_folder, key):
    plain = prepared(tmp_path, llama_folder, cutoff_len=512).train
    packed = prepared(tmp_path, llama_folder, cutoff_len=512, **{key: True}).train
    assert max(len(ids) for ids in packed["input_ids"]) <= 512
    samples = [sample for row in packed for _, sample in sequences_of(row)]
    assert sorted(sample["input_ids"] for sample in samples) == sorted(plain["input_ids"])
    labels = {tuple(row["input_ids"]): row["labels"] for row in plain}
    for sample in samples:
        assert sample["labels"][0] == IGNORE_INDEX
        assert sample["labels"][1:] == labels[tuple(sample["input_ids"])][1:]


def test_first_tokens_of_samples_are_not_learned_from_the_sample_before(tmp_path, llama_folder):
    packed = prepared(tmp_path, llama_folder, cutoff_len=512, packing=True, train_on_prompt=True).train
    for row in packed:
        starts = np.cumsum([0, *row["sample_lengths"][:-1]])
        assert [row["labels"][start] for start in starts] == [IGNORE_INDEX] * len(starts)
        assert row["labels"].count(IGNORE_INDEX) == len(starts)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_order_does_not_depend_on_how_rows_are_tokenized(tmp_path, llama_folder, batch_size):
    expected = prepared(tmp_path, llama_folder, packing=True).train["input_ids"]
    keys = {"preprocessing_batch_size": batch_size, "preprocessing_num_workers": batch_size, "overwrite_cache": True}
    assert prepared(tmp_path, llama_folder, packing=True, **keys).train["input_ids"] == expected


@pytest.mark.thorough
def test_packs_of_the_example_data_are_full(tmp_path, smollm2_folder):
    """The quickstart's own rows are 5.2 packs long, so of theirs all but the last are looked at."""
    (model,) = smollm2_folder.rglob("*.gguf")
    keys = {"template": "smollm2", "cutoff_len": 1024, "neat_packing": True}
    data = prepared(tmp_path, model, dataset="identity,multi_turn,tools,history", **keys)
    lengths = [len(ids) for ids in data.train["input_ids"]]
    assert sum(lengths) / (len(lengths) * 1024) >= 0.98
    assert data.ledger.samples["train"] == len(lengths)
    lengths = sorted(len(ids) for ids in prepared(tmp_path, model, dataset="identity", **keys).train["input_ids"])
    assert len(lengths) == 6 and sum(lengths[1:]) / (5 * 1024) >= 0.98


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_sample_has_the_logits_it_has_alone(tmp_path, llama_folder, attention):
    import torch
    from transformers import AutoModelForCausalLM

    from luthier.data.collate import model_inputs
    from luthier.model.attention import isolate_samples, isolates_samples

    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, attn_implementation=attention)
    packed = prepared(tmp_path, llama_folder, cutoff_len=512, neat_packing=True).train
    batch = concatenate_rows([packed[0], packed[1]])
    assert isolates_samples(model) is None
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
            for row in (packed[0], packed[1])
            for _, sample in sequences_of(row)
        ]
        isolate_samples(model)
        together = model(**model_inputs(batch)).logits[0]
    assert len(alone) > 2
    assert (together - torch.cat(alone)).abs().max() <= 1e-5


def test_a_pack_is_a_batch_of_its_samples():
    """The same positions, targets and boundaries as the samples as rows of their own."""
    ids, labels = [[5, 6, 7], [8, 9]], [[IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 9]]
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    pack = {"input_ids": [*ids[0], *ids[1]], "labels": [*labels[0], *labels[1]], "sample_lengths": [3, 2]}
    expected, got = concatenate_rows(rows), concatenate_rows([pack])
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key] == value) if isinstance(value, int) else got[key].tolist() == value.tolist()
    assert pad_rows([pack], 0)["targets"].tolist() == expected["targets"].tolist()


def unable(reason):
    return lambda model, trial: reason


def test_a_model_that_cannot_keep_samples_apart(tmp_path, llama_folder, monkeypatch, said):
    """`neat_packing` is refused with the reason; `packing` goes on as the reference does, and says so."""
    import luthier

    # A module that is first imported after the replacement would keep it for all later tests.
    for name in ("model.loading.training", "model.features.mixture_of_depths", "workflow.frozen_models"):
        importlib.import_module(f"luthier.{name}")
    monkeypatch.setattr("luthier.model.attention.isolates_samples", unable("it has an encoder"))
    monkeypatch.setattr("luthier.model.loading.training.isolates_samples", unable("it has an encoder"))
    values = {
        "model_name_or_path": str(llama_folder), "dataset_dir": str(EXAMPLES), "template": "chatml",
        "dataset": "identity", "cutoff_len": 512, "do_train": True, "finetuning_type": "lora", "max_steps": 1,
        "report_to": "none", "lora_target": "all", "use_cpu": True,
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"neat_packing.*it has an encoder"):
        luthier.train({**values, "output_dir": str(tmp_path / "neat"), "neat_packing": True})
    luthier.train({**values, "output_dir": str(tmp_path / "plain"), "packing": True})
    assert any("attends across the samples of a row" in line for line in said)
    report = json.loads((tmp_path / "plain" / "data_report.json").read_text())
    assert report["samples"]["train"] > 0
