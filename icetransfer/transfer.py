"""Stage 5: the model that training starts from -> exp/init.pt and exp/transfer.json.

The encoder and its front end come from an EN or ML checkpoint; decoder, joiner and the other
projections are initialised for the new vocabulary; `transfer.parts` chooses otherwise, down to
ranges of encoder stacks.  `transfer.json` says of every parameter whether it was loaded or
re-initialised and from where, and what of the base checkpoint was left out.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from icetransfer.config import Config
from icetransfer.data.tokenizer import Tokenizer
from icetransfer.experiment import (
    Experiment,
    checkpoint_steps,
    log,
    run_stage,
    write_provenance,
)
from icetransfer.model import hub
from icetransfer.model.checkpoint import read_checkpoint, save_checkpoint
from icetransfer.model.parts import is_in, require_matches
from icetransfer.model.transducer import SIZES, TransducerDims, TransducerModel, build_transducer
from icetransfer.stage import atomic
from icetransfer.stage.json_file import read_json
from icetransfer.stage.stamp import Stamp, digests, known_sha256, sha256

REPOSITORY = Path(__file__).resolve().parent.parent
BASE_MODELS = Path(__file__).with_name("base_models.yaml")

LOADED, REINITIALISED = "loaded", "reinitialised"


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint to start from."""

    name: str
    path: Path
    facts: dict[str, Any]


def named_base_model(config: Config, key: str) -> BaseModel:
    """The checkpoint that the config names for "en" or "ml".

    It names an entry of the list, a .pt file, or a file of a model hub, which is kept in
    egs/base_models/hub.

    Raises:
        ValueError: nothing is named, or the name is unknown.
    """
    where = f"transfer.base_models.{key}"
    name = dict(config.transfer.base_models).get(key)  # type: ignore[call-overload]
    if name is None:
        raise ValueError(f"{where} is not set: name a base model or a path to a .pt file")
    known: dict[str, dict[str, Any]] = yaml.safe_load(BASE_MODELS.read_text(encoding="utf-8"))
    if name in known:
        return BaseModel(name, REPOSITORY / known[name]["path"], known[name])
    if name.startswith("hf://"):
        wanted = hub.HubFile.parse(name)
        folder = REPOSITORY / "egs/base_models/hub" / wanted.repository / wanted.revision
        facts = {"huggingface": dataclasses.asdict(wanted)}
        return BaseModel(wanted.repository, folder / wanted.file, facts)
    if name.endswith(".pt"):
        return BaseModel(Path(name).stem, Path(name), {})
    raise ValueError(
        f"{where}={name} is neither a path to a .pt file, nor {hub.FORM}, nor one of "
        f"{', '.join(known)}"
    )


def find_base_model(config: Config, key: str) -> BaseModel:
    """The `named_base_model`, downloaded if it is not there yet and the list says from where.

    Raises:
        ValueError: there is none of this name, it is not there and cannot be downloaded, or it is
            not the one that was downloaded.
    """
    base = named_base_model(config, key)
    if not base.path.is_file():
        if "huggingface" not in base.facts:
            get = f"; get it from {base.facts['get']}" if "get" in base.facts else ""
            raise ValueError(
                f"transfer.base_models.{key}={base.name}: {base.path} does not exist{get}"
            )
        download(base)
    hold_checksum(base)
    record = hub_record(base)
    if "huggingface" in base.facts and record.is_file():
        found = read_json(record, ["revision"])
        pinned = {**base.facts["huggingface"], "revision": found.pop("revision")}
        return dataclasses.replace(base, facts={**base.facts, **found, "huggingface": pinned})
    return base


def download(base: BaseModel) -> None:
    """Fetches a base model from its hub, and records its commit and its checksum.

    Raises:
        ValueError: the download fails.
    """
    wanted = hub.HubFile(**base.facts["huggingface"])
    log.info("downloading %s of %s", wanted.file, wanted.repository)
    try:
        fetched, facts = hub.download(wanted)
    except ValueError as error:
        get = base.facts.get("get", f"{wanted.repository} ({wanted.file})")
        raise ValueError(f"{base.path}: {error}; get it from {get}, and put it there") from error
    digest = sha256(fetched)
    atomic.write_text(hub_record(base), json.dumps(facts, indent=1) + "\n")
    atomic.write_text(checksum_path(base), f"{digest}  {base.path.name}\n")
    with atomic.atomic_path(base.path) as temporary:
        shutil.copyfile(fetched, temporary)
    log.info("-> %s, sha256 %s", base.path, digest)
    log.info("to have the same on any machine: %s", wanted.at(facts["revision"]))


def hub_record(base: BaseModel) -> Path:
    """Where a downloaded base model's commit is recorded, and its repository's licence."""
    return base.path.with_name(f"{base.path.name}.hub.json")


def checksum_path(base: BaseModel) -> Path:
    """Where the checksum of a downloaded base model is recorded, in the format of sha256sum."""
    return base.path.with_name(f"{base.path.name}.sha256")


def hold_checksum(base: BaseModel) -> None:
    """Checks a base model against the checksum of the list, or the one recorded at its download.

    Raises:
        ValueError: it is another file.
    """
    recorded, where = base.facts.get("sha256"), str(BASE_MODELS)
    if recorded is None and (path := checksum_path(base)).is_file():
        recorded, where = path.read_text(encoding="utf-8").split()[0], str(path)
    if recorded is not None and (found := sha256(base.path)) != recorded:
        raise ValueError(
            f"{base.path} has sha256 {found}, but {where} says {recorded}: it was changed since "
            f"its download, or is another file; remove it (and the record) to fetch it again"
        )


def transfer(
    model: TransducerModel, base: Mapping[str, Tensor], parts: tuple[str, ...]
) -> dict[str, Any]:
    """Copies the parts of a base checkpoint into a fresh model.

    Args:
        model: changed in place.
        base: the base checkpoint's state_dict.
        parts: what to load (see `parts`); all of each must fit.

    Returns:
        The account of `transfer.json`: `groups` (submodule -> fate -> tensors and parameters),
        `parameters` (name -> fate, count, shape) and `left_out` (base entries not used).

    Raises:
        ValueError: an entry inside the parts is missing, superfluous or of another shape.
    """
    own = model.state_dict()
    wanted = {name for name in own if any(is_in(name, part) for part in parts)}
    offered = {name for name in base if any(is_in(name, part) for part in parts)}
    if not parts:
        raise ValueError("nothing to load: transfer.parts is empty; for that, use init=random")
    require_matches(parts, own, "transfer.parts")
    if problems := _mismatches(own, base, wanted, offered):
        raise ValueError(
            f"the base checkpoint does not fit the parts {list(parts)}, {len(problems)} entries, "
            f"such as: {'; '.join(problems[:3])}. Is it another model family or another size?"
        )
    model.load_state_dict({name: base[name] for name in wanted}, strict=False)
    return account(model, wanted, base)


def _mismatches(
    own: Mapping[str, Tensor], base: Mapping[str, Tensor], wanted: set[str], offered: set[str]
) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(wanted - offered)]
    extra = [f"{name} has no place in the model" for name in sorted(offered - wanted)]
    shapes = [
        f"{name} is {tuple(base[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(wanted & offered)
        if base[name].shape != own[name].shape
    ]
    return missing + extra + shapes


def account(model: TransducerModel, loaded: set[str], base: Mapping[str, Tensor]) -> dict[str, Any]:
    """What became of every parameter of the model and every entry of the base checkpoint."""
    own = model.state_dict()
    fates = {name: LOADED if name in loaded else REINITIALISED for name in own}
    left_out = {name: list(base[name].shape) for name in base if name not in loaded}
    groups: dict[str, dict[str, dict[str, int]]] = {}
    entries = [(name, fates[name], own[name].numel()) for name in own]
    entries += [(name, "left_out", base[name].numel()) for name in left_out]
    for name, fate, count in entries:
        group = groups.setdefault(name.split(".")[0], {})
        totals = group.setdefault(fate, {"tensors": 0, "parameters": 0})
        totals["tensors"] += 1
        totals["parameters"] += count
    return {
        "groups": groups,
        "parameters": {
            name: {"fate": fates[name], "count": own[name].numel(), "shape": list(own[name].shape)}
            for name in own
        },
        "left_out": left_out,
    }


def make_init(config: Config, vocab_size: int) -> tuple[TransducerModel, dict[str, Any]]:
    """Builds the model of `init=` and the account of where its weights came from.

    Raises:
        ValueError: the base model is not there or does not fit.
    """
    section = config.transfer
    facts: dict[str, Any] | None = None
    base: dict[str, Tensor] = {}
    if config.init == "random" and section.size is not None:
        if section.size not in SIZES:
            raise ValueError(f"transfer.size={section.size} is not one of {sorted(SIZES)}")
        dims = SIZES[section.size]
    else:
        source = find_base_model(config, "en" if config.init == "random" else config.init)
        dims, base, _ = read_checkpoint(source.path, trusted=section.trusted)
        facts = {
            "name": source.name,
            "path": str(source.path),
            "sha256": sha256(source.path),
            **{key: value for key, value in source.facts.items() if key != "path"},
        }
    model = build_transducer(_adapted(dims, config, vocab_size), seed=config.seed)
    if config.init == "random":
        report = account(model, set(), {})
    else:
        report = transfer(model, base, section.parts)
    fresh = f"initialised with seed {config.seed}"
    for entry in report["parameters"].values():
        entry["origin"] = facts["name"] if facts and entry["fate"] == LOADED else fresh
    what = "dimensions only" if config.init == "random" else "weights and dimensions"
    return model, {
        "init": config.init,
        "seed": config.seed,
        "base_model": facts and {**facts, "used_for": what},
        "parts": [] if config.init == "random" else list(section.parts),
        "adapters": section.adapters.model_dump(mode="json") if section.adapters.rank else None,
        "vocab_size": vocab_size,
        **report,
    }


def _adapted(dims: TransducerDims, config: Config, vocab_size: int) -> TransducerDims:
    return dataclasses.replace(
        dims,
        vocab_size=vocab_size,
        use_ctc=config.transfer.ctc,
        chunk_sizes=config.train.chunk_sizes,
        left_context_frames=config.train.left_context_frames,
    )


def _stamp(experiment: Experiment, tokens: Path) -> Stamp:
    """What init.pt is made from."""
    config = experiment.config
    inputs = digests([tokens]) | {"init": config.init, "seed": str(config.seed)}
    inputs |= {"transfer": config.transfer.model_dump_json()}
    if config.init != "random" or config.transfer.size is None:
        base = named_base_model(config, "en" if config.init == "random" else config.init)
        inputs |= {"base model": known_sha256(base.path)}
    return Stamp(experiment.dir / "transfer.stamp.json", inputs)


def make_start(experiment: Experiment) -> None:
    """Writes init.pt, transfer.json and the experiment's tokens, unless they are still right.

    Raises:
        ValueError: the base model is not there or does not fit; or training has begun, and would
            begin from something else now.
    """
    report_path = experiment.dir / "transfer.json"
    tokens = experiment.recipe_lang_dir / "bpe.model"
    stamp = _stamp(experiment, tokens)
    changed = stamp.changed()
    if changed and checkpoint_steps(experiment.checkpoints_dir):
        raise ValueError(
            f"{experiment.dir}: training has begun from other things than there are now (changed: "
            f"{', '.join(changed)}): bring those back, or start from these in an experiment of "
            f"their own: the recipe's run.sh with --exp {experiment.dir}-2"
        )
    if stamp.is_current(experiment.init_checkpoint, report_path):
        log.info("skip: %s is complete", experiment.init_checkpoint)
        return
    tokenizer = Tokenizer(tokens)
    stamp.renew(experiment.init_checkpoint, report_path)
    model, report = make_init(experiment.config, tokenizer.vocab_size)
    own = experiment.dir / "lang"
    for path in (tokens, tokens.with_name("tokens.txt")):
        with atomic.atomic_path(own / path.name) as temporary:
            shutil.copyfile(path, temporary)
    save_checkpoint(experiment.init_checkpoint, model)
    atomic.write_text(report_path, json.dumps(report, indent=1) + "\n")
    write_provenance(
        experiment, "transfer",
        init_sha256=sha256(experiment.init_checkpoint), base_model=report["base_model"],
    )  # fmt: skip
    for group, fates in report["groups"].items():
        for fate, totals in fates.items():
            log.info("%-16s %-14s %9d parameters", group, fate, totals["parameters"])
    log.info("-> %s", experiment.init_checkpoint)


if __name__ == "__main__":
    run_stage(__doc__, make_start)
