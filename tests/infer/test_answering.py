"""The thread that owns a model: who runs, who waits, and that one fault does not end it."""

from threading import Event

import pytest
import torch

from luthier.core.errors import DeviceFailed
from luthier.infer.answering import AnswerThread
from luthier.infer.engines.huggingface import HuggingFaceModel
from luthier.infer.row import Row
from luthier.infer.types import Settings
from tests.broken_cuda import ASSERTION, break_cuda
from tests.tiny import TINY_LLAMA, byte_tokenizer

GREEDY = Settings(do_sample=False, max_new_tokens=6)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})).eval()


def engine(model=None, **options):
    return HuggingFaceModel(model or llama(), byte_tokenizer(), [260], **options)


def text_of(ticket):
    return "".join(piece.text for piece in ticket.pieces())


def ids_of(ticket):
    for _ in ticket.pieces():
        pass
    return [token.id for token in ticket.answer.tokens]


def test_callers_share_the_batch_and_none_is_mixed_up():
    model, prompts = engine(), [[n, n + 1, n + 2] for n in range(12)]
    tickets = [model.submit(ids, GREEDY) for ids in prompts]
    together = [ids_of(ticket) for ticket in tickets]
    assert together == [ids_of(model.submit(ids, GREEDY)) for ids in prompts]


def test_no_more_than_max_rows_run_together():
    model, seen, all_wait = engine(max_rows=3), [], Event()
    forward = model.model.forward

    def count(*args, **given):
        assert all_wait.wait(60)
        seen.append(len(given["input_ids"]))
        return forward(*args, **given)

    count.__signature__ = __import__("inspect").signature(forward)
    model.model.forward = count
    tickets = [model.submit([n], GREEDY) for n in range(7)]
    all_wait.set()
    for ticket in tickets:
        ids_of(ticket)
    assert max(seen) == 3


def test_memory_limits_the_batch_and_the_limit_is_told(said):
    model = llama()
    per_token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimension, bytes
    thread = AnswerThread(
        model, byte_tokenizer(), frozenset([260]), max_rows=8, free_bytes=lambda: int(20 * per_token / 0.8)
    )
    served = engine(model)
    served._thread = thread
    most, all_wait = [], Event()
    step = thread._batch.step
    thread._batch.step = lambda: (all_wait.wait(60), most.append(len(thread._batch.rows)), step())
    tickets = [served.submit([n] * 4, GREEDY) for n in range(4)]  # 10 tokens each: two of them fit
    all_wait.set()
    assert len([ids_of(ticket) for ticket in tickets]) == 4
    assert max(most) == 2
    assert any("up to 8 answers at once, with 20 tokens together" in line for line in said)


def test_one_answer_after_the_other_is_told_no_limit(said):
    """A line of the log would stand amid the first answer of a conversation in a terminal."""
    model = llama()
    thread = AnswerThread(model, byte_tokenizer(), frozenset([260]), max_rows=8, free_bytes=lambda: 10**9)
    served = engine(model)
    served._thread = thread
    assert [len(ids_of(served.submit([n], GREEDY))) > 0 for n in range(2)] == [True, True]
    assert thread._max_tokens is not None and not any(line.startswith("batch: ") for line in said)


def test_a_canceled_answer_frees_its_place():
    model = engine(max_rows=1)
    long = model.submit([1], Settings(do_sample=False, max_new_tokens=500, ignore_eos=True))
    next(long.pieces())
    long.cancel()
    assert ids_of(model.submit([2], GREEDY)) == ids_of(engine().submit([2], GREEDY))


def test_a_fault_of_the_model_reaches_every_caller_and_the_next_is_answered():
    model, broken = engine(), Event()
    forward = model.model.forward

    def fails(*args, **given):
        if broken.is_set():
            raise RuntimeError("there is no memory left")
        return forward(*args, **given)

    fails.__signature__ = __import__("inspect").signature(forward)
    model.model.forward = fails
    broken.set()
    for ticket in [model.submit([n], GREEDY) for n in range(2)]:
        with pytest.raises(RuntimeError, match="no memory left"):
            text_of(ticket)
    broken.clear()
    assert len(ids_of(model.submit([1], GREEDY))) > 0


def test_a_fault_that_ends_the_thread_reaches_every_caller_and_the_next_is_answered(monkeypatch):
    """A fault of our own, which no row has: the next row starts the thread again."""
    model = engine(max_rows=1)
    with monkeypatch.context() as broken:
        broken.setattr("luthier.infer.answering.num_read_together", lambda rows: 1 / 0)
        for ticket in [model.submit([n], GREEDY) for n in range(3)]:
            with pytest.raises(ZeroDivisionError):
                text_of(ticket)
    assert ids_of(model.submit([1], GREEDY)) == ids_of(engine().submit([1], GREEDY))


@pytest.mark.parametrize("place", ["read", "step", "choose"])
@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_a_failed_device_ends_all_answers_with_one_error(monkeypatch, place, use_kv_cache):
    model, fault = engine(use_kv_cache=use_kv_cache), torch.AcceleratorError(ASSERTION)
    forward, push = model.model.forward, Row.push

    def fails(*args, **given):
        width = given["input_ids"].shape[1]
        if place != "choose" and (place == "read") == (width > 1):
            break_cuda(monkeypatch, fault)
            raise fault
        return forward(*args, **given)

    def chooses(row, token):
        if place == "choose":
            break_cuda(monkeypatch, fault)
            raise fault
        return push(row, token)

    fails.__signature__ = __import__("inspect").signature(forward)
    model.model.forward = fails
    monkeypatch.setattr(Row, "push", chooses)
    prompts = [[1, 2], [1, 2], [3]] if place != "step" or use_kv_cache else [[1]]
    tickets = [model.submit(ids, GREEDY) for ids in prompts]
    for ticket in [*tickets, model.submit([4], GREEDY)]:
        with pytest.raises(DeviceFailed, match="cuda:1 has failed"):
            text_of(ticket)
    assert model.fault is not None and "device-side assert" in model.fault
    with pytest.raises(DeviceFailed):
        text_of(model.submit([5], GREEDY))


def test_what_arrives_can_go_to_a_function_of_the_caller():
    arrived, done = [], Event()

    def deliver(item):
        arrived.append(item)
        if not hasattr(item, "tokens") or hasattr(item, "finish_reason"):
            done.set()

    engine().submit([1], GREEDY, deliver)
    assert done.wait(60)
    assert "".join(item.text for item in arrived[:-1]) == arrived[-1].text


def test_models_that_cannot_batch_answer_one_after_the_other(said):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        eos_token_id=260,
        pad_token_id=256,
        bos_token_id=259,
    )
    mamba = MambaForCausalLM(config).eval()
    model = engine(mamba)
    found = [ids_of(ticket) for ticket in [model.submit([n, 5], GREEDY) for n in range(3)]]
    for n, ids in enumerate(found):
        given = torch.tensor([[n, 5]])
        expected = mamba.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=6)
        assert ids == expected[0, 2:].tolist()
    assert sum("answers one prompt at a time" in line for line in said) == 1


def test_closing_cancels_and_waits():
    model = engine()
    model.submit([1], Settings(do_sample=False, max_new_tokens=400, ignore_eos=True))
    model.close()
    assert model.num_waiting == 0
