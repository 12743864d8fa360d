"""An export, run by onnxruntime, with the methods of the torch model.

Shapes: N streams, T feature frames (10 ms), c chunk_size, J joiner channels, V vocabulary, L tokens
of decoder context.  The joiner's input projections are inside the graphs, so encoder and decoder
outputs have J channels here.
"""

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from icetransfer.model.subsampling import FEATURE_DIM, WINDOW_EXTRA
from icetransfer.model.transducer import StreamingState, group_layers
from icetransfer.streaming.exported import Exported


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ValueError(f"{path} cannot be loaded; export it again ({error})") from error


class OnnxTransducer:
    """A model of one latency tier and one precision.

    Args:
        folder: the export.
        precision: "fp32", "int8", ...
        threads: of onnxruntime.

    Raises:
        ValueError: files are missing, broken, of another model family, or do not fit together.
    """

    def __init__(self, folder: Path, precision: str = "fp32", threads: int = 1) -> None:
        exported = Exported(folder)
        facts = exported.inspect(precision)
        files = exported.models(precision)
        self._encoder = _session(files["encoder"], threads)
        self._decoder = _session(files["decoder"], threads)
        self._joiner = _session(files["joiner"], threads)
        self._folder = folder
        self._inputs = [i.name for i in self._encoder.get_inputs()]
        self.context_size, self.vocab_size = facts.context_size, facts.vocab_size
        self.chunk_size, self.left_context_frames = facts.chunk_size, facts.left_context_frames

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """The one tier that was exported; -1 is offline."""
        return (self.chunk_size,)

    def encode(
        self,
        features: Tensor,
        feature_lens: Tensor,
        chunk_size: int = -1,
        left_context_frames: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances with full context.

        Args:
            features: (N, T, 80), padded with log(1e-10).
            feature_lens: (N,).
            chunk_size: -1, what an offline export does.
            left_context_frames: -1.

        Returns:
            (N, T4, J) and lengths (N,).

        Raises:
            ValueError: the export is a streaming one, or another chunk size is asked for.
        """
        if chunk_size != -1:
            raise ValueError(
                f"an ONNX model encodes whole utterances with full context only, not chunk_size="
                f"{chunk_size}; stream with initial_state and encode_chunk"
            )
        self._check_tier(chunk_size, left_context_frames)
        feeds = {"x": features.numpy(), "x_lens": feature_lens.numpy()}
        out, out_lens = self._encoder.run(None, feeds)
        return torch.from_numpy(out), torch.from_numpy(out_lens)

    def initial_state(
        self, batch_size: int, chunk_size: int, left_context_frames: int
    ) -> StreamingState:
        """The state of streams that have heard nothing; the tier must be the export's.

        Raises:
            ValueError: another tier is asked for.
        """
        self._check_tier(chunk_size, left_context_frames)
        tensors = [
            torch.zeros(
                [batch_size if isinstance(size, str) else size for size in given.shape],
                dtype=torch.int64 if given.type == "tensor(int64)" else torch.float32,
            )
            for given in self._encoder.get_inputs()[1:]
        ]
        *of_layers, embed_states, processed_lens = tensors
        return StreamingState(
            layers=group_layers(of_layers),
            embed_states=embed_states,
            processed_lens=processed_lens,
            chunk_size=self.chunk_size,
            left_context_frames=self.left_context_frames,
        )

    def encode_chunk(
        self, features: Tensor, state: StreamingState
    ) -> tuple[Tensor, StreamingState]:
        """Encodes the next chunk of every stream.

        Args:
            features: (N, 2c + 13, 80).
            state: of the previous call.

        Returns:
            (N, c // 2, J) and the next state.

        Raises:
            ValueError: features do not fit the state.
        """
        expected = (state.batch_size, 2 * self.chunk_size + WINDOW_EXTRA, FEATURE_DIM)
        if tuple(features.shape) != expected:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected {expected}")
        arrays = [features.numpy(), *(t.numpy() for t in state.tensors())]
        out, *new = self._encoder.run(None, dict(zip(self._inputs, arrays, strict=True)))
        return torch.from_numpy(out), state.with_tensors([torch.from_numpy(a) for a in new])

    def predict(self, tokens: Tensor) -> Tensor:
        """Decoder output (N, 1, J) after the last tokens (N, L)."""
        (out,) = self._decoder.run(None, {"y": tokens.numpy()})
        return torch.from_numpy(out).unsqueeze(1)

    def join(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Logits (N, 1, V) of one encoder frame (N, 1, J) and one decoder output (N, 1, J)."""
        feeds = {
            "encoder_out": encoder_out.squeeze(1).numpy(),
            "decoder_out": decoder_out.squeeze(1).numpy(),
        }
        (logits,) = self._joiner.run(None, feeds)
        return torch.from_numpy(logits).unsqueeze(1)

    def _check_tier(self, chunk_size: int, left_context_frames: int) -> None:
        effective = -1
        if chunk_size > 0:
            effective = left_context_frames // chunk_size * chunk_size
        if (chunk_size, effective) != (self.chunk_size, self.left_context_frames):
            raise ValueError(
                f"{self._folder} was exported for chunk_size={self.chunk_size}, "
                f"left_context_frames={self.left_context_frames}, not chunk_size={chunk_size}, "
                f"left_context_frames={left_context_frames}; export that tier"
            )
