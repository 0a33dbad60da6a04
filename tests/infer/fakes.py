"""A prompting and a model that need neither tokenizer nor weights: prompts are texts, answers come from a list."""

from luthier.infer.prompting import with_calls
from luthier.infer.types import Answer


class PlainPrompting:
    """`role: content` lines; a prompt "id" is a character. Calls are those of the syntax `qwen`."""

    description = "plain lines"

    def prompt_ids(self, messages, system, tools):
        head = ([f"system: {system}"] if system else []) + ([f"tools: {tools}"] if tools else [])
        return [ord(c) for c in "\n".join([*head, *(f"{m.role}: {m.content}" for m in messages)])]

    def read_answer(self, text, tools):
        return with_calls(text, 0, "qwen", tools)


class ScriptedModel:
    """Gives its answers one after the other, a word at a time, and keeps the prompts it has seen."""

    def __init__(self, *answers: str, special: tuple[str, ...] = ()) -> None:
        """`special`: words of special tokens, which the settings may leave out."""
        self.answers, self.prompts, self.special = list(answers), [], special

    def stream(self, prompt_ids, settings):
        self.prompts.append("".join(map(chr, prompt_ids)))
        answer = self.answers.pop(0)
        for word in answer.split("|"):
            if word == "^C":
                raise KeyboardInterrupt
            yield self._shown(word, settings)
        text = self._shown(answer.replace("|", ""), settings)
        return Answer(text=text, num_prompt_tokens=len(prompt_ids), num_new_tokens=len(text), finish_reason="stop")

    def _shown(self, text, settings):
        for word in self.special if settings.skip_special_tokens else ():
            text = text.replace(word, "")
        return text

    def generate(self, prompt_ids, settings):
        raise AssertionError("a session streams")
