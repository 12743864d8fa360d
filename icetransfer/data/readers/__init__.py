"""Readers of corpora as they are published: each yields utterances, and lines it cannot use.

lhotse has recipes for some of these corpora. They are not used here, because one clip that is
missing or broken ends them (MLS, FLEURS, Common Voice), they look for VoxPopuli's debates in
another folder than that of its ASR part, and none of them says what it leaves out.
"""
