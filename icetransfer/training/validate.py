"""WER of the dev set while training, to see what the losses do not tell."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icetransfer.config import Train
from icetransfer.data.loader import Batch
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.model.decoder import Decoder
from icetransfer.model.joiner import Joiner
from icetransfer.model.transducer import TransducerModel
from icetransfer.score import count_errors
from icetransfer.streaming.search import greedy_search
from icetransfer.training.distributed import World


@dataclass
class _Heads:
    """Decoder and joiner of a model on the CPU, where the search is."""

    context_size: int
    decoder: Decoder
    joiner: Joiner

    def predict(self, tokens: Tensor) -> Tensor:
        """See `search.Predicts`."""
        return self.decoder.predict(tokens)

    def join(self, out_frame: Tensor, decoder_out: Tensor) -> Tensor:
        """See `search.Predicts`."""
        joined: Tensor = self.joiner(out_frame, decoder_out)
        return joined


@torch.no_grad()
def dev_wer(
    model: TransducerModel,
    dev: Sequence[Batch],
    tokenizer: Tokenizer,
    settings: Train,
    world: World,
) -> dict[str, float]:
    """WER by greedy search, with the masks that give a chunk size's numbers.

    Args:
        model: in training, as it is at this step; what is decoded later is the average of many.
        dev: this process's batches.
        tokenizer: of the model.
        settings: of the training, with the chunk sizes and left contexts.
        world: over whose processes errors and words are summed.

    Returns:
        In percent, `wer_chunk_16` and so on for each chunk size with the longest left context that
        streams, and their mean, `wer`.
    """
    model.eval()
    heads = _Heads(
        model.context_size, copy.deepcopy(model.decoder).cpu(), copy.deepcopy(model.joiner).cpu()
    )
    wers = {}
    for chunk_size in settings.chunk_sizes:
        left = -1 if chunk_size == -1 else max(settings.left_context_frames)
        errors = torch.zeros(2, dtype=torch.int64)  # and words
        for batch in dev:
            on_device = batch.to(world.device)
            out, lens = model.encode(on_device.features, on_device.feature_lens, chunk_size, left)
            found = greedy_search(heads, out.cpu(), lens.cpu())
            counts = count_errors(
                (tokenizer.units(text), tokenizer.units(tokenizer.decode(tokens)))
                for text, tokens in zip(batch.texts, found, strict=True)
            )
            errors += torch.tensor([counts.errors, counts.length])
        wrong, words = world.sum(errors).tolist()
        name = "offline" if chunk_size == -1 else str(chunk_size)
        wers[f"wer_chunk_{name}"] = 100 * wrong / words
    model.train()
    return wers | {"wer": sum(wers.values()) / len(wers)}
