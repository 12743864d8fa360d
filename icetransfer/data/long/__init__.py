"""Long recordings with the text of the whole, cut into utterances.

In the order of the data: `words.py` (the text, as words that the model has tokens for),
`anchors.py` (where text and audio surely meet), `path.py` (when each word between two anchors was
said, and how surely), `cutting.py` (utterances from pause to pause, and what did not match) and
`ledger.py` (the files).  What the model hears comes from `streaming/posteriors.py`.
"""
