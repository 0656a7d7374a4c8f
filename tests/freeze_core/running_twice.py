"""A model that goes through its list of layers twice in a pass."""

from __future__ import annotations


def run_layers_twice(model):
    """Has a GPT-2 run its layers again on what they gave, before the last norm."""

    def again(module, args):
        states = args[0]
        for layer in model.transformer.h:
            states = layer(states)
        return (states,)

    model.transformer.ln_f.register_forward_pre_hook(again)
