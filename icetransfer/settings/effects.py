"""What a change of a key touches in an experiment that has begun.

Some keys change nothing that counts, and are free.  Some are read by later stages only, which then
run again.  Some change the course of a training, which is allowed when asked for and is recorded.
The others are what the experiment means: with another value it is another experiment.
"""

from typing import Literal

from icetransfer.settings.tree import longest_prefix

Effect = Literal["free", "later stages", "course", "meaning"]

# The effect of a key is that of the longest prefix here.
EFFECTS: dict[str, Effect] = {
    "data.features.jobs": "free",
    "train.workers": "free",
    "train.threads": "free",
    "train.log_every": "free",
    "train.valid_every": "free",
    "train.checkpoint_every": "free",
    "train.keep_checkpoints": "free",
    "train.keep_best": "free",
    "train.branches": "free",
    "train.loss_backend": "free",
    "decode.batch_streams": "free",
    "data.text": "later stages",
    "language_model": "later stages",
    "decode": "later stages",
    "export": "later stages",
    "remedy": "later stages",
    "robustness": "later stages",
    "bundle": "later stages",
    "train": "course",
    "train.chunk_sizes": "meaning",  # they travel in the model
    "train.left_context_frames": "meaning",
}


def effect_of(key: str) -> Effect:
    """What a change of a dotted key touches."""
    return longest_prefix(EFFECTS, key, "meaning")
