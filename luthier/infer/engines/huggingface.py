"""`generate()` of transformers, run in a thread: it pushes tokens into a queue, and the reader pulls text from it."""

from collections.abc import Collection, Generator, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import InvalidInput
from luthier.infer.engines import Engine
from luthier.infer.types import Answer, Settings

if TYPE_CHECKING:
    from queue import SimpleQueue
    from threading import Event

    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from luthier.config.runs import InferRun
    from luthier.model.files.sources import ModelSource


class HuggingFaceModel:
    """A loaded model with its tokenizer. An answer ends at the first token in `stop_ids`."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Collection[int],
        *,
        use_kv_cache: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, frozenset(stop_ids)
        self.use_kv_cache = use_kv_cache

    def generate(self, prompt_ids: Sequence[int], settings: Settings) -> Answer:
        pieces = self.stream(prompt_ids, settings)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                return done.value

    def stream(self, prompt_ids: Sequence[int], settings: Settings) -> Generator[str, None, Answer]:
        from luthier.infer.decoding import TextStream

        text = TextStream(self.tokenizer, settings.skip_special_tokens)
        written: list[str] = []
        num_new_tokens, stopped = 0, False
        for token_id in self._token_ids(prompt_ids, settings):
            num_new_tokens, stopped = num_new_tokens + 1, token_id in self.stop_ids
            if not stopped and (piece := text.push(token_id)):
                written.append(piece)
                yield piece
        if rest := text.finish():
            written.append(rest)
            yield rest
        return Answer(
            text="".join(written),
            num_prompt_tokens=len(prompt_ids),
            num_new_tokens=num_new_tokens,
            finish_reason="stop" if stopped else "length",
        )

    def _token_ids(self, prompt_ids: Sequence[int], settings: Settings) -> Generator[int, None, None]:
        """Yields the new tokens, including the one that ends the answer."""
        from concurrent.futures import ThreadPoolExecutor
        from queue import SimpleQueue
        from threading import Event

        config = self._generation_config(len(prompt_ids), settings)
        ready: SimpleQueue[int | None] = SimpleQueue()
        canceled = Event()
        with ThreadPoolExecutor(max_workers=1) as worker:
            answer = worker.submit(self._work, prompt_ids, config, settings.seed, ready, canceled)
            answer.add_done_callback(lambda _: ready.put(None))
            try:
                while (token_id := ready.get()) is not None:
                    yield token_id
            finally:
                canceled.set()
            answer.result()  # re-raises an error of the thread

    def _generation_config(self, num_prompt_tokens: int, settings: Settings) -> "GenerationConfig":
        from luthier.infer.decoding import generation_config, num_positions

        limit = num_positions(self.model)
        num_new_tokens = settings.num_new_tokens(num_prompt_tokens, limit)
        if num_new_tokens <= 0:
            reason = (
                f"the model takes {limit}; start a new conversation"
                if limit is not None and num_prompt_tokens >= limit
                else f"max_length is {settings.max_length}; raise it or set max_new_tokens"
            )
            raise InvalidInput(f"no room for an answer: the prompt has {num_prompt_tokens} tokens and {reason}")
        return generation_config(
            settings,
            model=self.model,
            num_prompt_tokens=num_prompt_tokens,
            num_new_tokens=num_new_tokens,
            stop_ids=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=self.use_kv_cache,
        )

    def _work(
        self,
        prompt_ids: Sequence[int],
        config: "GenerationConfig",
        seed: int | None,
        ready: "SimpleQueue[int | None]",
        canceled: "Event",
    ) -> None:
        import torch
        from transformers import StoppingCriteriaList

        if seed is not None:
            torch.manual_seed(seed)

        def asked_to_stop(input_ids: "torch.Tensor", scores: Any, **_: Any) -> "torch.Tensor":
            return torch.full((len(input_ids),), canceled.is_set(), device=input_ids.device)

        input_ids = torch.tensor([list(prompt_ids)], device=self.model.device)
        with_beams = config.num_beams > 1  # beams rewrite earlier tokens, so nothing can be streamed
        generate: Any = self.model.generate
        output = generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([asked_to_stop]),
            streamer=None if with_beams else _streamer(ready),
        )
        if with_beams:
            for token_id in output[0, len(prompt_ids) :].tolist():
                ready.put(token_id)


def _streamer(ready: "SimpleQueue[int | None]") -> Any:
    """Puts each new token into the queue. The first `put` is the prompt and is skipped."""
    from transformers.generation.streamers import BaseStreamer

    class NewTokens(BaseStreamer):
        def __init__(self) -> None:
            self.seen_prompt = False

        def put(self, value: "torch.Tensor") -> None:
            if self.seen_prompt:
                for token_id in value.tolist():
                    ready.put(token_id)
            self.seen_prompt = True

        def end(self) -> None:
            """Does nothing: the end is queued when the thread is done, so that an error ends the answer as well."""

    return NewTokens()


def open_model(run: "InferRun", source: "ModelSource", tokenizer: Any, stop_ids: Collection[int]) -> HuggingFaceModel:
    """Load the model of a run. End tokens in its generation_config.json are added to `stop_ids`."""
    from luthier.infer.decoding import end_ids
    from luthier.model.backends import load_for_inference
    from luthier.model.embeddings import add_missing_rows

    model = load_for_inference(run, source=source)
    add_missing_rows(model, tokenizer, source)
    all_ends = {*stop_ids, *end_ids(model)}
    return HuggingFaceModel(model, tokenizer, all_ends, use_kv_cache=run.model.use_kv_cache)


ENGINE = Engine(name="huggingface", open=open_model)
