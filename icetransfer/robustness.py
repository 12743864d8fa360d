"""After stage 9: the test sets as if recorded elsewhere, softer or in noise, say, and their WER.

    python -m icetransfer.robustness --exp egs/nl/exp/NAME

Each test set is decoded under every condition of `robustness` in the config, at one tier, by the
runtime that ships, in the first of `decode.precisions`.  What a condition makes of a recording is
made when it is read, and is a function of `robustness.seed`, the recording and the condition.
Results lie in decode/<test set>@<condition>/, each with the WER of the recordings as they are.
docs/robustness.md says what the conditions are, and how a command becomes one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from icetransfer.analysis.sweep_results import ENGINES
from icetransfer.config import Config
from icetransfer.data.conditions import Condition, make_condition
from icetransfer.decode import Source, checkpoint_digest, decode_run, test_sources
from icetransfer.experiment import Experiment, log, run_stage, write_provenance
from icetransfer.score import CONDITION_MARK, Decoding
from icetransfer.settings.robustness import CONDITIONS
from icetransfer.stage.json_file import read_json

USUAL = 16  # chunk size: 320 ms


def clean_run(config: Config, test_set: str) -> Decoding:
    """The run that conditions are compared with: a test set as it is."""
    decode, size = config.decode, config.robustness.chunk_size
    if size is None:
        streaming = [found for found in decode.chunk_sizes if found != -1]
        size = USUAL if USUAL in streaming else min(streaming, default=-1)
    engine = min(decode.engines, key=ENGINES.index)
    precision = "fp32" if engine == "torch" else decode.precisions[0]
    return Decoding(test_set, engine, precision, size, decode.left_context_frames, decode.search)


def conditions(config: Config) -> list[Condition]:
    """What the config asks for.

    Raises:
        ValueError: a command's program does not exist.
    """
    section = config.robustness
    names = CONDITIONS if section.conditions is None else section.conditions
    return [
        *(make_condition(name, section.seed) for name in names),
        *(make_condition(name, section.seed, text) for name, text in section.commands.items()),
    ]


def decode_condition(
    experiment: Experiment, clean: Decoding, condition: Condition, source: Source
) -> None:
    """Decodes a test set under a condition, unless that is done.

    Raises:
        ValueError: the condition failed with every recording.
    """

    def more(result: Mapping[str, Any]) -> dict[str, Any]:
        if len(condition.unchanged) == len(source.cuts):
            reason = next(iter(condition.unchanged.values()))
            raise ValueError(f"{condition.name} fails with every recording: {reason}")
        as_it_is = read_json(clean.folder(experiment.decode_dir) / "wer.json", ["wer"])
        return {"clean_wer": as_it_is["wer"], "unchanged": len(condition.unchanged)}

    run = replace(clean, test_set=f"{clean.test_set}{CONDITION_MARK}{condition.name}")
    decode_run(
        experiment,
        run,
        source.cuts,
        source.made_from | condition.made_of,
        source.normalize,
        change=condition,
        more=more,
    )


def measure(experiment: Experiment) -> None:
    """Decodes every test set under every condition of the config.

    Raises:
        ValueError: something that an earlier stage makes is missing, or a command does not work.
    """
    if not experiment.config.robustness.enabled:
        log.info("skip: robustness.enabled=false")
        return
    conditions(experiment.config)  # a program that is missing is said before anything is decoded
    for test_set, source in test_sources(experiment, checkpoint_digest(experiment)):
        clean = clean_run(experiment.config, test_set)
        decode_run(experiment, clean, source.cuts, source.made_from, source.normalize)
        for condition in conditions(experiment.config):
            decode_condition(experiment, clean, condition, source)
    write_provenance(experiment, "robustness")


if __name__ == "__main__":
    run_stage(__doc__, measure)
