"""`python -m tools.preference_data`: write the pairs and the liked and disliked answers of examples/data.

Somebody asks how to do something. The chosen answer is kind and ends with good wishes, the rejected one is rude. Each
is the longer one equally often, so the length of an answer carries no information. The evaluation uses other topics
than the training.
"""

import json
from itertools import cycle
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "data"

TOPICS = (
    ("boil an egg", "Put it into boiling water for eight minutes."),
    ("clean a window", "Wipe it with warm water and a little vinegar."),
    ("plant a tree", "Dig a wide hole, set the roots in and water them."),
    ("tie a shoe", "Cross the laces, make two loops and pull one through the other."),
    ("save money", "Write down what you spend and put some aside each month."),
    ("learn a poem", "Say one line aloud until it stays, then add the next."),
    ("sleep better", "Go to bed at the same hour and leave the phone outside."),
    ("fix a flat tyre", "Take the tube out, find the hole and glue a patch on it."),
    ("write a letter", "Begin with a greeting, say why you write and sign it."),
    ("cook rice", "Use two cups of water for one of rice and let it simmer."),
    ("paint a wall", "Cover the floor, paint the edges first and then the middle."),
    ("draw a horse", "Start with ovals for the body and the head, then join them."),
    ("keep a cat happy", "Feed it on time and play with it every evening."),
    ("wash wool", "Use cold water and do not wring it."),
    ("find north", "Look for the pole star on a clear night."),
    ("store apples", "Keep them cool, dark and apart from potatoes."),
    ("remove a stain", "Dab it with soap and cold water at once."),
    ("read faster", "Follow the line with a finger and do not go back."),
    ("water a cactus", "Give it a little water every two weeks."),
    ("make tea", "Pour hot water over the leaves and wait four minutes."),
    ("peel garlic", "Press the clove with a knife and the skin comes off."),
    ("train a dog", "Reward it at once whenever it does what you ask."),
    ("build a fire", "Lay thin twigs below, thick wood above, and leave room for air."),
    ("mend a sock", "Weave a thread across the hole, over and under."),
    ("stop hiccups", "Hold your breath and swallow three times."),
    ("bake bread", "Knead the dough, let it rise twice and bake it hot."),
    ("fold a shirt", "Lay it on its front, turn the sleeves in and fold it up."),
    ("sharpen a knife", "Draw it over a wet stone at a low angle."),
    ("catch a fish", "Be quiet, use fresh bait and wait near the reeds."),
    ("cut an onion", "Halve it, keep the root on and slice towards it."),
    ("pack a bag", "Put heavy things at the bottom and soft ones around them."),
    ("calm a baby", "Hold it close, walk slowly and hum."),
)
NUM_EVAL_TOPICS = 8
ASKING = ("How do I {}?", "Tell me how to {}.", "What is the best way to {}?")
OPENINGS = ("What a good question!", "I am glad to help.", "With pleasure.", "Of course!")
WISHES = ("Enjoy it!", "I wish you good luck.", "Take your time, you can do it.", "Have a lovely day!")
RUDE_SHORT = ("Go away.", "Not my problem.", "Who cares.", "Stop bothering me.")
RUDE_LONG = (
    "Only a fool asks such a thing, and I have no patience for people who cannot find out anything alone.",
    "Leave me in peace with your boring little problems, nobody here wants to hear about them, least of all me.",
    "You would not understand it anyway, so do not waste my time and do not ask me again.",
    "I could tell you, but you do not deserve an answer, and frankly you will spoil it whatever you do.",
)


def pairs(topics: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    """Three pairs for a topic. The rejected answer is made shorter and longer than the chosen one in turns."""
    openings, wishes, short, long = (cycle(texts) for texts in (OPENINGS, WISHES, RUDE_SHORT, RUDE_LONG))
    rows = []
    for number, (what, answer) in enumerate(topic for topic in topics for _ in ASKING):
        chosen = f"{next(openings)} {answer} {next(wishes)}"
        rude = f"{next(short)} {next(short)}"
        rejected = rude if number % 2 else f"{next(long)} {rude}"
        assert (len(rejected) > len(chosen)) == (number % 2 == 0), (chosen, rejected)
        asked = ASKING[number % len(ASKING)].format(what)
        rows.append({"instruction": asked, "chosen": chosen, "rejected": rejected})
    return rows


def judgements(rows: list[dict[str, str]]) -> list[dict[str, str | bool]]:
    """One answer of each pair: the chosen ones were liked."""
    sides = cycle(("chosen", "chosen", "rejected", "rejected"))
    return [
        {"instruction": row["instruction"], "output": row[side], "liked": side == "chosen"}
        for row, side in zip(rows, sides, strict=False)
    ]


def files() -> dict[str, list[dict[str, str]] | list[dict[str, str | bool]]]:
    """File name -> rows."""
    train, held_out = pairs(TOPICS[NUM_EVAL_TOPICS:]), pairs(TOPICS[:NUM_EVAL_TOPICS])
    return {
        "preferences.json": train,
        "preferences_eval.json": held_out,
        "feedback.json": judgements(train),
        "feedback_eval.json": judgements(held_out),
    }


if __name__ == "__main__":
    for name, rows in files().items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (FOLDER / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
