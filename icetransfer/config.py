"""Every config key: its type, default and meaning, and which stage reads it.

    python -m icetransfer.config                 every key
    python -m icetransfer.config train.schedule  the keys that begin with this
    python -m icetransfer.config --exp DIR       what an experiment sets, and where it came from;
                                                 with PREFIX, of these keys
    python -m icetransfer.config --markdown      docs/config.md

There is one config tree: defaults < conf/*.yaml < key=value on the command line.  A recipe's YAML
and the command line may set any key; an unknown key or a bad value is an error that names the
nearest right one.  The resolved tree is saved in the experiment's `config.yaml` (see
`experiment.py`) and is all that later stages read.
"""

import difflib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from icetransfer.settings import reference
from icetransfer.settings.augment import Augmentations
from icetransfer.settings.corpora import Corpus
from icetransfer.settings.errors import describe_errors, known_keys
from icetransfer.settings.language_model import LanguageModel
from icetransfer.settings.robustness import Robustness
from icetransfer.settings.section import Hours, Section
from icetransfer.settings.tree import SAVED_FIRST, leaves, merge, read_trees
from icetransfer.stage.command import command_parser

# The recipes that train the base models of the mini preset.
BASE_RECIPES = {"en": "en", "ml": "multilingual"}
FRAME_MS = 20  # one 50 Hz frame, the unit of chunk_size and left_context_frames
ORIGINS = "origins.json"  # in an experiment folder: where the keys that are set came from
LOOK_AHEAD_MS = 130  # 13 feature frames that the front end reads past a chunk


def hours_label(hours: float | None) -> str:
    """Names an amount of training data as files do: "2min", "100h", or "all" for None."""
    if hours is None:
        return "all"
    return f"{hours * 60:.4g}min" if hours < 1 else f"{hours:.6g}h"


def chunk_label(chunk_size: int) -> str:
    """Names a latency tier for people: "320 ms (+130 ms look-ahead)", or "offline" for -1."""
    if chunk_size == -1:
        return "offline"
    return f"{chunk_size * FRAME_MS} ms (+{LOOK_AHEAD_MS} ms look-ahead)"


def tier_folder(chunk_size: int, left_context_frames: int) -> str:
    """Names a latency tier as folders do: "chunk-16-left-128", or "offline" for -1."""
    return "offline" if chunk_size == -1 else f"chunk-{chunk_size}-left-{left_context_frames}"


def chunk_ms(chunk_size: int) -> int:
    """The chunk's length in milliseconds, -1 for offline, as `wer.json` holds it."""
    return -1 if chunk_size == -1 else chunk_size * FRAME_MS


AnySection = TypeVar("AnySection", bound=Section)


class Features(Section):
    """80-bin log-mel filter banks."""

    store: Literal["precomputed", "on_the_fly"] = "precomputed"
    """Computed once per recipe, or for each batch as it is loaded."""
    extractor: Literal["kaldi_native_fbank", "kaldifeat"] = "kaldi_native_fbank"
    """The library: on the CPU, or (kaldifeat) on a GPU."""
    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    """Speed perturbation of the training split: a copy of it for each factor."""
    jobs: int = Field(2, ge=1)
    """Processes of stages 1 and 3."""

    @model_validator(mode="after")
    def _check_extractor(self) -> "Features":
        if (self.store, self.extractor) == ("on_the_fly", "kaldifeat"):
            raise ValueError(
                "extractor=kaldifeat needs store=precomputed: the processes that load batches "
                "compute on the CPU"
            )
        return self


class Data(Section):
    """What the recipe reads.  Each corpus gives a train, a dev and a test split.

    The training splits are pooled; each test split is a test set of the corpus's name.
    """

    dir: Path = Path("data")
    """The recipe's data folder, shared by its experiments."""
    corpora: dict[str, Corpus] = Field(min_length=1)
    tokens: Literal["bpe", "characters"] = "bpe"
    """BPE pieces, or characters, for scripts without spaces between words."""
    vocab_size: int = Field(500, ge=8)
    """BPE pieces, blank and unknown included; of characters there are as many as the text has."""
    tokenizer_text: tuple[Path, ...] = ()
    """Files of text, a sentence a line, that tokens are trained on besides the transcripts."""
    text: tuple[Path, ...] = ()
    """Files or folders of text for language models: plain or .gz, a sentence a line or prose."""
    features: Features = Features()
    keep_apart: tuple[Literal["speakers", "sentences"], ...] = ()
    """What training must not share with dev and test: such recordings are left out of it."""
    min_seconds: float = Field(0.5, gt=0)
    """Shorter training and dev recordings are left out."""
    max_seconds: float = Field(30, gt=0)
    """Longer training and dev recordings are left out."""


class SpecAugment(Section):
    """Masks and warps of the training features (Park et al. 2019)."""

    enabled: bool = True
    """Whether training features are masked and warped."""
    time_warp_factor: int = 80
    """Frames (10 ms) by which a point in time moves at most."""
    num_feature_masks: int = 2
    """Masks over frequency."""
    features_mask_size: int = 27
    """Mel bins of a frequency mask at most."""
    num_frame_masks: int = 10
    """Masks over time at most."""
    frames_mask_size: int = 100
    """Frames (10 ms) of a time mask at most."""
    max_frames_mask_fraction: float = 0.15
    """Share of an utterance's frames that time masks may cover."""


SUBMODULES = (
    *("encoder_embed", "encoder", "decoder", "joiner"),
    *("simple_am_proj", "simple_lm_proj", "ctc_output"),
)


def check_part(part: str) -> str:
    """Refuses what cannot be a part of the model; whether it is one shows when there is a model."""
    submodule = part.partition(".")[0]
    if submodule not in SUBMODULES:
        near = difflib.get_close_matches(submodule, SUBMODULES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"a part of the model begins with one of {', '.join(SUBMODULES)}{hint}")
    if not re.fullmatch(r"\w+(\.(\w+|\d+-\d+))*", part):
        raise ValueError("a part of the model is written like encoder or encoder.encoders.0-2")
    return part


# A submodule, or a range of it: encoder, encoder.encoders.0-2, joiner.output_linear
Part = Annotated[str, AfterValidator(check_part)]


class Adapters(Section):
    """Low-rank adapters in attention and feed-forward; the rest of the parts is left as loaded."""

    rank: int = Field(0, ge=0)
    """Of the low-rank adapters; 0: none."""
    parts: tuple[Part, ...] = Field(("encoder_embed", "encoder"), min_length=1)
    """Parts that get adapters and are otherwise fixed."""


def current_name(base_model: str) -> str:
    """The name that a base model has now: saved configs may hold one of an earlier version."""
    return {"seed-en": "tiny-en", "seed-ml": "tiny-ml"}.get(base_model, base_model)


class Transfer(Section):
    """What an experiment starts from."""

    base_models: dict[Literal["en", "ml"], Annotated[str, AfterValidator(current_name)]] = Field(
        {"en": "tiny-en", "ml": "tiny-ml"}
    )
    """For each init a name in icetransfer/base_models.yaml, a .pt file, or hf://ORG/NAME/FILE.pt."""
    trusted: bool = False
    """Run code that these files hold: only if you know who made them."""
    parts: tuple[Part, ...] = ("encoder_embed", "encoder")
    """Parts that are loaded from the base model; the rest begins at random."""
    size: str | None = None
    """With init=random, a named size (tiny, small, ...) instead of the EN model's dimensions."""
    ctc: bool = True
    """Add a CTC head as an auxiliary task."""
    adapters: Adapters = Adapters()


class Mix(Section):
    """Training data of another recipe, such as that of the base model: against forgetting it."""

    data: Path | None = None
    """The other recipe's data folder, after its stage 2; null: nothing is mixed in."""
    share: float = Field(0.2, gt=0, lt=1)
    """Of the audio of each batch."""
    unknown: Literal["characters", "cuts"] = "characters"
    """What is dropped where the tokens lack a letter: the letter, or the cut."""


class Schedule(Section):
    """Learning rate: warm-up, then constant with a cool-down at the end, or Eden."""

    kind: Literal["cooldown", "eden"] = "cooldown"
    """Constant with a cool-down at the end, or icefall's Eden."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps in which the rate rises from half to its full value; null: a share of the run."""
    cooldown_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the run, at its end, in which the rate falls to 5 %."""
    eden_batches: float = 7500
    """Eden's time scale in steps."""
    eden_epochs: float = 3.5
    """Eden's time scale in epochs."""


class Train(Section):
    """Multi-latency fine-tuning."""

    max_steps: int | None = Field(None, ge=1)
    """Steps (updates of the weights) of the whole run; null: by the hours of data."""
    epochs: float | None = Field(None, gt=0)
    """The length in passes over the data at all speeds, as icefall counts; null: `max_steps`."""
    batch_seconds: float | None = Field(None, gt=0)
    """Audio of a batch, padding included; null: by the hours of data, and what memory holds."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients are summed for a step, in each process."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of most of the computation; auto: bf16 where the GPU has it, else fp32."""
    workers: int = Field(0, ge=0)
    """Processes that load batches ahead; 0: the training's own loads them."""
    lr: float = Field(0.045, gt=0)
    """ScaledAdam's learning rate."""
    schedule: Schedule = Schedule()
    lr_scale: dict[Part, Annotated[float, Field(gt=0)]] = Field({})
    """Factor on the learning rate, part by part; other parts have what the scheme gives them."""
    freeze: dict[Part, Annotated[int, Field(ge=-1)]] = Field({})
    """Steps that a part stays as it was loaded; -1: all."""
    clipping_scale: float = 2.0
    """A gradient longer than this times the recent median is shortened to it."""
    chunk_sizes: tuple[int, ...] = Field((8, 16, 32, -1), min_length=1)
    """50 Hz frames, multiples of 8, -1 for offline; one is drawn for each step."""
    left_context_frames: tuple[int, ...] = Field((64, 128, -1), min_length=1)
    """50 Hz frames, -1 for all; one is drawn with the chunk size."""
    prune_range: int = Field(5, ge=2)
    """Symbols a frame that the pruned transducer loss looks at."""
    delay_penalty: float = Field(0, ge=0)
    """What a symbol loses in log-probability by each frame (40 ms) that it comes later; 0: none."""
    simple_loss_scale: float = 0.5
    """Weight of the simple loss after the warm-up of the losses."""
    loss_warmup_steps: int | None = Field(None, ge=0)
    """Steps until the pruned loss has its full weight; null: a share of the run."""
    ctc_loss_scale: float = 0.5
    """Weight of the CTC loss."""
    loss_backend: Literal["auto", "k2", "torch"] = "auto"
    """What computes the transducer losses; auto: k2 where it is installed."""
    spec_augment: SpecAugment = SpecAugment()
    augment: Augmentations = ()
    """What is done to cuts: none, default, strong, or a list of your own, each with its `kind`."""
    mix: Mix = Mix()
    join_seconds: float = Field(0, ge=0)
    """Short cuts are joined to rows of at most this many seconds; 0: never."""
    shar: str | None = None
    """Folder or address of the training features as a lhotse Shar; null: read where they lie."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of training losses."""
    valid_every: int | None = Field(None, ge=1)
    """Steps between dev losses; null: ten in a run, or every 1000 steps."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; null: ten in a run, or every 1000 steps."""
    keep_checkpoints: int = Field(3, ge=1)
    """How many of the last checkpoints are kept."""
    keep_best: int = Field(0, ge=0)
    """How many of the lowest dev WER, or else dev loss, are kept besides."""
    dev_wer: bool = False
    """Measure dev WER too, by greedy search at every chunk size."""
    early_stop: int = Field(0, ge=0)
    """Stop after this number of dev WERs without improvement; 0: never."""
    average_period: int = Field(20, ge=1)
    """Steps between updates of the running average of the weights."""
    average_fraction: float = Field(0.2, gt=0, le=1)
    """Share of the run, at its end, whose weights are averaged for decoding."""
    threads: int = Field(1, ge=1)
    """CPU threads of each process."""
    branches: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Lengths, in steps, of shorter runs that `train --branch` can make out of this one."""

    @model_validator(mode="before")
    @classmethod
    def _read_noise(cls, tree: Any) -> Any:
        """Takes the noise of an earlier version, which saved configs hold, as an augmentation."""
        noise = tree.get("noise") if isinstance(tree, dict) else None
        if not isinstance(noise, dict):
            return tree
        tree = {key: value for key, value in tree.items() if key != "noise"}
        if noise.get("path") is not None:
            if tree.get("augment"):
                raise ValueError("noise is one of train.augment's list now: {kind: noise, ...}")
            tree["augment"] = [{"kind": "noise", "snr": (10, 20), **noise}]
        return tree

    @model_validator(mode="after")
    def _check_length(self) -> "Train":
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps both say how long to train: set one of them")
        if self.branches and self.schedule.kind != "cooldown":
            raise ValueError("branches need schedule.kind=cooldown: Eden's rate is never constant")
        return self

    @model_validator(mode="after")
    def _check_left_context(self) -> "Train":
        if illegal := [
            frames for frames in self.left_context_frames if frames != -1 and frames < 1
        ]:
            raise ValueError(
                f"left_context_frames has {illegal}: expected 50 Hz frames above 0, or -1 for all"
            )
        return self

    @model_validator(mode="after")
    def _check_early_stop(self) -> "Train":
        if self.early_stop and not self.dev_wer:
            raise ValueError("early_stop needs dev_wer=true: it is the dev WER that decides")
        return self


Precision = Literal["fp32", "fp16", "int8", "int4"]


class Int8(Section):
    """Weights of matrix products in 8 bits; their inputs too, as they come."""

    per_channel: bool = True
    """A scale for each output channel, else for each matrix."""
    decoder: bool = False
    """The decoder too: it saves little and is where most is lost."""


class Int4(Section):
    """Weights of the encoder's matrix products in 4 bits."""

    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share a scale."""
    symmetric: bool = False
    """Without zero points: a little smaller, a little worse."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    """onnxruntime's: 0 computes in fp32; 4, with inputs in 8 bits, takes half the time."""
    rest: Literal["fp32", "int8"] = "int8"
    """The joiner, and layers that are kept out of 4 bits."""


class Export(Section):
    """How the precisions below fp32 are made."""

    int8: Int8 = Int8()
    int4: Int4 = Int4()
    convolutions: Literal["fp32", "int8"] = "int8"
    """How int8 and int4 encoders store the weights of convolutions."""


class Remedy(Section):
    """WER points that a precision may cost against fp32: more is warned of, and can be remedied."""

    int8: float = Field(0.3, ge=0)
    """WER points that int8 may cost against fp32."""
    int4: float = Field(1.0, ge=0)
    """WER points that int4 may cost against fp32."""


class Decode(Section):
    """What is decoded, and with what."""

    splits: tuple[Literal["dev", "test"], ...] = ("test",)
    """The splits of each corpus that are test sets."""
    engines: tuple[Literal["torch", "onnxruntime", "sherpa"], ...] = ("torch", "sherpa")
    """What runs the model; torch decodes fp32 only."""
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    """The precisions that are exported and decoded."""
    chunk_sizes: tuple[int, ...] = Field((8, 16, 32, -1), min_length=1)
    """The latency tiers: 50 Hz frames (16 = 320 ms), multiples of 8, -1 for offline."""
    left_context_frames: int = Field(128, ge=1)
    """50 Hz frames that attention looks back beyond the chunk."""
    search: Literal["greedy_search", "modified_beam_search"] = "greedy_search"
    """How tokens are found."""
    beam: int = Field(4, ge=1)
    """Hypotheses of modified_beam_search."""
    hotwords: Path | None = None
    """Names and terms to expect, a phrase a line; for modified_beam_search."""
    hotwords_score: float = Field(1.0, gt=0)
    """What each token of a hotword is worth that has no score of its own."""
    language_model_scale: float = Field(0.0, ge=0)
    """Of the language model in modified_beam_search (shallow fusion); 0: without it."""
    batch_streams: int = Field(32, ge=1)
    """Recordings that are decoded at once."""
    latency: bool = False
    """Measure from a word's end to its output; needs the model's CTC head."""

    @model_validator(mode="after")
    def _check_hotwords(self) -> "Decode":
        if self.hotwords and self.search != "modified_beam_search":
            raise ValueError("hotwords need search=modified_beam_search: greedy search has no beam")
        return self

    @model_validator(mode="after")
    def _check_language_model(self) -> "Decode":
        if not self.language_model_scale:
            return self
        if self.search != "modified_beam_search":
            raise ValueError("language_model_scale needs search=modified_beam_search")
        if -1 in self.chunk_sizes and "sherpa" in self.engines:
            raise ValueError(
                "language_model_scale: sherpa-onnx's offline recogniser does no shallow fusion; "
                "leave -1 out of chunk_sizes, or sherpa out of engines"
            )
        return self


class Bundle(Section):
    """What is handed over."""

    tar: bool = False
    """An archive of each folder as well."""


class Config(Section):
    """Everything that decides an experiment's result."""

    language: str
    """Code of the recipe's language; run.sh gives its folder's name."""
    init: Literal["en", "ml", "random"] = "ml"
    """What the encoder starts from: an English or a multilingual base model, or nothing."""
    hours: Hours | None = None
    """Training data, as 8min or 100h; null: all there is."""
    seed: int = 1
    """Of initialisation, batches and augmentation."""
    data: Data
    transfer: Transfer = Transfer()
    train: Train = Train()
    export: Export = Export()
    remedy: Remedy = Remedy()
    language_model: LanguageModel = LanguageModel()
    decode: Decode = Decode()
    robustness: Robustness = Robustness()
    bundle: Bundle = Bundle()

    @model_validator(mode="after")
    def _check_chunk_sizes(self) -> "Config":
        for key, sizes in (
            ("train.chunk_sizes", self.train.chunk_sizes),
            ("decode.chunk_sizes", self.decode.chunk_sizes),
        ):
            illegal = [size for size in sizes if size != -1 and (size < 1 or size % 8)]
            if illegal:
                raise ValueError(
                    f"{key} has {illegal}: a chunk is a multiple of 8 frames (160 ms), because "
                    f"every stack's downsampling must divide it; or -1 for offline"
                )
        return self

    @model_validator(mode="after")
    def _check_language_model(self) -> "Config":
        if self.decode.language_model_scale and self.language_model.text == "none":
            raise ValueError(
                "decode.language_model_scale needs a language model: "
                "set language_model.text=transcripts or text"
            )
        return self

    @model_validator(mode="after")
    def _check_robustness(self) -> "Config":
        size = self.robustness.chunk_size
        if size is not None and size not in self.decode.chunk_sizes:
            raise ValueError(
                f"robustness.chunk_size={size} is none of decode.chunk_sizes, "
                f"{list(self.decode.chunk_sizes)}"
            )
        return self

    @property
    def name(self) -> str:
        """The experiment's default folder name: init, amount of data and seed."""
        return f"{self.init}-{hours_label(self.hours)}-seed{self.seed}"


def load_config(files: Iterable[Path], overrides: Iterable[str] = ()) -> Config:
    """Reads YAML files, later ones over earlier ones, then key=value overrides.

    Args:
        files: YAML files, each with any part of the tree.
        overrides: strings such as "train.max_steps=500"; values are YAML.

    Returns:
        The validated tree.

    Raises:
        ValueError: a file is missing or not YAML, a key is unknown (the nearest known one is
            named), or a value is not allowed.
    """
    tree: dict[str, Any] = {}
    for _, part in read_trees(files, overrides):
        tree = merge(tree, part)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(describe_errors(error, Config)) from None


def origins(files: Iterable[Path], overrides: Iterable[str] = ()) -> dict[str, str]:
    """Where each key that `load_config` finds set came from last: a file or the command line."""
    merged: dict[str, Any] = {}
    last: dict[str, str] = {}
    for source, part in read_trees(files, overrides):
        merged = merge(merged, part)
        last |= {key: source for key, _ in leaves(part)}
    # What a later null took out is not set any more, whoever set it before.
    return {key: last[key] for key, _ in leaves(merged) if key in last}


def load_section(section: type[AnySection], prefix: str, overrides: Iterable[str]) -> AnySection:
    """A part of the tree, of key=value overrides alone: its defaults where there are none.

    Args:
        section: the part's class.
        prefix: where it stands in the tree: what the keys begin with.
        overrides: as `load_config` takes them.

    Raises:
        ValueError: a key is unknown, or a value is not allowed.
    """
    tree: dict[str, Any] = {}
    for _, part in read_trees((), overrides):
        tree = merge(tree, part)
    try:
        return section.model_validate(tree.get(prefix, {}))
    except ValidationError as error:
        raise ValueError(describe_errors(error, section, f"{prefix}.")) from None


def dump_config(config: Section) -> str:
    """The whole tree as YAML, defaults included, and marked so that a part of it is none."""
    tree = config.model_dump(mode="json")
    return SAVED_FIRST + yaml.safe_dump(
        tree, sort_keys=False, allow_unicode=True, explicit_end=True
    )


def _begins(key: str, prefix: str) -> bool:
    return not prefix or f"{key}.".startswith(f"{prefix.rstrip('.')}.")


def _require_match(prefix: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Refuses a prefix that none of the keys begins with, and names the nearest known one."""
    if not any(_begins(key, prefix) for key in keys):
        near = difflib.get_close_matches(prefix, [*known], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no config key begins with {prefix}{hint}")


def _reference(prefix: str) -> Iterator[str]:
    """The reference of the keys of a part of the tree, as wide as the terminal.

    Raises:
        ValueError: there are none.
    """
    rows = [*reference.keys(Config)]
    _require_match(prefix, (row.name for row in rows), known_keys(Config))
    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    yield from reference.terminal((row for row in rows if _begins(row.name, prefix)), width)


def _defaults(resolved: Config) -> dict[str, Any]:
    """The values of the keys that nobody has to set, dotted."""
    corpora = {
        name: {key: getattr(corpus, key) for key in _required(type(corpus))}
        for name, corpus in resolved.data.corpora.items()
    }
    required = {"language": resolved.language, "data": {"corpora": corpora}}
    to_set = {key for key, _ in leaves(required)}
    tree = Config.model_validate(required).model_dump(mode="json")
    return {key: value for key, value in leaves(tree) if key not in to_set}


def _required(section: type[BaseModel]) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()]


def _set_in(experiment: Path, prefix: str) -> Iterator[str]:
    """What an experiment sets in a part of the tree, and where it came from.

    Raises:
        ValueError: the folder has no config, or its config no such part.
    """
    saved = experiment / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"{saved} does not exist: --exp takes an experiment folder")
    resolved = load_config([saved])
    path = experiment / ORIGINS
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    tree = resolved.model_dump(mode="json")
    keys = [key for key, _ in leaves(tree)]
    _require_match(prefix, keys, [*keys, *known_keys(Config)])
    lines = reference.set_keys(tree, _defaults(resolved), recorded)
    yield from (line for line in lines if _begins(line.partition(" = ")[0], prefix))


def main() -> None:
    """Prints the reference of keys, or what an experiment sets."""
    parser = command_parser(__doc__, "docs/config.md")
    parser.add_argument("prefix", nargs="?", default="", help="a key, or what keys begin with")
    parser.add_argument("--exp", type=Path, help="an experiment folder: what it sets")
    parser.add_argument("--markdown", action="store_true", help="the page docs/config.md")
    args = parser.parse_args()
    try:
        if args.exp:
            print("\n".join(_set_in(args.exp, args.prefix)))
        elif args.markdown:
            print(reference.markdown(Config), end="")
        else:
            print("\n".join(_reference(args.prefix)))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
