"""The one config tree: defaults < conf/*.yaml < key=value on the command line.

A recipe's YAML and the command line may set any field below; an unknown key or a bad value is an
error that names the nearest right one.  The resolved tree is saved in the experiment's
`config.yaml` (see `experiment.py`) and is all that later stages read.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

# The parser in C, where PyYAML has it: the same trees, ten times as fast.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# The recipes that train the base models of the mini preset.
BASE_RECIPES = {"en": "en", "ml": "multilingual"}
FRAME_MS = 20  # one 50 Hz frame, the unit of chunk_size and left_context_frames
LOOK_AHEAD_MS = 130  # 13 feature frames that the front end reads past a chunk


def parse_hours(value: object) -> object:
    """Turns "8min" or "100h" into hours; leaves anything else to the field's own check."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(min|h)\s*", value) if isinstance(value, str) else None
    if match is None:
        return value
    return float(match[1]) / (60 if match[2] == "min" else 1)


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


Split = Literal["train", "dev", "test"]
Hours = Annotated[float, BeforeValidator(parse_hours), Field(gt=0)]


class Section(BaseModel):
    """A part of the tree: every key is known, every value is checked, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


AnySection = TypeVar("AnySection", bound=Section)


class Minutes(Section):
    """How much synthetic speech to make for each split, in minutes."""

    train: float = Field(30, ge=0)
    dev: float = Field(3, ge=0)
    test: float = Field(6, ge=0)


class SyntheticCorpus(Section):
    """Speech made on this machine by espeak-ng."""

    kind: Literal["synthetic"]
    language: str | None = None  # None: the recipe's language
    domain: Literal["slots", "open"] = "slots"
    minutes: Minutes = Minutes()
    seed: int = 1


class FolderCorpus(Section):
    """Any folder with audio and a transcripts.tsv (path, text, speaker)."""

    kind: Literal["folder"]
    path: Path
    language: str | None = None
    holdout_every: int = Field(10, ge=0)  # every Nth recording is test, its neighbour dev; 0: none


class PublishedCorpus(Section):
    """A corpus that many study, in its publisher's layout."""

    path: Path | None = None  # where it lies; None: stage 0 fetches it to <data.dir>/corpus/<name>
    language: str | None = None
    splits: tuple[Split, ...] = Field(("train", "dev", "test"), min_length=1)  # those to use


class Fleurs(PublishedCorpus):
    """FLEURS: read sentences of Wikipedia, some 10 h a language."""

    kind: Literal["fleurs"]


class MultilingualLibriSpeech(PublishedCorpus):
    """Multilingual LibriSpeech: audio books."""

    kind: Literal["mls"]
    codec: Literal["flac", "opus"] = "opus"


class CommonVoice(PublishedCorpus):
    """Mozilla Common Voice, any release: sentences read by volunteers."""

    kind: Literal["common_voice"]
    train: Literal["train", "validated"] = "train"  # validated: without dev, test, their speakers


class VoxPopuli(PublishedCorpus):
    """The transcribed part of VoxPopuli: speeches in the European Parliament."""

    kind: Literal["voxpopuli"]


class ManifestCorpus(Section):
    """A corpus that manifests describe, any number for each split."""

    language: str | None = None
    train: tuple[Path, ...] = ()
    dev: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that have a manifest."""
        return tuple(split for split in get_args(Split) if getattr(self, split))


class JsonLines(ManifestCorpus):
    """NeMo's manifests, JSON objects with audio_filepath, duration, text, a line each."""

    kind: Literal["jsonl"]


class Cuts(ManifestCorpus):
    """lhotse's manifests of cuts, or Shar folders."""

    kind: Literal["cuts"]


CORPUS_CLASSES = (
    SyntheticCorpus,
    FolderCorpus,
    Fleurs,
    MultilingualLibriSpeech,
    CommonVoice,
    VoxPopuli,
    JsonLines,
    Cuts,
)
AnyCorpus = (
    SyntheticCorpus
    | FolderCorpus
    | Fleurs
    | MultilingualLibriSpeech
    | CommonVoice
    | VoxPopuli
    | JsonLines
    | Cuts
)
Corpus = Annotated[AnyCorpus, Field(discriminator="kind")]


def has_split(corpus: AnyCorpus, split: str) -> bool:
    """Whether the config uses this split of a corpus."""
    if isinstance(corpus, PublishedCorpus | ManifestCorpus):
        return split in corpus.splits
    return True


class Features(Section):
    """80-bin log-mel filter banks."""

    store: Literal["precomputed", "on_the_fly"] = "precomputed"  # once per recipe, or per batch
    extractor: Literal["kaldi_native_fbank", "kaldifeat"] = "kaldi_native_fbank"
    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)  # speed perturbation of the training split
    jobs: int = Field(2, ge=1)

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
    corpora: dict[str, Corpus] = Field(min_length=1)
    vocab_size: int = Field(500, ge=8)
    features: Features = Features()
    min_seconds: float = Field(0.5, gt=0)
    max_seconds: float = Field(30, gt=0)


class SpecAugment(Section):
    """Masks and warps of the training features (Park et al. 2019)."""

    enabled: bool = True
    time_warp_factor: int = 80
    num_feature_masks: int = 2
    features_mask_size: int = 27
    num_frame_masks: int = 10
    frames_mask_size: int = 100
    max_frames_mask_fraction: float = 0.15


class Noise(Section):
    """Recordings such as MUSAN's, added to some of the training cuts."""

    path: Path | None = None  # a folder of audio, or a lhotse manifest of recordings; None: none
    snr: tuple[float, float] = (10, 20)  # dB, drawn evenly between these
    probability: float = Field(0.5, gt=0, le=1)  # that a cut gets some


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

    rank: int = Field(0, ge=0)  # 0: none
    parts: tuple[Part, ...] = Field(("encoder_embed", "encoder"), min_length=1)


def current_name(base_model: str) -> str:
    """The name that a base model has now: saved configs may hold one of an earlier version."""
    return {"seed-en": "tiny-en", "seed-ml": "tiny-ml"}.get(base_model, base_model)


class Transfer(Section):
    """What an experiment starts from."""

    base_models: dict[Literal["en", "ml"], Annotated[str, AfterValidator(current_name)]] = {
        "en": "tiny-en",
        "ml": "tiny-ml",
    }
    trusted: bool = False  # run code that these files hold: only if you know who made them
    parts: tuple[Part, ...] = ("encoder_embed", "encoder")  # loaded from the base model
    size: str | None = None  # random init only: a named size instead of the EN model's dimensions
    ctc: bool = True  # add a CTC head as an auxiliary task
    adapters: Adapters = Adapters()


class Mix(Section):
    """Training data of another recipe, such as that of the base model: against forgetting it."""

    data: Path | None = None  # its data folder, after its stage 3; None: none
    share: float = Field(0.2, gt=0, lt=1)  # of the audio of each batch
    unknown: Literal["characters", "cuts"] = "characters"  # dropped where the tokens lack some


class Schedule(Section):
    """Learning rate: warm-up, then constant with a cool-down at the end, or Eden."""

    kind: Literal["cooldown", "eden"] = "cooldown"
    warmup_steps: int = Field(100, ge=0)
    cooldown_fraction: float = Field(0.5, ge=0, le=1)
    eden_batches: float = 7500
    eden_epochs: float = 3.5


class Train(Section):
    """Multi-latency fine-tuning."""

    max_steps: int = Field(1000, ge=1)
    batch_seconds: float = Field(60, gt=0)  # audio of a batch, padding included
    accumulate: int = Field(1, ge=1)  # batches of a step, in each process
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 where the GPU has it
    workers: int = Field(0, ge=0)  # processes that load batches ahead; 0: the training's own
    lr: float = Field(0.045, gt=0)
    schedule: Schedule = Schedule()
    lr_scale: dict[Part, Annotated[float, Field(gt=0)]] = {}  # factor on lr, part by part
    freeze: dict[Part, Annotated[int, Field(ge=-1)]] = {}  # steps a part stays frozen; -1: all
    clipping_scale: float = 2.0
    chunk_sizes: tuple[int, ...] = (8, 16, 32, -1)  # one is drawn for each batch
    left_context_frames: tuple[int, ...] = (64, 128, -1)  # one is drawn with it
    prune_range: int = Field(5, ge=2)
    simple_loss_scale: float = 0.5
    loss_warmup_steps: int = 60
    ctc_loss_scale: float = 0.5
    loss_backend: Literal["auto", "k2", "torch"] = "auto"
    spec_augment: SpecAugment = SpecAugment()
    noise: Noise = Noise()
    mix: Mix = Mix()
    join_seconds: float = Field(0, ge=0)  # short cuts are joined to so much audio; 0: never
    shar: str | None = None  # folder or address of the training features, read in sequence
    log_every: int = Field(20, ge=1)
    valid_every: int = Field(200, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    keep_checkpoints: int = Field(3, ge=1)  # the last ones
    keep_best: int = Field(0, ge=0)  # besides, those of the lowest dev WER, or else dev loss
    dev_wer: bool = False  # by greedy search at every chunk size, when the dev loss is computed
    early_stop: int = Field(0, ge=0)  # after so many dev WERs that were no better; 0: never
    average_period: int = Field(20, ge=1)  # steps between updates of the running model average
    average_fraction: float = Field(0.3, gt=0, le=1)  # of the run's end, averaged for decoding
    threads: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check_early_stop(self) -> "Train":
        if self.early_stop and not self.dev_wer:
            raise ValueError("early_stop needs dev_wer=true: it is the dev WER that decides")
        return self


Precision = Literal["fp32", "fp16", "int8", "int4"]


class Int8(Section):
    """Weights of matrix products in 8 bits; their inputs too, as they come."""

    per_channel: bool = True  # a scale for each output channel, else for each matrix
    decoder: bool = False  # the decoder too: it saves little and is where most is lost


class Int4(Section):
    """Weights of the encoder's matrix products in 4 bits."""

    block_size: Literal[16, 32, 64, 128, 256] = 32  # weights that share a scale
    symmetric: bool = False  # without zero points: a little smaller, a little worse
    # onnxruntime's: 0 computes in fp32; 4, with inputs in 8 bits, takes half the time
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    rest: Literal["fp32", "int8"] = "int8"  # the joiner, and layers that are kept out of 4 bits


class Export(Section):
    """How the precisions below fp32 are made."""

    int8: Int8 = Int8()
    int4: Int4 = Int4()
    convolutions: Literal["fp32", "int8"] = "int8"  # weights of int8 and int4 encoders, stored


class Remedy(Section):
    """WER points that a precision may cost against fp32: more is warned of, and can be remedied."""

    int8: float = Field(0.3, ge=0)
    int4: float = Field(1.0, ge=0)


class Decode(Section):
    """What is decoded, and with what."""

    splits: tuple[Literal["dev", "test"], ...] = ("test",)
    engines: tuple[Literal["torch", "onnxruntime", "sherpa"], ...] = ("torch", "sherpa")
    precisions: tuple[Precision, ...] = ("fp32", "int8")  # torch decodes fp32 only
    chunk_sizes: tuple[int, ...] = (8, 16, 32, -1)
    left_context_frames: int = Field(128, ge=1)
    search: Literal["greedy_search", "modified_beam_search"] = "greedy_search"
    beam: int = Field(4, ge=1)
    batch_streams: int = Field(32, ge=1)
    latency: bool = False  # measure from a word's end to its output; needs the model's CTC head


class Bundle(Section):
    """What is handed over."""

    tar: bool = False  # an archive of each folder as well


class Config(Section):
    """Everything that decides an experiment's result."""

    language: str
    init: Literal["en", "ml", "random"] = "ml"
    hours: Hours | None = None  # None: all there is
    seed: int = 1
    data: Data
    transfer: Transfer = Transfer()
    train: Train = Train()
    export: Export = Export()
    remedy: Remedy = Remedy()
    decode: Decode = Decode()
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
    for file in files:
        tree = _merge(tree, _read_yaml(file))
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(describe_errors(error, Config)) from None


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
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    try:
        return section.model_validate(tree.get(prefix, {}))
    except ValidationError as error:
        raise ValueError(describe_errors(error, section, f"{prefix}.")) from None


def dump_config(config: Section) -> str:
    """The whole tree as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists the keys in which two trees differ, one line each: "train.lr: 0.045 -> 0.02"."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"config file {file} does not exist")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), YAML_LOADER) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"config file {file} must hold keys and values, not {type(tree).__name__}")
    return tree


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"expected key=value (as in train.max_steps=500), got {override!r}")
    try:
        tree: Any = yaml.load(text, YAML_LOADER)
    except yaml.YAMLError:
        raise ValueError(f"the value of {key} is not YAML: {text!r}") from None
    for name in reversed(key.split(".")):
        tree = {name: tree}
    merged: dict[str, Any] = tree
    return merged


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None and isinstance(merged.get(key), Mapping):
            del merged[key]  # "slots: null" takes a corpus of an earlier file out
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
        elif field.annotation == dict[str, Corpus]:
            for corpus in CORPUS_CLASSES:
                keys += _known_keys(corpus, f"{prefix}{name}.NAME.")
    return keys


def describe_errors(error: ValidationError, section: type[BaseModel], prefix: str = "") -> str:
    """Turns pydantic's errors into lines that a user can act on; keys begin with the prefix."""
    known = _known_keys(section, prefix)
    lines = []
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        if parts[:2] == ["data", "corpora"]:
            # pydantic puts the tag of the union ("synthetic") after the name: users never type it
            del parts[3:4]
        key = prefix + ".".join(parts)
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"unknown config key {key}{hint}")
        elif item["type"] == "missing":
            lines.append(f"config key {key} is required and not set")
        else:
            value = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            where = f"config key {key}: " if key else ""
            lines.append(f"{where}{item['msg'].removeprefix('Value error, ')}{value}")
    return "\n".join(lines)
