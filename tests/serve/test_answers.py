"""Jobs of one request: started together, canceled together, counted until each has ended."""

import asyncio
from types import SimpleNamespace

import pytest

from luthier.core.errors import InvalidInput
from luthier.infer.types import Answer, Piece, Settings, UnsupportedSetting
from luthier.serve.admission import Admission
from luthier.serve.answers import Answers, Job
from luthier.serve.errors import ApiError
from luthier.serve.metrics import Metrics

ANSWER = Answer(text="x", num_prompt_tokens=1, num_new_tokens=2, finish_reason="stop")


class Engine:
    """Keeps what is submitted; the test delivers."""

    def __init__(self, refuses=None, fault=None):
        self.delivers, self.canceled, self.refuses = [], [], refuses
        self.fault = fault or InvalidInput("no")

    def submit(self, prompt_ids, settings, deliver):
        if len(self.delivers) == self.refuses:
            raise self.fault
        number = len(self.delivers)
        self.delivers.append(deliver)
        return SimpleNamespace(cancel=lambda: self.canceled.append(number))


def started(count, engine=None, num_positions=100):
    engine, admission, metrics = engine or Engine(), Admission(8, 8), Metrics()
    model = SimpleNamespace(engine=engine, num_positions=num_positions)
    jobs = [Job([1, 2, 3], Settings(), "messages") for _ in range(count)]
    return Answers(model, admission, metrics, jobs), engine, admission, metrics


def test_pieces_arrive_in_order_and_ends_are_counted():
    async def run():
        answers, engine, admission, metrics = started(2)
        answers.start()
        assert admission.num_answers == 2 and metrics.prompt_tokens == 6
        for deliver, item in zip((1, 0, 1, 0), (Piece("a"), Piece("b"), ANSWER, ANSWER), strict=True):
            engine.delivers[deliver](item)
        assert [number async for number, _ in answers] == [1, 0, 1, 0]
        assert (admission.num_answers, metrics.generated_tokens, metrics.canceled) == (0, 4, 0)
        assert metrics.first_token_seconds.count == 2
        answers.close()
        assert engine.canceled == []

    asyncio.run(run())


def test_closing_cancels_what_has_not_ended():
    async def run():
        answers, engine, admission, metrics = started(3)
        answers.start()
        engine.delivers[1](ANSWER)
        assert (await anext(aiter(answers)))[0] == 1
        answers.close()
        assert engine.canceled == [0, 2] and admission.num_answers == 0 and metrics.canceled == 2

    asyncio.run(run())


def test_one_job_is_canceled():
    async def run():
        answers, engine, admission, _ = started(2)
        answers.start()
        answers.cancel(0)
        engine.delivers[0](Piece("late"))
        engine.delivers[1](ANSWER)
        assert [number async for number, _ in answers] == [1]
        assert engine.canceled == [0] and admission.num_answers == 0

    asyncio.run(run())


def test_a_job_that_is_refused_takes_the_others_with_it():
    async def run():
        answers, engine, admission, _ = started(3, Engine(refuses=2))
        with pytest.raises(ApiError) as caught:
            answers.start()
        assert caught.value.param == "messages"
        assert engine.canceled == [0, 1] and admission.num_answers == 0

    asyncio.run(run())


def test_a_fault_while_jobs_are_started_leaves_no_place_taken():
    """A fault of the server itself, too: with each one, a queue would get shorter for good."""

    async def run():
        answers, engine, admission, metrics = started(3, Engine(1, RuntimeError("no thread can be started")))
        with pytest.raises(RuntimeError):
            answers.start()
        assert engine.canceled == [0] and admission.num_answers == 0 and metrics.prompt_tokens == 0

    asyncio.run(run())


def test_a_prompt_without_room_for_an_answer():
    async def run():
        answers, *_ = started(1, num_positions=3)
        with pytest.raises(ApiError) as caught:
            answers.start()
        assert caught.value.code == "context_length_exceeded"
        assert "3" in str(caught.value)

    asyncio.run(run())


def test_nothing_happens_after_the_end_of_the_loop():
    async def run():
        answers, engine, *_ = started(1)
        answers.start()
        return engine.delivers[0]

    asyncio.run(run())(Piece("late"))


def test_a_setting_that_the_engine_lacks_is_the_field_at_fault():
    class Lacking(Engine):
        def submit(self, prompt_ids, settings, deliver):
            raise UnsupportedSetting("seed", "there is none")

    async def run():
        answers, _, admission, _ = started(1, Lacking())
        with pytest.raises(ApiError, match=r"^seed: there is none$") as caught:
            answers.start()
        assert (caught.value.status, caught.value.param, admission.num_answers) == (400, "seed", 0)

    asyncio.run(run())
