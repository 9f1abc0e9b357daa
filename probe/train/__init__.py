"""Train: the scenarios that a convex solver can't do: unfrozen backbones and the appended DeiT.

A store (for its split, labels and tokens), a backbone and settings go in; results, the same as the
sweep's, and checkpoints come out.

To read, in this order: token_head (the appended DeiT classifier), tuned (a backbone and a head as
one model, with a learning rate per layer), feeds (batches of images or of stored features),
loss, checkpoints (saved and loaded, whole at any moment), training (the one loop: epochs, schedule,
early stopping; it goes on from a checkpoint to the same bits), scalars (curves for TensorBoard),
runs (settings, rows, identity), finetune (from a store to a result).
"""
