"""Speech made by espeak-ng from grammars and word lists, for trying the recipes."""
