"""How a freeze works, from a config to a frozen tensor and back out.

Before a pass, on `freeze_circuits`:

    requests.py         config and sites -> for each layer a `LayerFreeze`: roles, heads, and one treatment
    plan.py             the freezes of a layer -> `LayerPlan`: which edits of which modules, in which KV storage
    replacements.py     one class for each freeze type: the value that takes an activation's place
    module_features.py  where the features of each head are in a module's activation
    edits.py            x' = x + a (r - x) on chosen features
    backward.py         what the gradient of that is
    install.py          puts plans into a model, all or none; the handles that take them out again

During a pass the model calls modules whose `forward` is patched (`freeze_core/forward_patch.py`), from the outside in:

    pass_tracker.py     the stack of layers: knows the running pass (passes.py) and marks its cache (caches.py)
    frozen_modules.py   `FrozenAttention`: counts that what it holds ran; `FrozenProjection`: q, k, v; `FrozenOutput`: z
    layer_patch.py      what a frozen attention and a steered layer have in common

What a pass is made of: pass_arguments.py (arguments and the cache among them), padding_mask.py, row_order.py,
encoder_outputs.py. What runs layers a second time: recomputation.py (gradient checkpoints). Guards raise where a freeze
would have no effect: module_path.py (a module was replaced), caches.py (a cache was filled under other freezes).
"""
