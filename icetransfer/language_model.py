"""After stage 8: trains a language model of text, in the tokens of the experiment.

    python -m icetransfer.language_model --exp DIR

`language_model.text` in the config says of which text: none (the default), the transcripts of the
experiment's hours, or `data.text` besides.  exp/language_model/ gets text.txt, the sentences, each
once and none of a dev or test split, with their counts in text.json; lstm.pt, the model, and
lstm.onnx, what sherpa-onnx loads of it; language_model.json, its perplexity on dev, by token and by
word.  It is a small LSTM.  Training resumes where it was stopped, and is done again when text,
tokens or settings have changed.
"""

from icetransfer.experiment import Experiment, log, run_stage


def make_language_model(experiment: Experiment) -> None:
    """Trains the model that the config asks for, if any, unless it is there.

    Raises:
        ValueError: text is missing or is not what it should be, or there is no dev text.
    """
    if experiment.config.language_model.text == "none":
        log.info("skip: language_model.text=none")
        return
    # Here, because most recipes have none, and need not wait for torch.
    from icetransfer.training.language_model import make

    make(experiment)


if __name__ == "__main__":
    run_stage(__doc__, make_language_model)
