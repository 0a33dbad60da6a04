"""The model that is measured answers as `luthier chat` does."""

import luthier
from luthier.config.load import load_eval
from luthier.data.types import Message
from luthier.evals.model import Asked
from luthier.infer.decoding import UNFINISHED
from luthier.workflow.evaluate import load_eval_model
from luthier.workflow.text import load_text_side


def test_answers_are_those_of_the_chat(llama_folder):
    keys = {"model_name_or_path": str(llama_folder), "template": "chatml", "do_sample": False, "max_new_tokens": 5}
    run = load_eval({**keys, "task": "perplexity", "dataset": "d"})
    model = load_eval_model(run, load_text_side(run))
    asked = [Asked((Message("user", text),)) for text in ("Hi", "Who are you, and what for?")]
    chat = luthier.chat(keys)
    expected = []
    for text in ("Hi", "Who are you, and what for?"):
        chat.clear()
        expected.append(chat.ask(text))
    answers = [answer.rstrip(UNFINISHED) for answer in model.generate(asked)]  # a chat waits for whole characters
    assert answers == expected
    assert list(model.generate(asked, max_new_tokens=1)) != expected
    assert model.num_positions == 512
