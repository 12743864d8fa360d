"""Prose and lists of sentences are told apart and split."""

from icetransfer.data.text.sentences import Line, sentences, split


def texts(lines, *args):
    return [line.text for line in sentences(lines, *args)]


def test_a_sentence_a_line_stays_what_it_is() -> None:
    lines = ["een twee drie", "vier vijf", "", "zes"]
    assert [*sentences(lines)] == [Line(1, "een twee drie"), Line(2, "vier vijf"), Line(4, "zes")]


def test_a_line_with_several_sentences_is_split() -> None:
    text = 'Hij kwam. „Zij ook!" De rest bleef... en at? 3 waren ziek.'
    assert split(text) == ["Hij kwam.", '„Zij ook!"', "De rest bleef... en at?", "3 waren ziek."]


def test_abbreviations_and_initials_end_nothing() -> None:
    text = "Met o.a. Jan en dr. J. P. Smit. Dat was het."
    assert split(text, {"o.a.", "dr."}) == ["Met o.a. Jan en dr. J. P. Smit.", "Dat was het."]
    assert split("Zie blz. Drie.") == ["Zie blz.", "Drie."]


def test_prose_that_was_broken_at_a_width_is_joined() -> None:
    lines = [
        "De man die gisteren met de",
        "trein kwam, is weer weg. Niemand",
        "weet waarheen hij ging.",
        "",
        "Morgen komt een",
        "ander",
    ]
    assert [*sentences(lines)] == [
        Line(1, "De man die gisteren met de trein kwam, is weer weg."),
        Line(1, "Niemand weet waarheen hij ging."),
        Line(5, "Morgen komt een ander"),
    ]


def test_long_files_are_read_as_they_come() -> None:
    given = iter(f"zin nummer {number}" for number in range(1000))
    found = sentences(given)
    assert next(found).text == "zin nummer 0"
    assert next(given) == "zin nummer 200"
    assert sum(1 for _ in found) == 998
